"""What every rule may need to know of the losses, in one place."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any, NamedTuple

from gfs_core.detectors.base import positive
from gfs_core.detectors.profile import Profile

_SMALLEST_SPREAD = 1e-12  # keeps a division finite where all losses are 0


class UsualLoss(NamedTuple):
    """The losses lately.

    Attributes:
        median: of two in the middle the higher.
        spread: from the median to ``high``, > 0.
        high: what nine in ten losses are below.
    """

    median: float
    spread: float
    high: float


class LossBefore(NamedTuple):
    """What the losses were like before a rise; of skewed losses the mean is far from the median."""

    median: float
    spread: float
    mean: float


class Context:
    """What the losses tell the rules for ratios and rates. An early warning has one, which all its detectors share.

    The loss detector fills it in. Tracks and the early warning say when a rise begins and when all is quiet again.

    Attributes:
        losses: the latest ones, finite, of batches that are not short.
        mean_loss: their exponential mean; ``None`` before the first.
        before: what they were like before the rise that lasts, of several rises the lowest; ``None``: all is quiet, or
            there were too few losses to tell.
        back_for: losses in a row whose mean is back at that.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.losses: deque[float] = deque(maxlen=profile.loss_window)
        self.mean_loss: float | None = None
        self.before: LossBefore | None = None
        self.back_for = 0

    def smooth(self, loss: float) -> float:
        """Take a loss into the mean, and return the mean."""
        held, memory = self.mean_loss, self._profile.loss_memory
        self.mean_loss = loss if held is None else memory * held + (1 - memory) * loss
        return self.mean_loss

    def usual_loss(self) -> UsualLoss | None:
        """What the losses are like lately; ``None``: there are too few of them."""
        if len(self.losses) < self._profile.loss_first:
            return None
        ordered = sorted(self.losses)
        middle, high = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
        # The upper tenth tells how far healthy batches reach; a deviation would take their tail for a normal one.
        spread = max(high - middle, self._profile.least_spread * abs(middle), _SMALLEST_SPREAD)
        return UsualLoss(middle, spread, high)

    @property
    def loss_falls_fast(self) -> bool:
        """Whether the mean loss is far below the median: the ratio of a healthy run may rise meanwhile."""
        if self.mean_loss is None or len(self.losses) < self._profile.loss_first:
            return False
        middle = median(self.losses)
        return middle - self.mean_loss > self._profile.fast_fall * abs(middle)

    @property
    def losses_are_back(self) -> bool:
        """Whether the mean loss has been back for so long that a ratio or a rate that stays high does not matter."""
        return self.back_for >= self._profile.losses_back

    def rise_began(self) -> None:
        """Keep what the losses were like before a rise; of several rises, the lowest."""
        usual = self.usual_loss()
        if usual is not None and (self.before is None or usual.median < self.before.median):
            count = len(self.losses)
            self.before = LossBefore(usual.median, usual.spread, sum(loss / count for loss in self.losses))
        self.back_for = 0

    def all_is_quiet(self) -> None:
        """Forget what the losses were like before a rise: it is over."""
        self.before, self.back_for = None, 0

    def state_dict(self) -> dict[str, Any]:
        """All attributes, as numbers and lists."""
        return {
            "losses": list(self.losses),
            "mean_loss": self.mean_loss,
            "before": None if self.before is None else list(self.before),
            "back_for": self.back_for,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            ValueError: a number is none that this can have saved.
        """
        self.losses = deque(map(float, state["losses"]), maxlen=self._profile.loss_window)
        self.mean_loss = None if state["mean_loss"] is None else float(state["mean_loss"])
        self.before = None
        if state["before"] is not None:
            middle, spread, mean = state["before"]
            self.before = LossBefore(float(middle), positive(spread), float(mean))
        self.back_for = int(state["back_for"])
