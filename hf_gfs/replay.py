"""The loss of a training step, kept so that it can be evaluated again.

Two ways to it. :class:`TrainerReplay` wraps the trainer's ``compute_loss`` and calls it again on the same prepared
inputs: exact for every trainer whose ``training_step`` uses it. :class:`ModelReplay` sees the model's inputs
through a forward hook and takes the loss that the model returns; that is the trainer's own loss unless something
changes it behind the model's back, which :func:`disagreement` finds out from the gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core import Isolation, MeasurementError, Objective
from gfs_core.batches import batch_size, copied
from gfs_core.objective import LossFn
from gfs_core.python_state import PythonState
from gfs_core.ranks import Ranks, alone
from gfs_core.streams import RandomState, rewinder
from gfs_core.vectors import Vector, clone, dense, dots, local

Saw = Callable[[Tensor, int | None], None]

_COSINE = 1e-5  # 1 − cosine of two gradients of the same loss in float32 stays below; a loss term left out does not
_LENGTH = 1e-3


@dataclass
class _Seen:
    """What belongs to one micro-batch beside its inputs."""

    random: RandomState
    items: Any  # num_items_in_batch
    weight: float  # of this micro-batch's loss, so that the mean over micro-batches is the trainer's objective


class Kept(dict[str, Any]):
    """The inputs of one micro-batch with what belongs to them, which goes along into every deep copy.

    A part of it is a plain dictionary: its loss is a mean over the part.
    """

    def __init__(self, inputs: Mapping[str, Any], seen: _Seen) -> None:
        super().__init__(inputs)
        self.seen = seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept(copy.deepcopy(dict(self), memo), self.seen)


class Replay:
    """The micro-batches of a step, kept while ``keeping``; the two ways to their loss build upon it.

    Args:
        model: the module that is trained.
        saw: called with the loss of each micro-batch that training computes, scaled as :meth:`loss` scales it, and the
            number of its examples, if known.
    """

    def __init__(self, model: nn.Module, saw: Saw) -> None:
        self.model, self.saw = model, saw
        self.inputs: list[Kept] = []
        self.keeping = False

    def start(self) -> None:
        """Keep the micro-batches of the step that begins."""
        self.clear()
        self.keeping = True

    def clear(self) -> None:
        """Forget what was kept."""
        self.inputs = []

    def close(self) -> None:
        """Take all hooks away."""
        raise NotImplementedError

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch, evaluated again."""
        raise NotImplementedError

    def _remember(self, inputs: Mapping[str, Any], items: Any, weight: float = 1.0) -> None:
        seen = _Seen(RandomState([next(self.model.parameters())]), items, weight)
        try:
            own = copied(dict(inputs))  # training may do with its own what it likes
        except (MeasurementError, torch.OutOfMemoryError):  # the measurement will say so
            own = dict(inputs)
        self.inputs.append(Kept(own, seen))


