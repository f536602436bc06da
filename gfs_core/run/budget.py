"""The overhead budget: what measuring has cost, what the next measurement will cost, and whether that is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WARM = {"running": 0.1}  # expected price after the first measurement, as a fraction of the first; others: 0.5
_FLOW_GUESS = 4.0  # guessed price of a short flow before its first measurement, in prices of the sharpness


class OverheadBudget:
    """Wall time of training and of measuring.

    Three kinds of measurement are not charged to the budget:

    - The first measurement of the run: it includes start-up of the libraries.
    - The first measurement of each further signal. The short flow (``gfs``) is an exception, as it may take minutes:
      it is charged, and its first price is guessed from that of the sharpness.
    - The first 20 measurements that a control of the learning rate goes by, where nothing else is measured with them.

    All other measurements together may take the budgeted fraction of the wall time. The next one counts in advance, at
    the price of the last one.

    Args:
        needs: for each signal, the names of the signals that are measured before it.
        clock: returns seconds, from any origin.

    Attributes:
        last: seconds of the last measurement; ``None`` before there is one.
        prices: expected seconds of each signal's own part; under the empty name, of what every measurement shares.
    """

    def __init__(
        self, needs: Mapping[str, Sequence[str]] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._needs = clock, needs or {}
        self.began = clock()
        self.before = 0.0  # seconds of earlier runs that this one resumes
        self.first = 0.0  # seconds that were not charged
        self.spent: dict[str, float] = {}  # seconds that were charged, by the dearest signal of each measurement
        self.prices: dict[str, float] = {}
        self.last: float | None = None
        self.since = 0.0  # run time at which the first measurement ended

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self.before + self.clock() - self.began

    def affords(self, names: Sequence[str], budget: float | None, share: float = 1.0, ahead: float = 0.0) -> bool:
        """Whether measuring these signals stays within the budget.

        Args:
            names: the signals, the dearest last.
            budget: fraction of wall time that measuring may take, in (0, 1]; ``None``: no limit.
            share: part of the budget that measurements with this dearest signal may take, in (0, 1].
            ahead: seconds from now at which they are measured.
        """
        if budget is None or not self.first:
            return True
        price = self._price(names)
        allowed = budget * (self.elapsed() + ahead - self.since + price)
        spent = self.spent.get(names[-1], 0.0)
        return sum(self.spent.values()) + price <= allowed and spent + price <= share * allowed

    def _price(self, names: Sequence[str]) -> float:
        parts = {*names, *self._needs.get(names[-1], ())}
        guesses = {"gfs": _FLOW_GUESS * self.prices.get("sharpness", self.first)}
        return self.prices.get("", 0.0) + sum(self.prices.get(name, guesses.get(name, 0.0)) for name in parts)

    def measured(
        self,
        began: float,
        ended: float,
        names: Sequence[str],
        seconds: Mapping[str, float],
        *,
        early: bool = False,
        free: bool = False,
    ) -> None:
        """Record the cost of a measurement.

        Args:
            began: when it began, in seconds of the clock.
            ended: when it ended, in seconds of the clock.
            names: the signals that were due, the dearest last.
            seconds: seconds that each signal's own part took.
            early: it was the first, before the optimizer had second moments. It is not charged, and its price is not
                kept, as later ones cost more.
            free: a control needed it to start. It is not charged, but its price is kept.
        """
        self.last = ended - began
        costs: dict[str, float] = {"": max(self.last - sum(seconds.values()), 0.0)}
        costs.update(seconds)
        new = {part for part in costs if part not in self.prices and (part != "gfs" or not self.first)}
        given = self.last if early or free else sum(costs[part] for part in new)
        if not self.first:
            self.since = self.elapsed()
        self.first += given
        if not early:
            for part, cost in costs.items():  # the first, cold measurement of a signal is dearer than the next ones
                self.prices[part] = cost if part in self.prices else _WARM.get(part, 0.5) * cost
            self.spent[names[-1]] = self.spent.get(names[-1], 0.0) + self.last - given

    def overhead(self) -> float:
        """Fraction of the run's wall time spent measuring, uncharged measurements included."""
        return (self.first + sum(self.spent.values())) / max(self.elapsed(), 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as numbers."""
        return {
            "elapsed": self.elapsed(),
            "first": self.first,
            "spent": dict(self.spent),
            "prices": dict(self.prices),
            "last": self.last,
            "since": self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.before, self.began = float(state.get("elapsed", 0.0)), self.clock()
        self.first, self.since = float(state.get("first", 0.0)), float(state.get("since", 0.0))
        self.spent, self.prices = ({k: float(v) for k, v in state.get(n, {}).items()} for n in ("spent", "prices"))
        self.last = None if state.get("last") is None else float(state["last"])
