"""The gradient that training has just computed, as the one from which differences go.

``.grad`` holds it before an optimizer step: as the mean loss of the micro-batches has it, or their sum, and perhaps
clipped. Or it holds another gradient: of a loss with other random numbers, scaled for float16, or of another loss. So
it is compared with the gradient of the measured loss: at the first measurement, and now and then again. Where it is
another, that of the measured loss is computed each time: two gradients in place of one. So it is at a step of another
number of micro-batches than usual, as at the end of an epoch: its ``.grad`` may be divided by the usual number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gfs_core.linalg.vectors import Vector, dense, is_half, local, zeros_like
from gfs_core.loss.learned import OfStep
from gfs_core.loss.objective import Objective
from gfs_core.loss.one_gradient import CHANGE, OneGradient, StepLength
from gfs_core.loss.rounding import steps
from gfs_core.signals.context import StepContext
from gfs_core.signals.lab import Lab

_APART = 0.01  # relative distance of two gradients that count as the same; a difference is ten times as large
_FACTOR = 0.01  # relative distance of a factor from the one that is expected
_COMPARE_EVERY = 50  # uses of ``.grad`` after which it is compared again


def of_the_step(
    step: StepContext, lab: Lab, data: Sequence[Any], length: StepLength, change: float = CHANGE
) -> OneGradient | None:
    """Products as of :func:`one_gradient`, where ``data`` is all that training computes its gradient on.

    Args:
        step: the optimizer step.
        lab: the lab of this measurement.
        data: the batches that are to be measured.
        length: what the signal keeps of earlier step lengths.
        change: of the gradient, as in :class:`~gfs_core.loss.one_gradient.OneGradient`.
    """
    whole = len(data) == len(step.batches) and all(a is b for a, b in zip(data, step.batches, strict=True))
    if not lab.objective.on_all(step.gradient is not None and whole):  # a probe is a whole batch on some processes
        return None
    with lab.on(step.batches):
        return one_gradient(step, lab, length, change)


def one_gradient(
    step: StepContext, lab: Lab, length: StepLength, change: float = CHANGE, *, kinks: bool = True
) -> OneGradient | None:
    """Products from one gradient each, or two, of the mean loss over the step's micro-batches.

    It is called where the lab is on these micro-batches.

    Args:
        step: the optimizer step.
        lab: the lab of this measurement; its facts are updated.
        length: what the signal keeps of earlier step lengths.
        change: of the gradient, as in :class:`~gfs_core.loss.one_gradient.OneGradient`.
        kinks: whether to look for kinks of the loss, unless that was done. Not where no value is to come of it yet.

    Returns:
        The products; ``None``: differences would tell nothing here, as of a loss that rounds its weights, or of weights
        in half precision, which do not take so short a step, or double backward was asked for.

    Raises:
        MeasurementError: the loss or its gradient is not finite.
    """
    facts, objective = lab.facts, lab.objective
    if facts.smooth is None and (lab.hvp == "exact" or not _takes_steps(objective)):
        facts.smooth = False
    if facts.smooth is False:
        return None
    known, factor = _known(step, lab)
    products = OneGradient(objective, known, length, factor, change)
    if facts.smooth is None and kinks and objective.inner.norm(known) > 0:
        facts.smooth = not products.has_kink(known)
    return None if facts.smooth is False else products


def _known(step: StepContext, lab: Lab) -> tuple[Vector, float]:
    """A multiple of the gradient at the present weights, and the factor: training's own, or else a new one."""
    facts, objective = lab.facts, lab.objective
    taken = _training_gradient(step, objective)
    settled = taken is not None and facts.of_step in ("mean", "sum")
    usual = len(step.batches) == facts.micro_batches
    if taken is not None and settled and usual and step.clipped is not None and facts.uses < _COMPARE_EVERY:
        facts.uses += 1
        return taken, _factor(facts.of_step, step) * step.clipped
    own = objective.gradient()[1]
    if settled and not usual:
        return own, 1.0
    # It is compared again once the factor of clipping is known: a scaler's division by its scale looks like clipping.
    facts.micro_batches, facts.uses = len(step.batches), 0 if step.clipped is not None else _COMPARE_EVERY
    factor = None if taken is None else _multiple(objective, own, taken)
    facts.of_step = _kind(factor, step, facts.of_step)
    if taken is None or not factor or facts.of_step == "other":
        return own, 1.0
    return taken, factor  # the memory of the other is freed


def _takes_steps(objective: Objective) -> bool:
    """Whether a short step of the weights changes the loss: neither is rounded."""
    if any(is_half(p) for p in objective.params):
        return False
    found = steps(objective)
    return objective.on_all(not (found.rounded or found.compared))


def _training_gradient(step: StepContext, objective: Objective) -> Vector | None:
    """The ``.grad`` of each weight, zero where there is none; ``None``: there is none at all."""
    grads = step.gradient
    if not objective.on_all(grads is not None and any(g is not None for g in grads)):
        return None
    assert grads is not None
    pairs = zip(grads, objective.weights, strict=True)
    return [zeros_like([w])[0] if g is None else dense(local(g)) for g, w in pairs]


def _factor(of_step: OfStep, step: StepContext) -> float:
    return float(len(step.batches)) if of_step == "sum" else 1.0


def _multiple(objective: Objective, own: Vector, taken: Vector) -> float | None:
    """What multiple of the gradient ``own`` the other one is; ``None``: none, 0.0: both are zero."""
    if objective.precision.half is torch.float16 or (objective.precision.is_full and objective.precision.half):
        return None  # measured in another precision than trained
    square, along, other = objective.inner.dots([(own, own), (own, taken), (taken, taken)])
    if not square > 0 or not along > 0:
        return 0.0 if square == other == 0 else None
    factor = along / square
    return factor if other - factor * along <= (_APART * factor) ** 2 * square else None


def _kind(factor: float | None, step: StepContext, before: OfStep) -> OfStep:
    """What ``.grad`` holds, which is this multiple of the gradient, as far as this step tells."""
    if factor is None:
        return "other"
    if factor == 0.0:
        return before
    kinds: tuple[OfStep, ...] = ("mean", "sum")
    clipped = 1.0 if step.clipped is None else step.clipped
    for kind in kinds:
        if abs(factor / (clipped * _factor(kind, step)) - 1) < _FACTOR:
            return kind
    return before if step.clipped is None else "other"  # it may have been clipped
