"""The loss of a training step, kept so that it can be evaluated again.

There are three ways:

- :class:`TrainerReplay` wraps the trainer's ``compute_loss`` and calls it again on the same prepared inputs. That is
  exact for every trainer whose ``training_step`` uses it.
- :class:`StepReplay` wraps ``training_step`` and gives its inputs to a loss of the user's.
- :class:`ModelReplay` sees the model's inputs through a forward hook. It takes the loss that the model returns, or the
  user's. The trainer may change the loss that the model returns; :func:`~hf_gfs.agreement.disagreement` detects that
  from the gradients.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core import MeasurementError
from gfs_core.loss.batches import batch_size, changed, copied
from gfs_core.loss.processes import alone
from gfs_core.loss.python_state import PythonState, is_of_the_user
from gfs_core.loss.streams import rewinder
from gfs_core.run.micro_batches import keep
from hf_gfs.kept import end_step, labels_in, opened

GivenLoss = Callable[[Any, Any], Any]  # loss_fn(model, inputs)
_ARGS = "__positional__"
_WHOLE = "__inputs__"  # holds the inputs of a training_step that are no mapping


class Replay:
    """The micro-batches of a step, kept while ``keeping``; base of the three ways to their loss.

    Args:
        model: the module that is trained.
        loss_fn: ``loss_fn(model, inputs)``, a loss of the user's; ``None``: the trainer's or the model's own.

    Attributes:
        inputs: the micro-batches kept so far.
        losses: training's loss on each micro-batch of the step so far, scaled as by :meth:`loss`, with the number of
            its examples if known.
        keeping: whether micro-batches are kept now.
        unseen: the message for a step without any micro-batch that could be kept.
        sums: whether losses that are given ``num_items_in_batch`` are shares of a sum, to be added and not averaged.
    """

    unseen = ""
    sums = False

    def __init__(self, model: nn.Module, loss_fn: GivenLoss | None = None) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.inputs: list[dict[str, Any]] = []
        self.losses: list[tuple[Tensor, int | None]] = []
        self.keeping = False

    def start(self, keeping: bool) -> None:
        """Begin a step, and keep its micro-batches if ``keeping``."""
        self.clear()
        self.keeping = keeping

    def end(self) -> None:
        """Finish a step: all its micro-batches are known."""
        self.keeping = False
        end_step(self.inputs, self.sums)

    def clear(self) -> None:
        """Forget what was kept."""
        self.inputs, self.losses = [], []

    def close(self) -> None:
        """Take all hooks away."""
        raise NotImplementedError

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch, evaluated again."""
        raise NotImplementedError

    def prepared(self, batch: Any) -> dict[str, Any]:
        """A batch from a loader of the user's, as :meth:`loss` takes it.

        Raises:
            MeasurementError: the batch does not name the model's inputs.
        """
        if not isinstance(batch, Mapping):
            raise MeasurementError(
                f"a batch from the loader of `probe=` is a {type(batch).__name__}, and the model takes its inputs by "
                "name: give a loader with the trainer's collator, whose batches are dictionaries"
            )
        device = next(self.model.parameters()).device
        return changed(dict(batch), lambda t: t.to(device))  # type: ignore[no-any-return]

    def again(self) -> Callable[[dict[str, Any]], Tensor]:
        """:meth:`loss` as a function that also refers to the user's loss, so that a snapshot finds what that holds."""
        return functools.partial(_loss_of, self, self.loss_fn)

    def _remember(self, inputs: Mapping[str, Any], items: Any = None, weight: float = 1.0) -> None:
        try:
            own = copied(dict(inputs))  # training may change its own
        except (MeasurementError, torch.OutOfMemoryError):  # the measurement will say so
            own = dict(inputs)
        self.inputs.append(keep(own, [next(self.model.parameters())], items=items, weight=weight))


