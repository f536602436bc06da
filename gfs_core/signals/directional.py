"""Curvature along a direction: the step really taken, or the gradient of a mini-batch.

Let u be the last step, w the weights before it, and g the gradient at w. On a quadratic,
L(w + s·u) = L(w) + s·gᵀu + s²/2·uᵀHu. At the *critical multiple* s_c = −2gᵀu / uᵀHu of the step, the loss is back at
L(w): a longer step raises it. The critical learning rate is s_c times the present one. 1/s_c is the *empirical
stability ratio*. It is 1 at the edge of stability for every optimizer, because an optimizer that oscillates with period
two comes back to the same loss. Away from the edge it depends on the direction of the step only, and is smaller than
the ratio of the sharpest direction. (Critical sharpness: arXiv 2601.16979.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from gfs_core.linalg.vectors import Vector, clone, multiply
from gfs_core.loss.one_gradient import OneGradient
from gfs_core.loss.products import Hessian


@dataclass(frozen=True)
class Directional:
    """Curvature along one step.

    Attributes:
        sharpness: uᵀHu / ‖u‖² at the present weights; ``None``: the weights have not moved.
        critical: multiple of the step, > 0, at which the loss is back at its value before the step; ``None``: the step
            did not begin downhill, or the loss does not rise again along it.
    """

    sharpness: float | None
    critical: float | None


def along_by_product(hessian: Hessian | OneGradient, step: Vector) -> Directional:
    """Curvature along ``step``, by one Hessian-vector product and the gradient at the weights after it.

    Args:
        hessian: the Hessian on the probe at the present weights, by products or by differences of gradients.
        step: the change of the weights by the last optimizer step, ‖u‖ > 0.
    """
    product = hessian(step)
    slope = hessian.slope_along(step)
    curvature, square = hessian.objective.inner.dots([(step, product), (step, step)])
    return Directional(curvature / square, _root(slope - curvature, curvature))


def along_the_gradient(hessian: Hessian | OneGradient, inverse: Iterable[Tensor | float] | None) -> float | None:
    """Batch sharpness of one mini-batch: the curvature of its own loss along its own step.

    It is gᵀP⁻¹HP⁻¹g / gᵀP⁻¹g with the gradient g and the Hessian H of the batch, and gᵀHg / ‖g‖² without a
    preconditioner P. The mean of the latter over batches settles near 2/η in SGD (Andreyev & Beneventano,
    arXiv:2412.20553); in our runs with small batches it did not (`benchmarks/edge.md`). It takes one product and one
    gradient.

    Args:
        hessian: the Hessian of the loss on the batch, by products or by differences of gradients.
        inverse: diagonal of P⁻¹ per parameter; ``None``: the identity.

    Returns:
        The quotient; ``None`` if the gradient is zero.
    """
    gradient = hessian.gradient()
    assert gradient is not None
    step = gradient
    if inverse is not None:
        step = clone(gradient)
        multiply(inverse, step)
    inner = hessian.objective.inner
    length = inner.dot(gradient, step)
    return inner.dot(step, hessian(step)) / length if length > 0 else None


def _root(slope: float, curvature: float) -> float | None:
    """−2·slope/curvature, if the loss falls at first and rises later; otherwise, or if it overflows, ``None``."""
    if not (slope < 0 < curvature):
        return None
    root = -2 * slope / curvature
    return root if math.isfinite(root) else None
