"""The lab, which the signals of one measurement share: the loss with its derivatives, and the solvers' tolerances.

Each measurement makes one lab, and every signal that is due uses it. So the model is isolated once, and the loss on the
probe is differentiated once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gfs_core.errors import ConfigError
from gfs_core.linalg.eigen import EigenResult, largest_eigenvalues
from gfs_core.linalg.vectors import Vector, random_like
from gfs_core.loss.learned import HvpMethod, Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.one_gradient import OneGradient
from gfs_core.loss.products import Hessian
from gfs_core.optimizers.preconditioner import Curvature, Preconditioned
from gfs_core.optimizers.thresholds import Stability

_LARGEST_FACTOR = 1e300  # upper limit of the numbers below, so that products with them do not overflow
MIX = 0.3  # length of a vector that is mixed into a warm start, relative to the start
WORST_PRECISION = 0.05  # if half precision changes the sharpness by a larger fraction, float32 is used


@dataclass(frozen=True)
class Accuracy:
    """Tolerances and limits of the solvers.

    Attributes:
        tol: relative residual at which an eigenvalue counts as converged, > 0.
        max_hvps: Hessian-vector products allowed for an eigenvalue, ≥ 1.
        rtol: relative error of the sharpness that a flow aims at, > 0.
        max_grads: gradients allowed for a gradient flow, ≥ 1; a short one has a lower limit of its own.
        horizon: flow time of the short-horizon GFS sharpness, in units of the learning rate, > 0.

    Raises:
        ConfigError: one of them is out of its range.
    """

    tol: float = 1e-2
    max_hvps: int = 100
    rtol: float = 1e-2
    max_grads: int = 100_000
    horizon: float = 4.0

    def __post_init__(self) -> None:
        for name in ("tol", "rtol", "horizon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_FACTOR:
                raise ConfigError(f"`{name}` must be a finite number > 0, got {value!r}")
        for name in ("max_hvps", "max_grads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"`{name}` must be an integer ≥ 1, got {value!r}")


class Lab:
    """The loss on the probe, its Hessian, and the largest eigenvalues.

    Args:
        objective: the loss on the probe, isolated from training.
        hvp: how Hessian-vector products are computed.
        learned: known facts about the model and its loss; the lab works on a copy.
        accuracy: tolerances and limits; ``None``: the defaults.
        seed: of the random directions.

    Attributes:
        hvp: how Hessian-vector products are asked for.
        facts: what is known about the training's gradient and about differences; signals update it.
        hessian: the Hessian of the objective at the present weights.
        loss: the loss on the probe; ``None`` before a signal has asked for it.
        top: the largest eigenvalue of the optimizer's operator; ``None`` before it is solved for, or if unusable.
        sharpest: the eigenvector of the Hessian's largest eigenvalue; ``None`` before it is solved for, or if unusable.
    """

    def __init__(
        self,
        objective: Objective,
        hvp: HvpMethod = "auto",
        learned: Learned | None = None,
        accuracy: Accuracy | None = None,
        seed: int = 0,
    ) -> None:
        self.objective = objective
        self.hvp, self.facts = hvp, Learned() if learned is None else replace(learned)
        self.hessian = Hessian(objective, hvp, learned)
        self.accuracy = Accuracy() if accuracy is None else accuracy
        self.generator = torch.Generator().manual_seed(seed)
        self.loss: float | None = None
        self.top: EigenResult | None = None
        self.sharpest: Vector | None = None

    @property
    def flows(self) -> bool:
        """Whether there is a gradient flow to follow.

        There is none if the curvature is not symmetric, as the gradient is then not the gradient of any function.
        There is none if the loss rounds its weights, as the gradient is then that of another function.
        """
        return self.hessian.symmetric and not self.hessian.rounded

    @property
    def learned(self) -> Learned:
        """What is known by now about the model and its loss."""
        facts = self.facts
        return replace(
            self.hessian.learned,
            smooth=facts.smooth,
            of_step=facts.of_step,
            micro_batches=facts.micro_batches,
            uses=facts.uses,
            whole_cheaper=facts.whole_cheaper,
            solve_by_gradients=facts.solve_by_gradients,
        )

    def notes(self) -> list[str]:
        """Remarks about the values of this measurement, in words."""
        snapshot = self.objective.isolation
        leaks = [] if snapshot is None else snapshot.leaks
        found = [self.hessian.reason, self.hessian.resting, self.objective.precision.reason]
        found += [f"the loss changed `{name}` in place, too large to be put back" for name in leaks]
        return [note for note in found if note]

    def restore_weights(self) -> None:
        """Restore the weights to their values at the start of the measurement."""
        self.hessian.release()
        if self.objective.isolation is not None:
            self.objective.isolation.restore_weights()

    def loss_on_probe(self) -> float:
        """The loss on the probe; it is evaluated at the first call only."""
        if self.loss is None:
            self.loss = self.objective.loss()
        return self.loss

    def operator(self, stability: Stability | None, products: Curvature | None = None) -> Curvature | Preconditioned:
        """The optimizer's operator S·(H + shift)·S; the Hessian H for ``None`` or a plain optimizer.

        Args:
            stability: holds S and the shift.
            products: the Hessian; ``None``: :attr:`hessian`.
        """
        products = self.hessian if products is None else products
        if stability is None or stability.plain:
            return products
        return Preconditioned(products, stability.scale, stability.shift)

    @contextlib.contextmanager
    def on(self, batches: Sequence[Any]) -> Iterator[None]:
        """A context in which the objective is the loss on other batches."""
        held, self.objective.batches = self.objective.batches, batches
        self.hessian.forget_batches()
        try:
            yield
        finally:
            self.objective.batches = held
            self.hessian.forget_batches()

    def eigenvalue(
        self,
        stability: Stability | None = None,
        start: Vector | None = None,
        tol: float | None = None,
        mix: bool = False,
        products: OneGradient | None = None,
    ) -> EigenResult:
        """Largest eigenvalue at the present weights, of H or of the optimizer's operator.

        Args:
            stability: holds the optimizer's operator; ``None``: H.
            start: the vector to start from, which is overwritten; ``None``: a random one.
            tol: relative residual, > 0; ``None``: that of the lab's accuracy.
            mix: mix the gradient, which lies mostly along large curvature, and a random vector into the start.
                Otherwise an eigenvalue in a block of the Hessian where the start is 0 would never be found, even after
                it has become the largest.
            products: the Hessian by differences; ``None``: :attr:`hessian`.
        """
        operator = self.operator(stability, products)
        if mix and start is not None:
            self.objective.inner.mix_in(operator.gradient(), MIX, start)
            self.objective.inner.mix_in(random_like(start, self.generator), MIX, start)
        return largest_eigenvalues(
            operator,
            self.objective.weights,
            tol=self.accuracy.tol if tol is None else tol,
            max_hvps=self.accuracy.max_hvps,
            start=None if start is None else [start],
            generator=self.generator,
            product_error=self.hessian.error if products is None else products.error,
            inner=self.objective.inner,
        )

    def in_half_precision(self) -> bool:
        """Whether Hessian-vector products are computed in half precision."""
        precision = self.objective.precision
        return self.hessian.method == "exact" and precision.half is not None and not precision.full_for_products

    def precision_error(self, stability: Stability, vector: Vector, value: float) -> float:
        """Relative error of a Rayleigh quotient in half precision, against float32; it costs one product.

        If it exceeds ``WORST_PRECISION``, everything is computed in float32 from then on, unless training's precision
        was asked for.

        Args:
            stability: holds the operator of the quotient.
            vector: the vector of the quotient, of norm 1.
            value: the quotient in half precision.
        """
        self.hessian.release()
        with self.objective.in_float32():
            true = self.objective.inner.dot(vector, self.operator(stability)(vector))
        self.hessian.release()
        error = abs(value / true - 1) if true else math.inf
        precision = self.objective.precision
        if error > WORST_PRECISION and precision.choice == "auto":
            precision.choice = "float32"
            precision.reason = f"{precision.half} changes the sharpness by {error:.0%}; all is measured in float32"
        return error
