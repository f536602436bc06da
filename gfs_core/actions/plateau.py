"""A lower learning rate where the loss has come to rest: tried out, and kept where it made the loss fall.

At a constant rate the loss of noisy steps comes to rest at a level that the rate sets. A lower rate leaves it, unless
the loss rests for another reason. So it is measured: a third of the rate is used for a while, and kept if the loss fell
clearly. Otherwise the rate is let up again, and the next try waits twice as long.

Losses are compared by the means of blocks of steps in a row, whose scatter holds the correlation of neighbours too (the
method of batch means). A block has a hundredth of the steps so far. So a short run and a long one are judged alike.
Only a rate that stays at the largest so far is lowered: a schedule that has begun to fall is left to itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

from gfs_core.actions.lowered import FALL

# None of these was varied in a table.
LOOKED = 8  # blocks that are compared with as many before them
SHORTEST, PARTS = 5, 100  # losses in a block at least; it has one such part of the steps so far
FIRST = 200  # losses before a rate is lowered
FALLS, CLEAR = 2.0, 3.0  # standard errors from which on a loss still falls, and from which on a lower rate has helped
GAIN = 0.01  # of what the loss has fallen so far, that a lower rate has to gain besides


class Plateau:
    """Decides the share of the user's rate for each step.

    Attributes:
        last: the share of the last step taken.
    """

    def __init__(self) -> None:
        self.last = 1.0
        self._thirds = 0  # that have helped
        self._before: list[float] = []  # means of the blocks before a try; empty: none is under way
        self._means: deque[float] = deque(maxlen=2 * LOOKED)  # of the blocks of this stretch, at one rate
        self._block: list[float] = []  # losses of the block that is being filled
        self._taken = 0  # losses
        self._wait = self._waited = 0  # blocks before the next try, and those of this stretch
        self._first: float | None = None  # mean of the first block …
        self._best = math.inf  # … and the least of all
        self._rate = self._peak = 0.0  # the user's of this stretch, and the largest so far

    @property
    def share(self) -> float:
        """The share for the coming step, in (0, 1]."""
        thirds = self._thirds + bool(self._before)
        return FALL**-thirds if thirds else 1.0

    def add(self, loss: float) -> str:
        """Take in a loss that has become known, and decide.

        Returns:
            What was decided, in words; empty: nothing.
        """
        if not math.isfinite(loss):
            return ""
        self._taken += 1
        self._block.append(loss)
        if len(self._block) < max(SHORTEST, self._taken // PARTS):
            return ""
        mean, self._block = fmean(self._block), []
        self._first = mean if self._first is None else self._first
        self._best = min(self._best, mean)
        self._means.append(mean)
        self._waited += 1
        if len(self._means) < 2 * LOOKED:
            return ""
        return self._end() if self._before else self._begin()

    def step(self, rate: float) -> float:
        """The share for a step at the user's rate ``rate`` that is taken now; no try outlives a change of his rate."""
        if rate != self._rate:
            self.restart()
            self._rate, self._peak = rate, max(self._peak, rate)
        self.last = self.share
        return self.last

    def restart(self) -> None:
        """Begin a new stretch, without a try."""
        self._before = []
        self._stretch()

    def _stretch(self) -> None:
        self._means.clear()
        self._block = []
        self._waited = 0

    def _begin(self) -> str:
        """Try a lower rate, unless the loss still falls."""
        earlier, later = self._halves()
        if self._taken < FIRST or self._waited < self._wait or self._rate < self._peak:
            return ""
        if _apart(earlier, later, FALLS):
            return ""
        self._before = later
        self._stretch()
        return f"the mean loss rests at {fmean(later):.3g}: {self.share:.3g} of the user's rate is tried out"

    def _end(self) -> str:
        """Keep the lower rate if it has helped; its first blocks, in which the loss comes down, do not count."""
        before, (_, now) = self._before, self._halves()
        gained = fmean(before) - fmean(now)
        assert self._first is not None
        helped = _apart(before, now, CLEAR) and gained > GAIN * (self._first - self._best)
        self.restart()
        if helped:
            self._thirds, self._wait = self._thirds + 1, 0
            return f"the mean loss fell from {fmean(before):.3g} to {fmean(now):.3g}: the lower rate is kept"
        self._wait = max(2 * self._wait, 4 * LOOKED)
        return f"the mean loss stayed near {fmean(before):.3g}: the rate is {self.share:.3g} of the user's again"

    def _halves(self) -> tuple[list[float], list[float]]:
        means = [*self._means]
        return means[:LOOKED], means[LOOKED:]

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as numbers and lists."""
        return {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            KeyError: something is missing.
        """
        for name in vars(self):
            value = state[name]
            setattr(self, name, deque(value, maxlen=2 * LOOKED) if name == "_means" else value)


def _apart(earlier: Sequence[float], later: Sequence[float], errors: float) -> bool:
    """Whether the second mean lies below the first by more than so many standard errors."""
    error = math.sqrt(variance(earlier) / len(earlier) + variance(later) / len(later))
    return fmean(earlier) - fmean(later) > errors * error
