"""The largest eigenvalues of a symmetric operator, from a warm start and with little memory.

``solver="ritz"`` is Rayleigh–Ritz over the span of the current estimates X and one conjugate direction P per
estimate, a locally optimal scheme in the family of LOBPCG (Knyazev 2001). Differences from LOBPCG, and why:

1. The direction is P ← R + P·B with B chosen so that the new directions are conjugate to the old ones under
   H − λ, and *H·P is computed directly*; LOBPCG keeps R, H·R, P and H·P. That saves two vectors per
   eigenvalue at one product per step either way.
2. X and P are orthonormal by construction, and residuals orthogonal to the last space, up to rounding: what is known
   is not computed. A step with one estimate takes seven inner products in three transfers.
3. No preconditioner: none is known for a network's Hessian.
4. The stop rule is the residual ‖Hx − λx‖, never the change between iterates, which stops early when the
   next eigenvalue is close.

``solver="power"`` is the plain power iteration of the literature, for comparison: it finds the eigenvalue
largest in *magnitude* and stops on the change of its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

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
        ValueError: ``k`` is not between 1 and the dimension, or not what the solver can do.

    Example:
        >>> import torch
        >>> d = torch.tensor([5.0, 1.0, -9.0])
        >>> round(largest_eigenvalues(lambda v: [d * v[0]], [d], tol=1e-6).value, 6)  # not -9
        5.0
    """
    dimension = sum(t.numel() for t in like)
    if not 1 <= k <= dimension:
        raise ValueError(f"`k` must be between 1 and the number of parameters ({dimension}), got {k}")
    if solver not in get_args(Solver):
        raise ValueError(f"`solver` must be 'ritz' or 'power', got {solver!r}")
    if solver == "power" and k > 1:
        raise ValueError(f"solver='power' finds one eigenvalue, and k is {k}; use 'ritz'")
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
        self._php = self._pp = torch.zeros(0, 0, dtype=torch.float64)  # PᵀHP and PᵀP
        self.bound = 0.0  # the largest ‖Hv‖ seen for ‖v‖ = 1: a lower bound of the operator's norm
        self.eps = torch.finfo(torch.float32 if is_half(like[0]) else like[0].dtype).eps
        self.x: list[Vector] = list(start)[:k]
        for i, v in enumerate(self.x):
            self._randomise(v, self.x[:i])
        while len(self.x) < k:
            v = random_like(like, generator)
            self._randomise(v, self.x)
            self.x.append(v)

    def run(self) -> EigenResult:
        hx = self._products(self.x)
        values = self._rotate(self.x, hx)
        p: list[Vector] = []
        hp: list[Vector] = []
        best, stalled = math.inf, 0
        while True:
            r = [list(torch._foreach_add(h, v, alpha=-a)) for h, v, a in zip(hx, self.x, values, strict=True)]
            numbers = dots([(v, v) for v in r] + [(b, v) for v in r for b in hp])
            norms, across = [x**0.5 for x in numbers[: self.k]], numbers[self.k :]
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
            for i in open_ if p else ():
                self._conjugate(r[i], values[i], p, across[i * len(p) : (i + 1) * len(p)])
            p, hp = self._orthonormal([r[i] for i in open_]), []
            if not p:  # the residuals lie in the span already: nothing more to find from here
                return EigenResult(values, self.x, norms, self.hvps, False, Reason.INEXACT_PRODUCTS)
            hp = self._products(p)
            values = self._ritz(values, hx, p, hp)

    def _conjugate(self, r: Vector, value: float, p: list[Vector], across: list[float]) -> None:
        """R ← R + P·B, conjugate to P under H − λ; R is orthogonal to P, as to all of the last space."""
        left = self._php - value * self._pp
        right = torch.tensor(across, dtype=torch.float64)
        beta = torch.linalg.lstsq(left, -right.unsqueeze(1)).solution.flatten().tolist()
        for b, direction in zip(beta, p, strict=True):
            if math.isfinite(b):
                axpy(b, direction, r)

    def _orthonormal(self, directions: list[Vector]) -> list[Vector]:
        """Those of the directions that add something, orthonormal and orthogonal to X."""
        out: list[Vector] = []
        for direction in directions:
            if self._orthonormalise(direction, [*self.x, *out]):
                out.append(direction)
        return out

    def _ritz(self, values: list[float], hx: list[Vector], p: list[Vector], hp: list[Vector]) -> list[float]:
        """Best estimates within span{X, P}; X and HX are updated, P and HP keep their part of the step.

        The basis is orthonormal by construction, and X already diagonal in H: what is new has P in it.
        """
        k, m = self.k, len(p)
        pairs = [(h, h) for h in hp] + [(v, h) for v in (*self.x, *p) for h in hp]
        numbers = dots(pairs)
        self._see(numbers[:m])
        new = torch.tensor(numbers[m:], dtype=torch.float64).reshape(k + m, m)
        h = torch.zeros(k + m, k + m, dtype=torch.float64)
        h[:k, :k] = torch.tensor(values, dtype=torch.float64).diag()
        h[:k, k:], h[k:, :k] = new[:k], new[:k].T
        h[k:, k:] = php = (new[k:] + new[k:].T) / 2
        theta, s = torch.linalg.eigh(h)
        s = s[:, -k:].flip(1)  # the k largest, largest first
        for vectors, directions in ((self.x, p), (hx, hp)):
            _mix(vectors, directions, s)
        self._php, self._pp = s[k:].T @ php @ s[k:], s[k:].T @ s[k:]
        return list(theta[-k:].flip(0).tolist())

    def _rotate(self, x: list[Vector], hx: list[Vector]) -> list[float]:
        """Ritz values of X alone; X and HX are rotated to the Ritz vectors."""
        n = len(x)
        numbers = dots([(h, h) for h in hx] + [(a, b) for a in x for b in hx])
        self._see(numbers[:n])
        if n == 1:
            return numbers[1:]
        h = torch.tensor(numbers[n:], dtype=torch.float64).reshape(n, n)
        theta, s = torch.linalg.eigh((h + h.T) / 2)
        s = s.flip(1)
        _mix(x, [], s)
        _mix(hx, [], s)
        return list(theta.flip(0).tolist())

    def _products(self, vectors: list[Vector]) -> list[Vector]:
        self.hvps += len(vectors)
        return [self.operator(v) for v in vectors]

    def _see(self, squares: list[float]) -> None:
        """Take note of ‖Hv‖² of vectors of norm 1."""
        if not all(map(math.isfinite, squares)):
            raise MeasurementError("a Hessian-vector product is not finite")
        self.bound = max(self.bound, *(x**0.5 for x in squares))

    def _orthonormalise(self, v: Vector, basis: Sequence[Vector]) -> bool:
        """Gram–Schmidt, again where it took off more than half; False where nothing is left of ``v``."""
        whole = 0.0
        while True:
            square, *along = dots([(v, v), *((b, v) for b in basis)])
            whole = whole or square
            if not math.isfinite(square) or square <= (50 * self.eps) ** 2 * whole:
                return False
            for c, b in zip(along, basis, strict=True):
                axpy(-c, b, v)
            left = square - math.fsum(c * c for c in along)
            if left >= 0.5 * square:  # little was taken off, and what is left is known well
                scale(left**-0.5, v)
                return True

    def _randomise(self, v: Vector, basis: Sequence[Vector]) -> None:
        """Orthonormalise ``v``, at random where nothing of it is left."""
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
