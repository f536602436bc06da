"""Finding the learning rate of a plain training loop, in the same process; everything is put back afterwards."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gfs_core.config import GFSConfig
from gfs_core.errors import ConfigError
from gfs_core.linalg.inner import WHOLE
from gfs_core.linalg.vectors import local
from gfs_core.loss.python_state import PythonState
from gfs_core.loss.streams import RandomState
from gfs_core.optimizers.learning_rate import rate_of, set_rate
from gfs_core.optimizers.thresholds import parameters_of, unwrap
from gfs_core.run.monitor import StabilityMonitor
from gfs_core.run.rollback import Snapshots
from gfs_core.run.scheduler import scheduler_of
from gfs_core.search.found import FoundRate, search
from gfs_core.search.pilots import Pilot
from gfs_core.search.ramp import Point, Ramp, is_lost
from gfs_core.search.schedule import Setting, recorded

FEWEST = 100  # steps of a training, in which nothing can be tried out that is shorter
_JUDGED = 32  # batches of the validation data, on which a pilot is judged …
_LAST = 16  # … or its last steps, whose losses are those of batches that it is trained on only then
_MEASURED = 2  # steps between ratios in a ramp


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
    progress: Callable[[str, int], object] = lambda what, step: None,
) -> FoundRate:
    """Find the learning rate of a training before it begins, by trying it out.

    A ramp, a training whose rate rises from a hundredth of the present one on, shows where the loss is lost and from
    which rate on the stability ratio no longer follows the rate. Then short pilots, each a whole run of the schedule in
    its shape, are compared at rates half a decade apart. A search costs about one training at 500 steps, and less of a
    longer one. Afterwards everything is as it was, bitwise: weights, buffers, gradients, the optimizer, the scheduler,
    random streams, and the Python state of the model, the loss and the loaders.

    Args:
        model: the module, as training will begin with it.
        optimizer: its torch optimizer, or a wrapper of one. The largest rate of its groups is the one spoken of; all
            of them are multiplied by the same factor.
        loss_of: ``loss_of(batch)`` returns a 0-dim tensor, the mean over the batch.
        batches: the training data, gone through again and again: a ``DataLoader``, a list.
        steps: optimizer steps of the training.
        scheduler: learning-rate scheduler of ``optimizer``, stepped once per optimizer step; ``None``: constant rates.
        validation: batches that the pilots are judged on, with the model in eval mode; the first 32 are used.
            ``None``: they are judged by the losses of their last 16 steps.
        before_step: called when the gradients are there, such as to clip them.
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
    _check(optimizer, batches, steps, scheduler, validation)
    with _Loop(model, optimizer, loss_of, batches, steps, scheduler, validation, before_step, progress) as loop:
        return search(loop, time.perf_counter)


def _check(
    optimizer: Any, batches: Iterable[Any], steps: int, scheduler: Any, validation: Iterable[Any] | None
) -> None:
    """Refuse what cannot be searched.

    Raises:
        ConfigError: an argument is wrong.
    """
    if steps < FEWEST:
        raise ConfigError(f"`steps` must be ≥ {FEWEST}, for shorter runs to tell something of it; got {steps}")
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError("find_rate runs in one process; call it before there is a process group")
    for name, data in (("batches", batches), ("validation", validation)):
        if isinstance(data, Iterator):
            raise ConfigError(f"`{name}` is an iterator, which can be gone through once; give the loader or a list")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau goes by a metric of the run; leave `scheduler` out: pilots are too short for it"
        )
    if isinstance(unwrap(optimizer), torch.optim.LBFGS):
        raise ConfigError("LBFGS chooses the length of its steps itself: there is no rate to look for")
    if scheduler_of(optimizer) is not None:
        raise ConfigError("EdgeOfStabilityLR decides the rate by measurements: look for the rate without it")
    if any(is_lazy(p) for p in parameters_of(optimizer)):
        raise ConfigError("the model has weights without a shape yet: give it one batch first")
    if not 0 < rate_of(optimizer) < math.inf and scheduler is None:
        raise ConfigError(f"the optimizer's learning rate must be > 0 and finite, got {rate_of(optimizer)}")


