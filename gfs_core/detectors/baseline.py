"""A stability ratio against the run's own level: a healthy one may lie anywhere below the edge.

The level is the median of the latest ratios. A ratio also rises at the start of a healthy run, while the learning rate
warms up, and while the loss falls fast. So the rules wait until the level is known, only watch a ratio that has long
been rising, and are quiet while the loss falls fast.
"""

from __future__ import annotations

import itertools
from collections import deque
from statistics import median
from typing import Any

from gfs_core.detectors.base import AlertLevel, Finding, Track, is_positive, positive
from gfs_core.detectors.context import Context
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.detectors.trend import steps_to_edge
from gfs_core.signals.base import Reading

RUNNING_RATIO, SOLVED_RATIO = "running_stability_ratio", "stability_ratio"
_NAMED = 3  # layers that are named, at most …
_LARGE = 0.1  # … that hold this share of the curvature


class RatioDetector:
    """Rules ``rise``, a ratio well above its usual value, and ``growth``, one that will soon reach the edge.

    Args:
        key: name of the ratio.
        share: name of the key for the share of the same curvature in each layer.
        readings: what these are, in the plural, for messages.
        agree: latest ratios that have to agree.
        profile: the thresholds.
        context: what the losses say.
    """

    by_layer = True

    def __init__(self, key: str, share: str, readings: str, agree: int, profile: Profile, context: Context) -> None:
        self.name = key
        self.reads: tuple[str, ...] = (share, key)
        self.track = Track(readings, profile.ratio_patience, context.rise_began)
        self._agree, self._profile, self._context = agree, profile, context
        self._shares: dict[str, float] = {}  # of the step that is arriving, by layer
        # The judged ratio, those that make up the usual one, and as many before: has it long been rising?
        self._held: deque[tuple[int, float]] = deque(maxlen=2 * profile.ratio_window + 1)

    def observe(self, reading: Reading) -> Finding | None:
        """Judge a ratio; one that is not finite and > 0 is no measurement, and passed over."""
        ratio, window = reading.value, self._profile.ratio_window
        if reading.key.name != self.name or reading.layer or ratio is None:
            if reading.layer and reading.key.name != self.name and ratio is not None:
                self._shares[reading.layer] = ratio
            return None
        shares, self._shares = self._shares, {}
        if not is_positive(ratio):
            return None
        self._held.append((reading.step, ratio))
        near = ratio < self._profile.negligible_ratio or is_back(ratio, self.track, self._profile.rise, self._context)
        self._context.ratio = ratio
        found = self.track.take(self._judge(shares), near)
        if len(self._held) >= window:
            self.track.stands(median(r for _, r in itertools.islice(reversed(self._held), window)))
        return found

    def _judge(self, shares: dict[str, float]) -> Finding:
        profile, held = self._profile, [*self._held]
        window = profile.ratio_window
        step, ratio = held[-1][0], min(r for _, r in held[-self._agree :])
        if len(held) <= 2 * window or ratio < profile.negligible_ratio or self._context.loss_falls:
            return Finding()
        usual, before = median(r for _, r in held[-1 - window : -1]), median(r for _, r in held[: -1 - window])
        rise = ratio / usual
        by_rise, by_growth = level_of(rise - 1, profile.rise), AlertLevel.QUIET
        reason = f"the stability ratio rose to {ratio:.2g}, {rise:.1f} times its usual {usual:.2g}"
        ahead = steps_to_edge(held, profile)
        if ahead is not None:
            reason += "; at this pace it crosses the edge "
            reason += f"in about {ahead} steps (step {step + ahead})" if ahead > 0 else "now"
            by_growth = min(level_of(1 / max(ahead, 1), profile.closeness), level_of(rise - 1, profile.grown))
        found, rule = max(by_rise, by_growth), "growth" if by_growth > by_rise else "rise"
        if (usual > profile.long_rise * before and rise - 1 < profile.jump) or not any(self._context.raised.values()):
            found = min(found, AlertLevel.WATCH)  # the second stage: no alarm while all that is free is quiet
        large = sorted((layer for layer in shares if shares[layer] >= _LARGE), key=lambda layer: -shares[layer])
        named = large[:_NAMED]
        if named:
            reason += "; the curvature sits in " + ", ".join(f"{layer} ({shares[layer]:.0%})" for layer in named)
        return Finding(found, reason, rule, usual, layers=tuple(named))

    def forget(self) -> None:
        """Drop all ratios, and what they said: they are of other weights."""
        self._context.forget()
        self._held.clear()
        self._shares = {}
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        """The ratios held, and the level."""
        return {
            "held": [list(point) for point in self._held],
            "shares": dict(self._shares),
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._held.clear()
        self._held.extend((int(step), positive(ratio)) for step, ratio in state["held"])
        self._shares = {str(layer): float(share) for layer, share in state["shares"].items()}
        self.track.load_state_dict(state["track"])


def running_ratio(profile: Profile, context: Context) -> RatioDetector:
    """The detector of the running estimate."""
    return RatioDetector(
        RUNNING_RATIO, "running_curvature_share", "running stability ratios", profile.running_agree, profile, context
    )


def solved_ratio(profile: Profile, context: Context) -> RatioDetector:
    """The detector of solved eigenvalues, which have a usual value of their own."""
    return RatioDetector(
        SOLVED_RATIO, "curvature_share", "solved stability ratios", profile.solved_agree, profile, context
    )


def is_back(value: float, track: Track, rise: tuple[float, float], context: Context) -> bool:
    """Whether a value that has risen is near what it rose from, or stands where that no longer matters.

    It does not matter at a level that the run has stood before, as in schedules with restarts, nor where the mean loss
    has long been back: what was feared has not come.

    Args:
        value: the value now, > 0.
        track: of the detector that raised the level.
        rise: the thresholds of a rise, relative to the usual value.
        context: what the losses say.
    """
    near = track.usual is None or level_of(value / track.usual - 1, rise) is AlertLevel.QUIET
    return near or value <= track.stood or context.losses_are_back
