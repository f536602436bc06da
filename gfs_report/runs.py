"""What a training run has left behind, read from what logged it: history, TensorBoard, CSV, the Trainer's state.

Nothing that is read is executed: JSON, CSV and TensorBoard's own reader of scalars.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gfs_core import AlarmRecord, ConfigError, Measurement, history_parts, log_keys, read_alarm
from gfs_core.detectors.advice import WHAT_TO_DO
from gfs_core.detectors.base import AlertLevel
from gfs_core.run.flight_recorder import FOLDER
from gfs_core.run.record import KEYS

_OF_LAYERS = {key.name for key in KEYS.values() if key.only_layers}
_KEYS = {key.removeprefix("gfs/") for key in log_keys()}
_LOSSES = ("train_loss_step", "train_loss", "train/loss_step", "train/loss", "loss", "training_loss")
_NOT_TRAINING = re.compile(r"val|eval|test|gfs/|probe", re.IGNORECASE)
_STEPS = ("step", "global_step", "train/global_step")


class Curve(NamedTuple):
    """A value over training, in order of steps; both arrays are 1-dimensional and of the same length."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def last(self) -> float:
        """The latest value."""
        return float(self.values[-1])

    def head(self, fraction: float) -> NDArray[np.float64]:
        """The values in the first ``fraction`` of the steps; at least one."""
        end = self.steps[0] + fraction * (self.steps[-1] - self.steps[0])
        part: NDArray[np.float64] = self.values[self.steps <= end]
        return part

    def tail(self, fraction: float) -> NDArray[np.float64]:
        """The values in the last ``fraction`` of the steps; at least one."""
        start = self.steps[-1] - fraction * (self.steps[-1] - self.steps[0])
        part: NDArray[np.float64] = self.values[self.steps >= start]
        return part


class Mark(NamedTuple):
    """A rise of the early warning: 1 watch, 2 alarm."""

    step: int
    state: int
    reason: str

    @property
    def word(self) -> str:
        """The state in a word."""
        return AlertLevel(self.state).name.lower()


@dataclass
class Run:
    """One optimizer of one training run.

    Attributes:
        name: the folder or file it was read from, as given.
        optimizer: the optimizer's name; empty where the log does not say.
        gfs: what this package measured, by log key without ``gfs/``; finite values only, and of the stability ratio
            the solved ones only.
        logged: what the user logged, by its own key; values may be infinite or NaN.
        shares: the latest shares of the top eigenvector, or of the running estimate's direction, by layer.
        training_loss: means of the loss that was trained, over the steps since the value before, as the monitor has
            seen them; the first is of one step. NaN where the loss was not finite; ``None``: the monitor was not told.
        loss_spread: standard deviation of the single losses about such a mean; finite values only.
        marks: rises of the early warning.
        records: what was recorded of its alarms, as far as that is there.
        reasons: why values could not be had, each with the number of measurements that say so.
        settings: the options and facts that the history begins with.
        sources: the files that were read.
        notes: what was left out while reading, in sentences.
        part: which training of its history it is, from 1 on, …
        parts: … of how many.
    """

    name: str
    optimizer: str = ""
    gfs: dict[str, Curve] = field(default_factory=dict)
    logged: dict[str, Curve] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    training_loss: Curve | None = None
    loss_spread: Curve | None = None
    marks: list[Mark] = field(default_factory=list)
    records: list[AlarmRecord] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    part: int = 1
    parts: int = 1

    def loss_key(self, wanted: str | None = None) -> str | None:
        """The key in ``logged`` under which the training loss stands; ``wanted``, where it is given.

        Raises:
            ConfigError: there is nothing under ``wanted``.
        """
        if wanted is not None:
            if wanted not in self.logged:
                known = ", ".join(sorted(self.logged)) or "nothing beside this package's own values"
                raise ConfigError(f"{self.name} holds no `{wanted}`; it holds {known}")
            return wanted
        likely = [key for key in self.logged if "loss" in key.lower() and not _NOT_TRAINING.search(key)]
        found = [key for key in (*_LOSSES, *sorted(likely)) if key in self.logged]
        curves = [key for key in found if len(self.logged[key].steps) > 1]  # some log a summary of one value beside it
        return next(iter([*curves, *found]), None)

    @property
    def second_data(self) -> bool:
        """Whether the values belong to a second data set, and not to the data that was trained on."""
        return self.settings.get("probe") == "loader"

    def of_training(self, key: str) -> Curve | None:
        """What was measured under a key of this package, if it belongs to the data that was trained on."""
        return None if self.second_data else self.gfs.get(key)

    def loss(self, wanted: str | None = None) -> Curve | None:
        """The training loss as logged, else as the monitor has seen it, else on the probe; ``None``: there is none."""
        key = self.loss_key(wanted)
        seen = self.of_training("loss_probe") if self.training_loss is None else self.training_loss
        return seen if key is None else self.logged[key]

    @property
    def steps(self) -> tuple[int, int]:
        """First and last step at which anything was logged."""
        curves = [*self.gfs.values(), *self.logged.values(), *([self.training_loss] if self.training_loss else [])]
        ends = [(int(c.steps[0]), int(c.steps[-1])) for c in curves]
        return min(a for a, _ in ends), max(b for _, b in ends)