class _Loop:
    """Runs the training in this process, from its start each time."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_of: Callable[[Any], Tensor],
        batches: Iterable[Any],
        steps: int,
        scheduler: Any,
        validation: Iterable[Any] | None,
        before_step: Callable[[], object] | None,
        progress: Callable[[str, int], object],
    ) -> None:
        self.model, self.optimizer, self.loss_of, self.steps = model, unwrap(optimizer), loss_of, steps
        self.batches, self.validation, self.scheduler = batches, validation, scheduler
        self.before_step, self.progress = before_step, progress
        self.judged_on = "training" if validation is None else "validation"

    def __enter__(self) -> _Loop:
        self._kept = _Kept(self.model, self.optimizer, self.scheduler, self.loss_of, [self.batches, self.validation])
        try:
            self._schedule = self._recorded()
            self.users = max(setting.rate for setting in self._schedule)
            if not 0 < self.users < math.inf:
                raise ConfigError(f"the largest learning rate of the schedule must be > 0 and finite, got {self.users}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._kept.close()

    def ramp(self, first: float, growth: float, most: int) -> Ramp:
        """A training whose rate rises from ``first`` by a factor in each step, at most so many times."""
        peak = max(self._schedule, key=lambda setting: setting.rate)
        points: list[Point] = []
        monitor: StabilityMonitor | None = None
        try:
            config = GFSConfig(tier="running", every=_MEASURED, max_overhead=None, alarm="off")
            monitor = StabilityMonitor(self.model, self.optimizer, config, alone=True)
            rates = (first * growth**i for i in range(most))
            for rate, batch in zip(rates, self._data(), strict=False):
                peak.apply(self.optimizer, rate / self.users)
                loss = self._backward(batch)
                grads = [local(p.grad) for p in parameters_of(self.optimizer) if p.grad is not None]
                norm = WHOLE.norm(grads) if grads else None
                value, ratio = float(loss.detach()), None
                if math.isfinite(value) and (made := monitor.step(self.loss_of, batch, loss=loss)) is not None:
                    ratio = made.running_stability_ratio
                points.append(Point(rate, value, norm, ratio))
                self._step()
                if is_lost([p.loss for p in points]):
                    break
                self.progress("ramp", len(points))
        finally:
            if monitor is not None:
                monitor.close()
            self._kept.put_back()
        return Ramp.of(points)

    def pilot(self, rate: float, steps: int) -> Pilot:
        """A training of so many steps whose schedule, in its shape, comes to this rate."""
        losses: list[float] = []
        data = self._data()
        try:
            for step in range(steps):
                self._schedule[step * self.steps // steps].apply(self.optimizer, rate / self.users)
                loss = self._backward(next(data))
                losses.append(float(loss.detach()))
                self._step()
                if is_lost(losses):
                    return Pilot(rate, steps, len(losses), losses[0], ())
                self.progress(f"pilot at {rate:.2g}", len(losses))
            return Pilot(rate, steps, steps, losses[0], tuple(self._judged(losses)))
        finally:
            self._kept.put_back()

    def _recorded(self) -> list[Setting]:
        if self.scheduler is None:
            return recorded(self.optimizer, [], 1, lambda step: None) * self.steps
        return recorded(self.optimizer, [self.scheduler], self.steps, lambda step: self.scheduler.step())

    def _data(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.batches:
                empty = False
                yield batch
            if empty:
                raise ConfigError("`batches` holds no batch")

    def _backward(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _step(self) -> None:
        if self.before_step is not None:
            self.before_step()
        self.optimizer.step()

    def _judged(self, losses: list[float]) -> list[float]:
        if self.validation is None:
            return losses[-_LAST:]
        modes = {m: m.training for m in self.model.modules()}
        try:
            self.model.eval()
            with torch.no_grad():
                return [float(self.loss_of(batch)) for batch in itertools.islice(self.validation, _JUDGED)]
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Kept:
    """Everything that a training changes, put back as often as is asked for."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, loss_of: Any, data: list[Any]
    ) -> None:
        self._groups = optimizer.param_groups
        self._snapshots = Snapshots(model, optimizer)
        self._snapshots.beside = [] if scheduler is None else [scheduler]
        self._snapshot = self._snapshots.take(0)
        self._rates = [float(g["lr"]) for g in self._groups]
        own = [p for group in self._groups for p in group["params"]]
        self._params = list({id(p): p for p in [*model.parameters(), *own]}.values())
        self._grads = [p.grad for p in self._params]
        self._random = RandomState(self._params)
        roots = [
            *((name or "model", m) for name, m in model.named_modules()),
            *(("data", d) for d in data if not isinstance(d, (list, tuple))),
        ]
        self._python = PythonState(roots, self._params, [("loss_of", loss_of)])
        self.put_back()

    def put_back(self) -> None:
        """Put everything back for the next training: there are no gradients yet."""
        assert self._snapshot is not None
        self._snapshots.restore(self._snapshot)
        for group, rate in zip(self._groups, self._rates, strict=True):  # not put back where there is a scheduler
            set_rate(group, rate)
        self._python.restore()
        self._random.restore()
        for p in self._params:
            p.grad = None

    def close(self) -> None:
        """Put everything back as it was found."""
        self.put_back()
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
