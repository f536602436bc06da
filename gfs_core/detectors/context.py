"""What every rule may need to know of the losses, and of how the run stands, in one place."""

from __future__ import annotations

import math
from collections import deque
from statistics import median, median_low
from typing import Any, NamedTuple

from gfs_core.detectors.base import positive
from gfs_core.detectors.past import NORMAL
from gfs_core.detectors.profile import Profile

_SMALLEST_SPREAD = 1e-12  # keeps a division finite where all losses are 0
_FARTHEST = 1e300  # keeps distances finite
_SHORT = 8  # short batches that are remembered: gradients arrive some steps after their losses
_REFRESH = 5  # losses after which their median is computed anew
_FIRST, _BEST, _NOW = 5, 10, 3  # losses whose median is that of the start, the least so far, and the present one


class UsualLoss(NamedTuple):
    """The losses lately.

    Attributes:
        median: of two in the middle the higher.
        spread: median distance from it, as a deviation.
        high: how far the upper twentieth lies above the median, ≥ 0.
        mean: their mean, which skewed losses have far from the median.
    """

    median: float
    spread: float
    high: float
    mean: float


class Context:
    """What the losses tell the other rules. An early warning has one, which all its detectors share.

    The loss detector fills in the losses, the ratio detectors the ratio, the rate detector how the rate stands.
    Tracks and the early warning say when a rise begins and when all is quiet again.

    Attributes:
        losses: the latest ones, finite, of batches that are not short.
        first: what the run began with; ``None`` before so many are known.
        best: the lowest median of ten losses so far.
        before: what the losses were like before the rise that lasts, of several rises the lowest; ``None``: all is
            quiet, or there were too few losses to tell.
        back_for: losses in a row that are back at that.
        ratio: the latest stability ratio; ``None``: none is known of these weights.
        rate_is_steady: whether the rate is no higher than it was lately.
        rate_returns: whether it rose lately, to no more than what the run has stood before.
        outgrown: whether gradients are large beside the second moments of an adaptive optimizer.
        raised: by the name of a detector of free signals, whether it finds more than is usual.
        short_steps: the latest steps with a short batch, whose loss and gradient scatter more than others.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.losses: deque[float] = deque(maxlen=profile.loss_window)
        self.first: float | None = None
        self.best: float | None = None
        self.before: UsualLoss | None = None
        self.back_for = 0
        self.ratio: float | None = None
        self.rate_is_steady = True
        self.rate_returns = False
        self.outgrown = False
        self.raised: dict[str, bool] = {}
        self.short_steps: deque[int] = deque(maxlen=_SHORT)
        self._now: float | None = None  # the latest of these medians
        self._usual: UsualLoss | None = None
        self._new = 0  # losses since that was computed

    def add_loss(self, loss: float) -> None:
        """Take in a loss, once it has been judged."""
        self.losses.append(loss)
        self._new += 1
        if self.first is None and len(self.losses) >= _FIRST:
            self.first = median(self.losses)
        if len(self.losses) >= _BEST:
            now = median_low([self.losses[-i] for i in range(1, _BEST + 1)])  # the mean of two might overflow
            self.best, self._now = now if self.best is None else min(self.best, now), now

    def usual_loss(self) -> UsualLoss | None:
        """What the losses are like lately; ``None``: there are too few of them."""
        if len(self.losses) < self._profile.loss_first:
            return None
        if self._usual is None or self._new >= _REFRESH:
            self._new = 0
            ordered = sorted(self.losses)
            middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
            spread = NORMAL * median([abs(loss - middle) for loss in ordered])
            spread, high = min(spread, _FARTHEST), min(high - middle, _FARTHEST)
            self._usual = UsualLoss(middle, spread, high, math.fsum(loss / len(ordered) for loss in ordered))
        return self._usual

    @property
    def progress(self) -> float:
        """How far the loss has fallen, > 0; half of the first one at least, as before it falls."""
        if self.first is None:
            return _SMALLEST_SPREAD
        fallen = 0.0 if self.best is None else self.first - self.best
        return min(max(fallen, abs(self.first) / 2, _SMALLEST_SPREAD), _FARTHEST)

    @property
    def harmed(self) -> bool:
        """Whether the latest losses lie so far above the best ones that the run has lost something."""
        above = 0.0 if self._now is None or self.best is None else self._now - self.best
        return above > self._profile.harm * self.progress

    @property
    def strictness(self) -> float:
        """What the thresholds of gradients are multiplied by, ≥ 1.

        More than 1 where the loss is small beside what it has lost already, and where the rate comes back to what the
        run has stood, as in schedules with restarts: gradients rise there far above their median, and nothing follows.
        """
        small = self._now is not None and abs(self._now) < self._profile.fitted * self.progress
        return self._profile.stricter if small or self.rate_returns else 1.0

    @property
    def loss_falls(self) -> bool:
        """Whether the latest losses lie clearly below the usual one: gradients and ratios may rise meanwhile."""
        if self.first is None:
            return False
        usual, clear = self.usual_loss(), self._profile.falls * self.progress
        now = median([self.losses[-i] for i in range(1, _NOW + 1)])
        if usual is None:
            return now < self.first - clear
        return now < usual.median - min(usual.spread / 2, clear)

    @property
    def swings_at_edge(self) -> bool:
        """Whether a rise of the gradient or the loss is expected to come back by itself.

        At the edge of stability, at a steady rate, a step that overshoots also lowers the curvature (self-stabilisation
        of gradient descent). Not so with an adaptive optimizer whose second moments have been outgrown.
        """
        low, high = self._profile.at_edge
        return self.ratio is not None and low < self.ratio < high and self.rate_is_steady and not self.outgrown

    @property
    def losses_are_back(self) -> bool:
        """Whether the losses have been back for so long that a ratio or a rate that stays high does not matter."""
        return self.back_for >= self._profile.losses_back

    def rise_began(self) -> None:
        """Keep what the losses were like before a rise; of several rises, the lowest."""
        usual = self.usual_loss()
        if usual is not None and (self.before is None or usual.median < self.before.median):
            self.before = usual
        self.back_for = 0

    def all_is_quiet(self) -> None:
        """Forget what the losses were like before a rise: it is over."""
        self.before, self.back_for = None, 0

    def forget(self) -> None:
        """Drop what was measured on other weights."""
        self.ratio, self.outgrown = None, False

    def state_dict(self) -> dict[str, Any]:
        """All attributes, as numbers and lists."""
        return {
            "losses": list(self.losses),
            "first": self.first,
            "best": self.best,
            "before": None if self.before is None else list(self.before),
            "usual": None if self._usual is None else list(self._usual),
            "new": self._new,
            "back_for": self.back_for,
            "ratio": self.ratio,
            "now": self._now,
            "rate_is_steady": self.rate_is_steady,
            "rate_returns": self.rate_returns,
            "outgrown": self.outgrown,
            "raised": dict(self.raised),
            "short_steps": list(self.short_steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            ValueError: a number is none that this can have saved.
        """
        self.losses = deque(map(float, state["losses"]), maxlen=self._profile.loss_window)
        self.first, self.best, self._now = (
            None if state[n] is None else float(state[n]) for n in ("first", "best", "now")
        )
        self.before, self._usual = (_usual_from(state[name]) for name in ("before", "usual"))
        self._new = int(state["new"])
        self.back_for = int(state["back_for"])
        self.ratio = None if state["ratio"] is None else positive(state["ratio"])
        self.rate_is_steady, self.outgrown = bool(state["rate_is_steady"]), bool(state["outgrown"])
        self.rate_returns = bool(state["rate_returns"])
        self.short_steps = deque(map(int, state["short_steps"]), maxlen=_SHORT)
        self.raised = {str(name): bool(raised) for name, raised in state["raised"].items()}


def _usual_from(saved: Any) -> UsualLoss | None:
    if saved is None:
        return None
    middle, spread, high, mean = map(float, saved)
    if not (spread >= 0 and high >= 0):
        raise ValueError(f"{spread} and {high} are no distances")
    return UsualLoss(middle, spread, high, mean)