def read_run(path: str | Path, optimizer: str | None = None, part: int | None = None) -> Run:
    """Read a run from a file (history, TensorBoard log, ``metrics.csv``, ``trainer_state.json``) or a folder of them.

    In a folder the history counts first; from the others comes what it does not hold, as the training loss.

    Args:
        path: file or folder.
        optimizer: which one, where the run measured several.
        part: which training, from 1 on, where the history holds several; ``None``: the latest. Beside an earlier one
            no other log is read, for that is of a later training.

    Raises:
        ConfigError: nothing to read is there, no such part, or several runs or optimizers where one is asked for.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"there is nothing at {path}; give a run's folder, or one of its logs")
    run = Run(str(path))
    for source in _sources(path):
        try:
            _add(run, source, optimizer, part)
        except (OSError, ValueError, KeyError, RecursionError, csv.Error) as error:
            if path.is_file() or isinstance(error, _Several):
                raise ConfigError(f"{source}: {error}") from None
            run.notes.append(f"{source.name} was left out: {error}")
    if part is not None and not any(s.suffix == ".jsonl" for s in run.sources):
        raise ConfigError(f"{path} holds no history, and only a history has parts; leave --part out")
    if not run.gfs and not run.logged and run.training_loss is None:
        why = f" ({'; '.join(run.notes)})" if run.notes else ""
        raise ConfigError(f"{path} holds no logged value{why}")
    return run


class _Several(ConfigError):
    """One of several has to be named."""


def _sources(path: Path) -> list[Path]:
    """The files to read, the most telling first."""
    if path.is_file():
        return [path]
    found = logs_in(path)
    if not found:
        folders = sorted({p.parent for pattern in PATTERNS for p in path.glob(f"**/{pattern}")})
        if len(folders) > 1:
            shown = ", ".join(str(f) for f in folders[:8]) + (", …" if len(folders) > 8 else "")
            raise ConfigError(f"{path} holds several runs: {shown}; give one of these folders")
        found = logs_in(folders[0]) if folders else []
    if not found:
        raise ConfigError(f"{path} holds no history.jsonl, TensorBoard log, metrics.csv or trainer_state.json")
    return found


_EVENTS = "events.out.tfevents*"
PATTERNS = ("history*.jsonl", "metrics.csv", _EVENTS, "trainer_state.json")


def logs_in(folder: Path) -> list[Path]:
    """The logs of the run that this folder belongs to, the most telling first; empty where it belongs to none."""
    found = [p for pattern in PATTERNS for p in sorted(folder.glob(pattern))]
    for pattern in ("checkpoint-*/trainer_state.json", f"runs/*/{_EVENTS}"):  # where the Hugging Face Trainer puts them
        found += sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime)[-1:]
    return found


def _add(run: Run, source: Path, optimizer: str | None, part: int | None) -> None:
    """Add what a file holds and the run does not have yet."""
    if run.part < run.parts:
        return
    if source.suffix == ".jsonl":
        if run.sources and source.name.startswith("history"):
            raise _Several("there are several histories here; give the path of one of them")
        _add_history(run, source, optimizer, part)
    elif "tfevents" in source.name:
        _add_logged(run, _of_tensorboard(source))
    elif source.suffix == ".csv":
        _add_logged(run, _of_csv(source))
    elif source.suffix == ".json":
        _add_logged(run, _of_trainer_state(source))
    else:
        raise ValueError("not a history.jsonl, a TensorBoard log, a CSV log or a trainer_state.json")
    run.sources.append(source)


def _add_history(run: Run, source: Path, optimizer: str | None, part: int | None) -> None:
    found = history_parts(source)
    if part is not None and not 1 <= part <= len(found):
        raise _Several(f"there is no part {part}; it holds {len(found)}, numbered from 1")
    run.parts = len(found)
    run.part = run.parts if part is None else part
    training = found[run.part - 1]
    measurements = training.measurements
    if run.parts > 1:
        began = f", begun {training.began}" if training.began else ""
        run.notes.append(
            f"{source.name} holds {run.parts} trainings; this is part {run.part}{began}. --part N shows another one."
        )
    names = sorted({m.optimizer_name for m in measurements} | {m.optimizer_name for m in training.losses})
    if optimizer is not None and optimizer not in names:
        raise _Several(f"there is no optimizer {optimizer!r}; there are {', '.join(map(repr, names))}")
    if optimizer is None and len(names) > 1:
        raise _Several(f"it holds several optimizers, {', '.join(map(repr, names))}; name one of them")
    held = [m for m in measurements if optimizer in (None, m.optimizer_name)]
    run.optimizer = names[0] if optimizer is None else optimizer
    losses = [loss for loss in training.losses if loss.optimizer_name == run.optimizer]
    run.training_loss = _curve(((loss.step, loss.value) for loss in losses), finite=False)
    run.loss_spread = _curve(((x.step, x.spread) for x in losses if x.spread is not None), finite=True)
    run.settings = training.settings
    points: dict[str, list[tuple[int, float]]] = {}
    state = 0
    for m in held:
        run.shares = m.layers("curvature_share") or m.layers("running_curvature_share") or run.shares
        for key, value in m.values().items():
            points.setdefault(key, []).append((m.step, value))
        told = state if m.alarm is None else int(m.alarm)
        if told > state:
            run.marks.append(Mark(m.step, told, m.reasons[-1] if m.reasons else ""))
            _add_record(run, source.parent / FOLDER, m)
        elif m.reasons and told == state:
            for reason in m.reasons:
                run.reasons[reason] = run.reasons.get(reason, 0) + 1
        state = told
    run.gfs = {key: curve for key, p in points.items() if (curve := _curve(p, finite=True)) is not None}
    _leave_solved(run.gfs)


def _add_record(run: Run, folder: Path, alarm: Measurement) -> None:
    """Add what was recorded of an alarm: the latest record of the same optimizer, step and reason."""
    found = sorted(folder.glob(f"step-{alarm.step:08d}-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(found):
        try:
            record = read_alarm(path)
        except (OSError, ConfigError) as error:
            run.notes.append(f"{path.name} was left out: {error}")
            continue
        told = [reason.partition(WHAT_TO_DO)[0] for reason in alarm.reasons]
        if record.optimizer_name == alarm.optimizer_name and record.alert.reason in told:
            run.records.append(record)
            run.sources.append(path)
            return


def _add_logged(run: Run, points: dict[str, list[tuple[int, float]]]) -> None:
    for key, held in points.items():
        own = key.removeprefix("gfs/").removeprefix("train/gfs/")
        ours = own != key and (own in _KEYS or own.partition("/")[0] in _OF_LAYERS)
        curve = _curve(held, finite=ours)
        if curve is not None:
            (run.gfs if ours else run.logged).setdefault(own if ours else key, curve)
    _leave_solved(run.gfs)
    alarm = run.gfs.get("alarm")
    if alarm is not None and not run.marks:
        before = 0.0
        for step, state in zip(alarm.steps, alarm.values, strict=True):
            if state > before:
                run.marks.append(Mark(int(step), int(state), "the reason is in the run's history.jsonl"))
            before = float(state)


def _leave_solved(curves: dict[str, Curve]) -> None:
    """Leave out of the stability ratio what is the running one, which stands in for it between two solved ones."""
    ratio, running = curves.get("stability_ratio"), curves.get("running_stability_ratio")
    if ratio is None or running is None:
        return
    _, at, beside = np.intersect1d(ratio.steps, running.steps, return_indices=True)
    keep = np.ones(len(ratio.steps), np.bool_)
    keep[at] = ratio.values[at] != running.values[beside]
    del curves["stability_ratio"]
    if keep.any():
        curves["stability_ratio"] = Curve(ratio.steps[keep], ratio.values[keep])


def _curve(points: Iterable[tuple[int, float]], finite: bool) -> Curve | None:
    """In order of steps; of a step that was logged twice (a resumed run) the later value counts."""
    held = {step: value for step, value in points if math.isfinite(value) or not finite}
    if not held:
        return None
    steps = sorted(held)
    return Curve(np.array(steps, np.int64), np.array([held[s] for s in steps], np.float64))


def _of_tensorboard(source: Path) -> dict[str, list[tuple[int, float]]]:
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ValueError(f"a TensorBoard log needs {error.name}: pip install 'gfs-sharpness[report]'") from None
    events = EventAccumulator(str(source), size_guidance={"scalars": 0})
    try:
        events.Reload()
    except DecodeError as error:
        raise ValueError(f"a damaged TensorBoard log ({error})") from None
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _of_csv(source: Path) -> dict[str, list[tuple[int, float]]]:
    with source.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)  # Python 3.10 refuses a file that holds a zero
        column = next((s for s in _STEPS if s in (rows.fieldnames or ())), None)
        if column is None:
            raise ValueError(f"it has no column `step`, but {', '.join(map(str, rows.fieldnames or ['nothing']))}")
        return _points(rows, column)


def _of_trainer_state(source: Path) -> dict[str, list[tuple[int, float]]]:
    held = json.loads(source.read_text(encoding="utf-8", errors="replace"))
    log = held.get("log_history") if isinstance(held, dict) else None
    if not isinstance(log, list):
        raise ValueError("it has no `log_history`")
    return _points((row for row in log if isinstance(row, dict)), "step")


def _points(rows: Iterable[dict[str, Any]], column: str) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = _number(row.get(column))
        if step is None or not abs(step) < 2**63:
            continue
        for key, value in row.items():
            number = _number(value)
            if number is not None and isinstance(key, str) and key not in (column, "epoch"):
                points.setdefault(key, []).append((int(step), number))
    return points


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
