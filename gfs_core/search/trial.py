"""A training run again and again from the same start: a ramp, then pilots, each with rates of its own.

What is trained, and how, is behind :class:`Training`: a plain loop, a ``Trainer``. It asks the :class:`Trial` that it
is given for the rates of each step, and tells it what the step has shown.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gfs_core.config import GFSConfig
from gfs_core.errors import ConfigError, GFSError, MeasurementError
from gfs_core.optimizers.thresholds import parameters_of, unwrap
from gfs_core.run.scheduler import scheduler_of
from gfs_core.search.found import FoundRate, search
from gfs_core.search.kept import Kept
from gfs_core.search.pilots import Pilot
from gfs_core.search.ramp import Point, Ramp, is_lost
from gfs_core.search.schedule import Setting

FEWEST = 100  # steps of a training, in which nothing can be tried out that is shorter
JUDGED = 32  # batches of the validation data, on which a pilot is judged …
LAST = 16  # … or its last steps, whose losses are those of batches that it is trained on only then
OPTIONS: dict[str, Any] = {"tier": "running", "every": 2, "max_overhead": None, "alarm": "off"}  # of a ramp
MEASURED = GFSConfig(**OPTIONS)

Progress = Callable[[str, int], object]


class Trial:
    """One run of a training on the way.

    Args:
        name: what it is, in words.
        settings: what the schedule sets at each of its steps.
        factors: by which the rates of each step are multiplied.
        measures: whether the stability ratio is to be measured, with the options of :data:`MEASURED`.
        progress: called with the name and the steps taken.
        share: of the training data, that it goes through again and again; 1: all of them.

    Attributes:
        points: its steps so far.
        judged: losses on validation data after its last step; ``None``: there are none.
        lost: whether its loss is lost.
    """

    def __init__(
        self,
        name: str,
        settings: Sequence[Setting],
        factors: Sequence[float],
        measures: bool,
        progress: Progress,
        share: float = 1.0,
    ) -> None:
        self.name, self.measures, self.share = name, measures, share
        self._settings, self._factors, self._progress = settings, factors, progress
        self.points: list[Point] = []
        self.judged: list[float] | None = None
        self.lost = False

    @property
    def over(self) -> bool:
        """Whether it has taken its steps, or its loss is lost."""
        return self.lost or len(self.points) == len(self._settings)

    @property
    def judges(self) -> bool:
        """Whether losses on validation data are wanted now: it is a pilot that has taken its steps."""
        return self.over and not self.lost and not self.measures

    def set_rates(self, optimizer: Optimizer) -> None:
        """Give the groups of the optimizer the rates of the coming step."""
        step = min(len(self.points), len(self._settings) - 1)
        self._settings[step].apply(optimizer, self._factors[step])

    def took(self, loss: float, gradient: float | None = None, ratio: float | None = None) -> bool:
        """Take in a step.

        Args:
            loss: of its batch, before it.
            gradient: norm of its gradient, if known.
            ratio: the running stability ratio, if it was measured.

        Returns:
            Whether it was the last one.
        """
        step = len(self.points)
        self.points.append(Point(self._settings[step].rate * self._factors[step], loss, gradient, ratio))
        self.lost = is_lost([p.loss for p in self.points])
        if not self.lost:
            self._progress(self.name, len(self.points))
        return self.over


class Training(Protocol):
    """What is trained.

    Attributes:
        schedule: what its schedule sets at each of its steps.
        validated: whether there are validation data.
    """

    schedule: list[Setting]
    validated: bool

    def run(self, trial: Trial) -> None:
        """Train from the start until the trial is over; losses on validation data, if any, go to the trial."""


class Trials:
    """Runs a training as often as is asked for, and puts everything back each time.

    Args:
        training: what is trained.
        kept: everything that it changes.
        progress: called with what runs and the steps it has taken.

    Raises:
        ConfigError: it takes too few steps, or its rates are no rates.
    """

    def __init__(self, training: Training, kept: Kept, progress: Progress) -> None:
        self._training, self._kept, self._progress = training, kept, progress
        self._schedule = training.schedule
        self.steps, self.users = len(self._schedule), max(s.rate for s in self._schedule)
        self.judged_on = "validation" if training.validated else "training"
        self._before: list[float] | None = None
        self._errors: list[tuple[str, Exception]] = []
        if not 0 < self.users < math.inf:
            raise ConfigError(f"the largest learning rate of the schedule must be > 0 and finite, got {self.users}")

    def search(self) -> FoundRate:
        """Look for the rate.

        Raises:
            MeasurementError: none was found at which a pilot learns.
            Exception: that of the training, where it fails at all rates.
        """
        try:
            found = search(self, time.perf_counter)
        except MeasurementError:
            if self._errors:
                raise self._errors[0][1] from None
            raise
        told = [
            f"The {name} failed, and counts as lost: {type(e).__name__}: {_first_line(e)}" for name, e in self._errors
        ]
        return replace(found, unsure=(*found.unsure, *told))

    def ramp(self, first: float, growth: float, most: int) -> Ramp:
        """A training whose rate rises from ``first`` by a factor in each step, at most so many times."""
        peak = max(self._schedule, key=lambda setting: setting.rate)
        factors = [first * growth**i / self.users for i in range(min(most, self.steps))]
        return Ramp.of(self._run(Trial("ramp", [peak] * len(factors), factors, True, self._progress)).points)

    def pilot(self, rate: float, steps: int, share: float) -> Pilot:
        """A training of so many steps whose schedule, in its shape, comes to this rate, over a share of the data."""
        shape = [self._schedule[step * self.steps // steps] for step in range(steps)]
        name, factors = f"pilot at {rate:.2g}", [rate / self.users] * steps
        trial = self._run(Trial(name, shape, factors, False, self._progress, share))
        losses = [p.loss for p in trial.points]
        judged = [] if trial.lost else losses[-LAST:] if trial.judged is None else trial.judged
        return Pilot.of(rate, steps, losses, judged, self._start(), share)

    def _start(self) -> float | None:
        """Mean loss on the validation data before the training, or rather after a step at a rate of 0."""
        if self._training.validated and self._before is None:
            self._before = self._run(Trial("start", self._schedule[:1], [0.0], False, self._progress)).judged
        return fmean(self._before) if self._before else None

    def _run(self, trial: Trial) -> Trial:
        try:
            self._training.run(trial)
        except GFSError:
            raise
        except Exception as error:
            if not trial.points:
                raise
            trial.lost = True  # at a rate that is too high, much of what people write raises
            self._errors.append((trial.name, error))
        finally:
            self._kept.put_back()
        if not trial.over:
            raise ConfigError(
                f"the training ended by itself after {len(trial.points)} steps, and has {self.steps} by its settings"
            )
        return trial


def check_steps(steps: float) -> None:
    """Refuse a training that is too short.

    Raises:
        ConfigError: it is.
    """
    if steps < FEWEST:
        raise ConfigError(f"`steps` must be ≥ {FEWEST}, for shorter runs to tell something of it; got {steps:g}")


def check_alone() -> None:
    """Refuse several processes.

    Raises:
        ConfigError: there are.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError("find_rate runs in one process; call it before there is a process group")


def check_optimizer(optimizer: Any, schedulers: Sequence[Any] = ()) -> None:
    """Refuse an optimizer for which there is no rate to look for.

    Args:
        optimizer: a torch optimizer, or a wrapper of one.
        schedulers: all that set its rate.

    Raises:
        ConfigError: it is one.
    """
    for scheduler in schedulers:
        if by_metric(scheduler):
            raise ConfigError(
                f"{type(scheduler).__name__} goes by a metric of the run, and pilots are too short for it; leave the "
                "scheduler out to look for a rate"
            )
    if isinstance(unwrap(optimizer), torch.optim.LBFGS):
        raise ConfigError("LBFGS chooses the length of its steps itself: there is no rate to look for")
    if scheduler_of(optimizer) is not None:
        raise ConfigError("EdgeOfStabilityLR decides the rate by measurements: look for the rate without it")
    if any(is_lazy(p) for p in parameters_of(optimizer)):
        raise ConfigError("the model has weights without a shape yet: give it one batch first")


def by_metric(scheduler: Any) -> bool:
    """Whether what a scheduler sets depends on a metric of the run."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
