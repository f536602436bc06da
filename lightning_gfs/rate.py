"""A learning rate for Lightning's ``Trainer.fit``, tried out before it; in the manner of Lightning's ``Tuner``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from gfs_core import ConfigError, FoundRate, GFSWarning, Measurement
from gfs_core.search.kept import Kept, parts_of
from gfs_core.search.schedule import Setting, recorded
from gfs_core.search.steering import Steering
from gfs_core.search.trial import JUDGED, MEASURED, Progress, Trial, Trials, check_alone, check_optimizer, check_steps
from lightning_gfs import _compat
from lightning_gfs.callback import GFSCallback, takes_index

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    _Base = Callback
else:
    _Base = type("_Base", _compat.callback_bases(), {})

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
# Callbacks of Lightning that change on the way what is trained, or how: no short run shows what that comes to.
_CHANGING = ("BaseFinetuning", "GradientAccumulationScheduler", "ModelPruning", "StochasticWeightAveraging")


def find_rate(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    progress: Progress = lambda what, step: None,
) -> FoundRate:
    """Find the learning rate of a training before it begins, by trying it out; see :func:`gfs_core.find_rate`.

    Each run is a ``trainer.fit`` that ends early, with the module's own ``training_step``, optimizer, clipping,
    accumulation and precision. The shape of the schedule is read off its schedulers. Pilots are judged by the losses of
    ``training_step`` on the first 32 validation batches, in eval mode, or by those of their last 16 steps.

    Callbacks and loggers take no part, and there is no validation. Afterwards everything is as it was, bitwise: the
    trainer, the module, the data module, random streams. What code of the module writes to files or prints cannot be
    put back.

    Args:
        trainer: the trainer, of ``lightning.pytorch`` or ``pytorch_lightning``, before its ``fit``.
        model: the module.
        train_dataloaders: as for ``fit``.
        val_dataloaders: as for ``fit``.
        datamodule: as for ``fit``.
        progress: called with what runs and the steps it has taken.

    Returns:
        The rate with its range, the ramp, the pilots, the cost, and what is not known.

    Raises:
        ConfigError: a training that cannot be searched: manual optimization, several optimizers or processes, a
            schedule that goes by a metric or is not set by schedulers alone, fewer than 100 steps.
        MeasurementError: no rate was found at which a pilot learns.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_gfs import find_rate
        >>> find_rate(Trainer(max_steps=20, logger=False, barebones=True), BoringModel())
        Traceback (most recent call last):
        ...
        gfs_core.errors.ConfigError: `steps` must be ≥ 100, for shorter runs to tell something of it; got 20
    """
    _check(trainer, model)
    given = (train_dataloaders, val_dataloaders, datamodule)
    modules = [d for d in given if hasattr(d, "prepare_data")]
    loaders = _compat.loaders_in([d for d in given if not hasattr(d, "prepare_data")])
    if any(isinstance(loader, Iterator) for loader in loaders):
        raise ConfigError("the data are an iterator, which can be gone through once; give the loader")
    fit = _Fit(trainer, model, given)
    roots = parts_of(trainer, _PACKAGES, _compat.belongs_to_run(trainer))
    kept = Kept(
        model,
        data=[*loaders, *(value for d in modules for value in vars(d).values())],
        roots=[*roots, *(("datamodule", vars(d)) for d in modules)],
    )
    callbacks = [c for c in trainer.callbacks if _counts(c)]  # type: ignore[attr-defined]
    with contextlib.closing(kept), _quiet():
        try:
            fit.look()
        finally:
            kept.put_back()
        found = Trials(fit, kept, progress).search()
    if not callbacks:
        return found
    names = ", ".join(type(c).__name__ for c in callbacks)
    return replace(found, unsure=(*found.unsure, f"Callbacks took no part, and may change what is trained: {names}."))


def validation_losses(trainer: Any, module: Any, loader: Any) -> list[float]:
    """Losses of ``training_step`` on the first batches of a loader, in eval mode, in which the module is left."""
    losses: list[float] = []
    module.eval()
    with torch.no_grad(), _compat.quiet(trainer, module):
        for i, batch in enumerate(itertools.islice(loader, JUDGED)):
            given = _compat.prepared(trainer, batch)
            out = module.training_step(given, i) if takes_index(module) else module.training_step(given)
            losses.append(float(_loss_in(out)))
    return losses


def _check(trainer: Any, model: Any) -> None:
    """Refuse what cannot be searched, as far as it is known before ``fit``.

    Raises:
        ConfigError: why.
    """
    if not hasattr(trainer, "fit_loop"):
        raise ConfigError(f"`trainer` must be a Trainer of Lightning, got {type(trainer).__name__}")
    if not hasattr(model, "automatic_optimization"):
        raise ConfigError(f"`model` must be a LightningModule, got {type(model).__name__}")
    check_alone()
    strategy = type(trainer.strategy).__name__
    if not strategy.startswith("SingleDevice"):
        raise ConfigError(f"find_rate runs in one process on one device, and not with {strategy}: give it devices=1")
    if trainer.fast_dev_run:
        raise ConfigError("with `fast_dev_run` there is no training to find a rate for; leave it out")
    if trainer.global_step > 0:
        raise ConfigError(f"the trainer has taken {trainer.global_step} steps already; give it a new one")
    if not model.automatic_optimization:
        raise ConfigError(
            "the module uses manual optimization, whose steps it takes itself: there is no rate of the trainer's to "
            "look for; gfs_core.find_rate takes a loss and an optimizer"
        )
    if _compat.overrides(trainer, model, "lr_scheduler_step"):
        raise ConfigError("the module steps its schedulers in `lr_scheduler_step`: their rates cannot be read off")
    for callback in trainer.callbacks:
        if any(kind.__name__ in _CHANGING for kind in type(callback).__mro__):
            raise ConfigError(
                f"{type(callback).__name__} changes the training on the way, which short runs do not show; look for "
                "the rate without it"
            )


def _counts(callback: Any) -> bool:
    """Whether a callback may change what is trained, as far as its class tells."""
    own = type(callback).__module__.partition(".")[0] not in (*_PACKAGES, "lightning_gfs")
    return own or any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)


class _Fit:
    """The training of ``trainer.fit``."""

    def __init__(self, trainer: Any, model: Any, data: tuple[Any, ...]) -> None:
        self.trainer, self.model, self.data = trainer, model, data
        own = next((c for c in trainer.callbacks if isinstance(c, GFSCallback)), None)
        self.loss_fn = None if own is None else own.loss_fn
        self.schedule: list[Setting] = []
        self.validated = False

    def look(self) -> None:
        """Read off the schedule, and see whether there are validation data."""
        self._fit([_Look(self)])

    def run(self, trial: Trial) -> None:
        """Train from the start until the trial is over."""
        ratios = _Ratios(self.loss_fn, **asdict(MEASURED)) if trial.measures else None
        self._fit([_Watch(trial, ratios), *([] if ratios is None else [ratios])])

    def _fit(self, callbacks: list[Any]) -> None:
        _compat.bare(self.trainer, callbacks)
        self.model.configure_callbacks = list  # none of the module's own
        train, validation, module = self.data
        self.trainer.fit(self.model, train, validation, module)


class _Look(_Base):
    """Reads off the schedule, and ends the training before its first step."""

    def __init__(self, fit: _Fit) -> None:
        self.fit = fit

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is there now.

        Raises:
            ConfigError: the training cannot be searched.
        """
        optimizers = [o for o in trainer.optimizers if type(o).__name__ != "_MockOptimizer"]  # Lightning's for none
        if len(optimizers) != 1:
            raise ConfigError(f"`configure_optimizers` returned {len(optimizers)} optimizers; find_rate is for one")
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        check_optimizer(optimizers[0], schedulers)
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ConfigError("the trainer has no end: give it max_steps, or max_epochs and data with a length")
        check_steps(steps)
        advance = _compat.advance_schedulers(trainer)
        self.fit.schedule = recorded(optimizers[0], schedulers, int(steps), lambda step: advance())
        self.fit.validated = _compat.validation_loader(trainer) is not None
        _compat.stop(trainer)


