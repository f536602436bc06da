"""What is kept of a user's job while it runs: its losses, its speed, the facts of its model; and when it is enough."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core import ConfigError, StabilityMonitor
from gfs_core.actions.rate import Control
from gfs_core.config import TIERS
from gfs_core.linalg.vectors import local
from gfs_core.loss.memory import vector_bytes
from gfs_core.optimizers.learning_rate import LearningRateHook, rate_of
from gfs_core.optimizers.thresholds import parameters_of, stability_of, unwrap
from gfs_core.run.scheduler import scheduler_of
from gfs_core.search.ramp import is_lost
from gfs_core.search.schedule import recorded
from gfs_core.signals.catalog import Signals
from gfs_core.signals.measuring import copies_of
from gfs_report.jobs import Plan

_FLUSH = 0.5  # seconds between two looks at the losses, each of which waits for an accelerator
_NOT_FINITE = 10  # losses in a row after which a run counts as lost
# Options of the job's own GFSCallback that say how its loss can be measured; the others are the pilot's.
_KEPT = ("hvp", "precision", "probe", "probe_size", "max_memory")


class Recorder:
    """Writes what the job does as it does it, and decides when it is enough."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.steps = 0
        self.facts: dict[str, Any] = {}
        self._began = self._flushed = time.perf_counter()
        self._loss: Tensor | None = None  # sum over the step's micro-batches so far …
        self._micro = 0  # … and their number
        self._waiting: list[tuple[int, Tensor | None, float, float]] = []
        self._bad = 0
        self._losses: list[float] = []  # of a job whose rates are planned …
        self._lost = False  # … and whether they are lost
        self._file = (folder / "metrics.csv").open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._csv.writerow(["step", "train_loss", "seconds", "learning_rate"])

    def add_loss(self, loss: Any) -> None:
        """Take in the loss of a micro-batch; that of the step is their mean."""
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.detach().float().reshape(())
            self._loss = loss if self._loss is None else self._loss + loss
            self._micro += 1

    def stepped(self, rate: float) -> bool:
        """Take in that an optimizer step was taken; whether it was the last one wanted."""
        now = time.perf_counter()
        loss = None if self._loss is None else self._loss / self._micro
        rate = rate * self.plan.factor if self.plan.rates is None else self.plan.rates[self.steps]
        self._waiting.append((self.steps, loss, now - self._began, rate))
        self._loss, self._micro = None, 0
        self.steps += 1
        if self.steps >= self.plan.steps or now - self._flushed > _FLUSH:
            self._flush()
        return self.steps >= self.plan.steps or self.lost

    @property
    def lost(self) -> bool:
        """Whether its loss is lost, as far as it was looked at."""
        return self._bad >= _NOT_FINITE or self._lost

    def end(self) -> None:
        """Write what is known."""
        self._flush()
        if self.steps == 0:
            return
        ended = "diverged" if self.lost else "steps" if self.steps >= self.plan.steps else "itself"
        held = {"ended": ended, "steps": self.steps, "facts": self.facts}
        (self.folder / "outcome.json").write_text(json.dumps(held), encoding="utf-8")

    def _flush(self) -> None:
        for step, loss, seconds, rate in self._waiting:
            value = None if loss is None else float(loss)
            self._bad = self._bad + 1 if value is not None and not math.isfinite(value) else 0
            if value is not None and self.plan.rates is not None and not self._lost:
                self._losses.append(value)
                self._lost = is_lost(self._losses)
            self._csv.writerow([step, "" if value is None else repr(value), f"{seconds:.6f}", repr(rate)])
        self._waiting = []
        self._file.flush()
        self._flushed = time.perf_counter()


class _Fixed(Control):
    """A factor on the rate that never changes, in the place of one that measurements decide."""

    def __init__(self, factor: float) -> None:
        super().__init__("observe")
        self.factor = factor

    def scale(self, rate: float) -> float:
        """The factor, whatever the rate."""
        return self.factor

    def step(self, rate: float) -> float:
        """The factor, whatever the rate."""
        return self.factor


