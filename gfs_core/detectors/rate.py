"""The learning rate against its own level: a jump is known before the step is taken, and without a measurement."""

from __future__ import annotations

import itertools
from collections import deque
from statistics import median
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track, is_positive, positive
from gfs_core.detectors.baseline import RUNNING_RATIO, SOLVED_RATIO, is_back
from gfs_core.detectors.context import Context
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.signals.base import Reading
from gfs_core.signals.training import STEP_RATE

_STEADY = 1.1  # times the rate of some steps ago, or that of an earlier cycle, up to which a rate is no rise


class RateDetector:
    """Rule ``rate``: the rate is well above its median. A restart on purpose looks the same, and is announced too."""

    name = "rate"
    reads: tuple[str, ...] = (STEP_RATE.name, RUNNING_RATIO, SOLVED_RATIO)
    by_layer = False

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("learning rates", profile.rate_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._rates: deque[float] = deque(maxlen=profile.rate_window)
        self._last_step = -1  # of the latest of them
        self._ratios: dict[str, float] = {}  # the latest stability ratio of each kind

    def observe(self, reading: Reading) -> Finding | None:
        """Judge the rate of a step, once; one that is not finite and > 0 is passed over. Keep a stability ratio."""
        value, profile = reading.value, self._profile
        if value is None or not is_positive(value):
            return None
        if reading.key.name != STEP_RATE.name:
            self._ratios[reading.key.name] = value
            return None
        if reading.step == self._last_step:
            return None
        self._last_step = reading.step
        finding = self._judge(value)
        self._context.rate_is_steady = not self._rates or value <= _STEADY * self._rates[0]
        self._context.rate_returns = not self._context.rate_is_steady and value <= _STEADY * self.track.stood
        self._rates.append(value)
        found = self.track.take(finding, is_back(value, self.track, profile.rate_rise, self._context))
        if len(self._rates) >= profile.rate_first:
            self.track.stands(min(itertools.islice(reversed(self._rates), profile.rate_first)))
        return found

    def _judge(self, rate: float) -> Finding:
        rise, rates = self._profile.rate_rise, self._rates
        if len(rates) < self._profile.rate_first:
            return QUIET
        if level_of(rate / min(rates) - 1, rise) is AlertLevel.QUIET:  # so it is beside the median, which takes longer
            return QUIET
        usual = median(rates)
        if self._ratios and max(self._ratios.values()) * rate / usual < self._profile.negligible_ratio:
            return QUIET
        level = level_of(rate / usual - 1, rise)
        if rate <= _STEADY * self.track.stood:  # a restart
            level = min(level, AlertLevel.WATCH)
        reason = f"the learning rate rose to {rate:.3g}, {rate / usual:.1f} times its usual {usual:.3g}"
        return Finding(level, reason, "rate", usual)

    def forget(self) -> None:
        """Drop the stability ratios: they are of other weights. The rates stay."""
        self._ratios.clear()

    def state_dict(self) -> dict[str, Any]:
        """The rates and ratios held, and the level."""
        return {
            "rates": list(self._rates),
            "last_step": self._last_step,
            "ratios": dict(self._ratios),
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._rates = deque(map(positive, state["rates"]), maxlen=self._profile.rate_window)
        self._last_step = int(state["last_step"])
        self._ratios = {str(name): positive(ratio) for name, ratio in state["ratios"].items()}
        self.track.load_state_dict(state["track"])
