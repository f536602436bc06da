"""Thick-restart Lanczos with full reorthogonalisation.

Wu & Simon 2000, in the form of the Krylov–Schur method of Stewart 2001.

1. One basis vector is kept for each product, at most 6 for one eigenvalue, and the next one. Products themselves are
   not kept, since H·V = V·C with a small matrix C.
2. A restart keeps some of the lowest Ritz vectors beside the largest ones, as many of either as make the rest converge
   soonest (Wu & Simon's estimate). Outlying negative eigenvalues stay deflated so.
3. C is taken from the products as they are, without use of symmetry, so that the residual is that of the products
   computed, their errors and their asymmetry included.
4. The stop rule is the residual ‖Hx − λx‖, never the change between iterates, which stops early when the
   next eigenvalue is close. Rounding counts: what a product loses beside a much larger ‖H‖ is part of the residual.
5. A warm start that turns out to lie far from what it leads to, or where the operator is 0, is mixed with a random
   vector: a Krylov space never leaves the invariant subspace that its start lies in.
6. For k eigenvalues the basis grows from k start vectors (block Lanczos), so that a k-fold eigenvalue is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError, Reason
from gfs_core.linalg.inner import InnerProduct
from gfs_core.linalg.operator import Operator
from gfs_core.linalg.vectors import Vector, axpy, is_half, random_like, scale

_FAR_COSINE = 0.8  # a warm start is far from a Ritz vector where the cosine of the angle is less
_PRODUCT_ROUNDING = 4  # what a product loses, in units of eps·‖H‖
_NEAR_FLOOR = 100  # a residual that stays above the error of the products by more is slow, and not at its end


@dataclass(frozen=True)
class Space:
    """The vectors: their shapes, their inner product, and where random ones come from."""

    like: Sequence[Tensor]
    inner: InnerProduct
    generator: torch.Generator

    @property
    def dimension(self) -> int:
        """Of the whole space, on this process."""
        return sum(t.numel() for t in self.like)

    @property
    def eps(self) -> float:
        """Unit roundoff of their numbers."""
        return torch.finfo(torch.float32 if is_half(self.like[0]) else self.like[0].dtype).eps

    def random(self) -> Vector:
        """A standard normal vector."""
        return random_like(self.like, self.generator)


class Lanczos:
    """One run of the solver; the arguments are those of :func:`gfs_core.largest_eigenvalues`.

    Attributes:
        most: vectors that are multiplied before a restart.
        basis: orthonormal vectors V; the first of them have been multiplied, the rest wait for their turn.
        coefficients: C of H·V = V·C, a row for each vector and a column for each that has been multiplied.
        lost: of each column, the length of what restarts have dropped from H·V: 0 for exact products.
        bound: the largest ‖Hv‖ seen for ‖v‖ = 1: a lower bound of the operator's norm.
    """

    def __init__(
        self,
        operator: Operator,
        space: Space,
        k: int,
        tol: float,
        max_hvps: int,
        start: Sequence[Vector],
        product_error: float,
        most: int,
    ) -> None:
        self.operator, self.space, self.k, self.tol, self.max_hvps = operator, space, k, tol, max_hvps
        self.product_error = product_error
        self.most = most
        self.eps = space.eps
        self.hvps = 0
        self.bound = 0.0
        self.warm = bool(start)
        self._begin(start[:k])

    def run(self) -> tuple[list[float], list[Vector], list[float], Reason]:
        """The values, largest first, the vectors, the residuals, and why it stopped where it did not converge."""
        best, stalled = math.inf, 0
        while True:
            self._multiply()
            if len(self.lost) < self.k:
                continue
            theta, s, residuals = self._ritz()
            values = theta[-self.k :].flip(0).tolist()
            if self.warm and self.hvps < self.max_hvps and self._is_far(values, s):
                self.warm = False
                self._begin_anew(s)
                continue
            rounding = _PRODUCT_ROUNDING * self.eps * self.bound
            residuals = [max(r, rounding) for r in residuals]
            over = [r / (self.tol * abs(v) or math.ulp(0.0)) for r, v in zip(residuals, values, strict=True)]
            worst = max(over)
            stalled = 0 if worst < 0.7 * best else stalled + 1
            best = min(best, worst)
            reason = Reason.OK
            if worst > 1:
                open_ = max(r for r, o in zip(residuals, over, strict=True) if o > 1)
                floor = max(rounding, 3 * self.product_error * self.bound)
                in_vain = open_ <= _NEAR_FLOOR * floor or self._asymmetry() > floor
                if open_ <= floor or (self.product_error and stalled >= 15 * self.k and in_vain):
                    reason = Reason.INEXACT_PRODUCTS
                elif self.hvps >= self.max_hvps:
                    reason = Reason.MAX_PRODUCTS
                elif not self._go_on(theta, s):
                    reason = Reason.INEXACT_PRODUCTS
                else:
                    continue
            del self.basis[len(self.lost) :]
            _rotate(self.basis, s[:, -self.k :].flip(1))
            return values, self.basis, residuals, reason

    def _asymmetry(self) -> float:
        """How far VᵀH·V is from symmetric: the error that the products really have."""
        square = self.coefficients[: len(self.lost)]
        return float((square - square.T).abs().max())

    def _begin(self, start: Sequence[Vector]) -> None:
        """Start the basis from these vectors, and random ones where they are no basis."""
        self.basis: list[Vector] = []
        self.coefficients = torch.zeros(0, 0, dtype=torch.float64)
        self.lost: list[float] = []
        for vector in start:
            self._append(vector, 0)
        while len(self.basis) < self.k:
            self._append(self.space.random(), 0)

    def _is_far(self, values: list[float], s: Tensor) -> bool:
        """Whether the warm start has nothing to do with this operator: known after a second product of each vector."""
        if 0.0 in values:
            return True
        overlap = s[: self.k, -self.k :].square().sum(0).sqrt()
        return len(self.lost) == 2 * self.k and float(overlap.min()) < _FAR_COSINE

    def _begin_anew(self, s: Tensor) -> None:
        """Start again, from the present Ritz vectors and random vectors in equal parts."""
        found = self.basis[: len(self.lost)]
        _rotate(found, s[:, -self.k :])
        for vector in found:
            noise = self.space.random()
            axpy(1 / self.space.inner.norm(noise), noise, vector)
        self._begin(found)

    def _append(self, vector: Vector, columns: int) -> None:
        """Take a start vector into the basis, a random one where nothing of it is new."""
        while not self._orthonormalise(vector)[1] > 0:
            for a, b in zip(vector, self.space.random(), strict=True):
                a.copy_(b)
        self.basis.append(vector)
        self.coefficients = torch.cat([self.coefficients, torch.zeros(1, columns, dtype=torch.float64)])

    def _multiply(self) -> None:
        """The product of the next vector of the basis; what is new in it is appended."""
        image = self.operator(self.basis[len(self.lost)])
        self.hvps += 1
        along, left = self._orthonormalise(image)
        size = math.hypot(*along, left)
        if not math.isfinite(size):
            raise MeasurementError("a Hessian-vector product is not finite")
        self.bound = max(self.bound, size)
        column = torch.tensor([along], dtype=torch.float64).T
        self.coefficients = torch.cat([self.coefficients, column], dim=1)
        self.lost.append(0.0)
        if left:
            row = torch.zeros(1, len(self.lost), dtype=torch.float64)
            row[0, -1] = left
            self.basis.append(image)
            self.coefficients = torch.cat([self.coefficients, row])

    def _ritz(self) -> tuple[Tensor, Tensor, list[float]]:
        """Ritz values, ascending, their coordinates in the basis, and the residuals of the k largest, largest first."""
        m = len(self.lost)
        c = self.coefficients
        theta, s = torch.linalg.eigh((c[:m] + c[:m].T) / 2)
        apart = c @ s
        apart[:m] -= s * theta
        dropped = s.square().T @ torch.tensor(self.lost, dtype=torch.float64).square()
        residuals = (apart.square().sum(0) + dropped).sqrt()
        return theta, s, residuals[-self.k :].flip(0).tolist()

    def _go_on(self, theta: Tensor, s: Tensor) -> bool:
        """Make room for another product, and see that there is a vector for it; False where the space is used up."""
        if len(self.lost) == self.most:
            self._restart(theta, s)
        if len(self.basis) == len(self.lost):  # invariant: what is missing lies elsewhere
            if len(self.basis) == self.space.dimension:
                return False
            self._append(self.space.random(), len(self.lost))
        return True

    def _restart(self, theta: Tensor, s: Tensor) -> None:
        """Keep some Ritz vectors at both ends, and the vectors that wait for their turn."""
        m = len(theta)
        widths = (self.coefficients[m:] @ s).square().sum(0).sqrt()
        low, high = _kept(theta.tolist(), widths.tolist(), self.k)
        kept, given_up = [*range(low), *range(m - high, m)], [*range(low, m - high)]
        wait = self.basis[m:]
        del self.basis[m:]
        _rotate(self.basis, s[:, kept])
        self.basis += wait
        c = torch.cat([s.T @ self.coefficients[:m] @ s, self.coefficients[m:] @ s])
        before = s.square().T @ torch.tensor(self.lost, dtype=torch.float64).square()
        self.lost = (c[given_up].square().sum(0) + before).sqrt()[kept].tolist()
        self.coefficients = c[[*kept, *range(m, len(c))]][:, kept]

    def _orthonormalise(self, v: Vector) -> tuple[list[float], float]:
        """Gram–Schmidt against the basis, again where it took off half or more of ‖v‖² ("twice is enough").

        Going on with less, errors of the basis grow from product to product, until it is none (Daniel et al. 1976).

        Returns:
            The components of ``v`` along the basis, and the length of what was left before it was scaled to 1: 0 where
            that is rounding, nan where ``v`` is not finite.
        """
        total = [0.0] * len(self.basis)
        whole = 0.0
        while True:
            square, *along = self.space.inner.dots([(v, v), *((b, v) for b in self.basis)])
            whole = whole or square
            if not math.isfinite(square):
                return total, math.nan
            if square <= (50 * self.eps) ** 2 * whole:
                return total, 0.0
            for i, (c, b) in enumerate(zip(along, self.basis, strict=True)):
                axpy(-c, b, v)
                total[i] += c
            left = square - math.fsum(c * c for c in along)
            if left >= 0.5 * square:
                scale(left**-0.5, v)
                return total, math.sqrt(left)


def _kept(theta: list[float], widths: list[float], k: int) -> tuple[int, int]:
    """How many Ritz vectors a restart keeps at the low and at the high end.

    The rate at which Lanczos converges until the next restart is about (products until then)·√γ, with γ the gap to the
    largest value given up, relative to the spread of all that are given up (Wu & Simon 2000, section 4). A Ritz vector
    with a residual stands for eigenvalues about that far apart, so that what is given up spreads by as much more; one
    vector that is given up alone would have no spread otherwise.

    Args:
        theta: Ritz values, ascending.
        widths: their residuals.
        k: eigenvalues wanted.
    """
    m = len(theta)
    best, choice = -1.0, (0, k)
    for low in range(m - k):
        for high in range(k, m - low):
            top, bottom = theta[m - 1 - high], theta[low]
            gap, spread = theta[m - k] - top, top - bottom + max(widths[low : m - high])
            rate = (m - low - high) * math.sqrt(gap / spread) if spread > 0 else math.inf
            if rate > best:
                best, choice = rate, (low, high)
    return choice


def _rotate(basis: list[Vector], s: Tensor) -> None:
    """V ← V·S in place, without another vector: by the factors of S = P·L·U, column after column.

    Args:
        basis: the columns of V; afterwards as many as S has.
        s: at least as many rows as columns.
    """
    p, lower, upper = torch.linalg.lu(s)
    n = s.shape[1]
    basis[:] = [basis[i] for i in p.argmax(0).tolist()]
    for j in range(n):
        for i in range(j + 1, len(basis)):
            axpy(float(lower[i, j]), basis[i], basis[j])
    del basis[n:]
    for j in reversed(range(n)):
        scale(float(upper[j, j]), basis[j])
        for i in range(j):
            axpy(float(upper[i, j]), basis[i], basis[j])
