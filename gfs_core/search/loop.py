"""Finding the learning rate of a plain training loop, in the same process; everything is put back afterwards."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gfs_core.errors import ConfigError
from gfs_core.linalg.inner import WHOLE
from gfs_core.linalg.vectors import local
from gfs_core.optimizers.thresholds import parameters_of, unwrap
from gfs_core.run.monitor import StabilityMonitor
from gfs_core.search.found import FoundRate
from gfs_core.search.kept import Kept
from gfs_core.search.part import part_of
from gfs_core.search.schedule import recorded
from gfs_core.search.trial import JUDGED, MEASURED, Trial, Trials, check_alone, check_optimizer, check_steps


def find_rate(
    model: nn.Module,
    optimizer: Any,
    loss_of: Callable[[Any], Tensor],
    batches: Iterable[Any],
    steps: int,
    *,
    scheduler: Any = None,
    validation: Iterable[Any] | None = None,
    before_step: Callable[[], object] | None = None,
    scaler: Any = None,
    accumulate: int = 1,
    progress: Callable[[str, int], object] = lambda what, step: None,
) -> FoundRate:
    """Find the learning rate of a training before it begins, by trying it out.

    A ramp, a training whose rate rises from a hundredth of the present one on, shows where the loss is lost and from
    which rate on the stability ratio no longer follows the rate. Then pilots are compared at rates half a decade apart:
    each is the training in small, a tenth of the steps over a tenth of the data, with the schedule in its shape. A
    search costs about half a training. Afterwards everything is as it was, bitwise: weights, buffers, gradients, the
    optimizer, the scheduler, random streams, and the Python state of the model, the loss and the loaders.

    Args:
        model: the module, as training will begin with it.
        optimizer: its torch optimizer, or a wrapper of one. The largest rate of its groups is the one spoken of; all
            of them are multiplied by the same factor.
        loss_of: ``loss_of(batch)`` returns a 0-dim tensor, the mean over the batch.
        batches: the training data, gone through again and again: a ``DataLoader``, a list. Where its length is not
            known, or a ``DataLoader`` has a batch sampler of its own, pilots go through all of it.
        steps: optimizer steps of the training.
        scheduler: learning-rate scheduler of ``optimizer``, stepped once per optimizer step; ``None``: constant rates.
        validation: batches that the pilots are judged on, with the model in eval mode; the first 32 are used.
            ``None``: they are judged by the losses of their last 16 steps.
        before_step: called when the gradients are there, such as to clip them.
        scaler: gradient scaler, a ``torch.amp.GradScaler``; ``before_step`` sees gradients without a scale.
        accumulate: number of batches in an optimizer step, ≥ 1; the mean of their losses is trained.
        progress: called with what runs and the steps it has taken.

    Returns:
        The rate with its range, the ramp, the pilots, the cost, and what is not known.

    Raises:
        ConfigError: an argument is wrong: too few steps, no rate, an iterator in the place of the data.
        MeasurementError: no rate was found at which a pilot learns.

    Example:
        >>> import torch, gfs_core as gfs
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        >>> batches = [torch.randn(8, 4) for _ in range(20)]
        >>> found = gfs.find_rate(model, optimizer, lambda x: (model(x) - x.sum(1, True)).square().mean(), batches, 100)
        >>> for group in optimizer.param_groups:
        ...     group["lr"] *= found.factor
    """
    _check(batches, steps, validation, accumulate)
    inner = unwrap(optimizer)
    check_optimizer(inner, [] if scheduler is None else [scheduler])
    beside = [of for of in (scheduler, scaler) if of is not None]
    functions = [("loss_of", loss_of), ("before_step", before_step)]
    kept = Kept(model, inner, beside=beside, data=[batches, validation], functions=functions)
    with contextlib.closing(kept):
        loop = _Loop(model, inner, loss_of, batches, steps, scheduler, validation, before_step, scaler, accumulate)
        return Trials(loop, kept, progress).search()


def _check(batches: Iterable[Any], steps: int, validation: Iterable[Any] | None, accumulate: int) -> None:
    """Refuse what cannot be searched.

    Raises:
        ConfigError: an argument is wrong.
    """
    check_steps(steps)
    check_alone()
    if accumulate < 1:
        raise ConfigError(f"`accumulate` must be ≥ 1, the number of batches in a step; got {accumulate}")
    for name, data in (("batches", batches), ("validation", validation)):
        if isinstance(data, Iterator):
            raise ConfigError(f"`{name}` is an iterator, which can be gone through once; give the loader or a list")


class _Loop:
    """The training of a plain loop."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_of: Callable[[Any], Tensor],
        batches: Iterable[Any],
        steps: int,
        scheduler: Any,
        validation: Iterable[Any] | None,
        before_step: Callable[[], object] | None,
        scaler: Any,
        accumulate: int,
    ) -> None:
        self.model, self.optimizer, self.loss_of = model, optimizer, loss_of
        self.batches, self.validation = batches, validation
        self.before_step, self.scaler, self.accumulate = before_step, scaler, accumulate
        if scheduler is None:
            self.schedule = recorded(optimizer, [], 1, lambda step: None) * steps
        else:
            self.schedule = recorded(optimizer, [scheduler], steps, lambda step: scheduler.step())
        self.validated = validation is not None

    def run(self, trial: Trial) -> None:
        """Train from the start until the trial is over."""
        monitor: StabilityMonitor | None = None
        data = self._data(trial.share)
        try:
            if trial.measures:
                monitor = StabilityMonitor(self.model, self.optimizer, MEASURED, alone=True)
            while not trial.over:
                trial.set_rates(self.optimizer)
                batches = list(itertools.islice(data, self.accumulate))
                loss = self._backward(batches)
                ratio = gradient = None
                if monitor is not None:
                    gradient = self._gradient()
                    if math.isfinite(loss):
                        made = monitor.step(self.loss_of, batches, micro_batches=True, loss=loss)
                        ratio = None if made is None else made.running_stability_ratio
                self._step()
                trial.took(loss, gradient, ratio)
            if trial.judges and self.validation is not None:
                trial.judged = self._judged(self.validation)
        finally:
            if monitor is not None:
                monitor.close()

    def _data(self, share: float) -> Iterator[Any]:
        batches = part_of(self.batches, share)
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ConfigError("`batches` holds no batch")

    def _backward(self, batches: list[Any]) -> float:
        """The mean loss of the batches of a step, whose gradient is then there, without a scale."""
        self.optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for batch in batches:
                loss = self.loss_of(batch)
                total += float(loss.detach())
                if len(batches) > 1:
                    loss = loss / len(batches)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return total / len(batches)

    def _gradient(self) -> float | None:
        grads = [local(p.grad) for p in parameters_of(self.optimizer) if p.grad is not None]
        return WHOLE.norm(grads) if grads else None

    def _step(self) -> None:
        if self.before_step is not None:
            self.before_step()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _judged(self, validation: Iterable[Any]) -> list[float]:
        self.model.eval()
        with torch.no_grad():
            return [float(self.loss_of(batch)) for batch in itertools.islice(validation, JUDGED)]
