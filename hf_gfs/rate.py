"""A learning rate for ``Trainer.train``, tried out before it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gfs_core import ConfigError, FoundRate, GFSWarning, Measurement
from gfs_core.search.kept import Kept, parts_of
from gfs_core.search.part import examples_of
from gfs_core.search.schedule import Setting, recorded
from gfs_core.search.steering import Steering
from gfs_core.search.trial import JUDGED, MEASURED, Progress, Trial, Trials, check_alone, check_optimizer, check_steps
from hf_gfs.callback import GFSCallback

_PACKAGES = ("transformers", "accelerate")
_NOT_OURS = ("builtins", "torch", "__main__")


def find_rate(trainer: Any, *, progress: Progress = lambda what, step: None) -> FoundRate:
    """Find the learning rate of a training before it begins, by trying it out; see :func:`gfs_core.find_rate`.

    Each run is a ``trainer.train()`` that ends early, with the trainer's own ``compute_loss``, collator, optimizer,
    clipping, accumulation and precision. The shape of the schedule is read off its scheduler. Pilots are judged by
    ``compute_loss`` on the first 32 batches of ``eval_dataset``, in eval mode, or by the losses of their last 16 steps.

    Callbacks take no part: nothing is logged, evaluated or saved. Afterwards everything is as it was, bitwise: the
    trainer, the model, random streams. With ``trainer.args.learning_rate *= found.factor``, ``trainer.train()`` is then
    the run of a new trainer with that rate. What code of a trainer writes to files or prints cannot be put back.

    Args:
        trainer: a ``Trainer`` of transformers, or one that is built upon it, before its ``train``.
        progress: called with what runs and the steps it has taken.

    Returns:
        The rate with its range, the ramp, the pilots, the cost, and what is not known.

    Raises:
        ConfigError: a training that cannot be searched: several processes or devices, DeepSpeed, FSDP, a schedule that
            goes by a metric, fewer than 100 steps.
        MeasurementError: no rate was found at which a pilot learns.
    """
    _check(trainer)
    train = _Train(trainer)
    packages = {kind.__module__.partition(".")[0] for kind in type(trainer).__mro__}
    callbacks = tuple(type(c) for c in trainer.callback_handler.callbacks)
    roots = parts_of(trainer, packages.difference(_NOT_OURS).union(_PACKAGES), callbacks)
    for name in ("config", "generation_config"):
        if hasattr(config := getattr(trainer.model, name, None), "__dict__"):
            roots.append((name, vars(config)))
    sets = [d for d in (trainer.train_dataset, trainer.eval_dataset) if d is not None]
    beside = [of for of in (trainer.lr_scheduler, getattr(trainer.accelerator, "scaler", None)) if of is not None]
    kept = Kept(
        _modules(trainer),
        trainer.optimizer,
        beside=beside,
        roots=roots,
        functions=[("data", list(getattr(d, "__dict__", {}).values())) for d in sets],
        skip=sets,
    )
    with contextlib.closing(kept), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of each run is said of the training too
        warnings.simplefilter("default", GFSWarning)
        try:
            train.look()
        finally:
            kept.put_back()
        return Trials(train, kept, progress).search()


def validation_losses(trainer: Any) -> list[float] | None:
    """Losses of the first batches of ``eval_dataset``, in eval mode, in which the model is left; ``None``: no batch."""
    data = trainer.eval_dataset
    if data is None:
        return None
    loader = trainer.get_eval_dataloader(next(iter(data.values())) if isinstance(data, Mapping) else None)
    losses: list[float] = []
    trainer.model.eval()
    with torch.no_grad():
        for batch in itertools.islice(loader, JUDGED):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                losses.append(float(trainer.compute_loss(trainer.model, inputs)))
    return losses or None


@contextlib.contextmanager
def sharing(trainer: Any, share: float, steps: int) -> Iterator[None]:
    """Context in which training goes through a share of its data, again and again for at least so many steps."""
    changed: list[tuple[Any, Any]] = []
    loader_of = trainer.get_train_dataloader

    def loader_of_share() -> Any:
        loader = loader_of()
        if (examples := examples_of(loader, share)) is not None:
            batches = loader.batch_sampler
            changed.append((batches, batches.sampler))
            batches.sampler = examples
        return loader

    if share < 1:
        trainer.get_train_dataloader, trainer.args.max_steps = loader_of_share, steps
    try:
        yield
    finally:
        for batches, sampler in changed:
            batches.sampler = sampler


def _check(trainer: Any) -> None:
    """Refuse what cannot be searched, as far as it is known before ``train``.

    Raises:
        ConfigError: why.
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
        raise ConfigError(f"`trainer` must be a Trainer of transformers, got {type(trainer).__name__}")
    check_alone()
    arguments = trainer.args
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise ConfigError("find_rate runs in one process on one device: set CUDA_VISIBLE_DEVICES=0")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("find_rate runs in one process: give it a trainer without DeepSpeed and FSDP")
    if trainer.state.global_step > 0:
        raise ConfigError(f"the trainer has taken {trainer.state.global_step} steps already; give it a new one")


