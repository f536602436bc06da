"""The largest eigenvalues of a symmetric operator, from a warm start and with little memory.

``solver="ritz"`` is Rayleigh–Ritz over the span of the current estimates X and one conjugate direction P per
estimate, a locally optimal scheme in the family of LOBPCG (Knyazev 2001). Differences from LOBPCG, and why:

1. The direction is P ← R + P·B with B chosen so that the new directions are conjugate to the old ones under
   H − λ, and *H·P is computed directly*; LOBPCG keeps R, H·R, P and H·P. That saves two vectors per
   eigenvalue at one product per step either way.
2. No preconditioner: none is known for a network's Hessian.
3. The stop rule is the residual ‖Hx − λx‖, never the change between iterates, which stops early when the
   next eigenvalue is close.

``solver="power"`` is the plain power iteration of the literature, for comparison: it finds the eigenvalue
largest in *magnitude* and stops on the change of its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gfs_core.curvature import Operator
from gfs_core.errors import MeasurementError, Reason
from gfs_core.vectors import Vector, axpy, clone, combine, dots, is_half, norm, random_like, scale, zeros_like

Solver: TypeAlias = Literal["ritz", "power"]


@dataclass(frozen=True)
class EigenResult:
    """The largest algebraic eigenvalues of a symmetric operator.

    Attributes:
        values: the eigenvalues, largest first.
        vectors: their eigenvectors, of norm 1.
        residuals: ‖Hx − λx‖ of each. An eigenvalue lies within this distance of the value (theorem, for a
            symmetric operator); that it is the *largest* one is not implied.
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
    solver: Solver = "ritz",
    generator: torch.Generator | None = None,
    product_error: float = 0.0,
) -> EigenResult:
    """The ``k`` largest (algebraic) eigenvalues of ``operator``.

    Args:
        operator: v ↦ H·v, symmetric; returns a new vector.
        like: tensors with the shapes, dtypes and devices of a vector.
        k: how many eigenvalues; at most the dimension.
        tol: relative residual at which an eigenvalue counts as converged.
        max_hvps: products allowed (each start vector costs one).
        start: warm start, up to ``k`` vectors, consumed; missing ones are random.
        solver: ``"ritz"`` or ``"power"`` (``k=1`` only).
        generator: source of the random start; by default one seeded with 0.
        product_error: relative error of the products, below which no residual can be asked for.

    Raises:
        MeasurementError: a product is not finite.
        ValueError: ``k`` is not between 1 and the dimension.

    Example:
        >>> import torch
        >>> d = torch.tensor([5.0, 1.0, -9.0])
        >>> round(largest_eigenvalues(lambda v: [d * v[0]], [d], tol=1e-6).value, 6)  # not -9
        5.0
    """
    dimension = sum(t.numel() for t in like)
    if not 1 <= k <= dimension:
        raise ValueError(f"`k` must be between 1 and the number of parameters ({dimension}), got {k}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if solver == "power":
        return _power(operator, like, tol, max_hvps, generator)
    return _Ritz(operator, like, k, tol, max_hvps, start or (), generator, product_error).run()


class _Ritz:
    """One run of the block solver; holds X, HX, P, HP."""

    def __init__(
        self,
        operator: Operator,
        like: Sequence[Tensor],
        k: int,
        tol: float,
        max_hvps: int,
        start: Sequence[Vector],
        generator: torch.Generator,
        product_error: float,
    ) -> None:
        self.operator, self.k, self.tol, self.max_hvps = operator, k, tol, max_hvps
        self.product_error = product_error
        self.generator = generator
        self.hvps = 0
        self.bound = 0.0  # the largest ‖Hv‖ seen for ‖v‖ = 1: a lower bound of the operator's norm
        self.eps = torch.finfo(torch.float32 if is_half(like[0]) else like[0].dtype).eps
        self.x: list[Vector] = list(start)[:k]
        for v in self.x:
            if not self._orthonormalise(v, self.x[: self.x.index(v)]):
                self._randomise(v, self.x[: self.x.index(v)])
        while len(self.x) < k:
            v = random_like(like, generator)
            self._randomise(v, self.x)
            self.x.append(v)

    def run(self) -> EigenResult:
        hx = [self._product(v) for v in self.x]
        values = self._rotate(self.x, hx)
        p: list[Vector] = []
        hp: list[Vector] = []
        best, stalled = math.inf, 0
        while True:
            r = [clone(h) for h in hx]
            for residual, value, v in zip(r, values, self.x, strict=True):
                axpy(-value, v, residual)
            norms = [x**0.5 for x in dots([(v, v) for v in r])]
            floor = 4 * self.eps * self.bound
            wanted = [max(self.tol * abs(v), floor) for v in values]
            open_ = [i for i in range(self.k) if norms[i] > wanted[i]]
            worst = max(n / w if w else (0.0 if n == 0 else math.inf) for n, w in zip(norms, wanted, strict=True))
            stalled = 0 if worst < 0.7 * best else stalled + 1
            best = min(best, worst)
            reason = Reason.OK
            if open_:
                below_error = self.product_error and max(norms) <= 3 * self.product_error * self.bound
                if below_error or (self.product_error and stalled >= 15):
                    reason = Reason.INEXACT_PRODUCTS
                elif self.hvps + len(open_) > self.max_hvps:
                    reason = Reason.MAX_PRODUCTS
            if not open_ or reason is not Reason.OK:
                return EigenResult(values, self.x, norms, self.hvps, not open_, reason)
            directions = self._directions([r[i] for i in open_], [values[i] for i in open_], p, hp)
            p, hp = directions, []
            if not p:  # the residuals lie in the span already: nothing more to find from here
                return EigenResult(values, self.x, norms, self.hvps, False, Reason.INEXACT_PRODUCTS)
            hp = [self._product(v) for v in p]
            values = self._ritz(hx, p, hp)

    def _directions(self, r: list[Vector], values: list[float], p: list[Vector], hp: list[Vector]) -> list[Vector]:
        """R + P·B, conjugate to P under H − λ, orthonormal, and orthogonal to X."""
        if p:
            m = len(p)
            flat = dots([(a, b) for a in p for b in hp] + [(a, b) for a in p for b in p])
            php = torch.tensor(flat[: m * m], dtype=torch.float64).reshape(m, m)
            pp = torch.tensor(flat[m * m :], dtype=torch.float64).reshape(m, m)
            for residual, value in zip(r, values, strict=True):
                flat = dots([(b, residual) for b in hp] + [(a, residual) for a in p])
                right = torch.tensor(flat[:m], dtype=torch.float64) - value * torch.tensor(
                    flat[m:], dtype=torch.float64
                )
                left = (php + php.T) / 2 - value * pp
                beta = torch.linalg.lstsq(left, -right.unsqueeze(1)).solution.flatten().tolist()
                for b, direction in zip(beta, p, strict=True):
                    if math.isfinite(b):
                        axpy(b, direction, residual)
            hp.clear()
        out: list[Vector] = []
        for direction in r:
            if self._orthonormalise(direction, [*self.x, *out]):
                out.append(direction)
        return out

    def _ritz(self, hx: list[Vector], p: list[Vector], hp: list[Vector]) -> list[float]:
        """Best estimates within span{X, P}; X and HX are updated, P and HP keep their part of the step."""
        basis, images = [*self.x, *p], [*hx, *hp]
        n = len(basis)
        upper = [(i, j) for i in range(n) for j in range(i, n)]
        gram, h = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        numbers = dots([(basis[i], images[j]) for i, j in upper] + [(basis[i], basis[j]) for i, j in upper])
        for (i, j), a, g in zip(upper, numbers[: len(upper)], numbers[len(upper) :], strict=True):
            h[i, j] = h[j, i] = a
            gram[i, j] = gram[j, i] = g
        lower = torch.linalg.cholesky(gram)
        inverse = torch.linalg.inv(lower)
        theta, s = torch.linalg.eigh(inverse @ h @ inverse.T)
        s = (inverse.T @ s)[:, -self.k :].flip(1)  # the k largest, largest first
        for vectors, directions in ((self.x, p), (hx, hp)):
            _mix(vectors, directions, s)
        return list(theta[-self.k :].flip(0).tolist())

    def _rotate(self, x: list[Vector], hx: list[Vector]) -> list[float]:
        """Ritz values of X alone; X and HX are rotated to the Ritz vectors."""
        n = len(x)
        if n == 1:
            return dots([(x[0], hx[0])])
        h = torch.tensor(dots([(a, b) for a in x for b in hx]), dtype=torch.float64).reshape(n, n)
        theta, s = torch.linalg.eigh((h + h.T) / 2)
        s = s.flip(1)
        _mix(x, [], s)
        _mix(hx, [], s)
        return list(theta.flip(0).tolist())

    def _product(self, v: Vector) -> Vector:
        self.hvps += 1
        image = self.operator(v)
        length = norm(image)
        if not math.isfinite(length):
            raise MeasurementError("a Hessian-vector product is not finite")
        self.bound = max(self.bound, length)
        return image

    def _orthonormalise(self, v: Vector, basis: Sequence[Vector]) -> bool:
        """Gram–Schmidt, twice; False where nothing is left of ``v``."""
        length = norm(v)
        if not math.isfinite(length) or length == 0.0:
            return False
        scale(1 / length, v)
        for _ in range(2):
            if basis:
                for c, b in zip(dots([(b, v) for b in basis]), basis, strict=True):
                    axpy(-c, b, v)
            length = norm(v)
            if length < 50 * self.eps:
                return False
            scale(1 / length, v)
        return True

    def _randomise(self, v: Vector, basis: Sequence[Vector]) -> None:
        while not self._orthonormalise(v, basis):
            for a, b in zip(v, random_like(v, self.generator), strict=True):
                a.copy_(b)


def _mix(x: list[Vector], p: list[Vector], s: Tensor) -> None:
    """X ← [X P]·S and P ← P·S_P in place, S of shape (len(X)+len(P), len(X))."""
    k, m = len(x), len(p)
    if k == 1 and m == 1:
        scale(float(s[1, 0]), p[0])
        combine(1.0, p[0], float(s[0, 0]), x[0])
        return
    steps = []
    for j in range(k):
        step = zeros_like(x[0])
        for i in range(m):
            axpy(float(s[k + i, j]), p[i], step)
        steps.append(step)
    rotated = []
    for j in range(k):
        new = clone(steps[j])
        for i in range(k):
            axpy(float(s[i, j]), x[i], new)
        rotated.append(new)
    x[:] = rotated
    if m:
        p[:] = steps


def _power(
    operator: Operator, like: Sequence[Tensor], tol: float, max_hvps: int, generator: torch.Generator
) -> EigenResult:
    """Power iteration that stops when the value changes by less than ``tol`` relative to itself."""
    v = random_like(like, generator)
    scale(1 / norm(v), v)
    value, hvps = math.inf, 0
    while True:
        image = operator(v)
        hvps += 1
        new, square = dots([(v, image), (image, image)])
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
