"""What a measurement works with: the objective with its Hessian, and flows that start from its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gfs_core.errors import Reason
from gfs_core.linalg.eigen import EigenResult, largest_eigenvalues
from gfs_core.linalg.operator import negated
from gfs_core.linalg.vectors import Vector, random_like
from gfs_core.loss.flow import Flow, FlowState
from gfs_core.loss.learned import HvpMethod, Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian
from gfs_core.optimizers.preconditioner import Preconditioned
from gfs_core.optimizers.thresholds import Stability

_GROWTH_TOL, _GROWTH_HVPS = 0.2, 20  # whether an eigenvalue is negative need not be known more closely
MIX = 0.3  # lengths of what is mixed into a warm start, relative to it
WORST_PRECISION = 0.05  # half precision that changes the sharpness by more than this gives way to float32


@dataclass(frozen=True)
class FlowResult:
    """Sharpness at the end of a gradient flow.

    Attributes:
        sharpness: the largest eigenvalue there (of the operator that the flow belongs to).
        loss: the loss there.
        time: flow time; the end of a full solution is where nothing changes any more.
        steps: accepted steps.
        grad_evals: gradients used.
        hvps: Hessian-vector products used.
        error: |difference| of the sharpness at two tolerances, where asked for.
        converged: the end was reached.
        reason: why not, or that the value belongs to a loss cutoff; empty otherwise.
    """

    sharpness: float
    loss: float
    time: float
    steps: int
    grad_evals: int
    hvps: int
    converged: bool
    reason: Reason = Reason.OK
    error: float | None = None


class Probe:
    """Everything one measurement works with: the objective, its Hessian, and the eigenvalue settings."""

    def __init__(
        self,
        objective: Objective,
        *,
        hvp: HvpMethod = "auto",
        learned: Learned | None = None,
        tol: float = 1e-2,
        max_hvps: int = 100,
        seed: int = 0,
    ) -> None:
        self.objective = objective
        self.hessian = Hessian(objective, hvp, learned)
        self.tol, self.max_hvps = tol, max_hvps
        self.generator = torch.Generator().manual_seed(seed)

    def operator(self, stability: Stability | None) -> Hessian | Preconditioned:
        """H, or the optimizer's operator."""
        if stability is None or stability.plain:
            return self.hessian
        return Preconditioned(self.hessian, stability.scale, stability.shift)

    @contextlib.contextmanager
    def on(self, batches: Sequence[Any]) -> Iterator[None]:
        """Measure on other batches for a while."""
        held, self.objective.batches = self.objective.batches, batches
        self.hessian.forget_batches()
        try:
            yield
        finally:
            self.objective.batches = held
            self.hessian.forget_batches()

    def top(
        self,
        stability: Stability | None = None,
        start: Vector | None = None,
        tol: float | None = None,
        mix: bool = False,
    ) -> EigenResult:
        """Largest eigenvalue at the present weights, of H or of the optimizer's operator.

        With ``mix``, the start takes in the gradient, which lies mostly along large curvature, and a random vector: an
        eigenvalue that overtakes in a block of the Hessian where the start is 0 would otherwise never be seen.
        """
        operator = self.operator(stability)
        if mix and start is not None:
            self.objective.inner.mix_in(operator.gradient(), MIX, start)
            self.objective.inner.mix_in(random_like(start, self.generator), MIX, start)
        return largest_eigenvalues(
            operator,
            self.objective.weights,
            tol=self.tol if tol is None else tol,
            max_hvps=self.max_hvps,
            start=None if start is None else [start],
            generator=self.generator,
            product_error=self.hessian.error,
            inner=self.objective.inner,
        )

    def in_half_precision(self) -> bool:
        """Whether an eigenvalue is found by products in half precision."""
        precision = self.objective.precision
        return self.hessian.method == "exact" and precision.half is not None and not precision.full_for_products

    def precision_error(self, stability: Stability, vector: Vector, value: float) -> float:
        """How far a Rayleigh quotient found in half precision is from its value in float32; costs a product.

        Where it is too far, all is computed in float32 from then on, unless training's precision was asked for.

        Args:
            stability: whose operator's quotient it is.
            vector: of norm 1.
            value: of the quotient, as found.
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

    def flow(self, top: EigenResult, stability: Stability | None, rtol: float, max_grads: int) -> Flowing:
        """A flow from the present weights, in the coordinates of ``stability``."""
        return Flowing(self, top, stability, rtol, max_grads)


class Flowing:
    """A flow together with the running estimate of the stiffest direction."""

    def __init__(
        self, probe: Probe, top: EigenResult, stability: Stability | None, rtol: float, max_grads: int
    ) -> None:
        self.probe, self.stability = probe, stability
        self.vector = top.vector  # turned along in place: one copy less, and the next measurement starts from there
        self._known: float | None = top.value + top.residual
        inverse = None if stability is None or stability.scale is None else stability.scale.squared()
        probe.hessian.release()
        self.flow = Flow(probe.objective, self._rho, preconditioner=inverse, rtol=rtol, max_grads=max_grads)

    def _rho(self) -> float:
        if self._known is not None:
            known, self._known = self._known, None
            return known
        result = self.top(tol=0.1, afresh=self.flow.doubtful)
        return max(result.value, 0.0) + result.residual

    def top(self, tol: float | None = None, afresh: bool = False) -> EigenResult:
        """The largest eigenvalue where the flow stands, warm from the last one.

        A symmetry of the loss may keep the last vector out of the direction that is the top now, at a saddle for
        instance, and a warm start does not find it then; ``afresh`` starts at random.
        """
        self.probe.hessian.release()
        result = self.probe.top(self.stability, start=None if afresh else self.vector, tol=tol)
        self.vector = result.vector
        self.probe.hessian.release()
        return result

    def growth(self) -> float:
        """The rate at which something grows where the flow stands: −(lowest eigenvalue), 0 where that is not negative.

        From a random start. It may be more, never less: what few products find.
        """
        self.probe.hessian.release()
        operator = self.probe.operator(self.stability)

        found = largest_eigenvalues(
            negated(operator),
            self.probe.objective.weights,
            tol=_GROWTH_TOL,
            max_hvps=max(_GROWTH_HVPS, self.flow.grad_evals // 100),
            generator=self.probe.generator,
            product_error=self.probe.hessian.error,
            inner=self.probe.objective.inner,
        )
        self.probe.hessian.release()
        known = (10 * self.flow.eps + 3 * self.probe.hessian.error) * self.flow.rho
        return found.value if found.value > known else 0.0

    def result(self, state: FlowState, top: EigenResult, converged: bool, reason: Reason = Reason.OK) -> FlowResult:
        """What was found where the flow stands."""
        return FlowResult(
            top.value,
            state.loss,
            state.time,
            state.steps,
            self.flow.grad_evals,
            self.probe.hessian.hvps,
            converged and top.converged,
            state.reason or reason or top.reason,
        )


def flow_for(flowing: Flowing, time: float, afresh: bool = False) -> FlowResult:
    """Sharpness after flow time ``time``; ``afresh``: as in :meth:`Flowing.top`, for a long one."""
    state = flowing.flow.advance(flowing.flow.start(), time)
    state.field.clear()  # nothing flows on from here; a copy of the weights less for the eigenvalue
    return flowing.result(state, flowing.top(afresh=afresh), converged=not state.reason)