class TrainerReplay(Replay):
    """Calls the trainer's own ``compute_loss`` again.

    Args:
        trainer: any trainer of transformers or built upon it; its ``compute_loss`` is wrapped until :meth:`close`.
        model: the module that is trained.
        saw: as in :class:`Replay`.
    """

    def __init__(self, trainer: Any, model: nn.Module, saw: Saw) -> None:
        super().__init__(model, saw)
        self.trainer = trainer
        self._module: Any = model
        self._own = vars(trainer).get("compute_loss")  # an instance attribute of the user's, put back at the end
        self._compute_loss = trainer.compute_loss

        @functools.wraps(trainer.compute_loss)
        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
            if self.keeping:
                self._keep(model, inputs, items)
            out = self._compute_loss(model, inputs, *args, **kwargs)
            loss = out[0] if isinstance(out, tuple) else out
            if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
                self.saw(loss.detach() * self._weight(items), batch_size(inputs))
            return out

        trainer.compute_loss = watched

    def close(self) -> None:
        """Give the trainer its ``compute_loss`` back."""
        self.clear()
        if self._own is None:
            vars(self.trainer).pop("compute_loss", None)
        else:
            self.trainer.compute_loss = self._own

    def _keep(self, model: Any, inputs: Any, items: Any) -> None:
        self._module = model
        self._remember(inputs, items, self._weight(items))

    def _weight(self, items: Any) -> float:
        scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            takes_items = getattr(self.trainer, "model_accepts_loss_kwargs", False) and items is not None
            scaled = takes_items or getattr(self.trainer, "compute_loss_func", None) is not None
        count = getattr(self.trainer, "current_gradient_accumulation_steps", 1)
        return float(count) if scaled else 1.0

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch as the trainer computes it; of a part of one, the mean over that part."""
        seen = inputs.seen if isinstance(inputs, Kept) else None
        if seen is not None:
            seen.random.restore()
        with _kept(self.trainer, self.model), self.trainer.compute_loss_context_manager(), alone(self._module):
            loss = self._compute_loss(self._module, dict(inputs), num_items_in_batch=seen and seen.items)
        if isinstance(loss, Tensor) and loss.ndim:
            loss = loss.mean()
        return loss if seen is None or seen.weight == 1.0 else loss * seen.weight  # type: ignore[no-any-return]


class ModelReplay(Replay):
    """Calls the model again and takes the loss it returns.

    Args:
        model: the module that is trained; it carries hooks around its forward until :meth:`close`.
        saw: as in :class:`Replay`.
        count: micro-batches of a step.
    """

    def __init__(self, model: nn.Module, saw: Saw, count: int) -> None:
        super().__init__(model, saw)
        self.count = count
        self._again = False
        before, after = (torch.compiler.disable(hook) for hook in (self._hook, self._seen_loss))  # type: ignore[no-untyped-call]
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    def close(self) -> None:
        """Take the hooks away."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def _seen_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if self._again or not module.training or not torch.is_grad_enabled():
            return
        loss = _loss_in(out)
        if loss is not None:  # each micro-batch's share is a sum over the items of the whole step
            times = self.count if kwargs.get("num_items_in_batch") is not None else 1
            self.saw(loss.detach() * times, batch_size([args, kwargs]))

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.keeping and module.training and torch.is_grad_enabled():
            kept = {**kwargs, **({_ARGS: list(args)} if args else {})}
            self._remember(kept, kept.pop("num_items_in_batch", None))

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss that the model returns.

        Raises:
            MeasurementError: it returns none.
        """
        seen = inputs.seen if isinstance(inputs, Kept) else None
        keywords = dict(inputs)
        args = keywords.pop(_ARGS, [])
        if seen is not None:
            seen.random.restore()
            if seen.items is not None:
                keywords["num_items_in_batch"] = seen.items
        self._again = True
        try:
            loss = _loss_in(self.model(*args, **keywords))
        finally:
            self._again = False
        if loss is None:
            raise MeasurementError("the model returns no loss")
        if seen is not None and seen.items is not None:
            loss = loss * len(self.inputs)  # each micro-batch's share is a sum over the items of the whole step
        return loss


def _loss_in(out: Any) -> Tensor | None:
    """The loss in what a model returns."""
    loss = out.get("loss") if isinstance(out, dict) else out[0] if isinstance(out, (tuple, list)) else out
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


_ARGS = "__positional__"


def disagreement(
    replay: Replay, model: nn.Module, params: Sequence[Tensor], reference: Reference | None, ranks: Ranks | None = None
) -> str:
    """Whether the replayed loss is what the trainer differentiated: a description of the difference, empty if none.

    The replayed gradient is compared with the ``.grad`` fields in direction (they may have been clipped), and with
    ``reference`` in length. Where the same evaluation twice does not give the same gradient, that noise is allowed for.
    With several processes, ``ranks``, the ``.grad`` fields hold the mean over them, and the reference does not.

    Raises:
        MeasurementError: the replayed loss has no gradient or is not finite.
    """
    pairs = [(p, p.grad) for p in params if p.grad is not None]
    if not pairs:
        return ""
    true = [dense(local(g)) for _, g in pairs]
    params = [p for p, _ in pairs]
    loss_fn: LossFn = lambda _model, inputs: replay.loss(inputs)  # noqa: E731
    with Isolation(model, params) as isolation:
        sharded = any(hasattr(p, "to_local") for p in params)  # whose gradients are a mean already
        objective = Objective(model, loss_fn, replay.inputs, params, isolation, ranks if sharded else None)
        loss, own = objective.gradient()
        again = own
        if ranks is not None and not sharded:
            again = clone(own)
            ranks.mean_of(loss, again)
        apart = _apart(again, true)
        noise = 0.0
        if apart > _COSINE:  # the same on all processes
            noise = _apart(objective.gradient()[1], own)
            noise = noise if ranks is None else ranks.mean(noise)
    if apart > _COSINE + 10 * noise:
        return f"gradients point apart, cosine {1 - apart:.6f}; replayed loss {loss:.6g}"
    if reference is not None and (length := reference.length()):
        for g, p in zip(own, params, strict=True):
            if p is reference.param and abs(float(g.norm()) / length - 1) > _LENGTH + 10 * noise**0.5:
                return f"its gradient is {float(g.norm()) / length:.4g} times as long; replayed loss {loss:.6g}"
    return ""


def _apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """1 − cosine of the angle between two vectors."""
    first: Vector = [t.detach().double() for t in a]
    second: Vector = [t.detach().double() for t in b]
    ab, aa, bb = dots([(first, second), (first, first), (second, second)])
    if aa == 0.0 or bb == 0.0:
        return 0.0 if aa == bb else 1.0
    return 1 - ab / math.sqrt(aa * bb)


class Reference:
    """The gradient of one parameter before clipping, as a measure of the loss's scale."""

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


@contextlib.contextmanager
def _kept(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Counters, metric lists and loss modules of the trainer are as before when this is left."""
    entered = (int, float, str, bool, dict, list, deque, set, Tensor, nn.Module, type(None))
    held = {k for k, v in vars(trainer).items() if isinstance(v, entered) or rewinder(v) is not None}
    skip = [v for k, v in vars(trainer).items() if "dataset" in k or k not in held]
    modules = {id(m) for m in model.modules()}
    skip += [v for v in vars(trainer).values() if isinstance(v, nn.Module) and id(v) in modules]
    wrapped = getattr(trainer, "model_wrapped", None)
    state = PythonState([("trainer", vars(trainer))], skip=[*skip, *model.parameters(), wrapped])
    try:
        yield
    finally:
        state.restore()
