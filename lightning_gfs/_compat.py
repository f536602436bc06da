"""Lightning's two packages and the private attributes that are used of them (checked with Lightning 2.6.6)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gfs_core.search.part import part_of

_FLAVOURS = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type, ...]:
    """``Callback`` of each of the two packages that is loaded; where none is, of the first that is installed."""
    loaded = [name for name in _FLAVOURS if name in sys.modules]
    if not loaded:
        try:
            importlib.import_module(_FLAVOURS[0])
            loaded = [_FLAVOURS[0]]
        except ModuleNotFoundError:
            importlib.import_module(_FLAVOURS[1])
            loaded = [_FLAVOURS[1]]
    return tuple(dict.fromkeys(importlib.import_module(name).Callback for name in loaded))


def after_batch_start(trainer: Any, call: Callable[[Any, int], None]) -> Callable[[], None]:
    """Call ``call(batch, batch_idx)`` after the ``on_train_batch_start`` of all callbacks and of the module.

    The strategy's ``on_train_batch_start`` comes last, just before the training step. So it is wrapped.

    Returns:
        A function that takes the wrapper away.
    """
    strategy = trainer.strategy
    own = strategy.on_train_batch_start

    @functools.wraps(own)
    def watched(batch: Any, batch_idx: int) -> None:
        own(batch, batch_idx)
        call(batch, batch_idx)

    strategy.on_train_batch_start = watched
    return lambda: vars(strategy).pop("on_train_batch_start", None)


def steps_with_this_batch(trainer: Any, batch_idx: int) -> bool:
    """Whether the present batch is the last micro-batch of an optimizer step."""
    should_accumulate = getattr(trainer.fit_loop, "_should_accumulate", None)
    if should_accumulate is not None:
        return not should_accumulate()
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)


def takes_no_step(trainer: Any) -> bool:
    """Whether this epoch takes no steps, as when stochastic weight averaging updates the BatchNorm statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def logger_step(trainer: Any) -> int:
    """The step under which Lightning's own values of the next optimizer step are logged.

    ``global_step`` counts the steps of every optimizer, but Lightning logs under the number of batches that stepped.
    Where that private counter is missing, this is ``global_step``.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def unscaled(trainer: Any, loss: Any) -> Any:
    """The loss of one micro-batch, from what is differentiated: its share in the step, times the gradient scaler's."""
    loss = loss.detach()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        loss = loss / scaler._scale  # `get_scale()` would wait for an accelerator
    count = trainer.accumulate_grad_batches
    return loss * count if count > 1 else loss


def stateful(trainer: Any) -> list[Any]:
    """What has a state beside the module and its optimizers: the schedulers and the gradient scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return [*(config.scheduler for config in trainer.lr_scheduler_configs), *([] if scaler is None else [scaler])]


def prepared(trainer: Any, batch: Any) -> Any:
    """A batch from a loader, as the training step gets it: moved to the module's device, through the user's hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_loaders(trainer: Any) -> list[Any]:
    """The loaders that training takes its batches from; empty where that private attribute is missing."""
    loaders = getattr(trainer.fit_loop, "_combined_loader", None)
    return list(getattr(loaders, "flattened", ()))


def keep_share(trainer: Any, share: float) -> None:
    """From the start of training on, let it go through a share of its data again and again, without an end."""
    if share == 1:
        return
    trainer.fit_loop.max_epochs = -1
    loaders = trainer.fit_loop._combined_loader
    loaders.flattened = [part_of(loader, share) for loader in loaders.flattened]
    with torch.random.fork_rng(devices=[]):  # what this draws was drawn for all of the data already
        iter(trainer.fit_loop._data_fetcher)


@contextlib.contextmanager
def quiet(trainer: Any, module: Any) -> Iterator[None]:
    """Context under the trainer's autocast in which everything that the module logs is dropped."""
    dummy = _flavour(trainer, "loggers.logger").DummyLogger
    loggers = trainer.loggers
    silenced = [m for m in module.modules() if hasattr(m, "log_dict") and hasattr(m, "training_step")]
    for m in silenced:
        m.__dict__["log"] = m.__dict__["log_dict"] = _nothing
    trainer.loggers = [dummy() for _ in loggers]
    try:
        with trainer.strategy.precision_plugin.train_step_context():
            yield
    finally:
        trainer.loggers = loggers
        for m in silenced:
            m.__dict__.pop("log", None)
            m.__dict__.pop("log_dict", None)


def advance_schedulers(trainer: Any) -> Callable[[], None]:
    """A function that steps the schedulers as the batches of one optimizer step, and the end of an epoch after it, do.

    ``ReduceLROnPlateau`` stands still.
    """
    configs = [c for c in trainer.lr_scheduler_configs if not c.reduce_on_plateau]
    per_epoch, per_step = trainer.num_training_batches, trainer.accumulate_grad_batches
    batch = epoch = 0  # batches of this epoch that have been, and epochs

    def step(interval: str, count: int) -> None:
        for config in configs:
            if config.interval == interval and count % config.frequency == 0:
                config.scheduler.step()

    def advance() -> None:
        nonlocal batch, epoch
        batch = min(batch - batch % per_step + per_step, per_epoch)
        step("step", batch)
        if batch == per_epoch:
            batch, epoch = 0, epoch + 1
            step("epoch", epoch)

    return advance


def validation_loader(trainer: Any) -> Any:
    """The first loader of validation batches within ``fit``; ``None``: there is none."""
    if not trainer.enable_validation:
        return None
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    return next(iter(loaders), None) if isinstance(loaders, (list, tuple)) else loaders


def bare(trainer: Any, callbacks: list[Any]) -> None:
    """Leave nothing but these callbacks: no loggers, no profiler, no sanity check."""
    dummy = _flavour(trainer, "loggers.logger").DummyLogger
    trainer.callbacks = callbacks
    trainer.loggers = [dummy() for _ in trainer.loggers]
    trainer.profiler = _flavour(trainer, "profilers").PassThroughProfiler()
    trainer.num_sanity_val_steps = 0


def stop(trainer: Any) -> None:
    """End ``fit`` after this batch, whatever its least number of steps and epochs."""
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
    trainer.should_stop = True


def belongs_to_run(trainer: Any) -> tuple[type, ...]:
    """Classes of what a trainer refers to and the user has made."""
    root = _flavour(trainer)
    return root.Callback, root.LightningDataModule, _flavour(trainer, "loggers").Logger


def overrides(trainer: Any, module: Any, name: str) -> bool:
    """Whether a module has its own method in the place of Lightning's."""
    return getattr(type(module), name, None) is not getattr(_flavour(trainer).LightningModule, name)


def loaders_in(data: Any) -> list[Any]:
    """The loaders in what ``fit`` takes as training or validation data."""
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [loader for part in data for loader in loaders_in(part)]
    return list(getattr(data, "flattened", [] if data is None or isinstance(data, Tensor) else [data]))


def _flavour(trainer: Any, name: str = "") -> Any:
    own = any(kind.__module__.startswith("pytorch_lightning") for kind in type(trainer).__mro__)
    root = "pytorch_lightning" if own else "lightning.pytorch"
    return importlib.import_module(f"{root}.{name}" if name else root)


def _nothing(*args: object, **kwargs: object) -> None:
    return None
