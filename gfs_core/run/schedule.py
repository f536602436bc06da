"""Decides which signals are measured at a step, by their intervals, the budget, and what a control needs to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gfs_core.actions.rate import Control
from gfs_core.config import TIERS, GFSConfig
from gfs_core.run.budget import OverheadBudget
from gfs_core.run.ranks import Ranks
from gfs_core.signals.base import Signal
from gfs_core.signals.curvature import RunningCurvature

_CHEAP_SHARE = 0.9  # of the budget, for all signals but the dearest
# Signals with a ratio for a control that is not along the step.
_LEADING = ("running", "sharpness", "midpoint", "gfs", "gfs_full")


class Schedule:
    """The signals that are on, by name, and when each is due.

    Args:
        config: the options.
        control: the learning rate's control, whose first measurements do not wait for the budget.
        empirical: the optimizer's threshold is not known, so the curvature along its steps is measured.
        signals: all signals.
        ranks: the processes, which all follow the budget of rank 0; ``None``: there is only this one.

    Attributes:
        every: steps between measurements of each signal that is on, cheapest first.
        budget: the overhead budget.
        leading: the signal that the control goes by.
        back: the most steps that a signal looks back.
    """

    def __init__(
        self,
        config: GFSConfig,
        control: Control,
        empirical: bool,
        signals: Sequence[Signal],
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.control, self.ranks = config, control, ranks
        self._decided: tuple[int, list[str]] = (-1, [])  # a step, and the signals that all processes measure at it
        places: dict[str, int] = {name: place for place, name in enumerate(TIERS)}
        by_cost = sorted(signals, key=lambda signal: (signal.cost, places.get(signal.name, len(places))))
        self._cheapest_first = [signal.name for signal in by_cost]
        self._needs = {signal.name: signal.needs for signal in signals}
        self._past = {signal.name: signal.past for signal in signals}
        self.back = max(self._past.values())
        self._running = next((s for s in signals if isinstance(s, RunningCurvature)), None)
        self.every: dict[str, int] = {}
        self.also({signal.name: signal.every for signal in signals if signal.every is not None})
        self.also(config.intervals())
        by_the_step = empirical or control.policy == "cdat"
        if by_the_step and "directional" not in self.every:
            often = config.every if empirical else config.running_every or config.every
            self.also({"directional": often})
        self.budget = OverheadBudget(self._needs)
        leads = ("directional",) if by_the_step else _LEADING
        self.leading = next((name for name in self.every if name in leads), config.tier)

    def also(self, every: Mapping[str, int]) -> None:
        """Measure these signals too, or at another interval than before.

        Args:
            every: steps between measurements, by the signal's name.
        """
        wanted = self.every | dict(every)
        self.every = {name: wanted[name] for name in self._cheapest_first if name in wanted}
        self._turns = [(every, ahead) for name, every in self.every.items() for ahead in range(self._past[name] + 1)]

    def due(self, step: int, kept: int) -> list[str]:
        """The signals to be measured at ``step``, cheapest first.

        Signals that are due at the same step are admitted cheapest first. Each is admitted if the budget allows it
        together with those before it. In place of a signal that looks back further than weights were kept, the signals
        that it needs are measured.

        Args:
            step: optimizer steps taken so far.
            kept: how many steps in a row, up to the last one, the weights before the step were kept.

        Raises:
            OtherRankFailed: another process has failed since the last exchange.
            RanksLost: another process does not answer.
        """
        if self.ranks is None:
            return self._due(step, kept, self._affords)
        if self._decided[0] != step:
            wanted = self._due(step, kept, lambda names: True)
            if wanted and self.config.max_overhead is not None:
                own = self._due(step, kept, self._affords)
                said = self.ranks.total([float(self.ranks.rank == 0 and name in own) for name in wanted])
                wanted = [name for name, yes in zip(wanted, said, strict=True) if yes]
            self._decided = (step, wanted)
        return list(self._decided[1])

    def _due(self, step: int, kept: int, affords: Callable[[list[str]], bool]) -> list[str]:
        due: list[str] = []
        eager = self.eager(step)
        for name, every in self.every.items():
            free = name == self.leading and self.control.starting
            wanted = (step % every == 0 and (free or affords([*due, name]))) or (eager and name == "running")
            if wanted or (free and self.control.waiting):
                due += [name] if kept >= self._past[name] else [n for n in self._needs[name] if n not in due]
        return due

    def left_out(self, step: int, names: Sequence[str]) -> list[str]:
        """Why signals that have their turn at ``step`` are not among ``names`` but represented by those they need."""
        return [
            f"{name} left out: the weights before the last {back} steps were not kept"
            for name, every in self.every.items()
            if (back := self._past[name]) and step % every == 0 and name not in names
            if self._needs[name] and set(self._needs[name]) <= set(names)
        ]

    def eager(self, step: int) -> bool:
        """Whether the running estimate is measured at ``step`` because it has begun lately, without being charged."""
        wanted = self._next_eager(step - 1) == step
        return wanted and (self.config.max_overhead is None or self.budget.starts_free)

    def _next_eager(self, step: int) -> int | None:
        return self._running.next_eager(step) if self._running is not None and "running" in self.every else None

    def next_possible(self, step: int) -> int:
        """The first step after ``step`` at which anything may be due or weights be kept, by the intervals alone."""
        if self.control.policy != "observe":
            return step + 1
        regular = min(step + 1 + (-(step + 1 + ahead)) % every for every, ahead in self._turns)
        eager = self._next_eager(step)
        return regular if eager is None else min(eager, regular)

    def nearly_due(self, step: int) -> bool:
        """Whether a measurement will be due after the optimizer step taken at ``step``."""
        ahead = step + 1
        return self.ranks is None and bool(self._due(ahead, self.back, lambda names: self._affords(names, step, 1)))

    def keeps(self, step: int) -> bool:
        """Whether the weights before the optimizer step taken at ``step`` are kept, as a signal will look back."""
        together = self.ranks is not None  # all processes keep their weights, as their clocks differ
        for name, every in self.every.items():
            for ahead in range(1, self._past[name] + 1):
                if name == self.leading and self.control.waiting:
                    return True
                if (step + ahead) % every == 0 and (together or self._affords([name], step, ahead)):
                    return True
        return False

    def free(self, names: Sequence[str]) -> bool:
        """Whether a measurement of ``names`` is not charged to the budget, because the control needs it to start."""
        instead = list(self._needs[self.leading]) if self._past[self.leading] else [self.leading]
        return self.control.starting and list(names) in ([self.leading], instead)

    def _affords(self, names: list[str], step: int = 0, ahead: int = 0) -> bool:
        # At `step`, or that many steps ahead of it, which take as long as steps did so far.
        # The cheaper signals share most of the budget evenly, so that the dearest gets its turn. The dearest may use
        # all that is left.
        share = 1.0 if self.config.tier in names else _CHEAP_SHARE / max(len(self.every) - 1, 1)
        later = self.budget.elapsed() / max(step, 1) * ahead if ahead else 0.0
        return self.budget.affords(names, self.config.max_overhead, share, later)