class _Planned(Control):
    """The rate of each step, whatever the user's schedule sets."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__("observe")
        self.rates, self.taken = rates, 0

    def scale(self, rate: float) -> float:
        """The factor that makes the planned rate of the coming step of ``rate``."""
        return self.rates[min(self.taken, len(self.rates) - 1)] / rate if rate > 0 else 1.0

    def step(self, rate: float) -> float:
        """The same, and a step is taken."""
        scale = self.scale(rate)
        self.taken += 1
        return scale


def _scale_rates(monitors: list[StabilityMonitor], factor: float) -> None:
    """Put ``factor`` on every rate that the optimizers use from now on, whatever sets it."""
    if factor == 1.0:
        return
    for monitor in monitors:
        if scheduler_of(monitor.optimizer) is not None:
            raise ConfigError("the rate of this job is decided by EdgeOfStabilityLR; it can be run with --rates 1 only")
        monitor.rates.act(_Fixed(factor))


def _record_schedule(
    optimizer: Any, schedulers: Sequence[Any], steps: int, advance: Callable[[int], object]
) -> list[float]:
    """The largest rate of each of so many steps.

    Raises:
        ConfigError: measurements decide the rate.
    """
    if scheduler_of(optimizer) is not None:
        raise ConfigError("the rate of this job is decided by EdgeOfStabilityLR; leave it out to look for a rate")
    return [setting.rate for setting in recorded(unwrap(optimizer), schedulers, steps, advance)]


class Watched:
    """A job under way: what is the same in both frameworks."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.recorder = Recorder(plan, folder)
        self.plan, self.folder = plan, folder
        self.monitors: list[StabilityMonitor] = []
        self._peak: int | None = None
        self._rate = 0.0
        self._hook: LearningRateHook | None = None

    def options(self, own: Any) -> dict[str, Any]:
        """Options to measure with, those that the job's own callback, if any, needs for its loss included."""
        kept = {} if own is None else {name: getattr(own.config, name) for name in _KEPT}
        return kept | self.plan.options | {"history": str(self.folder / "history.jsonl")}

    def begin(self, monitors: list[StabilityMonitor]) -> None:
        """Take in that measuring begins."""
        self.monitors = monitors
        for monitor in monitors:
            monitor.schedule.also(self.plan.intervals)
        _scale_rates(monitors, self.plan.factor)
        if self.plan.rates is not None:
            for monitor in monitors:
                monitor.rates.act(_Planned(self.plan.rates))
        self._peak = _peak_bytes(reset=True)

    def starts(self, optimizer: Any) -> None:
        """Take in that a step begins: a scheduler changes its rate before the step is said to have ended."""
        self._rate = rate_of(optimizer)
        if self.plan.rates is not None and not self.monitors and self._hook is None:  # nothing is measured
            self._hook = LearningRateHook(optimizer, _Planned(self.plan.rates))

    def schedule(
        self, optimizer: Any, schedulers: Sequence[Any], steps: float, advance: Callable[[int], object]
    ) -> None:
        """Record the schedule of the whole training, where that is wanted.

        Args:
            optimizer: whose rates it sets.
            schedulers: all that set them by the number of steps.
            steps: that the trainer would take; not finite: without end.
            advance: called with each step but the first, before it; steps the schedulers.

        Raises:
            ConfigError: the training has no end, or measurements decide the rate.
        """
        if self.plan.schedule is None:
            return
        if not self.plan.schedule and not 0 < steps < math.inf:
            raise ConfigError("this job sets no number of steps or epochs; give --steps, those of the whole training")
        rates = _record_schedule(optimizer, schedulers, self.plan.schedule or int(steps), advance)
        self.recorder.facts["schedule"] = rates

    def stepped(
        self, model: nn.Module, optimizer: Any, facts: dict[str, Any], judge: Callable[[], list[float] | None]
    ) -> None:
        """Take in an optimizer step.

        Args:
            model: what is trained.
            optimizer: that took the step.
            facts: what is known of the job.
            judge: losses of validation batches; ``None``: there are none.

        Raises:
            SystemExit: it was the last one.
        """
        if self.recorder.steps == 0:
            self.recorder.facts |= _facts(model, optimizer) | facts
        if self.recorder.stepped(self._rate):
            if self.plan.judge and not self.recorder.lost:
                self.recorder.facts["judged"] = judge()
            self.leave(optimizer)

    def leave(self, optimizer: Any = None) -> None:
        """Write what is known, and end the job.

        Raises:
            SystemExit: always.
        """
        if optimizer is not None:
            self.recorder.facts |= _stability(optimizer)
        peak = _peak_bytes()
        if self._peak is not None and peak is not None:
            self.recorder.facts["peak_bytes"] = {"before": self._peak, "after": peak}
            self.recorder.facts["free_bytes"] = _free_bytes()
        for monitor in self.monitors[:1]:
            learned = monitor.measuring.learned
            self.recorder.facts["measuring"] = {
                "products": "exact" if learned.hvp != "gradients" and learned.double_backward_verified else learned.hvp,
                "precision": learned.precision,
                "fits": learned.fits if learned.splits else None,  # examples; what cannot be cut is measured whole
                "prices": monitor.schedule.budget.prices,
            }
        self.recorder.end()
        sys.stdout.flush()
        raise SystemExit(0)


def _facts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What is known of model and optimizer."""
    params = parameters_of(optimizer)
    held = list(model.parameters())
    named = len(list(model.named_parameters(remove_duplicate=False)))
    return {
        "model": type(model).__name__,
        "optimizer": type(unwrap(optimizer)).__name__,
        "weights": sum(p.numel() for p in held),
        "measured": sum(p.numel() for p in params),
        "frozen": sum(p.numel() for p in held if not p.requires_grad),
        "tied": named - len(held),  # tensors that stand at a second place
        "weight_bytes": sum(local(p).nbytes for p in params),
        "device": str(params[0].device),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in params}),
    }


def _stability(optimizer: Any) -> dict[str, Any]:
    """What is known of the optimizer's threshold, and the bytes of a measurement's vectors."""
    params = parameters_of(optimizer)
    stability = stability_of(optimizer, params)
    preconditioned = stability.adaptive or not stability.plain
    signals = Signals()
    return {
        "threshold": stability.threshold,
        "adaptive": stability.adaptive,
        "empirical": stability.empirical,
        "preconditioned": preconditioned,
        "no_threshold": stability.reason,
        "vector_bytes": {
            tier: vector_bytes(params, copies_of(signals.named([tier, "running"]), preconditioned)) for tier in TIERS
        },
    }


def _peak_bytes(reset: bool = False) -> int | None:
    """Largest memory so far: of torch on an accelerator, of the process otherwise; ``None``: not known here."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(peak)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_bytes() -> int | None:
    """Memory that could still be had now; ``None``: not known here."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
