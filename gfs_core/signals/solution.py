"""The full gradient flow solution: where a flow ends, and how the end is told from a place where the flow is only slow.

On a plateau and near a saddle, a flow is as slow as at its end. The flow therefore runs in stretches, each of which
doubles its time t. After each stretch, three tests compare the flow with its own past. So they do not depend on the
units of time, loss or weights:

1. The loss will fall no further. The next stretch lowers it by at most t·‖∇L‖², unless the gradient grows. At an end
   this is small compared with the fall so far. On a plateau it is as large as the fall so far.
2. The sharpness will change no further. Its last change is extrapolated over all later stretches as a geometric series.
   The ratio of the series is that of the lengths of the last two stretches of the path. If the lengths do not shrink,
   no end is in sight.
3. Nothing grows: the lowest eigenvalue of the Hessian is not negative, or too small to matter in the time t. The solver
   starts at random, because a flow that approaches a saddle has no component in the directions in which it would leave.

Near a saddle, the flow goes on for as long as a component of the size of rounding would need to grow and leave. If the
flow is still at the saddle then, or if rounding alone decides how it leaves, the saddle is its end. That holds for
exactly these weights, and not for weights nearby.
"""

from __future__ import annotations

import math

from gfs_core.errors import Reason
from gfs_core.loss.flow import Flow, FlowState
from gfs_core.signals.flowing import Flowing, FlowResult

FALL = 1e-5  # largest further fall of the loss at an end, as a fraction of the fall so far
SETTLED = 1e-4  # largest relative change of the sharpness in the last stretch
MORE = 1e-3  # largest relative change of the sharpness in all later stretches
GROWTH = 0.1  # largest growth rate times flow time that counts as no growth
_NEAR = 1e-2  # while the loss has a larger fraction left to fall, the sharpness is not computed
_ROUNDED = 10.0  # a gradient is rounding if it is below this many times its rounding error
_ENDLESS = 1e14  # largest flow time, in units of the fastest time scale; a stiff flow needs 10⁷ gradients for it


def flow_to_the_end(flowing: Flowing, first: float, loss_cutoff: float | None = None) -> FlowResult:
    """Full gradient flow solution: flow until neither loss nor sharpness will change, and nothing grows.

    Args:
        flowing: the flow, at its start.
        first: flow time of the first stretch, > 0; each later stretch doubles the time.
        loss_cutoff: the flow also ends at this loss, which is then part of the value's definition (separable
            cross-entropy has no finite solution); ``None``: there is no such limit.

    Returns:
        The sharpness at the end. It is not converged, and has a reason, if the end is a saddle or was not reached.
    """
    flow = flowing.flow
    state = flow.start()
    start, until, tol = state.loss, first, min(flowing.lab.accuracy.tol, SETTLED)
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
                stays = 0.5 * growth * until > -math.log(flow.eps)  # time for a component of size ε to grow and leave
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
    """Whether the gradient is so small that it may consist of rounding errors only."""
    norm = flow.objective.inner.norm
    speed = norm(state.field)
    if speed > 100 * flow.eps * flow.rho * norm(flow.objective.weights):  # ‖H·δ‖, δ a change in the weights' last bits
        return False
    return speed <= _ROUNDED * flow.rounding(state)
