"""The only place that knows Lightning's two package names and its private attributes (tried on 2.6.6)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_FLAVOURS = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type, ...]:
    """``Callback`` of every flavour that is loaded; of the first that is installed where none is."""
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
    """Have ``call(batch, batch_idx)`` called when all callbacks, and the module, have had ``on_train_batch_start``.

    The strategy's own is the last, just before the training step. Returns what undoes it.
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
    """Whether the optimizer steps with the batch that begins, or has begun: the last of a step's micro-batches."""
    should_accumulate = getattr(trainer.fit_loop, "_should_accumulate", None)
    if should_accumulate is not None:
        return not should_accumulate()
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)


def takes_no_step(trainer: Any) -> bool:
    """Whether this epoch only computes losses, as when stochastic weight averaging renews the batch statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def logger_step(trainer: Any) -> int:
    """The step under which Lightning's own values of the next optimizer step are logged.

    ``global_step`` counts every optimizer; Lightning logs under the batches that stepped. Without that private
    counter: ``global_step``.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


@contextlib.contextmanager
def quiet(trainer: Any, module: Any) -> Iterator[None]:
    """Nothing that the module logs in here arrives anywhere; runs under the trainer's autocast."""
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


def _flavour(trainer: Any, name: str) -> Any:
    root = "pytorch_lightning" if type(trainer).__module__.startswith("pytorch_lightning") else "lightning.pytorch"
    return importlib.import_module(f"{root}.{name}")


def _nothing(*args: object, **kwargs: object) -> None:
    return None
