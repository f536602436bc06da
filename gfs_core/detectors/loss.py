"""The loss against its own level: what curvature cannot see, such as wrong data.

A loss has to come back to what it was before the rise; where it never does, the alarm never ends. The loss of a short
batch, such as the rest that ends an epoch, scatters more than the others and is not compared with them.
"""

from __future__ import annotations

import math
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.signals.base import Reading
from gfs_core.signals.training import EXAMPLES, LOSS, BatchSizes


class LossDetector:
    """Rules ``spike``, one loss far above the others, ``loss``, their mean above them, and ``not finite``.

    It fills in the losses of its context.
    """

    name = "loss"
    reads: tuple[str, ...] = (EXAMPLES.name, LOSS.name)

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("losses", profile.loss_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._sizes = BatchSizes()
        self._short_step: int | None = None  # whose batch is short, and whose loss is still to come

    def observe(self, reading: Reading) -> Finding | None:
        """Judge a loss; a finite one of a short batch is passed over. Keep whether a batch is short."""
        if reading.value is None:
            return None
        if reading.key.name == EXAMPLES.name:
            self._short_step = reading.step if self._sizes.short(int(reading.value)) else None
            return None
        short, self._short_step = self._short_step == reading.step, None
        if not math.isfinite(reading.value):
            self._context.back_for = 0
            return self.track.take(Finding(AlertLevel.ALARM, f"the loss is {reading.value}", "not finite"))
        return None if short else self._observe_finite(reading.value)

    def _observe_finite(self, loss: float) -> Finding | None:
        context = self._context
        rising = context.mean_loss is None or loss >= context.mean_loss  # a mean lags behind its losses on the way back
        mean = context.smooth(loss)
        found = self.track.take(self._judge(loss, mean, rising), self._is_back(loss, mean))
        context.losses.append(loss)
        return found

    def _judge(self, loss: float, mean: float, rising: bool) -> Finding:
        usual = self._context.usual_loss()
        if usual is None:
            return QUIET
        far = (loss - usual.median) / usual.spread
        by_spike, by_mean = level_of(far, self._profile.spike), self._mean_level(mean, usual.median, usual.spread)
        if by_spike is by_mean is AlertLevel.QUIET:
            return QUIET
        if by_spike >= by_mean:
            reason = (
                f"the loss is {loss:.3g}, {far:.1f} times as far above its median {usual.median:.3g} as nine in ten are"
            )
            return Finding(by_spike, reason, "spike", rising=rising)
        reason = f"the mean loss rose to {mean:.3g}, from a median of {usual.median:.3g}; "
        reason += f"nine in ten were below {usual.high:.3g}"
        return Finding(by_mean, reason, "loss", rising=rising)

    def _mean_level(self, mean: float, usual: float, spread: float) -> AlertLevel:
        return level_of((mean - usual) / spread, self._profile.mean_rise)

    def _is_back(self, loss: float, mean: float) -> bool:
        """Whether a loss and their mean are near those before the rise; the context counts such means."""
        context, before = self._context, self._context.before
        if before is None:
            return True
        by_spike = level_of((loss - before.median) / before.spread, self._profile.spike)
        by_mean = self._mean_level(mean, max(before.median, before.mean), before.spread)
        context.back_for = context.back_for + 1 if by_mean is AlertLevel.QUIET else 0
        return by_spike is by_mean is AlertLevel.QUIET

    def forget(self) -> None:
        """Drop nothing: losses do not depend on which weights are trained."""

    def state_dict(self) -> dict[str, Any]:
        """The sizes of batches, and the level; the losses are in the context."""
        return {"sizes": list(self._sizes.seen), "short_step": self._short_step, "track": self.track.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        short_step = state["short_step"]
        self._sizes, self._short_step = BatchSizes(state["sizes"]), None if short_step is None else int(short_step)
        self.track.load_state_dict(state["track"])
