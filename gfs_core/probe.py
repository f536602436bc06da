"""What a measurement works with: the objective with its Hessian, and flows that start from its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gfs_core.curvature import Hessian, HvpMethod, Operator, Preconditioned
from gfs_core.eigen import EigenResult, largest_eigenvalues
from gfs_core.errors import Reason
from gfs_core.flow import Flow, FlowState
from gfs_core.objective import Objective
from gfs_core.stability import Stability
from gfs_core.vectors import Vector, dots

WORST_PRECISION = 0.05  # half precision that changes the sharpness by more than this gives way to float32
LOSS_FRACTION = 1e-6  # full GFS: the loss has fallen to this fraction of its start (or stopped falling by it) …
SETTLED = 1e-4  # … and the sharpness changed by less than this while the flow time doubled


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
        trusted: bool = False,
        plain_kernels: bool = False,
        tol: float = 1e-2,
        max_hvps: int = 100,
        seed: int = 0,
    ) -> None:
        self.objective = objective
        self.hessian = Hessian(objective, hvp, trusted, plain_kernels)
        self.tol, self.max_hvps = tol, max_hvps
        self.generator = torch.Generator().manual_seed(seed)

    def operator(self, stability: Stability | None) -> Operator:
        """H, or the optimizer's operator."""
        if stability is None or stability.plain:
            return self.hessian
        return Preconditioned(self.hessian, stability.scale, stability.shift)

    @contextlib.contextmanager
    def on(self, batches: Sequence[Any]) -> Iterator[None]:
        """Measure on other batches for a while."""
        held, self.objective.batches = self.objective.batches, batches
        self.hessian.release()
        try:
            yield
        finally:
            self.objective.batches = held
            self.hessian.release()

    def top(
        self,
        stability: Stability | None = None,
        start: Vector | None = None,
        tol: float | None = None,
    ) -> EigenResult:
        """Largest eigenvalue at the present weights, of H or of the optimizer's operator."""
        return largest_eigenvalues(
            self.operator(stability),
            self.objective.weights,
            tol=self.tol if tol is None else tol,
            max_hvps=self.max_hvps,
            start=None if start is None else [start],
            generator=self.generator,
            product_error=self.hessian.error,
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
            true = dots([(vector, self.operator(stability)(vector))])[0]
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
        result = self.top(tol=0.1)
        return max(result.value, 0.0) + result.residual

    def top(self, tol: float | None = None) -> EigenResult:
        """The largest eigenvalue where the flow stands, warm from the last one."""
        self.probe.hessian.release()
        result = self.probe.top(self.stability, start=self.vector, tol=tol)
        self.vector = result.vector
        self.probe.hessian.release()
        return result

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


def flow_for(flowing: Flowing, time: float) -> FlowResult:
    """Sharpness after flow time ``time``."""
    state = flowing.flow.advance(flowing.flow.start(), time)
    state.field.clear()  # nothing flows on from here; a copy of the weights less for the eigenvalue
    return flowing.result(state, flowing.top(), converged=not state.reason)


def flow_to_the_end(flowing: Flowing, first: float, loss_cutoff: float | None = None) -> FlowResult:
    """Full gradient flow solution: flow until the loss and the sharpness have settled.

    The end is reached when the loss has fallen to 1e-6 of its start, or by less than that fraction while the
    flow time doubled, *and* the sharpness changed by less than 1e-4 while the flow time doubled; or at ``loss_cutoff``,
    which then is part of the value's definition (separable cross-entropy has no finite solution).
    """
    state = flowing.flow.start()
    start = state.loss
    until, top = first, flowing.top()
    while True:
        loss, sharpness = state.loss, top.value
        state = flowing.flow.advance(state, until, loss_cutoff)
        top = flowing.top(tol=min(flowing.probe.tol, 1e-4))
        if state.reason is Reason.LOSS_CUTOFF:
            return flowing.result(state, top, converged=True)
        if state.reason:
            return flowing.result(state, top, converged=False)
        still = state.loss <= LOSS_FRACTION * start or loss - state.loss <= LOSS_FRACTION * start
        if still and abs(top.value - sharpness) <= SETTLED * abs(top.value):
            return flowing.result(state, top, converged=True)
        until *= 2
