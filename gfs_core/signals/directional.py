"""Curvature along the step really taken: the cheapest measurement, for every optimizer and at every size.

And along the gradient of a mini-batch, :func:`along_the_gradient`.

With u the last step and w the weights before it, on a quadratic L(w + s·u) = L(w) + s·gᵀu + s²/2·uᵀHu. The loss stops
falling at the *critical multiple* s_c = −2gᵀu / uᵀHu of the step; the critical learning rate is s_c times the present
one. 1/s_c is the *empirical stability ratio*: an optimizer that oscillates with period two comes back to the same loss,
so it is 1 at the edge of stability whatever the optimizer; away from the edge it only sees the direction taken, and is
smaller than the ratio of the sharpest direction. (Critical sharpness: arXiv 2601.16979.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from gfs_core.linalg.vectors import Vector, axpy, clone, copy
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian

_MAX_FORWARDS = 8
_FAR = 16.0  # steps; the line through two points near the start is all there is beyond
_SETTLED = 0.02  # the critical multiple changed by less than this, relative
_LOST = 8  # a second difference below this many roundings of the loss is noise


@dataclass(frozen=True)
class Directional:
    """Curvature along one step.

    Attributes:
        sharpness: uᵀHu / ‖u‖² at the present weights; ``None``: lost in rounding.
        critical: multiple of the step, from where it began, at which the loss is back where it was; ``None``: the step
            did not go downhill, or the loss does not rise again along it.
    """

    sharpness: float | None
    critical: float | None


def along_by_product(hessian: Hessian, step: Vector) -> Directional:
    """With one Hessian-vector product and one gradient at the present weights, the end of ``step``.

    Args:
        hessian: of the probe, at the present weights.
        step: the change of the weights by the last optimizer step, ‖u‖ > 0.
    """
    product = hessian(step)
    slope = hessian.slope_along(step)
    curvature, square = hessian.objective.inner.dots([(step, product), (step, step)])
    return Directional(curvature / square, _root(slope - curvature, curvature))


def along_by_losses(objective: Objective, step: Vector) -> Directional:
    """With three to eight forward passes and nothing else; the weights are put back.

    The critical multiple is the root of φ(s) = (L(w + s·u) − L(w))/s by secants: exact after three losses on a
    quadratic, refined by up to five more otherwise.

    Args:
        objective: the loss on the probe; the weights stand at the end of ``step``.
        step: the change of the weights by the last optimizer step, ‖u‖ > 0.
    """
    with objective.in_float32():
        return _along_by_losses(objective, step)


def _along_by_losses(objective: Objective, step: Vector) -> Directional:
    params = objective.weights
    held = clone(params)

    def loss(multiple: float) -> float:
        axpy(multiple - 1.0, step, params)
        try:
            return objective.loss()
        finally:
            copy(held, params)

    start, end, beyond = loss(0.0), loss(1.0), loss(2.0)
    second = beyond - 2 * end + start
    rounding = max(abs(x) for x in (start, end, beyond)) * objective.loss_eps
    if abs(second) <= _LOST * rounding:
        return Directional(None, None)
    sharpness = second / objective.inner.dot(step, step)
    mean = {1.0: end - start, 2.0: (beyond - start) / 2}  # φ, the mean slope from the start on
    if mean[1.0] > 0:  # the loss rose already: what lies beyond tells little of where it began to
        mean[0.5] = (loss(0.5) - start) / 0.5
    while True:
        critical = _crossing(mean)
        following = min(mean) / 4 if critical is None and min(mean.values()) > 0 else critical
        settled = critical is not None and any(abs(critical - s) <= _SETTLED * critical for s in mean)
        if following is None or following > _FAR or settled or len(mean) + 1 >= _MAX_FORWARDS:
            return Directional(sharpness, critical)
        mean[following] = (loss(following) - start) / following


def along_the_gradient(hessian: Hessian, inverse: Iterable[Tensor | float] | None) -> float | None:
    """Batch sharpness of one mini-batch: the curvature of its own loss along its own step.

    gᵀP⁻¹HP⁻¹g / gᵀP⁻¹g with the gradient g and the Hessian H of the batch; without a preconditioner gᵀHg / ‖g‖², whose
    mean over batches settles near 2/η in SGD (Andreyev & Beneventano, arXiv:2412.20553; not in our runs with small
    batches, `benchmarks/edge.md`). One product and one gradient.

    Args:
        hessian: of the loss on the batch.
        inverse: diagonal of P⁻¹ per parameter; ``None``: the identity.

    Returns:
        The quotient; ``None`` where the gradient is zero.
    """
    gradient = hessian.objective.gradient()[1]
    step = gradient if inverse is None else [g * s for g, s in zip(gradient, inverse, strict=True)]
    inner = hessian.objective.inner
    length = inner.dot(gradient, step)
    return inner.dot(step, hessian(step)) / length if length > 0 else None


def _crossing(mean: dict[float, float]) -> float | None:
    """Root of the line through the two points around it, or next to it; ``None`` where the line does not rise."""
    below = [s for s in sorted(mean) if mean[s] <= 0]
    above = [s for s in sorted(mean) if mean[s] > 0]
    a, b = (below[-1], above[0]) if below and above else (below[-2:] or above[:2])
    rise = (mean[b] - mean[a]) / (b - a)
    if rise <= 0:
        return None
    root = a - mean[a] / rise
    return root if 0 < root < math.inf else None


def _root(slope: float, curvature: float) -> float | None:
    """−2·slope/curvature where it is a positive finite number: downhill first, uphill later."""
    if not (slope < 0 < curvature):
        return None
    root = -2 * slope / curvature
    return root if math.isfinite(root) else None
