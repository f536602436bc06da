"""What became of the runs of a set: what they end with, whether they failed, how often the loss spiked, the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gfs_core import ConfigError
from gfs_core.run.history import TRAINING_LOSS
from gfs_report.comparison.sets import RunSet
from gfs_report.losses import Values, count_spikes, course_of
from gfs_report.runs import Curve, Run

_SECONDS = ("train_runtime", "train/train_runtime")  # wall time of a run, which the Hugging Face Trainer logs


@dataclass(frozen=True)
class Result:
    """What became of a run; ``None`` where the log does not say.

    Attributes:
        name: the run within its set.
        steps: last step at which anything was logged.
        final: mean of the metric over the last part of its steps; not of a failed run.
        failed: whether the loss (or the metric) ended non-finite, or the loss tells that the run is destroyed.
        spikes: how often the loss rose far above its latest values.
        overhead: fraction of the wall time spent measuring.
        alarms: early warnings that reached *alarm*.
        seconds: wall time, where the framework logs it.
    """

    name: str
    steps: int
    final: float | None
    failed: bool
    spikes: int | None
    overhead: float | None
    alarms: int | None
    seconds: float | None


@dataclass(frozen=True)
class SetResult:
    """What became of the runs of a set; ``runs`` is what was read, in the same order."""

    name: str
    results: tuple[Result, ...]
    runs: tuple[Run, ...] = field(repr=False)

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return sum(r.failed for r in self.results)

    def known(self, name: str) -> Values:
        """The values of a field of :class:`Result`, of the runs that have one."""
        return np.array([v for r in self.results if (v := getattr(r, name)) is not None], np.float64)

    def median(self, name: str) -> float | None:
        """Their median."""
        return float(np.median(v)) if len(v := self.known(name)) else None


def metric_of(sets: Sequence[RunSet]) -> str:
    """The key of the training loss: the user's own, or that of what the monitors have seen, where it is not the same.

    Raises:
        ConfigError: there is none, or not the same in all runs.
    """
    keys: dict[str, str] = {}
    for one in sets:
        for name, run in one.runs.items():
            losses = {TRAINING_LOSS: run.training_loss, "loss_probe": run.of_training("loss_probe")}
            own = [f"gfs/{name}" for name, curve in losses.items() if curve is not None]
            key = run.loss_key() or next(iter(own), None)
            if key is not None:
                keys.setdefault(key, f"{one.name}: {name}")
    if not keys:
        raise ConfigError("no training loss was found in these runs; name the value to compare with --metric")
    seen = [run.training_loss is not None for one in sets for run in one.runs.values()]
    if len(keys) > 1 and all(seen):
        return f"gfs/{TRAINING_LOSS}"
    if len(keys) > 1:
        where = ", ".join(f"`{key}` ({run})" for key, run in keys.items())
        raise ConfigError(f"the runs hold their training loss under several keys: {where}; name one with --metric")
    return next(iter(keys))


def curve_of(run: Run, key: str) -> Curve | None:
    """What was logged under a key, the user's own or this package's."""
    if key == f"gfs/{TRAINING_LOSS}":
        return run.training_loss
    return run.logged[key] if key in run.logged else run.gfs.get(key.removeprefix("gfs/"))


def judge_set(one: RunSet, key: str, final: float) -> SetResult:
    """What became of each run.

    Args:
        one: the runs.
        key: of the metric, the user's own or this package's.
        final: the last part of the steps, over which the mean of the metric is taken; 0: its last value.
    """
    results = tuple(_result(name, run, key, final) for name, run in one.runs.items())
    return SetResult(one.name, results, tuple(one.runs.values()))


def _result(name: str, run: Run, key: str, final: float) -> Result:
    metric, loss = curve_of(run, key), run.loss()
    end = np.array([]) if metric is None else metric.tail(final)
    bad = course_of(run).failed or (len(end) > 0 and not np.isfinite(end[-1]))
    overhead = run.gfs.get("overhead")
    seconds = next((run.logged[k].last for k in _SECONDS if k in run.logged), math.nan)
    return Result(
        name=name,
        steps=run.steps[1],
        final=None if bad or not np.isfinite(end).any() else float(end[np.isfinite(end)].mean()),
        failed=bad,
        spikes=None if loss is None else count_spikes(loss.values),
        overhead=None if overhead is None else overhead.last,
        alarms=sum(m.state >= 2 for m in run.marks) if run.marks or "alarm" in run.gfs else None,
        seconds=seconds if math.isfinite(seconds) else None,
    )
