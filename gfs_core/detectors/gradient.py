"""The gradient of the worst layer against its own past, and growth of the weights: free, and early.

Both are in logarithms, so that a layer with a small gradient counts as one with a large one. What is said is silent
while the loss falls: gradients and weights grow then as they should. (Measured: ``benchmarks/danger.md``.)
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.past import OVERFLOW, Past
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.detectors.stood import Stood
from gfs_core.signals.base import Reading

GRADIENT, WEIGHTS = "grad_norm", "weight_norm"
_WHOLE = ""
_LEAST, _MOST = -5.0, 15.0  # spreads that a score counts: one reading does not decide for ten others
_NAMED = 3  # layers that are named, at most …
_OF_THE_WORST = 0.5  # … whose score is at least this part of the worst one's, and one spread


class GradientDetector:
    """Rules ``gradient``, as above, and ``not finite``, a gradient that holds no number.

    It reads the layers of a step first, and judges with the value of the whole model.
    """

    name = "gradient"
    reads: tuple[str, ...] = (WEIGHTS, GRADIENT)
    by_layer = True

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("gradients", profile.gradient_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._gradients = Past(profile.gradient_window, profile.gradient_first, refresh=5)
        self._stood = Stood(profile.gradient[1], profile, context)
        self._weights = _Growth(profile.weight_steps)
        self._step = -1  # that is arriving
        self._layers: dict[str, float] = {}  # the gradient of each, of that step
        self._scores: dict[str, float] = {}  # of each layer, smoothed
        self._growth = 0.0  # of the weights, in units of the profile's, smoothed

    def observe(self, reading: Reading) -> Finding | None:
        """Keep what is of a layer, or of the weights; judge the gradient of the whole model."""
        value, key = reading.value, reading.key.name
        if value is None or (key == GRADIENT and math.isfinite(value) and reading.step in self._context.short_steps):
            return None
        if reading.step != self._step:
            self._step, self._layers = reading.step, {}
        if key == GRADIENT and not reading.layer:
            layers, self._layers = self._layers, {}
            finding = self._judge(value, layers)
            self._context.raised[self.name] = finding.level is not AlertLevel.QUIET
            return self.track.take(finding, step=reading.step)
        if key == GRADIENT:
            self._layers[reading.layer] = value
        elif not reading.layer and 0 < value < math.inf:
            self._weights.add(reading.step, math.log(value))
        return None

    def _judge(self, norm: float, layers: dict[str, float]) -> Finding:
        if not math.isfinite(norm):
            broken = tuple(layer for layer, value in layers.items() if not math.isfinite(value))[:_NAMED]
            where = f", in {', '.join(broken)}" if broken else ""
            return Finding(AlertLevel.ALARM, f"the gradient's norm is {norm}{where}", "not finite", layers=broken)
        logs = {layer: math.log(value) for layer, value in (layers or {_WHOLE: norm}).items() if 0 < value < math.inf}
        new, medians = self._compared(logs)
        memory = self._profile.gradient_memory
        known = self._scores | new  # one that has no gradient at this step is nearer to its usual one
        self._scores = {n: memory * self._scores.get(n, 0.0) + (1 - memory) * new.get(n, 0.0) for n in known}
        growth = min(max(self._weights.growth / self._profile.weight_growth, _LEAST), self._profile.most_growth)
        self._growth = memory * self._growth + (1 - memory) * growth
        score, falls = max(self._scores.values(), default=0.0) + self._growth, self._context.loss_falls
        self._stood.add(self._step, 0.0 if falls else score)
        level = level_of(score / (self._stood.strictness * self._context.strictness), self._profile.gradient)
        if level is AlertLevel.QUIET or falls:
            return QUIET
        swings = self._context.swings_at_edge
        if swings:
            level = AlertLevel.WATCH
        named = sorted((layer for layer in new if layer), key=lambda layer: -new[layer])
        named = [layer for layer in named if new[layer] >= max(_OF_THE_WORST * new[named[0]], 1.0)][:_NAMED]
        reason = self._reason({layer: logs[layer] - medians[layer] for layer in named})
        reason += "; it swings at the edge of stability" if swings else ""
        return Finding(level, reason, "gradient", layers=tuple(named))

    def _compared(self, logs: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """How far each layer is above its median, in its own spreads, and the medians; then it is part of the past."""
        scores, medians = dict[str, float](), dict[str, float]()
        for layer, log in logs.items():
            if (usual := self._gradients.usual(layer)) is not None:
                medians[layer] = usual[0]
                distance = (log - usual[0]) / max(usual[1], self._profile.gradient_spread)
                scores[layer] = min(max(distance, _LEAST), _MOST)
        self._gradients.add(logs)
        return scores, medians

    def _reason(self, risen: dict[str, float]) -> str:
        parts = [f"{layer} {math.exp(min(log, OVERFLOW)):.2g} times" for layer, log in risen.items()]
        grown = self._growth > 1
        weights = f"the weights grew by {math.expm1(min(self._weights.growth, OVERFLOW)):.0%}" if grown else ""
        if not parts and weights:
            return weights
        reason = "the gradient rose above its usual size" + (f": {', '.join(parts)}" if parts else "")
        return f"{reason}; {weights} meanwhile" if weights else reason

    def forget(self) -> None:
        """Drop all: it is of other weights."""
        self._gradients.clear()
        self._stood.clear()
        self._weights = _Growth(self._profile.weight_steps)
        self._step, self._layers, self._scores, self._growth = -1, {}, {}, 0.0
        self._context.raised.pop(self.name, None)
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        """The values held, the scores and the level."""
        return {
            "gradients": self._gradients.state_dict(),
            "stood": self._stood.state(),
            "weights": self._weights.state(),
            "step": self._step,
            "layers": dict(self._layers),
            "scores": dict(self._scores),
            "growth": self._growth,
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._gradients.load_state_dict(state["gradients"])
        self._stood.load(state["stood"])
        self._weights.load(state["weights"])
        self._layers, self._scores = (
            {str(layer): float(value) for layer, value in state[name].items()} for name in ("layers", "scores")
        )
        self._step, self._growth = int(state["step"]), float(state["growth"])
        self.track.load_state_dict(state["track"])


class _Growth:
    """How much a logarithm grows in so many steps, however seldom it is read."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._held: deque[tuple[int, float]] = deque()
        self._since: int | None = None

    def add(self, step: int, log: float) -> None:
        """Take in a reading."""
        self._since = step if self._since is None else self._since
        self._held.append((step, log))
        while len(self._held) > 1 and self._held[1][0] <= step - self.steps:
            self._held.popleft()

    @property
    def growth(self) -> float:
        """In :attr:`steps` steps; 0 before so many have passed."""
        if self._since is None or self._held[-1][0] - self._since < self.steps:
            return 0.0
        (first, low), (last, high) = self._held[0], self._held[-1]
        return (high - low) * min(1.0, self.steps / max(last - first, 1))

    def state(self) -> dict[str, Any]:
        """The readings held."""
        return {"held": [list(point) for point in self._held], "since": self._since}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` left off."""
        self._held = deque((int(step), float(log)) for step, log in state["held"])
        self._since = None if state["since"] is None else int(state["since"])
