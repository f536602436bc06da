"""The largest eigenvalues of a symmetric operator, from a warm start and with little memory.

``solver="lanczos"`` is thick-restart Lanczos (:mod:`gfs_core.linalg.lanczos`), ``solver="power"`` the plain power
iteration of the literature, for comparison: it finds the eigenvalue largest in *magnitude* and stops on the change of
its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError, Reason
from gfs_core.linalg.inner import WHOLE, InnerProduct
from gfs_core.linalg.lanczos import Lanczos, Space
from gfs_core.linalg.operator import Operator
from gfs_core.linalg.vectors import Vector, scale

Solver: TypeAlias = Literal["lanczos", "power"]


@dataclass(frozen=True)
class EigenResult:
    """The largest algebraic eigenvalues of a symmetric operator.

    Attributes:
        values: the eigenvalues, largest first.
        vectors: their eigenvectors, of norm 1.
        residuals: ‖Hx − λx‖ of each, at least the rounding of a product. An eigenvalue lies within this distance of
            the value (theorem, for a symmetric operator); that it is the *largest* one is not implied.
        hvps: operator products used.
        converged: every residual is within its tolerance.
        reason: why it stopped where it did not converge; empty otherwise.
    """

    values: list[float]
    vectors: list[Vector]
    residuals: list[float]
    hvps: int
    converged: bool
    reason: Reason = Reason.OK

    @property
    def value(self) -> float:
        """The largest eigenvalue."""
        return self.values[0]

    @property
    def vector(self) -> Vector:
        """Its eigenvector, of norm 1."""
        return self.vectors[0]

    @property
    def residual(self) -> float:
        """Its residual: the distance to an eigenvalue is at most this."""
        return self.residuals[0]

    @property
    def error_bound(self) -> float:
        """Bound on the distance from ``value`` to the nearest eigenvalue, relative to ``value``."""
        return self.residual / abs(self.value) if self.value else self.residual


def largest_eigenvalues(
    operator: Operator,
    like: Sequence[Tensor],
    *,
    k: int = 1,
    tol: float = 1e-2,
    max_hvps: int = 200,
    start: Sequence[Vector] | None = None,
    solver: Solver = "lanczos",
    generator: torch.Generator | None = None,
    product_error: float = 0.0,
    basis: int | None = None,
    inner: InnerProduct = WHOLE,
) -> EigenResult:
    """The ``k`` largest (algebraic) eigenvalues of ``operator``.

    Args:
        operator: v ↦ H·v, symmetric; returns a new vector.
        like: tensors with the shapes, dtypes and devices of a vector.
        k: how many eigenvalues; at most the dimension.
        tol: relative residual at which an eigenvalue counts as converged.
        max_hvps: products allowed (each start vector costs one).
        start: warm start, up to ``k`` vectors, consumed; missing ones are random.
        solver: ``"lanczos"`` or ``"power"`` (``k=1`` only).
        generator: source of the random start; by default one seeded with 0.
        product_error: relative error of the products, below which no residual can be asked for.
        basis: vectors that are multiplied before a restart, more than ``2 * k``: memory against products; by default
            ``3 * k + 3``.
        inner: the inner product, which knows how vectors are spread over processes.

    Raises:
        MeasurementError: a product is not finite.
        ValueError: ``k`` is not between 1 and the dimension, or not what the solver can do.

    Example:
        >>> import torch
        >>> d = torch.tensor([5.0, 1.0, -9.0])
        >>> round(largest_eigenvalues(lambda v: [d * v[0]], [d], tol=1e-6).value, 6)  # not -9
        5.0
    """
    space = Space(like, inner, torch.Generator().manual_seed(0) if generator is None else generator)
    if not 1 <= k <= space.dimension:
        raise ValueError(f"`k` must be between 1 and the number of parameters ({space.dimension}), got {k}")
    if solver not in get_args(Solver):
        raise ValueError(f"`solver` must be 'lanczos' or 'power', got {solver!r}")
    if solver == "power" and k > 1:
        raise ValueError(f"solver='power' finds one eigenvalue, and k is {k}; use 'lanczos'")
    if basis is not None and basis <= 2 * k:
        raise ValueError(f"`basis` must be more than twice `k`, got {basis} for k={k}")
    if solver == "power":
        return _power(operator, space, tol, max_hvps)
    solved = Lanczos(operator, space, k, tol, max_hvps, start or (), product_error, basis or 3 * k + 3)
    values, vectors, residuals, reason = solved.run()
    return EigenResult(values, vectors, residuals, solved.hvps, reason is Reason.OK, reason)


def _power(operator: Operator, space: Space, tol: float, max_hvps: int) -> EigenResult:
    """Power iteration that stops when the value changes by less than ``tol`` relative to itself."""
    v = space.random()
    scale(1 / space.inner.norm(v), v)
    value, hvps = math.inf, 0
    while True:
        image = operator(v)
        hvps += 1
        new, square = space.inner.dots([(v, image), (image, image)])
        if not math.isfinite(square):
            raise MeasurementError("a Hessian-vector product is not finite")
        residual = max(square - new * new, 0.0) ** 0.5
        settled = math.isfinite(value) and abs(new - value) <= tol * max(abs(new), 1e-30)
        if settled or square == 0.0 or hvps >= max_hvps:
            converged = settled or square == 0.0
            return EigenResult([new], [v], [residual], hvps, converged, Reason.OK if converged else Reason.MAX_PRODUCTS)
        value = new
        scale(1 / square**0.5, image)
        v = image
