"""Which tiers are measured at a step: their intervals, the budget, and what a control needs to start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gfs_core.actions.rate import Control
from gfs_core.config import GFSConfig, Tier
from gfs_core.run.budget import OverheadBudget
from gfs_core.run.ranks import Ranks
from gfs_core.signals.measure import SOLVED

_CHEAP_SHARE = 0.75


class Schedule:
    """The tiers that are on, and when each is due.

    Args:
        config: the options.
        control: its first measurements do not wait for the budget.
        empirical: the optimizer's threshold is not known, so that its steps are measured.
        ranks: the processes that decide together: by the clock of rank 0. ``None``: there is only this one.

    Attributes:
        every: steps between measurements of each tier, cheapest first.
        clock: what measuring has cost.
        leading: the tier that the control goes by.
        stretch: factor by which the interval of the running tier is longer, where it needs whole batches.
    """

    def __init__(self, config: GFSConfig, control: Control, empirical: bool, ranks: Ranks | None = None) -> None:
        self.config, self.control, self.ranks = config, control, ranks
        self._decided: tuple[int, list[Tier]] = (-1, [])  # step, and what all of the processes measure there
        self.every = config.cadence()
        by_the_step = empirical or control.policy == "cdat"
        if by_the_step and "directional" not in self.every:
            often = config.every if empirical else config.running_every or config.every
            self.every = {"directional": often, **self.every}
        self.stretch = 1
        self.clock = OverheadBudget()
        leads = ("directional",) if by_the_step else ("running", *SOLVED)
        self.leading: Tier = next((tier for tier in self.every if tier in leads), config.tier)

    def due(self, step: int, stepped: bool) -> list[Tier]:
        """The tiers to be measured at ``step``, cheapest first.

        What comes to be due together is afforded together, from the cheapest on.

        Args:
            step: optimizer steps taken so far.
            stepped: whether the last step was seen, without which nothing directional is measured.

        Raises:
            RanksLost: another process does not answer.
        """
        if self.ranks is None:
            return self._due(step, stepped, self._affords)
        if self._decided[0] != step:
            wanted = self._due(step, stepped, lambda tiers: True)
            if wanted and self.config.max_overhead is not None:
                own = self._due(step, stepped, self._affords)
                said = self.ranks.total([float(self.ranks.rank == 0 and tier in own) for tier in wanted])
                wanted = [tier for tier, yes in zip(wanted, said, strict=True) if yes]
            self._decided = (step, wanted)
        return list(self._decided[1])

    def _due(self, step: int, stepped: bool, affords: Callable[[list[Tier]], bool]) -> list[Tier]:
        due: list[Tier] = []
        for tier, every in self.every.items():
            free = tier == self.leading and self.control.starting
            apart = every * self.stretch if tier == "running" else every
            wanted = step % apart == 0 and (free or affords([*due, tier]))
            if (stepped or tier != "directional") and (wanted or (free and self.control.waiting)):
                due.append(tier)
        return due

    def needs_step(self, step: int) -> bool:
        """Whether the step that ends at ``step`` is to be seen: something directional may be due there."""
        if "directional" not in self.every:
            return False
        if self.leading == "directional" and self.control.waiting:
            return True
        together = self.ranks is not None  # all of them keep their weights, whatever each one's clock says
        return any(step % every == 0 and (together or self._affords([t])) for t, every in self.every.items())

    def free(self, tiers: Sequence[Tier]) -> bool:
        """Whether a measurement of ``tiers`` is one that the control needs to start."""
        return self.control.starting and list(tiers) == [self.leading]

    def _affords(self, tiers: list[Tier]) -> bool:
        # The cheap tiers share three quarters of the budget evenly, so that the dearest comes to its turn; it may have
        # all that is left.
        share = 1.0 if self.config.tier in tiers else _CHEAP_SHARE / max(len(self.every) - 1, 1)
        return self.clock.affords(tiers, self.config.max_overhead, share)