class TrainerReplay(Replay):
    """Calls the trainer's own ``compute_loss`` again.

    Args:
        trainer: any trainer of transformers or built upon it; its ``compute_loss`` is wrapped until :meth:`close`.
        model: the module that is trained.
    """

    unseen = "`compute_loss` was not called during the step, as where `training_step` computes the loss itself"

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        super().__init__(model)
        self.trainer = trainer
        self._module: Any = model
        self._compute_loss = trainer.compute_loss

        @functools.wraps(trainer.compute_loss)
        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
            examples = batch_size(inputs)
            if self.keeping:
                self._module = model
                self._remember(inputs, items, self._weight(items))
            out = self._compute_loss(model, inputs, *args, **kwargs)
            loss = out[0] if isinstance(out, tuple) else out
            if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
                self.losses.append((loss.detach() * self._weight(items), examples))
            return out

        self._put_back = _replace(trainer, "compute_loss", watched)

    def close(self) -> None:
        """Give the trainer its ``compute_loss`` back."""
        self.clear()
        self._put_back()

    def prepared(self, batch: Any) -> dict[str, Any]:
        """A batch from a loader of the user's; a loss function that divides by the number of items is given theirs."""
        inputs = super().prepared(batch)
        if getattr(self.trainer, "compute_loss_func", None) is None:
            return inputs
        weight = next(self.model.parameters())
        return keep(inputs, [weight], items=labels_in(inputs) or None, weight=1.0, per_label=1.0)

    def _weight(self, items: Any) -> float:
        scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            takes_items = getattr(self.trainer, "model_accepts_loss_kwargs", False) and items is not None
            scaled = takes_items or getattr(self.trainer, "compute_loss_func", None) is not None
        return _micro_batches(self.trainer) if scaled else 1.0

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch as the trainer computes it; for a part, with the part's share of the items."""
        own, beside = opened(inputs)
        with _kept(self.trainer, self.model), self.trainer.compute_loss_context_manager(), alone(self._module):
            loss = self._compute_loss(self._module, own, num_items_in_batch=beside.items)
        if isinstance(loss, Tensor) and loss.ndim:
            loss = loss.mean()
        return loss if beside.weight == 1.0 else loss * beside.weight  # type: ignore[no-any-return]


class StepReplay(Replay):
    """Gives the inputs of the trainer's ``training_step`` to a loss of the user's.

    Args:
        trainer: any trainer of transformers or built upon it; its ``training_step`` is wrapped until :meth:`close`.
        model: the module that is trained.
        loss_fn: ``loss_fn(model, inputs)``, the mean loss of one micro-batch.
    """

    unseen = "`training_step` was not called during the step"

    def __init__(self, trainer: Any, model: nn.Module, loss_fn: GivenLoss) -> None:
        super().__init__(model, loss_fn)
        self.trainer = trainer
        self._module: Any = model
        training_step = trainer.training_step

        @functools.wraps(training_step)
        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            examples = batch_size(inputs)
            if self.keeping:
                self._module = model
                self._remember(inputs if isinstance(inputs, Mapping) else {_WHOLE: inputs})
            loss = training_step(model, inputs, *args, **kwargs)
            if isinstance(loss, Tensor) and loss.numel() == 1:  # the trainer has divided it
                self.losses.append((loss.detach() * _micro_batches(trainer), examples))
            return loss

        self._put_back = _replace(trainer, "training_step", watched)

    def close(self) -> None:
        """Give the trainer its ``training_step`` back."""
        self.clear()
        self._put_back()

    def prepared(self, batch: Any) -> dict[str, Any]:
        """A batch from a loader of the user's; the loss gets it as it is."""
        return super().prepared(batch if isinstance(batch, Mapping) else {_WHOLE: batch})

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The user's loss of one micro-batch."""
        own, _ = opened(inputs)
        given = own[_WHOLE] if own.keys() == {_WHOLE} else own
        with _kept(self.trainer, self.model), self.trainer.compute_loss_context_manager(), alone(self._module):
            return self.loss_fn(self._module, given)  # type: ignore[misc, no-any-return]


