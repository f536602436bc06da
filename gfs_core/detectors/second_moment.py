"""Gradients that outgrow the second moments of an adaptive optimizer: free, and the first sign of Adam's own spikes.

RMS_t is the root mean square of gradient over root of the second moment; where the moment lags behind, steps are longer
than they are meant to be (Wortsman et al. 2023, arXiv 2304.13013). (Measured: ``benchmarks/danger.md``.)
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from gfs_core.detectors.base import QUIET, AlertLevel, Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.past import OVERFLOW, Past
from gfs_core.detectors.profile import Profile, level_of
from gfs_core.detectors.stood import Stood
from gfs_core.signals.base import Reading

NORMALISED = "rms_ratio"
_WHOLE = ""
_LATEST = 3  # whose median is judged: one batch is not enough
_NAMED = 3  # layers that are named, at most
_RISEN = 1.3  # times its usual value from which on a layer is named


class SecondMomentDetector:
    """Rule ``second moment``: RMS_t is well above its usual value. It reads the layers before the whole model."""

    name = "second moment"
    reads: tuple[str, ...] = (NORMALISED,)
    by_layer = True

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("normalised gradients", profile.gradient_patience, context.rise_began)
        self._profile, self._context = profile, context
        self._past = Past(profile.normalised_window, profile.normalised_first, refresh=5)
        self._stood = Stood(profile.normalised[1], profile, context)
        self._latest: deque[float] = deque(maxlen=_LATEST)  # logarithms of the whole model's
        self._layers: dict[str, float] = {}  # of the step that is arriving

    def observe(self, reading: Reading) -> Finding | None:
        """Keep what is of a layer; judge the whole model's. A short batch is passed over: it scatters more."""
        if reading.value is None or not 0 < reading.value < math.inf or reading.step in self._context.short_steps:
            return None
        if reading.layer:
            self._layers[reading.layer] = math.log(reading.value)
            return None
        layers, self._layers = self._layers, {}
        self._latest.append(math.log(reading.value))
        finding = self._judge(reading.step, layers)
        self._past.add({_WHOLE: self._latest[-1], **layers})
        self._context.raised[self.name] = finding.level is not AlertLevel.QUIET
        return self.track.take(finding, step=reading.step)

    def _judge(self, step: int, layers: dict[str, float]) -> Finding:
        usual = self._past.usual(_WHOLE)
        rise = 0.0 if usual is None else median(self._latest) - usual[0]
        self._context.outgrown = usual is not None and self._latest[-1] - usual[0] > math.log(self._profile.outgrown)
        self._stood.add(step, rise)
        level = level_of(rise / (self._stood.strictness * self._context.strictness), self._profile.normalised)
        if level is AlertLevel.QUIET:
            return QUIET
        risen = {n: v - u[0] for n, v in layers.items() if (u := self._past.usual(n)) and v - u[0] > math.log(_RISEN)}
        named = tuple(sorted(risen, key=lambda layer: -risen[layer])[:_NAMED])
        times = math.exp(min(rise, OVERFLOW))
        reason = f"gradients are {times:.2g} times as large as usual beside the optimizer's second moments"
        return Finding(level, reason, "second moment", layers=named)

    def forget(self) -> None:
        """Drop all: it is of other weights."""
        self._past.clear()
        self._stood.clear()
        self._latest.clear()
        self._layers = {}
        self._context.raised.pop(self.name, None)
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        """The values held, what the run stood, and the level."""
        return {
            "past": self._past.state_dict(),
            "stood": self._stood.state(),
            "latest": list(self._latest),
            "layers": dict(self._layers),
            "track": self.track.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._past.load_state_dict(state["past"])
        self._stood.load(state["stood"])
        self._latest = deque(map(float, state["latest"]), maxlen=_LATEST)
        self._layers = {str(layer): float(value) for layer, value in state["layers"].items()}
        self.track.load_state_dict(state["track"])
