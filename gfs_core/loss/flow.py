"""Gradient flow dw/dt = −D⁻¹∇L(w), integrated with a stabilised explicit method.

The flow is stiff: at the edge of stability λ₁ ≈ 2/η. Its steps are those of :mod:`gfs_core.linalg.chebyshev` (RKC2,
Sommeijer, Shampine and Verwer 1998), which spend s gradients for a step of about 0.65·s²/λ₁. What is decided here is
how long they may be, and which are accepted.

Differences from that paper, and why:

1. The spectral radius is the sharpness that was just measured (plus a margin), updated by warm products as
   the flow moves: no power iteration of its own.
2. What is wanted is the sharpness at the end, to a relative error ``rtol``. The error of a step is measured in the
   2-norm, of all parameters together, against the way ℓ that the flow has come so far, or will come along the
   fastest direction, |F|/ρ: of a pretrained model with
   |w| = 280 the sharpness fell to a tenth within ℓ = 0.2, and a limit relative to |w| alone let it be wrong by 240 %.
   A step's error falls as h³ and there are ~1/h steps: per step the limit is rtol^1.5·min(|w|, 5ℓ), which leaves an
   error of order rtol at the end; never below rounding, 0.3 ε·|w|. Where shorter steps do not help, as at the kinks of
   ReLUs, it is relative to |w| alone.
   The estimate overstates stiff modes by about h·ρ: of a mode of amplitude a the exact flow leaves nothing, the
   step up to a, the estimate says 0.4·hλ·a. The limit is therefore raised by h·ρ where that is above 1, up to 30:
   on the long way to a full solution the step would otherwise outgrow every control.
3. A step that raises the loss is rejected, whatever the error estimate says: along a gradient flow the loss
   falls (dL/dt = −‖∇L‖²). Near a loss of zero it can be rounding that raises it: a squared loss of 1e-11 in float32 is
   known to a tenth. What the last bits of all weights change of it is no reason to reject a step.

D is the identity, or a diagonal preconditioner; then the flow is gradient flow in the coordinates of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError, Reason
from gfs_core.linalg.chebyshev import Step, move, stability_interval, stages_needed, step
from gfs_core.linalg.vectors import Vector, axpy, clone, copy, multiply, random_like
from gfs_core.loss.objective import Objective

_MAX_STAGES = 10_000
_PER_WAY = 5.0  # measured with an MLP, a GPT-2 and a pretrained MiniLM: with 10 the error was up to 1.6 rtol
_MOST_LENIENT = 30.0  # measured, benchmarks/flow_cost.py: without a limit a full solution was wrong by 6 rtol
# Of ε·|w|, what rounding the weights changes; with 10, rtol < 1e-2 was out of a large model's reach.
_WEIGHT_ROUNDING = 0.3
_CUTOFF_REACHED = 0.01  # the loss lands within 1 % below its cutoff


@dataclass
class FlowState:
    """Where a flow stands; passed in and returned, so that it can be continued.

    Attributes:
        time: flow time so far.
        loss: loss at the present weights.
        field: dw/dt at the present weights (first same as last: the next step's first stage).
        step: step length that the error control proposes next; 0 before the first step.
        way: length of the path so far, in the norm of the weights.
        kinks: whether the field was found to have kinks.
        refused: length and error of the step that was rejected last, where it was too short to be stiff.
        noise: what rounding can do to the loss, where that was in question.
        noise_at: the loss at which it was found.
        steps: accepted steps.
        rejected: rejected steps.
        reason: why the flow ended early; empty where it did not.
    """

    time: float
    loss: float
    field: Vector
    step: float = 0.0
    way: float = 0.0
    kinks: bool = False
    refused: tuple[float, float] | None = None
    noise: float = 0.0
    noise_at: float = math.inf
    steps: int = 0
    rejected: int = 0
    reason: Reason = Reason.OK


class Flow:
    """Integrates gradient flow of ``objective`` in place, from the present weights.

    Args:
        objective: the loss; its ``params`` are moved.
        rho: ρ(), an estimate of the largest eigenvalue of D⁻¹H at the present weights. Called at the start
            of a step when the weights have moved enough, or when the loss rose (``doubtful``).
        preconditioner: D⁻¹ per parameter (a tensor of its shape or a number); ``None``: the identity.
        rtol: relative error aimed at for the sharpness at the end. A step is accepted while its error
            estimate is below rtol^1.5·min(|w|, 5ℓ)·min(max(1, h·ρ), 30), w being the weights and ℓ the way so far.
        max_grads: gradients allowed.
    """

    def __init__(
        self,
        objective: Objective,
        rho: Callable[[], float],
        *,
        preconditioner: Iterable[Tensor | float] | None = None,
        rtol: float = 1e-2,
        max_grads: int = 100_000,
    ) -> None:
        self.objective, self.estimate_rho, self.preconditioner = objective, rho, preconditioner
        self.rtol, self.max_grads = rtol, max_grads
        self.inner = objective.inner
        self.grad_evals = 0
        self.rho = 0.0  # what steps are limited by now
        self._rho_age = math.inf
        self.doubtful = False  # whether the last step makes ρ doubtful: the loss rose
        self.eps = objective.eps
        # Rounding errors of a step grow as s²·ε (Sommeijer et al. 1998, §2.1), here relative to its own length.
        self.max_stages = max(8, min(_MAX_STAGES, int((rtol / self.eps) ** 0.5)))

    def start(self) -> FlowState:
        """The state at the present weights; costs one gradient."""
        loss, field = self._field()
        return FlowState(0.0, loss, field)

    def advance(self, state: FlowState, until: float, loss_cutoff: float | None = None) -> FlowState:
        """Integrate to flow time ``until``, to ``loss_cutoff`` or to the limit of gradients; ``state`` is consumed.

        The weights in place are those of the returned state.
        """
        params = self.objective.weights
        if state.step == 0.0:
            state.step = self._first_step(until)
        held: Vector = []
        room: tuple[Vector, Vector] = ([], [])
        while state.time < until * (1 - 1e-12):
            if reason := self._ended(state, loss_cutoff):
                state.reason = reason
                break
            if self._rho_is_old(state):
                held, room = [], ([], [])  # hold nothing now that the weights do not; the estimate needs the memory
                self._estimate_rho()
            if not held:
                held, room = clone(params), (clone(params), clone(params))
            h = self._length(state, until)
            copy(params, held)
            trial = self._trial(state, held, room, h)
            if loss_cutoff is not None and trial.value < loss_cutoff * (1 - _CUTOFF_REACHED):  # a shorter one
                copy(held, params)
                state.step = h * _part_to(loss_cutoff, state.loss, trial.value)
                continue
            ratio = self._error_ratio(state, trial, h)
            risen = self._risen(state, trial)
            if risen and ratio <= 1.0 and state.loss < 0.25 * state.noise_at:
                state.noise, state.noise_at = self._noise(held, params, state.loss), state.loss
                copy(held, params)
                state.step = h  # the same again, held against what is known now
            elif ratio <= 1.0 and not risen:
                self._accept(state, trial, h, ratio, until)
            else:
                copy(held, params)
                rho = self.rho
                self._reject(state, trial, h, ratio, risen)
                if state.step * rho < 1e-4:
                    held, room = [], ([], [])
                    self._estimate_rho()  # it may have grown by far, as when a flow leaves a plateau
                    if state.step * self.rho < 1e-4:
                        state.reason = Reason.STEP_TOO_SMALL
                        break
        return state

    def _ended(self, state: FlowState, loss_cutoff: float | None) -> Reason:
        if loss_cutoff is not None and state.loss <= loss_cutoff:
            return Reason.LOSS_CUTOFF
        return Reason.MAX_GRADIENTS if self.grad_evals >= self.max_grads else Reason.OK

    def _length(self, state: FlowState, until: float) -> float:
        """The length of the next step."""
        remaining = until - state.time
        h = min(state.step, remaining, stability_interval(self.max_stages) / self.rho)
        if remaining < 2 * h and h < remaining:
            h = remaining / 2  # two equal steps rather than one full and one sliver
        return h

    def _trial(self, state: FlowState, held: Vector, room: tuple[Vector, Vector], h: float) -> Step:
        """A step that is not accepted yet; one with infinite loss where there is none."""
        try:
            start, s = (held, state.field), stages_needed(h * self.rho)
            return step(self._field, self.objective.weights, start, room, h, s, self.inner)
        except MeasurementError:  # a non-finite loss on the way: the step was far too long
            return Step(math.inf, state.field, 0.0, math.inf)

    def _error_ratio(self, state: FlowState, trial: Step, h: float) -> float:
        """The error of a step relative to its limit; whether the field has kinks is found out on the way."""
        rho, size = self.rho, self.inner.norm(self.objective.weights)
        lenient = min(max(1.0, h * rho), _MOST_LENIENT)
        fastest = self.inner.norm(state.field) / rho  # the fastest direction alone will come so far
        way = max(state.way + trial.moved, fastest)
        if state.refused is not None and h * rho <= 1.0:
            # Of a smooth flow a step's error falls as h³; at a kink as h, and then no step is short enough.
            longer, its = state.refused
            state.kinks = state.kinks or trial.error > its * (h / longer) ** 2
        limit = self.rtol**1.5 * lenient * (size if state.kinks else min(size, _PER_WAY * way))
        limit = max(limit, _WEIGHT_ROUNDING * self.eps * size)
        return trial.error / limit if limit > 0 else (math.inf if trial.error else 0.0)

    def _risen(self, state: FlowState, trial: Step) -> bool:
        """Whether a step has raised the loss, by more than rounding is known to."""
        # Of a squared loss, rounding the outputs changes about the root of it.
        known = state.noise * min(1.0, abs(state.loss) / state.noise_at) ** 0.5
        return bool(trial.value > state.loss + max(known, 20 * self.eps * abs(state.loss)))

    def _accept(self, state: FlowState, trial: Step, h: float, ratio: float, until: float) -> None:
        state.time = until if h == until - state.time else state.time + h
        state.loss, state.field = trial.value, trial.field
        state.steps += 1
        state.way += trial.moved
        state.refused = None
        self._rho_age += h * self.rho
        state.step = h * min(5.0, 0.8 / max(ratio, 1e-6) ** (1 / 3))

    def _reject(self, state: FlowState, trial: Step, h: float, ratio: float, risen: bool) -> None:
        state.rejected += 1
        state.refused = (h, trial.error) if 0.0 < h * self.rho <= 1.0 and trial.error < math.inf else None
        self.doubtful = risen
        self._rho_age = math.inf if risen else self._rho_age
        shrink = 0.8 / ratio ** (1 / 3) if 1.0 < ratio < math.inf else 0.3
        state.step = h * min(max(shrink, 0.1), 0.7)

    def _noise(self, held: Vector, params: Vector, loss: float) -> float:
        """What rounding can do to the loss: several times what random changes of the weights' last bits do."""
        generator, differences = torch.Generator().manual_seed(0), []
        for _ in range(2):
            bits = random_like(held, generator)
            torch._foreach_mul_(bits, held)
            move(params, held, bits, self.eps)
            del bits
            differences.append(abs(self.objective.loss() - loss))
        self.grad_evals += 1  # two forward passes
        return 2 * max(differences)

    def rounding(self, state: FlowState) -> float:
        """What rounding can do to the field: how far random changes of the weights' last bits move it. One gradient."""
        params = self.objective.weights
        held = clone(params)
        bits = random_like(held, torch.Generator().manual_seed(0))
        torch._foreach_mul_(bits, held)
        move(params, held, bits, self.eps)
        field = self._field()[1]
        copy(held, params)
        axpy(-1.0, state.field, field)
        return self.inner.norm(field)

    def _field(self) -> tuple[float, Vector]:
        self.grad_evals += 1
        loss, field = self.objective.gradient()
        if self.preconditioner is not None:
            multiply(self.preconditioner, field)
        torch._foreach_neg_(field)
        return loss, field

    def _rho_is_old(self, state: FlowState) -> bool:
        # Re-estimated when about ten times the fastest time scale has gone by, and at longer and longer
        # intervals as the flow slows down.
        return self._rho_age >= max(10.0, 0.5 * state.time * self.rho)

    def _estimate_rho(self) -> None:
        self.rho = self.estimate_rho() * 1.1
        self._rho_age = 0.0
        self.doubtful = False
        if not math.isfinite(self.rho) or self.rho <= 0:
            self.rho = 1e-12

    def _first_step(self, until: float) -> float:
        self._estimate_rho()
        return min(until, max(8.0 / self.rho, 1e-3 * until))


def _part_to(cutoff: float, before: float, after: float) -> float:
    """The part of a step at which an exponential decay of the loss meets the cutoff that the step went past."""
    fraction = math.log(before / cutoff) / math.log(before / max(after, 1e-300))
    return min(max(fraction * (1 + 0.5 * _CUTOFF_REACHED), 1e-3), 0.999)
