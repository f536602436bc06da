"""The overhead budget: what measuring has cost, what the next measurement will cost, and whether that is allowed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST = 0.5  # of the budget, that measurements may take whatever the hooks beside them take
_WARM = 0.5  # expected price after the first measurement, as a fraction of the first
_START = 24  # measurements with which the running estimate begins, and that are not charged
# Guessed prices before the first measurement of a signal, in prices of another one.
_GUESSES = {"sharpness": (40.0, "running"), "midpoint": (20.0, "running"), "gfs": (4.0, "sharpness")}


class OverheadBudget:
    """Wall time of training, and of everything that is done here: measurements, hooks and logging.

    Three kinds of measurement are not charged to the budget:

    - The first measurement of the run, and what is done around it in the same hook and before it: all of that includes
      start-up of the libraries, and what is found out once, such as whether a loss is that of training.
    - The first 24 of the running estimate, which are closer together at first.
    - The first 20 measurements that a control of the learning rate goes by, where nothing else is measured with them.

    All else together may take the budgeted fraction of the wall time. The next measurement counts in advance, at the
    price of the last one, or at a guess. Where steps are so short that the hooks alone take more than half of the
    budget, measurements may still take the other half, as a run without any would be watched for nothing.

    Args:
        needs: for each signal, the names of the signals that are measured before it.
        clock: returns seconds, from any origin.

    Attributes:
        ours: seconds of the run that were not the training's.
        start: those of them that were not charged.
        last: seconds of the last measurement; ``None`` before there is one.
        prices: expected seconds of each signal's own part; under the empty name, of what every measurement shares.
    """

    def __init__(
        self, needs: Mapping[str, Sequence[str]] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._needs = clock, needs or {}
        self.began = clock()
        self.before = 0.0  # seconds of earlier runs that this one resumes
        self.ours = self.start = 0.0
        self.spent: dict[str, float] = {}  # seconds that were charged, by the dearest signal of each measurement
        self.prices: dict[str, float] = {}
        self.last: float | None = None
        self.since = 0.0  # run time at which the first measurement ended
        self._started = 0  # measurements with which the running estimate has begun
        self.counts = False  # whether the time is being counted now

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self.before + self.clock() - self.began

    def counting(self) -> Counting:
        """Context whose wall time is not the training's; one inside another is counted once."""
        return Counting(self)

    @property
    def starts_free(self) -> bool:
        """Whether the next measurement with which the running estimate begins is not charged."""
        return self._started < _START

    def affords(self, names: Sequence[str], budget: float | None, share: float = 1.0, ahead: float = 0.0) -> bool:
        """Whether measuring these signals stays within the budget. The first measurement may be of one signal.

        Args:
            names: the signals, the dearest last.
            budget: fraction of wall time that measuring may take, in (0, 1]; ``None``: no limit.
            share: part of the budget that measurements with this dearest signal may take, in (0, 1].
            ahead: seconds from now at which they are measured.
        """
        if budget is None:
            return True
        if self.last is None:
            return len(names) == 1
        price = self.price(names)
        allowed = budget * (self.elapsed() + ahead - self.since + price)
        spent = sum(self.spent.values())
        beside = self.ours - self.start - spent
        for_measuring = max(allowed - beside, LEAST * allowed)
        return spent + price <= for_measuring and self.spent.get(names[-1], 0.0) + price <= share * for_measuring

    def price(self, names: Sequence[str]) -> float:
        """Expected seconds of a measurement of these signals, the dearest last."""
        return self.prices.get("", 0.0) + sum(self._own(name) for name in {*names, *self._needs.get(names[-1], ())})

    def _own(self, name: str) -> float:
        if name in self.prices or name not in _GUESSES:
            return self.prices.get(name, 0.0)
        times, other = _GUESSES[name]
        return times * self._own(other)

    def measured(
        self,
        began: float,
        ended: float,
        names: Sequence[str],
        seconds: Mapping[str, float],
        *,
        eager: bool = False,
        free: bool = False,
    ) -> None:
        """Record the cost of a measurement.

        Args:
            began: when it began, in seconds of the clock.
            ended: when it ended, in seconds of the clock.
            names: the signals that were due, the dearest last.
            seconds: seconds that each signal's own part took.
            eager: it is one with which the running estimate begins, and nothing else was measured.
            free: a control needed it to start. It is not charged.
        """
        first, self.last = self.last is None, ended - began
        costs: dict[str, float] = {"": max(self.last - sum(seconds.values()), 0.0)}
        costs.update(seconds)
        if eager:
            free, self._started = free or self.starts_free, self._started + 1
        if first:
            self.since = self.elapsed()
            free = True
        if not self.counts:
            self.ours += self.last
        if free:
            self.start += self.last
        else:
            self.spent[names[-1]] = self.spent.get(names[-1], 0.0) + self.last
        for part, cost in costs.items():  # the first, cold measurement of a signal is dearer than the next ones
            self.prices[part] = cost if part in self.prices else _WARM * cost

    def took(self, seconds: float, first: bool) -> None:
        """Record what a hook took, with the measurements in it.

        Args:
            seconds: wall time.
            first: there was no measurement before the hook. If it made one, all that came before is not charged.
        """
        self.ours += seconds
        if first and self.last is not None:
            self.start = self.ours

    def beside(self) -> float:
        """Fraction of the wall time since the first measurement that is ours, but spent on no measurement."""
        measuring = self.start + sum(self.spent.values())
        return max(self.ours - measuring, 0.0) / max(self.elapsed() - self.since, 1e-9)

    def overhead(self) -> float:
        """Fraction of the run's wall time that was not the training's, uncharged measurements included."""
        return self.ours / max(self.elapsed(), 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as numbers."""
        return {
            "elapsed": self.elapsed(),
            "ours": self.ours,
            "start": self.start,
            "spent": dict(self.spent),
            "prices": dict(self.prices),
            "last": self.last,
            "since": self.since,
            "started": self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.before, self.began = float(state.get("elapsed", 0.0)), self.clock()
        self.ours, self.start, self.since = (float(state.get(name, 0.0)) for name in ("ours", "start", "since"))
        self.spent, self.prices = ({k: float(v) for k, v in state.get(n, {}).items()} for n in ("spent", "prices"))
        self.last = None if state.get("last") is None else float(state["last"])
        self._started = int(state.get("started", 0))


class Counting:
    """The context of :meth:`OverheadBudget.counting`. A class is faster than a generator, and every step enters it."""

    __slots__ = ("_began", "_budget", "_first")

    def __init__(self, budget: OverheadBudget) -> None:
        self._budget, self._began, self._first = budget, math.nan, False

    def __enter__(self) -> None:
        if not self._budget.counts:
            self._first = self._budget.last is None
            self._budget.counts, self._began = True, self._budget.clock()

    def __exit__(self, *error: object) -> None:
        if not math.isnan(self._began):  # else it is inside of another
            self._budget.counts = False
            self._budget.took(self._budget.clock() - self._began, self._first)


class Charged:
    """Context whose wall time is charged to budgets in equal parts, but for what they count themselves."""

    __slots__ = ("_before", "_began", "_budgets", "_first")

    def __init__(self, budgets: Sequence[OverheadBudget]) -> None:
        self._budgets, self._began, self._before = budgets, 0.0, 0.0
        self._first: list[bool] = []

    def __enter__(self) -> None:
        self._first = [budget.last is None for budget in self._budgets]
        for budget in self._budgets:
            self._before += budget.ours
            self._began = budget.clock()

    def __exit__(self, *error: object) -> None:
        for budget in self._budgets:
            self._before -= budget.ours
        for budget, first in zip(self._budgets, self._first, strict=True):
            budget.took(max(budget.clock() - self._began + self._before, 0.0) / len(self._budgets), first)
