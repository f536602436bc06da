"""Gradient flow from the present weights, and the sharpness along it."""

from __future__ import annotations

from dataclasses import dataclass

from gfs_core.errors import Reason
from gfs_core.linalg.eigen import EigenResult, largest_eigenvalues
from gfs_core.linalg.operator import negated
from gfs_core.loss.flow import Flow, FlowState
from gfs_core.optimizers.thresholds import Stability
from gfs_core.signals.lab import Lab

_GROWTH_TOL, _GROWTH_HVPS = 0.2, 20  # enough to tell whether an eigenvalue is negative


@dataclass(frozen=True)
class FlowResult:
    """Sharpness at the end of a gradient flow.

    Attributes:
        sharpness: the largest eigenvalue at the end, of the operator in whose coordinates the weights flow.
        loss: the loss at the end.
        time: flow time, in the unit of the learning rate.
        steps: accepted steps.
        grad_evals: gradients used.
        hvps: Hessian-vector products used.
        converged: whether the end was reached and the eigenvalue has converged.
        reason: why it has not converged, or that the value belongs to a loss cutoff; empty otherwise.
        error: absolute difference of the sharpness at two tolerances; ``None`` if that was not asked for.
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


class Flowing:
    """A gradient flow from the present weights, with the largest eigenvalue at its present point.

    Args:
        lab: holds the objective whose weights flow.
        top: the largest eigenvalue at the start; its vector is overwritten as the flow goes on.
        stability: the optimizer's operator, in whose coordinates the weights flow; ``None``: plain gradient flow.
        rtol: relative error of the sharpness that the flow aims at, > 0.
        max_grads: gradients allowed.
    """

    def __init__(self, lab: Lab, top: EigenResult, stability: Stability | None, rtol: float, max_grads: int) -> None:
        self.lab, self.stability = lab, stability
        self.vector = top.vector  # overwritten in place: it saves a copy, and the next measurement starts from it
        self._known: float | None = top.value + top.residual
        inverse = None if stability is None or stability.scale is None else stability.scale.squared()
        lab.hessian.release()
        self.flow = Flow(lab.objective, self._rho, preconditioner=inverse, rtol=rtol, max_grads=max_grads)

    def _rho(self) -> float:
        if self._known is not None:
            known, self._known = self._known, None
            return known
        result = self.top(tol=0.1, afresh=self.flow.doubtful)
        return max(result.value, 0.0) + result.residual

    def top(self, tol: float | None = None, afresh: bool = False) -> EigenResult:
        """The largest eigenvalue at the present point of the flow. The solve starts from the last eigenvector.

        A symmetry of the loss, for instance at a saddle, may keep the last eigenvector orthogonal to the present one.
        A warm start would not find that one. ``afresh`` starts at random instead.

        Args:
            tol: relative residual; ``None``: that of the lab.
            afresh: start from a random vector.
        """
        self.lab.hessian.release()
        result = self.lab.eigenvalue(self.stability, start=None if afresh else self.vector, tol=tol)
        self.vector = result.vector
        self.lab.hessian.release()
        return result

    def growth(self) -> float:
        """The fastest growth rate at the present point of the flow: −(lowest eigenvalue), or 0 if none is negative.

        The solve starts at random and takes few products. So the result is a lower bound: the true rate may be larger.
        """
        self.lab.hessian.release()
        found = largest_eigenvalues(
            negated(self.lab.operator(self.stability)),
            self.lab.objective.weights,
            tol=_GROWTH_TOL,
            max_hvps=max(_GROWTH_HVPS, self.flow.grad_evals // 100),
            generator=self.lab.generator,
            product_error=self.lab.hessian.error,
            inner=self.lab.objective.inner,
        )
        self.lab.hessian.release()
        known = (10 * self.flow.eps + 3 * self.lab.hessian.error) * self.flow.rho
        return found.value if found.value > known else 0.0

    def result(self, state: FlowState, top: EigenResult, converged: bool, reason: Reason = Reason.OK) -> FlowResult:
        """The result at the present point of the flow."""
        return FlowResult(
            top.value,
            state.loss,
            state.time,
            state.steps,
            self.flow.grad_evals,
            self.lab.hessian.hvps,
            converged and top.converged,
            state.reason or reason or top.reason,
        )


def flow_for(flowing: Flowing, time: float, afresh: bool = False) -> FlowResult:
    """Sharpness after flow time ``time`` > 0; ``afresh``, for a long flow, is as in :meth:`Flowing.top`."""
    state = flowing.flow.advance(flowing.flow.start(), time)
    state.field.clear()  # the flow ends here: this frees one copy of the weights for the eigenvalue
    return flowing.result(state, flowing.top(afresh=afresh), converged=not state.reason)