def _modules(trainer: Any) -> nn.Module:
    """The model, and whatever else the trainer holds that can be trained, as a loss with weights of its own."""
    held = [v for value in vars(trainer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    others = [m for m in held if isinstance(m, nn.Module) and any(p.requires_grad for p in m.parameters())]
    return nn.ModuleList([trainer.model, *others])


class _Train:
    """The training of ``trainer.train``."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        own = next((c for c in trainer.callback_handler.callbacks if isinstance(c, GFSCallback)), None)
        self.loss_fn = None if own is None else own.loss_fn
        self.schedule: list[Setting] = []
        self.validated = trainer.eval_dataset is not None

    def look(self) -> None:
        """Read off the schedule.

        Raises:
            ConfigError: the training cannot be searched.
        """
        look = _Look()
        with contextlib.suppress(_Seen):
            self._train([look])
        self.schedule = look.schedule

    def run(self, trial: Trial) -> None:
        """Train from the start until the trial is over."""
        ratios = _Ratios(loss_fn=self.loss_fn, **asdict(MEASURED)) if trial.measures else None
        watch = _Watch(self.trainer, trial, ratios)
        try:
            with sharing(self.trainer, trial.share, len(self.schedule)):
                self._train([watch, *([] if ratios is None else [ratios])])
        finally:
            watch.close()

    def _train(self, callbacks: list[TrainerCallback]) -> None:
        trainer = self.trainer
        trainer.callback_handler.callbacks = callbacks
        trainer.args.eval_on_start = trainer.args.load_best_model_at_end = trainer.args.push_to_hub = False
        trainer.train()


class _Seen(Exception):
    """Everything was seen; ends the training before its first step."""


class _Look(TrainerCallback):  # type: ignore[misc]
    """Reads off the schedule."""

    schedule: list[Setting]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is there now.

        Raises:
            ConfigError: the training cannot be searched.
            _Seen: always else.
        """
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        check_optimizer(optimizer, [scheduler])
        check_steps(state.max_steps)
        self.schedule = recorded(optimizer, [scheduler], state.max_steps, lambda step: scheduler.step())
        raise _Seen


class _Ratios(GFSCallback):
    """Keeps the latest measurement in the place of logging it."""

    latest: Measurement | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure, without a history file."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.monitor is not None:
            self.monitor.journal.path = None

    def _publish(self, measurement: Measurement | None, state: Any, control: Any) -> None:
        self.latest = measurement or self.latest


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Sets the rates of a trial, tells it of each step, and ends the training when it is over."""

    def __init__(self, trainer: Any, trial: Trial, ratios: _Ratios | None) -> None:
        self.trainer, self.trial, self.ratios = trainer, trial, ratios
        self.losses: list[float] = []  # of the micro-batches of this step so far
        self.steering: Steering | None = None
        training_step = trainer.training_step

        @functools.wraps(training_step)
        def seen(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self.losses.append(float(loss) * trainer.current_gradient_accumulation_steps)  # it is its share
            return loss

        trainer.training_step = seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to set the rates."""
        self.steering = Steering(self.trial, kwargs["optimizer"])
        if self.ratios is not None:
            self.ratios.set_trainer(self.trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rates of the step."""
        assert self.steering is not None
        self.losses = []
        self.steering.set_rates()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the step."""
        loss = sum(self.losses) / len(self.losses)
        made = None if self.ratios is None else self.ratios.latest
        if made is None:
            over = self.trial.took(loss)
        else:
            over = self.trial.took(loss, made.grad_norm, made.running_stability_ratio)
            self.ratios.latest = None  # type: ignore[union-attr]
        if over:
            self.close()
            if self.trial.judges:
                self.trial.judged = validation_losses(self.trainer)
            control.should_training_stop = True

    def close(self) -> None:
        """Take all hooks away."""
        if self.steering is not None:
            self.steering.close()
        if self.ratios is not None:
            self.ratios._close()
