"""The gradient of the worst layer against its own past, and growth of the weights: free, and early.

Both are in logarithms, so that a layer with a small gradient counts as one with a large one. What is said is silent
while the loss falls: gradients and weights grow then as they should. (Measured: ``benchmarks/danger.md``.)
"""

from __future__ import annotations

import math
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.past import Past
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.signals.base import Reading
from gfs_core.signals.gradients import GRAD_NORM, RMS_RATIO, WEIGHT_NORM

_WHOLE = ""
_MOST = 15.0  # spreads that a score counts at most: one reading does not decide for ten others
_NAMED = 3  # layers that are named


class GradientDetector:
    """Rules ``gradient``, as above, and ``not finite``, a gradient that holds no number.

    It reads the layers of a step first, and judges with the value of the whole model.
    """

    name = "gradient"
    reads: tuple[str, ...] = (RMS_RATIO.name, WEIGHT_NORM.name, GRAD_NORM.name)
    by_layer = True

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("gradients", profile.gradient_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._gradients = Past(profile.gradient_window, profile.gradient_first, refresh=5)
        self._weights = Past(profile.weight_window, profile.weight_first, refresh=5)
        self._normalised = Past(profile.weight_window, profile.weight_first, refresh=5)
        self._layers: dict[str, float] = {}  # logarithms of the gradient of each, of the step that is arriving
        self._growth = 0.0  # of the weights, in units of the profile's
        self._score = 0.0

    def observe(self, reading: Reading) -> Finding | None:
        """Keep what is of a layer, or of the weights; judge the gradient of the whole model."""
        value = reading.value
        if value is None:
            return None
        if reading.key.name == GRAD_NORM.name and not reading.layer:
            finding = self._judge(value)
            self._context.raised[self.name] = finding.level is not AlertLevel.QUIET
            return self.track.take(finding)
        if not 0 < value < math.inf:
            return None
        if reading.key.name == GRAD_NORM.name:
            self._layers[reading.layer] = math.log(value)
        elif not reading.layer:
            self._observe_whole(reading.key.name, math.log(value))
        return None

    def _observe_whole(self, key: str, log: float) -> None:
        if key == RMS_RATIO.name:
            usual = self._normalised.usual(_WHOLE)
            self._context.outgrown = usual is not None and log - usual[0] > math.log(self._profile.outgrown)
            self._normalised.add({_WHOLE: log})
        else:
            usual = self._weights.usual(_WHOLE)
            self._growth = 0.0 if usual is None else (log - usual[0]) / self._profile.weight_growth
            self._weights.add({_WHOLE: log})

    def _judge(self, norm: float) -> Finding:
        profile, layers = self._profile, self._layers
        self._layers = {}
        if not math.isfinite(norm):
            return Finding(AlertLevel.ALARM, f"the gradient's norm is {norm}", "not finite")
        if norm > 0:
            layers[_WHOLE] = math.log(norm)
        scores, medians = dict[str, float](), dict[str, float]()
        for layer, log in layers.items():
            if (usual := self._gradients.usual(layer)) is not None:
                medians[layer] = usual[0]
                scores[layer] = (log - usual[0]) / max(usual[1], profile.gradient_spread)
        self._gradients.add(layers)
        whole = scores.pop(_WHOLE, 0.0)
        worst = max(scores.values(), default=whole)
        growth = min(max(self._growth, -_MOST / 3), _MOST)
        new = min(max(worst, -_MOST / 3), _MOST) + growth
        self._score = profile.gradient_memory * self._score + (1 - profile.gradient_memory) * new
        level = level_of(self._score, profile.gradient)
        if level is AlertLevel.QUIET or self._context.loss_falls:
            return QUIET
        swings = self._context.swings_at_edge
        if swings:
            level = AlertLevel.WATCH
        named = sorted((layer for layer in scores if layer), key=lambda layer: -scores[layer])
        named = [layer for layer in named if scores[layer] >= 0.5 * worst][:_NAMED]
        reason = self._reason(named, layers, medians) + ("; it swings at the edge of stability" if swings else "")
        return Finding(level, reason, "gradient", layers=tuple(named))

    def _reason(self, named: list[str], layers: dict[str, float], medians: dict[str, float]) -> str:
        parts = [f"{layer} {math.exp(min(layers[layer] - medians[layer], 700)):.2g} times" for layer in named]
        reason = "the gradient rose above its usual size" + (f": {', '.join(parts)}" if parts else "")
        if self._growth > 1:
            reason += f"; the weights grew by {math.expm1(self._growth * self._profile.weight_growth):.0%} meanwhile"
        return reason

    def forget(self) -> None:
        """Drop all: it is of other weights."""
        for past in (self._gradients, self._weights, self._normalised):
            past.clear()
        self._layers, self._growth, self._score = {}, 0.0, 0.0
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        """The values held, the score and the level."""
        return {
            "gradients": self._gradients.state_dict(),
            "weights": self._weights.state_dict(),
            "normalised": self._normalised.state_dict(),
            "layers": dict(self._layers),
            "growth": self._growth,
            "score": self._score,
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._gradients.load_state_dict(state["gradients"])
        self._weights.load_state_dict(state["weights"])
        self._normalised.load_state_dict(state["normalised"])
        self._layers = {str(layer): float(log) for layer, log in state["layers"].items()}
        self._growth, self._score = float(state["growth"]), float(state["score"])
        self.track.load_state_dict(state["track"])