class ModelReplay(Replay):
    """Calls the model again and takes the loss that it returns, or gives its inputs to a loss of the user's.

    Args:
        model: the module that is trained; it has forward hooks until :meth:`close`.
        loss_fn: ``loss_fn(model, inputs)``, the mean loss of one micro-batch; ``None``: what the model returns.
    """

    unseen = "no forward pass of the model was seen during the step"
    sums = True

    def __init__(self, model: nn.Module, loss_fn: GivenLoss | None = None) -> None:
        super().__init__(model, loss_fn)
        self._items: list[bool] = []  # for each loss: whether it is a sum over items, divided by those of the step
        self._again = False
        before, after = (torch.compiler.disable(hook) for hook in (self._hook, self._seen_loss))  # type: ignore[no-untyped-call]
        self._handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
        if loss_fn is None:
            self._handles.append(model.register_forward_hook(after, with_kwargs=True))

    def end(self) -> None:
        """Finish a step: losses that are shares of a sum are multiplied by the number of micro-batches."""
        super().end()
        count = len(self.losses)
        self.losses = [
            (loss * count if share else loss, examples)
            for (loss, examples), share in zip(self.losses, self._items, strict=True)
        ]

    def clear(self) -> None:
        """Forget what was kept."""
        super().clear()
        self._items = []

    def close(self) -> None:
        """Take the hooks away."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def _seen_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if self._again or not module.training or not torch.is_grad_enabled():
            return
        loss = _loss_in(out)
        if loss is not None:
            self.losses.append((loss.detach(), batch_size([args, kwargs])))
            self._items.append(kwargs.get("num_items_in_batch") is not None)

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.keeping and module.training and torch.is_grad_enabled():
            kept = {**kwargs, **({_ARGS: list(args)} if args else {})}
            items = kept.pop("num_items_in_batch", None)
            if self.loss_fn is None:
                self._remember(kept, items)
            else:
                self._remember(_named(module, args, kept))

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss that the model returns, or the user's.

        Raises:
            MeasurementError: the model returns none.
        """
        keywords, beside = opened(inputs)
        self._again = True
        try:
            if self.loss_fn is not None:
                return self.loss_fn(self.model, keywords)  # type: ignore[no-any-return]
            if beside.items is not None:
                keywords["num_items_in_batch"] = beside.items
            loss = _loss_in(self.model(*keywords.pop(_ARGS, []), **keywords))
        finally:
            self._again = False
        if loss is None:
            raise MeasurementError("the model returns no loss")
        return loss if beside.weight == 1.0 else loss * beside.weight


def _loss_of(replay: Replay, _given: GivenLoss | None, inputs: dict[str, Any]) -> Tensor:
    return replay.loss(inputs)


def _named(module: nn.Module, args: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by name, the positional ones too where their names are known."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]
    if not args or len(names) < len(args):
        return kept
    return {**dict(zip(names, args, strict=False)), **{k: v for k, v in kept.items() if k != _ARGS}}


def _micro_batches(trainer: Any) -> float:
    """Number of micro-batches of the present step."""
    return float(getattr(trainer, "current_gradient_accumulation_steps", 1))


def _replace(trainer: Any, name: str, method: Any) -> Callable[[], None]:
    """Replace a method of the trainer; the function returned restores the trainer's own."""
    own = vars(trainer).get(name)  # an instance attribute of the user's

    def put_back() -> None:
        if own is None:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, own)

    setattr(trainer, name, method)
    return put_back


def _loss_in(out: Any) -> Tensor | None:
    """The loss in what a model returns; ``None`` where there is none."""
    loss = out.get("loss") if isinstance(out, dict) else out[0] if isinstance(out, (tuple, list)) else out
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


@contextlib.contextmanager
def _kept(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Put back the trainer's counters, metric lists, loss modules, random streams and iterators on exit.

    Raises:
        MeasurementError: from the loss, where it takes from an iterator that cannot be put back.
    """
    held = {k for k, v in vars(trainer).items() if _is_state(v) and "dataset" not in k and "collator" not in k}
    skip = [v for k, v in vars(trainer).items() if k not in held]
    skip += [*model.modules(), *model.parameters(), getattr(trainer, "model_wrapped", None)]
    classes = [cls for cls in type(trainer).__mro__ if is_of_the_user(cls)]
    members = [(f"{cls.__name__}.{k}", v) for cls in classes for k, v in vars(cls).items()]
    state = PythonState([("trainer", vars(trainer))], skip, members)
    try:
        state.guard()
        yield
    finally:
        state.restore()


def _is_state(value: Any) -> bool:
    """Whether an attribute of a trainer is something that a loss may change, rather than part of the run itself."""
    entered = (int, float, str, bool, dict, list, deque, set, tuple, Tensor, nn.Module, type(None))
    return isinstance(value, entered) or rewinder(value) is not None or is_of_the_user(type(value))
