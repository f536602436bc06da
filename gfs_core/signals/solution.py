"""The full gradient flow solution: where a flow ends, and how that is told from a place where it is only slow.

On a plateau and near a saddle a flow is as slow as at its end. Each test below compares the flow with itself while
its time doubled, so that no unit of time, loss or weights matters:

1. The loss has nothing left to fall. Another such stretch lowers it by t·‖∇L‖² at most, unless the gradient grows:
   little beside what it fell so far. On a plateau, it is all that it fell so far.
2. The sharpness has nothing left to change. Its last change is continued from stretch to stretch as a geometric
   series, with the ratio in which the way ahead, t·‖∇L‖, shrinks. Where that does not shrink, no end is in sight.
3. Nothing grows: the lowest eigenvalue of the Hessian is not negative, or too little so to matter in such a time. It is
   sought from a random start: a flow that approaches a saddle has nothing in the directions in which it would leave.

Near a saddle the flow goes on for as long as the least trace of a direction that leads away needs to grow. Where it
is still there then, or where rounding alone decides which way it leaves, its end is the saddle: from exactly these
weights, and from no others nearby.
"""

from __future__ import annotations

import math

from gfs_core.errors import Reason
from gfs_core.loss.flow import Flow, FlowState
from gfs_core.signals.lab import Flowing, FlowResult

FALL = 1e-5  # of what the loss fell so far
SETTLED = 1e-4  # of the sharpness, in the last stretch
MORE = 1e-3  # of the sharpness, in all stretches to come
GROWTH = 0.1  # a rate of growth times the time, below which nothing grows
_NEAR = 1e-2  # while the loss has more than this left to fall, the sharpness is not worth its products
_ROUNDED = 10.0  # a gradient below so many times its own rounding tells nothing
_ENDLESS = 1e14  # flow time in units of the fastest time scale; a stiff flow would need 10⁷ gradients for it


def flow_to_the_end(flowing: Flowing, first: float, loss_cutoff: float | None = None) -> FlowResult:
    """Full gradient flow solution: flow until neither loss nor sharpness will change, and nothing grows.

    Args:
        flowing: the flow, at its start.
        first: length of the first stretch of flow time; each later one doubles the time.
        loss_cutoff: the flow ends at this loss too, which then is part of the value's definition (separable
            cross-entropy has no finite solution).

    Returns:
        The sharpness at the end. Not converged, with its reason, where that is a saddle or was not reached.
    """
    flow = flowing.flow
    state = flow.start()
    start, until, tol = state.loss, first, min(flowing.probe.tol, SETTLED)
    way, gone, sharpness, fastest = 0.0, 0.0, math.nan, 0.0
    while True:
        began = state.time
        state = flow.advance(state, until, loss_cutoff)
        if state.reason:
            return flowing.result(state, flowing.top(tol, afresh=True), state.reason is Reason.LOSS_CUTOFF)
        before, gone, way = gone, state.way - way, state.way
        shrinks = gone / before if gone < before else math.inf
        left, fallen = until * (gone / (until - began)) ** 2, start - state.loss
        still = _is_rounding(flow, state)
        fastest = max(fastest, flow.rho)
        endless = until * fastest > _ENDLESS
        value = math.nan
        if still or endless or left <= _NEAR * fallen:
            top = flowing.top(tol)
            value = top.value
            change = abs(value - sharpness)
            more = change * shrinks / (1 - shrinks) if shrinks < 1 else math.inf
            settled = left <= FALL * fallen and change <= SETTLED * abs(value) and more <= MORE * abs(value)
            if still or endless or settled:
                anew, growth = flowing.top(tol, afresh=True), flowing.growth()
                missed = anew.value > (1 + SETTLED) * value
                top = anew if missed else top
                stays = 0.5 * growth * until > -math.log(flow.eps)  # a trace of ε would have left in the last stretch
                no_minimum = growth > 0 or top.value <= 0
                if no_minimum and (still or stays or (endless and shrinks < 1)):
                    return flowing.result(state, top, False, Reason.SADDLE)
                if endless:
                    return flowing.result(state, top, False, Reason.NO_END)
                if growth * until <= GROWTH and (still or not missed):
                    return flowing.result(state, top, converged=True)
        sharpness = value
        until *= 2


def _is_rounding(flow: Flow, state: FlowState) -> bool:
    """Whether the gradient is no more than rounding makes of it: nothing moves any more, or not for a reason."""
    norm = flow.objective.inner.norm
    speed = norm(state.field)
    if speed > 100 * flow.eps * flow.rho * norm(flow.objective.weights):  # ‖H·δ‖ for a δ of the last bits
        return False
    return speed <= _ROUNDED * flow.rounding(state)
