"""Whether the loss of a batch is the mean of the losses of its parts.

Cheap measurements assume that it is: products on parts of a batch, a smaller probe, a batch evaluated in pieces.
For a mean over examples that is a theorem. It is wrong

- for a sum over the batch,
- for BatchNorm in training mode,
- for losses that compare examples with each other,
- for graphs and flat inputs with offsets, and where the first dimension is time,
- for a mean over tokens where the parts have unequal numbers of tokens.

The type of a model does not show any of that, so it is tested. The whole batch and its parts are evaluated at the
present weights, and at weights near by in a random direction. Two things are compared: the loss, and the change of the
gradient between the two places. That change is a vector, the curvature along the direction. A single number may agree
by chance; two different functions differ in thousands of entries of the vector.

A loss with dropout gives another value each time. Then each part draws its own random numbers, and the parts are
evaluated a second time with other numbers. The vector of the whole may differ from that of the parts by twice as much
as the two evaluations of the parts differ. Its loss may be off by as much as the losses of the parts scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gfs_core.errors import own_fault
from gfs_core.linalg.vectors import Vector, axpy, clone, copy, random_like, spread
from gfs_core.loss.batches import all_parts, examples_of, first_of_all
from gfs_core.loss.learned import PrecisionChoice
from gfs_core.loss.memory import GIB, Limits, OverLimit, vector_bytes
from gfs_core.loss.objective import LossFn, Objective
from gfs_core.loss.precision import Precision
from gfs_core.loss.processes import Processes, alone
from gfs_core.loss.snapshot import StateSnapshot

_HARMLESS = 0.03  # relative difference that is tolerated: single parts scatter by several times as much
_IN_ROUNDINGS = 20.0  # roundings that are tolerated: the gradients of parts may be longer than their mean
_BETWEEN_DRAWS = 2.0  # allowed ratio of two differences between independent draws; in many dimensions it is near 1
_SCATTER = 4.0  # standard errors that the loss may be off
_FEWEST_PARTS = 8  # parts, where there are enough examples: the smaller the parts, the clearer the difference
_TRIAL_COPIES = 6  # copies of the weights that the test holds at its peak
_SECOND_PLACE = 0.1  # distance of the second place, as a fraction of the length of the weights

UNTRIED = "alone would keep more than `max_memory` allows"


class _Seen(NamedTuple):
    """What was computed on the whole batch, or on its parts together.

    Attributes:
        losses: of the parts.
        loss: their mean.
        bend: change of the gradient between the two places, a vector.
        slope: length of the gradient at the present weights.
    """

    losses: list[float]
    loss: float
    bend: Vector
    slope: float


def why_whole(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    params: Sequence[Tensor],
    parts: int,
    *,
    precision: PrecisionChoice = "auto",
    ranks: Processes | None = None,
    max_memory: float | None = None,
) -> str:
    """Why the loss of these batches is not the mean over their parts, or why that is not known; empty where it is.

    Costs four gradients of the batches, six where the two differ at first (a loss that draws random numbers), and up to
    six copies of the weights. Where the batches do not fit into memory, half of their examples are tested instead, and
    so on down to two.

    Args:
        model: the module; its state is put back afterwards.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor.
        batches: the micro-batches of a step; the loss of the whole is their mean.
        params: the parameters over which the curvature is measured.
        parts: how many parts each batch is cut into, at least 8 where there are enough examples.
        precision: as in :class:`~gfs_core.GFSConfig`.
        ranks: the processes. They act together where they share the weights; otherwise each tests by itself.
        max_memory: as in :class:`~gfs_core.GFSConfig`. Not kept where processes share the weights, as none of them can
            use less than the others.

    Raises:
        MeasurementError: the loss of the whole is not finite, or no loss.
        OutOfMemoryError: not even two examples fit.
    """
    computed = Precision(precision, model, params)
    ranks = ranks if any(spread(p) for p in params) else None
    room = None
    if max_memory is not None and ranks is None:
        room = int(max_memory * GIB) - vector_bytes(params, _TRIAL_COPIES)
    with StateSnapshot(model, params) as isolation, alone(model), computed.governing():
        while True:
            try:
                objective = Objective(model, loss_fn, batches, params, isolation, ranks, computed, Limits(graph=room))
                with objective.in_float32():
                    return _compared(objective, all_parts(batches, max(parts, _FEWEST_PARTS)))
            except torch.OutOfMemoryError as error:
                count = examples_of(batches) or 0
                if count > 2 and ranks is None:
                    batches = first_of_all(batches, max(count // 2, 2))
                elif isinstance(error, OverLimit):
                    return f"{'two examples' if count else 'a batch'} {UNTRIED}"
                else:
                    raise


def _compared(objective: Objective, cut: list[tuple[Any, float]]) -> str:
    norm = objective.inner.norm
    whole = _seen(objective)
    objective.pieces = cut
    try:
        split = _seen(objective, draw=1)
        rounding = _IN_ROUNDINGS * objective.eps
        bend, apart = norm(whole.bend), norm(_less(split.bend, whole.bend))
        allowed = _HARMLESS * bend + rounding * max(whole.slope, split.slope)
        off = abs(split.loss - whole.loss)
        size = sum(map(abs, split.losses)) / len(split.losses)
        bearable = (_HARMLESS + rounding) * max(size, abs(whole.loss))
        if objective.on_all(apart <= allowed and off <= bearable):
            return ""
        axpy(1.0, whole.bend, split.bend)
        whole.bend.clear()  # frees its memory
        again = _seen(objective, draw=1 + 2 * len(cut))
        noise = norm(_less(again.bend, split.bend))
        if noise > rounding * max(split.slope, again.slope) and not normalises_over_batch(objective.model):
            drawn = zip(split.losses, again.losses, cut, strict=True)
            scatter = math.sqrt(sum((share * (one - other)) ** 2 for one, other, (_, share) in drawn))
            if objective.on_all(apart <= allowed + _BETWEEN_DRAWS * noise and off <= bearable + _SCATTER * scatter):
                return ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # raised by a loss that works on whole batches only
        if own_fault(error):
            raise
        return f"it fails on a part ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return _cause(objective.model, whole, split, off > bearable, apart / (bend or 1.0))


def _seen(objective: Objective, draw: int = 0) -> _Seen:
    """Evaluate the pieces at the present weights and near by; ``draw`` > 0: each with its own random numbers."""
    norm = objective.inner.norm
    objective.draw = draw
    loss, slope = objective.gradient()
    losses, length = objective.losses, norm(slope)
    held = clone(objective.weights)
    way = random_like(held, torch.Generator().manual_seed(0))
    try:
        axpy(_SECOND_PLACE * max(norm(held), 1.0) / norm(way), way, objective.weights)
        del way
        objective.draw = draw
        bend = objective.gradient()[1]
    finally:
        copy(held, objective.weights)
    axpy(-1.0, slope, bend)
    return _Seen(losses, loss, bend, length)


def normalises_over_batch(model: nn.Module) -> bool:
    """Whether a layer normalises over the batch now. With dropout, that difference could be taken for chance."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())


def _less(x: Vector, y: Vector) -> Vector:
    """``x −= y``."""
    axpy(-1.0, y, x)
    return x


def _cause(model: nn.Module, whole: _Seen, split: _Seen, loss_apart: bool, apart: float) -> str:
    count = len(split.losses)
    if split.loss and abs(whole.loss / split.loss / count - 1) < _HARMLESS:
        return f"it is a sum over the batch ({whole.loss:.4g}, and {split.loss:.4g} on average over {count} parts)"
    if normalises_over_batch(model):
        return "the model holds BatchNorm in training mode, for which a part is another batch"
    if loss_apart:
        found = f"it is {whole.loss:.4g}, and {split.loss:.4g} on average over {count} parts"
    else:
        found = f"its curvature differs from that of its {count} parts by {apart:.0%}"
    return f"{found}: it compares or weights examples, or they are not along the first dimension"
