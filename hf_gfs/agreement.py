"""Whether the loss that is evaluated again is the one that the trainer has differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gfs_core import MeasurementError, Objective, StateSnapshot
from gfs_core.linalg.inner import WHOLE, InnerProduct
from gfs_core.linalg.vectors import Vector, clone, dense, local
from gfs_core.loss.objective import LossFn
from gfs_core.run.ranks import Ranks
from hf_gfs.replay import Replay

_COSINE = 1e-5  # 1 − cosine of two gradients; in float32 the same loss stays below, one without a term of it does not
_LENGTH = 1e-3  # relative difference of their lengths
NO_GRADIENT = (
    "no gradient is left when the optimizer is called, as where the steps are taken inside of the backward pass: the "
    "loss cannot be compared with the trainer's"
)
SOME_GRADIENT = (
    "no gradient is left for {} when the optimizer is called, as where some steps are taken inside of the backward "
    "pass: the loss cannot be compared with the trainer's"
)


class GradientMissing(MeasurementError):
    """Weights that the loss depends on have no gradient when the optimizer is called."""


def disagreement(
    replay: Replay, model: nn.Module, params: Sequence[Tensor], reference: Reference | None, ranks: Ranks | None = None
) -> str:
    """How the replayed loss differs from the one that the trainer differentiated, in words; empty where it does not.

    The direction of the replayed gradient is compared with the ``.grad`` fields, which may have been clipped. Its
    length is compared with ``reference``. Where two evaluations of the replayed loss give different gradients, the
    tolerance grows with that difference. With several processes (``ranks``) the ``.grad`` fields hold the mean over
    them; the reference is of this process.

    Raises:
        GradientMissing: no ``.grad`` is left, or none for some weight that the loss depends on.
        MeasurementError: the replayed loss has no gradient, or one of the two is not finite.
    """
    if all(p.grad is None for p in params):
        raise GradientMissing(NO_GRADIENT)
    grads = [p.grad for p in params]
    true = [dense(local(g)) for g in grads if g is not None]
    inner = WHOLE
    if ranks is not None:
        inner = ranks.inner_product([p for p, g in zip(params, grads, strict=True) if g is not None])
    loss_fn: LossFn = lambda _model, inputs: replay.loss(inputs)  # noqa: E731
    with StateSnapshot(model, params, replay.again()) as isolation:
        sharded = any(hasattr(p, "to_local") for p in params)  # their gradients are a mean already
        objective = Objective(model, loss_fn, replay.inputs, params, isolation, ranks if sharded else None)
        loss, all_of_it = objective.gradient()
        used = [p for p, g, own in zip(params, grads, all_of_it, strict=True) if g is None and bool(own.any())]
        if bool(used) if ranks is None else ranks.any(bool(used)):
            raise GradientMissing(SOME_GRADIENT.format(_name(model, used)))
        own = _where_some(grads, all_of_it)
        again = own
        if ranks is not None and not sharded:
            again = clone(own)
            ranks.mean_of(loss, again)
        apart = _apart(again, true, inner)
        if math.isnan(apart):
            raise MeasurementError("the gradient of the training step is not finite")
        noise = 0.0
        if apart > _COSINE:  # the same on all processes
            noise = _apart(_where_some(grads, objective.gradient()[1]), own, inner)
            noise = noise if ranks is None else ranks.mean(noise)
    if apart > _COSINE + 10 * noise:
        return f"gradients point apart, cosine {1 - apart:.6f}; replayed loss {loss:.6g}"
    if reference is not None and (length := reference.length()):
        for g, p in zip(all_of_it, params, strict=True):
            if p is reference.param and abs(float(g.norm()) / length - 1) > _LENGTH + 10 * noise**0.5:
                return f"its gradient is {float(g.norm()) / length:.4g} times as long; replayed loss {loss:.6g}"
    return ""


def _where_some(grads: Sequence[Tensor | None], vector: Vector) -> Vector:
    """The tensors of ``vector`` whose parameter has a gradient."""
    return [v for g, v in zip(grads, vector, strict=True) if g is not None]


def _name(model: nn.Module, params: Sequence[Tensor]) -> str:
    names = {id(p): name for name, p in model.named_parameters()}
    if not params:
        return "some weights on another rank"
    first = f"`{names.get(id(params[0]), 'a weight')}`"
    return first if len(params) == 1 else f"{first} and {len(params) - 1} more"


def _apart(a: Sequence[Tensor], b: Sequence[Tensor], inner: InnerProduct) -> float:
    """1 − cosine of the angle between two vectors."""
    first: Vector = [t.detach().double() for t in a]
    second: Vector = [t.detach().double() for t in b]
    ab, aa, bb = inner.dots([(first, second), (first, first), (second, second)])
    if aa == 0.0 or bb == 0.0:
        return 0.0 if aa == bb else 1.0
    return 1 - ab / math.sqrt(aa * bb)


class Reference:
    """The gradient of one parameter before clipping, which shows the scale of the trainer's loss."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.param = params[-1]
        self._grad: Tensor | None = None
        self._handle: Any = self.param.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]

    def _hook(self, param: Tensor) -> None:
        self._grad = None if param.grad is None else param.grad.detach().clone()

    def length(self) -> float:
        """Norm of the gradient; 0 where there was none."""
        return 0.0 if self._grad is None else float(self._grad.norm())

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        self._grad = None
