"""Sharpness after gradient flow: after a short time, and at the end of the flow."""

from __future__ import annotations

from gfs_core.errors import Reason
from gfs_core.linalg.vectors import clone
from gfs_core.signals.base import Cost, Key, Reading, Stateless
from gfs_core.signals.context import StepContext
from gfs_core.signals.flowing import Flowing, flow_for
from gfs_core.signals.keys import RATIO_CHART, SHARPNESS_CHART
from gfs_core.signals.lab import Lab
from gfs_core.signals.solution import flow_to_the_end

GFS_SHARPNESS = Key(
    "gfs_sharpness",
    "the same eigenvalue after gradient flow for a few learning rates: raw sharpness without its oscillation",
    chart=SHARPNESS_CHART,
)
GFS_STABILITY_RATIO = Key("gfs_stability_ratio", "gfs_sharpness / threshold", scales_with_rate=1, chart=RATIO_CHART)
GFS_SHARPNESS_FULL = Key(
    "gfs_sharpness_full",
    "sharpness of the full gradient flow solution, the paper's quantity",
    chart=SHARPNESS_CHART,
)
# A short-horizon value that needs more gradients is left out, as it is not worth its price. This is at rtol 1e-2. The
# flow's method is of second order, so a smaller rtol needs (1e-2 / rtol)^1/2 times as many.
_SHORT_FLOW_GRADS = 100
_FIRST_STRETCH = 64  # flow time of a full solution's first stretch, in learning rates


class ShortFlow(Stateless):
    """Sharpness after gradient flow for a few learning rates, in the coordinates of the optimizer."""

    name = "gfs"
    keys = (GFS_SHARPNESS, GFS_STABILITY_RATIO)
    cost = Cost.FLOW
    copies = (11, 13)
    needs = ("sharpness",)
    past = 0
    every = None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure at the point that the flow reaches after ``lab.accuracy.horizon`` learning rates.

        There are no readings if there is no usable eigenvalue at the start, if the threshold or the learning rate is
        not known, or if there is no gradient flow to follow.
        """
        stability, accuracy = step.stability, lab.accuracy
        if lab.top is None or stability.threshold is None or stability.learning_rate is None or not lab.flows:
            return []
        with lab.objective.in_float32():
            most = int(_SHORT_FLOW_GRADS * max(1.0, (1e-2 / accuracy.rtol) ** 0.5))
            flowing = Flowing(lab, lab.top, stability, accuracy.rtol, min(accuracy.max_grads, most))
            flow = flow_for(flowing, accuracy.horizon * stability.learning_rate)
        if not flow.converged:
            too_long = flow.reason is Reason.MAX_GRADIENTS
            why = f"it needs more than {flowing.flow.max_grads} gradients here" if too_long else flow.reason
            return [Reading(GFS_SHARPNESS, step.step, None, reason=f"short-horizon GFS sharpness left out: {why}")]
        return [
            Reading(GFS_SHARPNESS, step.step, flow.sharpness),
            Reading(GFS_STABILITY_RATIO, step.step, flow.sharpness / stability.threshold),
        ]


class FullFlow(Stateless):
    """Sharpness at the end of gradient flow, in the coordinates of the weights."""

    name = "gfs_full"
    keys = (GFS_SHARPNESS_FULL,)
    cost = Cost.FLOW
    copies = (11, 13)
    needs = ("sharpness", "gfs")
    past = 0
    every = None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure at the end of the flow.

        There are no readings if the learning rate is 0 or not known, or if there is no gradient flow to follow.
        """
        rate, accuracy, raw = step.stability.learning_rate, lab.accuracy, lab.sharpest
        if not rate or not lab.flows:
            return []
        with lab.objective.in_float32():
            lab.restore_weights()
            top = lab.eigenvalue(start=None if raw is None else clone(raw))
            flow = flow_to_the_end(Flowing(lab, top, None, accuracy.rtol, accuracy.max_grads), _FIRST_STRETCH * rate)
        if not flow.converged:
            return [Reading(GFS_SHARPNESS_FULL, step.step, None, reason=f"full GFS sharpness: {flow.reason}")]
        return [Reading(GFS_SHARPNESS_FULL, step.step, flow.sharpness)]
