"""Hessian-vector products by differences of gradients, with their step length and their error.

The central difference (∇L(w+εv) − ∇L(w−εv)) / 2ε needs first derivatives only. The step is as long as leaves the
gradient nearly linear: it turns by about a hundredth of its length in float32. Where the loss has kinks on the way, it
is shortened until two step lengths agree.

Training never moves a weight whose gradient is zero for good: a row of padding, and where the loss takes the norm of a
row of zeros, of which torch's gradient is zero. No difference moves them either.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError
from gfs_core.linalg.inner import InnerProduct
from gfs_core.linalg.vectors import Vector, axpy, zeros_like
from gfs_core.loss.objective import Objective

ROUGH = 0.05  # relative error above which differences are tried with shorter steps, and prove nothing
_SUDDEN = 1e-3  # a step so short, relative to the longest, is compared with one further out: there may be a kink


class Differences:
    """v ↦ H·v of ``objective`` at the present weights, from two gradients each. Computed in float32 where that works.

    Args:
        objective: the loss on the probe.
        reach: the longest step, in the norm of the weights.

    Attributes:
        reach: as given, or shorter where kinks of the loss make longer steps uncertain.
        error: relative error of a product, as the difference of two step lengths; found at the first one, and at the
            first with more entries than those before.
        noise: what rounding alone can make of the last product, as a norm.
        loss: mean of the two losses of the last product.
        at_kink: whether the gradient jumps at the present weights, or turns within a tiny fraction of their norm:
            products grow as the step shortens, and tell nothing about a training step.
        resting: weights that are zero at such a kink and have no gradient, and are not moved.
    """

    def __init__(self, objective: Objective, reach: float = math.inf) -> None:
        self.objective, self.inner, self.reach = objective, objective.inner, reach
        self.error = self.noise = self.loss = 0.0
        self.at_kink = False
        self.resting = 0
        self._tried = -1  # entries of the vector by whose product the error was found; another may meet more kinks
        self._slope = 0.0  # length of the gradient
        self._steepest = 0.0  # largest ‖Hv‖/‖v‖ seen
        self._still: list[tuple[int, int]] | None = None  # rows that training never moves
        self._zeros: list[Tensor] | None = None  # of each weight, the entries that rest at a kink

    def forget_batches(self) -> None:
        """The next product is of other batches: whether they have a kink, and the error, is found out anew."""
        self._tried, self.at_kink, self.resting = -1, False, 0
        self._still = self._zeros = None

    def __call__(self, vector: Vector) -> Vector:
        """H·v, a new vector of the same shapes.

        Raises:
            MeasurementError: a loss or gradient on the way is not finite.
        """
        with self.objective.in_float32(), self._standing_still(vector):
            reach = self.reach
            product = self._product(vector)
            if self.at_kink and self._zeros is None and self._find_resting():
                self.reach = reach
                product = self._product(vector)
            return product

    def _find_resting(self) -> bool:
        """Weights that are zero and have no gradient are not moved from here on; returns whether there are any."""
        try:
            gradient = self.objective.gradient()[1]
        except MeasurementError:  # it is not finite exactly there, as that of a root: nothing rests
            return False
        zeros = [(w == 0) & (g == 0) for w, g in zip(self.objective.weights, gradient, strict=True)]
        self.resting = sum(int(z.sum()) for z in zeros)
        if self.objective.on_all(self.resting == 0):
            return False
        self._zeros = zeros
        self._tried, self.at_kink, self._steepest = -1, False, 0.0
        return True

    @contextlib.contextmanager
    def _standing_still(self, vector: Vector) -> Iterator[None]:
        """Padding rows are zero in ``vector`` here: no gradient moves them, but a difference would."""
        rows = self.objective.padding
        if rows and self._still is None:
            gradient = self.objective.gradient()[1]  # a tied weight has one from elsewhere
            self._still = [(i, row) for i, row in rows if not gradient[i][row].any()]
        held = [(vector[i][row], vector[i][row].clone()) for i, row in self._still or ()]
        for entries, _ in held:
            entries.zero_()
        try:
            yield
        finally:
            for entries, values in held:
                entries.copy_(values)

    def _product(self, vector: Vector) -> Vector:
        params = self.objective.weights
        if self._zeros is not None:
            vector = [torch.where(z, 0.0, v) for v, z in zip(vector, self._zeros, strict=True)]
        length = self.inner.norm(vector)
        if length == 0.0:
            return zeros_like(params)
        if self.objective.precision.choice == "training" and not self._slope:
            self.objective.gradient()  # tells in which precision the loss is computed
        eps = self.objective.eps
        size = self.inner.norm(params)
        longest, shortest = min(self.reach, eps ** (1 / 3) * max(1.0, size)), 30 * eps * max(1.0, size)
        turn = 2 * eps ** (1 / 3)  # how far the gradient may turn, relative to its length
        step = longest if not self._steepest else min(longest, turn * self._slope / self._steepest)
        while True:
            step = max(step, shortest)
            product = self._difference(vector, step / length)
            curvature = self.inner.norm(product) / length
            self._steepest = max(self._steepest, curvature)
            if step <= shortest or step * curvature <= 4 * turn * self._slope:
                break
            step = min(step / 4, turn * self._slope / curvature)  # the gradient is not linear over so long a step
        entries = sum(int(v.count_nonzero()) for v in vector)
        if not self.objective.on_all(entries <= self._tried):
            self._tried = entries
            product, step = self._checked(vector, product, step, longest, shortest)
        # What rounding of the two gradients alone can make of their difference, with room to spare.
        self.noise = 30 * self.objective.eps * self._slope * length / step
        return product

    def _checked(
        self, vector: Vector, product: Vector, step: float, longest: float, shortest: float
    ) -> tuple[Vector, float]:
        """A better product and its step, if there is one: other step lengths tell what the method is worth here."""
        length = self.inner.norm(vector)
        self.error = _apart(self.inner, self._difference(vector, 2 * step / length), product)
        last, taken = product, step
        while self.error > ROUGH and taken > 8 * shortest:  # kinks on the way: shorter steps, until they agree
            taken /= 8
            finer = self._difference(vector, taken / length)
            error = _apart(self.inner, last, finer)
            if error < self.error:
                product, self.error, step = finer, error, taken
                self.reach = step
            last = finer
        settled = self.error <= ROUGH
        if not settled or taken < _SUDDEN * longest:
            far = self._difference(vector, (longest if settled else 8 * taken) / length)
            self.at_kink = _grown(self.inner, last, far, settled)
        return product, step

    def _difference(self, vector: Vector, eps: float) -> Vector:
        (ahead, plus), (behind, minus) = self.objective.on_both_sides(eps, vector, self.objective.gradient)
        self.loss = 0.5 * (ahead + behind)
        after, before = (x**0.5 for x in self.inner.dots([(plus, plus), (minus, minus)]))
        self._slope = 0.5 * (after + before)
        axpy(-1.0, minus, plus)
        torch._foreach_div_(plus, 2 * eps)
        for product, zeros in zip(plus, self._zeros or (), strict=False):
            product.masked_fill_(zeros, 0.0)
        return plus


def _apart(inner: InnerProduct, other: Vector, product: Vector) -> float:
    """‖other − product‖ / ‖product‖."""
    axpy(-1.0, product, other)
    pp, oo = inner.dots([(product, product), (other, other)])
    axpy(1.0, product, other)
    return (oo / pp) ** 0.5 if pp > 0 else 0.0


def _grown(inner: InnerProduct, near: Vector, far: Vector, settled: bool) -> bool:
    """Whether products have grown as the step shortened, by more than 4.

    A jump of the gradient gives one that grows as 1 / step, and keeps its direction; what rounding gives grows too, and
    has no direction. Products that have settled are not rounding.
    """
    nn, ff, nf = inner.dots([(near, near), (far, far), (near, far)])
    return nn > 16 * ff and (settled or nf > 0.5 * (nn * ff) ** 0.5)
