"""The edge for noisy steps, 1 in the mean square: it tells of a run that is wrong from the start, without a past."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from gfs_core.detectors.base import AlertLevel, Finding, Track, is_positive, positive
from gfs_core.detectors.context import Context
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.signals.base import Reading


class EdgeDetector:
    """Rule ``edge``: the stability ratio in the mean square stays past the edge, whatever the batch size."""

    name = "edge"
    reads: tuple[str, ...] = ("mean_square_stability_ratio",)

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("mean-square stability ratios", profile.edge_patience, context.rise_began)
        self._profile = profile
        self._ratios: deque[float] = deque(maxlen=profile.edge_window)
        self._count = 0  # of all ratios seen

    def observe(self, reading: Reading) -> Finding | None:
        """Judge the geometric mean of the latest ratios; one that is not finite and > 0 is passed over."""
        if reading.value is None or not is_positive(reading.value):
            return None
        self._ratios.append(reading.value)
        self._count += 1
        mean = math.exp(sum(map(math.log, self._ratios)) / len(self._ratios))
        settled = self._count > self._profile.edge_first
        reason = f"noisy steps are past the edge: the stability ratio in the mean square is {mean:.2g}, not < 1"
        level = level_of(mean, self._profile.edge) if settled else AlertLevel.QUIET
        return self.track.take(Finding(level, reason, "edge"))

    def forget(self) -> None:
        """Drop all ratios, and what they said: they are of other weights."""
        self._ratios.clear()
        self._count = 0
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        """The ratios held, how many there were, and the level."""
        return {"ratios": list(self._ratios), "count": self._count, "track": self.track.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._ratios = deque(map(positive, state["ratios"]), maxlen=self._profile.edge_window)
        self._count = int(state["count"])
        self.track.load_state_dict(state["track"])
