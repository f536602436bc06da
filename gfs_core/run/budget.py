"""The overhead budget: what measuring has cost, what it will cost, and whether that is within the budget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from gfs_core.config import TIERS, Tier

_WARM = {"running": 0.1}  # price of a tier beside that of its first measurement; of the others a half
_FLOW_GUESS = 4.0  # a short flow costs about so many times the sharpness, while nothing is known


class OverheadBudget:
    """Wall time of training and of measuring.

    The first measurement is on the house: it is cold, and holds one-time costs of the libraries. So is the first of a
    tier that was not part of it, but for the flow, which may cost minutes: its first price is guessed from that of the
    sharpness. And so are the first 20 that a control of the learning rate goes by. From then on, measuring (the one to
    come included, at the price of the last) may take the budgeted fraction.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.before = 0.0  # seconds of earlier runs that this one resumes
        self.first = 0.0  # price of what was free
        self.spent: dict[str, float] = {}  # price of all else, by the dearest tier of each measurement
        self.prices: dict[str, float] = {}  # what each tier's own part costs; "": what all measurements cost
        self.last: float | None = None
        self.since = 0.0  # run time at which the first measurement ended

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self.before + time.perf_counter() - self.began

    def affords(self, tiers: Sequence[Tier], budget: float | None, share: float = 1.0) -> bool:
        """Whether a measurement of ``tiers`` now stays within the budget, and its dearest tier within its share."""
        if budget is None or not self.first:
            return True
        price = self._price(tiers)
        allowed = budget * (self.elapsed() - self.since + price)
        spent = self.spent.get(tiers[-1], 0.0)
        return sum(self.spent.values()) + price <= allowed and spent + price <= share * allowed

    def _price(self, tiers: Sequence[Tier]) -> float:
        solved = TIERS[TIERS.index("sharpness") :]  # a dearer one of them holds the cheaper ones
        parts = {*tiers, *(solved[: solved.index(tiers[-1]) + 1] if tiers[-1] in solved else ())}
        guesses = {"gfs": _FLOW_GUESS * self.prices.get("sharpness", self.first)}
        return self.prices.get("", 0.0) + sum(self.prices.get(t, guesses.get(t, 0.0)) for t in parts)

    def measured(
        self,
        began: float,
        ended: float,
        tiers: Sequence[Tier],
        seconds: Mapping[Tier, float],
        *,
        early: bool = False,
        free: bool = False,
    ) -> None:
        """Take in a measurement.

        Args:
            began: when, in seconds.
            ended: when, in seconds.
            tiers: what was measured.
            seconds: what each tier's own part took.
            early: it was the first, and without the second moments of the optimizer: its price says nothing.
            free: a control needed it to start: it is on the house, its price counts from the next one on.
        """
        self.last = ended - began
        costs: dict[str, float] = {"": max(self.last - sum(seconds.values()), 0.0)}
        costs.update((str(tier), cost) for tier, cost in seconds.items())
        new = {part for part in costs if part not in self.prices and (part != "gfs" or not self.first)}
        given = self.last if early or free else sum(costs[part] for part in new)
        if not self.first:
            self.since = self.elapsed()
        self.first += given
        if not early:
            for part, cost in costs.items():  # what was measured cold costs less from then on
                self.prices[part] = cost if part in self.prices else _WARM.get(part, 0.5) * cost
            self.spent[tiers[-1]] = self.spent.get(tiers[-1], 0.0) + self.last - given

    def overhead(self) -> float:
        """Fraction of the run's wall time spent measuring, all that was free included."""
        return (self.first + sum(self.spent.values())) / max(self.elapsed(), 1e-9)

    def state(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {
            "elapsed": self.elapsed(),
            "first": self.first,
            "spent": dict(self.spent),
            "prices": dict(self.prices),
            "last": self.last,
            "since": self.since,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` left off."""
        self.before, self.began = float(state.get("elapsed", 0.0)), time.perf_counter()
        self.first, self.since = float(state.get("first", 0.0)), float(state.get("since", 0.0))
        self.spent, self.prices = ({k: float(v) for k, v in state.get(n, {}).items()} for n in ("spent", "prices"))
        self.last = None if state.get("last") is None else float(state["last"])