class _Ratios(GFSCallback):
    """Keeps the latest measurement in the place of logging it."""

    latest: Measurement | None = None

    def _publish(self, trainer: Any, module: Any, measurement: Measurement, name: str, step: int) -> None:
        self.latest = measurement


class _Watch(_Base):
    """Sets the rates of a trial, tells it of each step, and ends the training when it is over."""

    def __init__(self, trial: Trial, ratios: _Ratios | None) -> None:
        self.trial, self.ratios = trial, ratios
        self.losses: list[float] = []  # of the micro-batches of this step so far
        self.validation: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to set the rates; no validation runs."""
        self.steering = Steering(self.trial, trainer.optimizers[0])
        self.validation = _compat.validation_loader(trainer)
        trainer.limit_val_batches = 0
        _compat.keep_share(trainer, self.trial.share)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the rates of the step."""
        self.steering.set_rates()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in the loss, and the step if it was taken with this batch."""
        loss = _loss_in(outputs)
        if loss is None:
            raise ConfigError("`training_step` returned no loss, without which a run cannot be judged")
        self.losses.append(float(loss) * trainer.accumulate_grad_batches)  # Lightning has divided it
        if trainer.global_step == len(self.trial.points):
            return
        made = None if self.ratios is None else self.ratios.latest
        if made is None:
            over = self.trial.took(sum(self.losses) / len(self.losses))
        else:
            over = self.trial.took(sum(self.losses) / len(self.losses), made.grad_norm, made.running_stability_ratio)
            self.ratios.latest = None  # type: ignore[union-attr]
        self.losses = []
        if over:
            self.steering.close()
            if self.trial.judges and self.validation is not None:
                self.trial.judged = validation_losses(trainer, pl_module, self.validation)
            _compat.stop(trainer)


def _loss_in(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which Lightning does not say for each run what it says for a training."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", *_PACKAGES[1:3])]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", GFSWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
