"""Hessian-vector products from one gradient each, where the gradient at the present weights is known.

Training has just computed ∇L(w). So H·v = (∇L(w + εv) − ∇L(w)) / ε costs one gradient more, computed as training
computes it: with fused attention, compiled, checkpointed, sharded, in half precision. No second derivative is needed.

The step ε is as long as changes the gradient by about a tenth of its length, which is far more than its rounding. The
sign of ε alternates from one product to the next, so that an error that is odd in ε cancels in an average over
products. What such products are worth for the stability ratio: ``benchmarks/tiers.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gfs_core.linalg.vectors import Vector, axpy, clone, scale, zeros_like
from gfs_core.loss.compiled import as_compiled
from gfs_core.loss.objective import Objective

CHANGE = 0.1  # of the gradient's length, by which it is to change
_AT_MOST = 4.0  # times that; where it changes by more, the product is taken again with a shorter step
_TRIES = 4  # steps that a product may take to find its length
_FARTHEST = 0.02  # longest step, relative to the weights
_SHORTEST = 30 * torch.finfo(torch.float32).eps  # the same of the shortest: a shorter one is lost in rounding
_FIRST = 1 / 16  # of the longest, the first step
_WIDTH_EVERY = 20  # products after which the length of the weights is computed anew
_NEARER = 8  # times that, the step is shortened to look for a kink


@dataclass
class StepLength:
    """What lasts from one measurement to the next of products along similar vectors.

    Attributes:
        steepness: ‖H·v‖/‖v‖ of the latest product; 0: there was none.
        sign: of the next step.
        width: length of the weights, when it was last looked at.
        age: products so far.
    """

    steepness: float = 0.0
    sign: int = 1
    width: float = 1.0
    age: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> StepLength:
        """What :meth:`state_dict` returned."""
        sign = 1 if int(state["sign"]) > 0 else -1
        return StepLength(float(state["steepness"]), sign, float(state["width"]), int(state["age"]))


class OneGradient:
    """v ↦ H·v of ``objective`` at the present weights, by one gradient each.

    Args:
        objective: the loss on the probe; its isolation holds the weights, and puts them back after each product.
        known: a multiple of ∇L at the present weights, in the precision in which the objective computes it; it is not
            changed.
        length: what earlier measurements have found out about the length of a step; it is updated.
        factor: the multiple, > 0.
        change: by what fraction of its length the gradient is to change; less is less noisy only in full precision.

    Attributes:
        loss: the loss at the last product, a step away from the present weights.
        seconds: that the last gradient took.
        error: relative error of a product that is to be reckoned with.
    """

    def __init__(
        self,
        objective: Objective,
        known: Sequence[Tensor],
        length: StepLength,
        factor: float = 1.0,
        change: float = CHANGE,
    ) -> None:
        assert objective.isolation is not None
        self.objective, self.inner, self.known, self.length = objective, objective.inner, list(known), length
        self.factor, self.change = factor, change
        self.loss = self.seconds = self.error = self._taken = 0.0
        self._isolation = objective.isolation
        self._slope = self.inner.norm(self.known) / factor
        # Rows of padding, which no gradient moves.
        self._still = [(i, row) for i, row in objective.padding if not self.known[i][row].any()]

    def __call__(self, vector: Vector) -> Vector:
        """H·v, a new vector of the same shapes.

        Raises:
            MeasurementError: the loss or the gradient is not finite a step away.
        """
        return self.along(lambda: clone(vector))

    def along(self, make: Callable[[], Vector]) -> Vector:
        """H·v of the vector that ``make`` returns; it is not held while the gradient is computed.

        Args:
            make: returns the vector, each time a new one.
        """
        width = self._width()
        longest, shortest = _FARTHEST * width, _SHORTEST * width
        wanted = self.change * self._slope
        step = wanted / self.length.steepness if self.length.steepness else _FIRST * longest
        product: Vector | None = None
        for _ in range(_TRIES):
            product = None  # frees its memory
            step = min(max(step, shortest), longest)
            product = self._difference(make, step)
            if product is None:
                return zeros_like(self.objective.weights)
            change = step * self.length.steepness
            if step <= shortest or change <= _AT_MOST * wanted:
                break
            step *= min(0.25, wanted / change)  # the gradient is not linear over so long a step
        assert product is not None
        self.length.sign = -self.length.sign
        return product

    def _width(self) -> float:
        """The length of the weights, at least 1; it hardly changes from one measurement to the next."""
        if self.length.age % _WIDTH_EVERY == 0:
            self.length.width = max(1.0, self.inner.norm(self.objective.weights))
        self.length.age += 1
        return self.length.width

    def _difference(self, make: Callable[[], Vector], step: float) -> Vector | None:
        """H·v by a step of this length; ``None``: the vector is zero."""
        self._taken = step
        vector = make()
        for place, row in self._still:
            vector[place][row].zero_()
        size = self.inner.norm(vector)
        if size == 0.0 or not self._slope:
            return None
        eps = self.length.sign * step / size
        axpy(eps, vector, self.objective.weights)
        del vector  # its memory is needed
        began = time.perf_counter()
        try:
            with as_compiled(self.objective.model):
                self.loss, product = self.objective.gradient()
        finally:
            self._isolation.restore_weights()
        self.seconds = time.perf_counter() - began
        axpy(-1 / self.factor, self.known, product)
        scale(1 / eps, product)
        self.length.steepness = self.inner.norm(product) / size
        return product

    def has_kink(self, vector: Vector) -> bool:
        """Whether the gradient jumps at the present weights: a product grows as its step shortens. Two gradients."""
        far = self.inner.norm(self(vector))
        self.length.sign = -self.length.sign  # on the same side: a ReLU's kink shows on one alone
        near = self._difference(lambda: clone(vector), self._taken / _NEARER)
        return near is not None and not self.objective.on_all(self.inner.norm(near) <= _NEARER / 2 * far)

    def slope_along(self, vector: Vector) -> float:
        """∇L·v at the present weights."""
        return self.inner.dot(self.known, vector) / self.factor

    def gradient(self, compute: bool = True) -> Vector | None:
        """∇L at the present weights, a new vector; ``None`` unless it is asked for, as a copy is not free."""
        if not compute:
            return None
        gradient = clone(self.known)
        if self.factor != 1.0:
            scale(1 / self.factor, gradient)
        return gradient
