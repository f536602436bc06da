"""The loss against its own level: what curvature cannot see, such as wrong data.

How far a loss is above its usual value counts beside how far losses scatter, and beside how far the run has come: once
it has fitted its data, a loss that is many times its median is still nothing. A loss has to come back to what it was
before the rise; where it never does, the alarm never ends. The loss of a short batch, such as the rest that ends an
epoch, scatters more than the others and is not compared with them.
"""

from __future__ import annotations

import math
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track
from gfs_core.detectors.context import Context, UsualLoss
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.signals.base import Reading
from gfs_core.signals.training import EXAMPLES, LOSS, BatchSizes

_FARTHEST = 1e300  # keeps sums of differences finite
_LOWEST, _HIGHEST = -3.0, 40.0  # spreads that one loss counts


class LossDetector:
    """Rules ``spike``, a loss far above the others, ``loss``, their mean above them, and ``not finite``.

    It fills in the losses of its context.
    """

    name = "loss"
    reads: tuple[str, ...] = (EXAMPLES.name, LOSS.name)
    by_layer = False

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("losses", profile.loss_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._sizes = BatchSizes()
        self._short_step: int | None = None  # whose batch is short, and whose loss is still to come
        self._mean: float | None = None  # exponential mean of the losses
        self._above = 0.0  # the same of their distance from the usual one
        self._burst = 0.0  # the same, in spreads, and of fewer losses

    def observe(self, reading: Reading) -> Finding | None:
        """Judge a loss; a finite one of a short batch is passed over. Keep whether a batch is short."""
        if reading.value is None:
            return None
        if reading.key.name == EXAMPLES.name:
            self._short_step = reading.step if self._sizes.short(int(reading.value)) else None
            if self._short_step is not None:
                self._context.short_steps.append(reading.step)
            return None
        short, self._short_step = self._short_step == reading.step, None
        if not math.isfinite(reading.value):
            self._context.back_for = 0
            return self.track.take(Finding(AlertLevel.ALARM, f"the loss is {reading.value}", "not finite"))
        return None if short else self._observe_finite(reading.value)

    def _observe_finite(self, loss: float) -> Finding | None:
        memory, rising = self._profile.loss_memory, self._mean is None or loss >= self._mean
        self._mean = loss if self._mean is None else memory * self._mean + (1 - memory) * loss
        finding = self._judge(loss, rising)
        self._context.raised[self.name] = finding.level is not AlertLevel.QUIET
        found = self.track.take(finding, self._is_back(loss))
        self._context.add_loss(loss)
        return found

    def _judge(self, loss: float, rising: bool) -> Finding:
        profile, usual = self._profile, self._context.usual_loss()
        if usual is None:
            return QUIET
        above = min(max(loss - usual.median, -_FARTHEST), _FARTHEST)
        self._above = profile.loss_memory * self._above + (1 - profile.loss_memory) * above
        spreads = min(max(above / self._unit_of_spikes(usual), _LOWEST), _HIGHEST)
        self._burst = profile.spike_memory * self._burst + (1 - profile.spike_memory) * spreads
        mean = self._above / self._unit_of_means(usual)
        by_spike, by_mean = level_of(self._burst, profile.spike), level_of(mean, profile.mean_rise)
        if by_spike is by_mean is AlertLevel.QUIET:
            return QUIET
        level, swings = max(by_spike, by_mean), self._context.swings_at_edge
        if swings and self._above < profile.beyond_swing * self._context.progress:
            level = AlertLevel.WATCH
        if by_spike >= by_mean:
            rule, reason = "spike", f"the loss is {loss:.3g}, far above its median {usual.median:.3g}"
        else:
            rule = "loss"
            reason = f"the mean loss rose by {self._above:.3g} above its median {usual.median:.3g}"
        first, best = self._context.first, self._context.best
        reason += (
            f"; so far it has fallen by {first - best:.3g}"
            if first is not None and best is not None and best < first
            else ""
        )
        return Finding(level, reason + ("; it swings at the edge of stability" if swings else ""), rule, rising=rising)

    def _unit_of_spikes(self, usual: UsualLoss) -> float:
        return max(usual.spread, usual.high / 2, self._profile.small_loss * self._context.progress)

    def _unit_of_means(self, usual: UsualLoss) -> float:
        return max(self._profile.mean_high * usual.high, self._profile.small_rise * self._context.progress)

    def _is_back(self, loss: float) -> bool:
        """Whether a loss and their mean are near those before the rise; the context counts such means."""
        context, before = self._context, self._context.before
        if before is None:
            return True
        assert self._mean is not None
        above = self._mean - max(before.median, before.mean)
        by_mean = level_of(above / self._unit_of_means(before), self._profile.mean_rise)
        context.back_for = context.back_for + 1 if by_mean is AlertLevel.QUIET else 0
        by_spike = level_of((loss - before.median) / self._unit_of_spikes(before), self._profile.spike)
        return by_spike is by_mean is AlertLevel.QUIET

    def forget(self) -> None:
        """Drop nothing: losses do not depend on which weights are trained."""

    def state_dict(self) -> dict[str, Any]:
        """The sizes of batches, the means and the level; the losses are in the context."""
        return {
            "sizes": list(self._sizes.seen),
            "short_step": self._short_step,
            "means": [self._mean, self._above, self._burst],
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        short_step = state["short_step"]
        self._sizes, self._short_step = BatchSizes(state["sizes"]), None if short_step is None else int(short_step)
        mean, above, burst = state["means"]
        self._mean, self._above, self._burst = None if mean is None else float(mean), float(above), float(burst)
        self.track.load_state_dict(state["track"])
