"""A lower learning rate where the loss has come to rest: tried out, and kept where it made the loss fall.

At a constant rate the loss of noisy steps comes to rest at a level that the rate sets. A lower rate leaves it, unless
the loss rests for another reason. So it is measured: a third of the rate is used for a while, and kept if the loss fell
clearly. Otherwise the rate is let up again, and the next try waits twice as long.

Losses are compared by the means of blocks of steps in a row, whose scatter holds the correlation of neighbours too (the
method of batch means). A block has a hundredth of the steps so far. So a short run and a long one are judged alike. The
loss *rests* where the mean of the last quarter of the run is, for sure, hardly below that of the quarter before. A rate
that is lowered while the loss still falls makes it fall faster for a while, and slower in the end. Only a rate that
stays at the largest so far is lowered: a schedule that has begun to fall is left to itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

from gfs_core.actions.lowered import FALL

# None of these was varied in a table but the first two: benchmarks/plateau.md.
STRETCH = 25  # blocks that are compared with as many before them to tell whether the loss rests
RESTS = 0.02  # of what the loss has fallen so far, that it falls at most from one to the other
TRIED = 8  # blocks for which a lower rate is judged, after as many in which the loss comes down
SHORTEST, PARTS = 5, 100  # losses in a block at least; it has one such part of the steps so far
CLEAR = 3.0  # standard errors by which a lower rate has to gain …
GAIN = 0.01  # … and this part of what the loss has fallen so far


class Plateau:
    """Decides the share of the user's rate for each step.

    Attributes:
        last: the share of the last step taken.
    """

    def __init__(self) -> None:
        self.last = 1.0
        self._thirds = 0  # that have helped
        self._before: list[float] = []  # means of the blocks before a try; empty: none is under way
        self._means: deque[float] = deque(maxlen=2 * STRETCH)  # of the blocks of this stretch, at one rate
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
        if self._before:
            return self._end() if len(self._means) == 2 * TRIED else ""
        return self._begin() if len(self._means) == 2 * STRETCH else ""

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
        """Try a lower rate, if the loss rests."""
        if self._waited < self._wait or self._rate < self._peak:
            return ""
        means = [*self._means]
        fallen, error = _fall(means[:STRETCH], means[STRETCH:])
        if fallen + error > RESTS * self._progress:
            return ""
        self._before = means[-2 * TRIED :]
        self._stretch()
        return f"the mean loss rests at {fmean(self._before):.3g}: {self.share:.3g} of the user's rate is tried out"

    def _end(self) -> str:
        """Keep the lower rate if it has helped."""
        before, now = self._before, [*self._means][TRIED:]
        fallen, error = _fall(before, now)
        self.restart()
        if fallen > max(CLEAR * error, GAIN * self._progress):
            self._thirds, self._wait = self._thirds + 1, 0
            return f"the mean loss fell from {fmean(before):.3g} to {fmean(now):.3g}: the lower rate is kept"
        self._wait = max(2 * self._wait, 4 * STRETCH)
        return f"the mean loss stayed near {fmean(before):.3g}: the rate is {self.share:.3g} of the user's again"

    @property
    def _progress(self) -> float:
        """How far the loss has fallen."""
        return 0.0 if self._first is None else self._first - self._best

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
            setattr(self, name, deque(value, maxlen=2 * STRETCH) if name == "_means" else value)


def _fall(earlier: Sequence[float], later: Sequence[float]) -> tuple[float, float]:
    """How far the mean has fallen, and the standard error of that."""
    error = math.sqrt(variance(earlier) / len(earlier) + variance(later) / len(later))
    return fmean(earlier) - fmean(later), error
