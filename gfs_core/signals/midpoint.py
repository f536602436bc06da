"""Sharpness at the midpoint of the last three iterates: the swing of the weights is taken out by averaging.

At the edge of stability the weights swing with period two along the sharpest direction, and the sharpness with them. In
w* = (w₋₁ + 2w₀ + w₊₁)/4 a swing of period two cancels, and a drift along a straight line leaves w₀. Cohen, Damian,
Talwalkar, Kolter and Lee ("Understanding optimization in deep learning with central flows", ICLR 2025,
arXiv:2410.24206) measure the curvature there; their code calls it the second-order midpoint. It is no quantity of a
gradient flow. A swing of another period, as momentum or noisy batches give, is weakened and not taken out: with period
p it keeps the fraction cos²(π/p).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from gfs_core.linalg.vectors import Vector, axpy, copy, is_half, scale
from gfs_core.signals.base import Cost, Key, Reading, Stateless
from gfs_core.signals.context import StepContext
from gfs_core.signals.eigenvalue import reading_of
from gfs_core.signals.keys import RATIO_CHART, SHARPNESS_CHART
from gfs_core.signals.lab import Lab

MIDPOINT_SHARPNESS = Key(
    "midpoint_sharpness",
    "the same eigenvalue at the midpoint (w₋₁ + 2w₀ + w₊₁)/4 of the last three iterates: raw sharpness without its "
    "oscillation, one step late",
    chart=SHARPNESS_CHART,
)
MIDPOINT_STABILITY_RATIO = Key(
    "midpoint_stability_ratio", "midpoint_sharpness / threshold", scales_with_rate=1, chart=RATIO_CHART
)


class Midpoint(Stateless):
    """Sharpness at the midpoint of the last three iterates, in the coordinates of the optimizer."""

    name = "midpoint"
    keys = (MIDPOINT_SHARPNESS, MIDPOINT_STABILITY_RATIO)
    cost = Cost.SOLVE
    copies = (10, 12)
    needs = ("sharpness",)
    past = 2
    every = None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Solve at the midpoint. The solve starts from the eigenvector at the present weights, and overwrites it.

        There are no readings if there is no usable eigenvalue at the present weights, or if the threshold is not known.
        """
        threshold = step.stability.threshold
        if lab.top is None or threshold is None:
            return []
        if len(step.past) < self.past:
            why = f"midpoint sharpness left out: the weights before the last {self.past} steps are not there"
            return [Reading(MIDPOINT_SHARPNESS, step.step, None, reason=why)]
        with _exact_weights(lab):
            middle = _midpoint(lab, *step.past[:2])
            if middle is None:
                why = "midpoint sharpness left out: the weights have not moved, or by less than rounding"
                return [Reading(MIDPOINT_SHARPNESS, step.step, None, reason=why)]
            lab.hessian.release()
            copy(middle, lab.objective.weights)
            del middle  # the weights in place hold it now
            try:
                top = lab.eigenvalue(step.stability, start=lab.top.vector)
            finally:
                lab.restore_weights()
        found = [reading_of(MIDPOINT_SHARPNESS, step.step, top, lab, "midpoint sharpness")]
        if found[0].value is not None:
            found.append(Reading(MIDPOINT_STABILITY_RATIO, step.step, found[0].value / threshold))
        return found


def _exact_weights(lab: Lab) -> AbstractContextManager[None]:
    """A context in which weights in half precision are float32 copies: in half precision a midpoint is rounded away."""
    return lab.objective.in_float32() if lab.objective.precision.moves else nullcontext()


def _midpoint(lab: Lab, before: Vector, earlier: Vector) -> Vector | None:
    """The midpoint of the present weights, those before the last step and those before the step before it.

    ``None`` if one of the two steps has moved nothing, as a step that the gradient scaler skips.
    """
    norm, weights = lab.objective.inner.norm, lab.objective.weights
    last = _difference(weights, before)
    middle = _difference(before, earlier)
    if norm(last) == 0.0 or norm(middle) == 0.0:
        return None
    # w₀ + ((w₊₁ − w₀) − (w₀ − w₋₁))/4, without the rounding of a sum that is four times as large
    scale(-0.25, middle)
    axpy(0.25, last, middle)
    axpy(1.0, before, middle)
    return middle


def _difference(a: Vector, b: Vector) -> Vector:
    """``a - b``, in float32 for half precision."""
    out = [t.float() if is_half(t) else t.clone() for t in a]
    axpy(-1.0, b, out)
    return out
