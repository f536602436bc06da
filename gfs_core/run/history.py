"""The history: one JSON line per measurement, written at once, readable after a crash.

The lines of one training are its *part* of the file. A part begins with a line of settings. Each line names its run, so
that a second training, or another process, may write into the same file. A resumed training keeps the name of its run.
It writes another line of settings, with the step at which it was resumed.

``training_loss`` is the mean of the training losses since the last line that held one; it is ``null`` where most of
them were not finite. ``training_loss_spread`` is their standard deviation. The first loss is written by itself. After
10 steps without such a line, the losses get a line of their own. That happens where nothing is measured, or where
measurements come before the loss of their step is known.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from gfs_core.errors import ConfigError
from gfs_core.run.record import KEYS, Measurement
from gfs_core.signals.base import Key, Reading

TRAINING_LOSS = "training_loss"
_SPREAD = f"{TRAINING_LOSS}_spread"
_NO_VALUES = ("step", TRAINING_LOSS, _SPREAD)  # numbers of a line that are not readings
_LARGEST_INTEGER = 2**63 - 1  # larger integers are neither steps nor counts: readers of a history have 64 bits


class MeanOfLosses(NamedTuple):
    """The mean of the training losses since the previous mean.

    Attributes:
        step: the last step that it includes.
        value: the mean of the finite losses; NaN where most of the losses were not finite.
        spread: their standard deviation; ``None`` for a single loss.
        optimizer_name: name of the optimizer that took the steps.
    """

    step: int
    value: float
    spread: float | None = None
    optimizer_name: str = ""


@dataclass(frozen=True)
class HistoryPart:
    """The part of a history that one training has written.

    Attributes:
        run: the training's identifier; empty in a file whose lines have none.
        began: when it was begun or last resumed, in UTC, as ISO 8601; empty where that is not known.
        resumed_at: the steps at which it was resumed.
        settings: its latest settings, as plain JSON values by name.
        measurements: in order of steps; empty where the training has written losses only.
        losses: means of the training loss, in order of steps; empty in a file of an earlier version.
    """

    run: str
    began: str
    resumed_at: tuple[int, ...]
    settings: dict[str, Any]
    measurements: list[Measurement]
    losses: list[MeanOfLosses] = field(default_factory=list)


def new_run() -> str:
    """A unique identifier for a run. It draws no number from the random streams of a training."""
    return uuid.uuid4().hex[:12]


def begin(
    path: Path, settings: Mapping[str, Any], run: str = "", name: str = "", resumed_at: int | None = None
) -> None:
    """Write the line of settings with which a training begins, or is resumed.

    Args:
        path: the history; it is created if it does not exist.
        settings: options, and facts about the training, as JSON values.
        run: the training's identifier.
        name: of the optimizer, where a training writes the measurements of several into one file.
        resumed_at: the step at which the training is resumed. Earlier lines of this run from that step on become
            invalid: they belong to steps that were discarded.

    Raises:
        OSError: the file cannot be written.
    """
    line: dict[str, Any] = {"settings": dict(settings)}
    if run:
        line |= {"run": run, "name": name, "began": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if resumed_at is not None:
        line["resumed_at"] = resumed_at
    _write(path, line)


def append(path: Path, measurement: Measurement, run: str = "", loss: tuple[float, float | None] | None = None) -> None:
    """Write one measurement as a line; values that it does not have are left out.

    Args:
        path: the history.
        measurement: the measurement.
        run: the training's identifier.
        loss: mean and standard deviation of the training losses since the last line with a loss; ``None``: not known.

    Raises:
        OSError: the file cannot be written.
    """
    line = as_line(measurement)
    if loss is not None:
        line |= _of_losses(*loss)
    _write(path, {"run": run, **line} if run else line)


def as_line(measurement: Measurement) -> dict[str, Any]:
    """The object of a measurement, to be written as JSON."""
    line: dict[str, Any] = {"step": measurement.step, "optimizer_name": measurement.optimizer_name}
    layers: dict[str, dict[str, Any]] = {}
    for reading in measurement.readings:
        if reading.layer:
            layers.setdefault(reading.key.name, {})[reading.layer] = reading.value
        else:
            line[reading.key.name] = reading.value
    line |= {"layers": layers} if layers else {}
    return line | ({"reasons": measurement.reasons} if measurement.reasons else {})


def append_losses(path: Path, losses: MeanOfLosses, run: str = "") -> None:
    """Write a line that holds a mean of losses only.

    Args:
        path: the history.
        losses: the mean.
        run: the training's identifier.

    Raises:
        OSError: the file cannot be written.
    """
    line: dict[str, Any] = {"run": run} if run else {}
    line |= {"step": losses.step, "optimizer_name": losses.optimizer_name}
    _write(path, line | _of_losses(losses.value, losses.spread))


def _of_losses(mean: float, spread: float | None) -> dict[str, float | None]:
    return {TRAINING_LOSS: mean if math.isfinite(mean) else None} | ({} if spread is None else {_SPREAD: spread})


def _write(path: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line, allow_nan=False)
    try:
        file = path.open("a+b")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        # A killed run may have left half a line; the new text must start on a line of its own.
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode() + b"\n")


def read(path: str | Path, part: int = -1) -> list[Measurement]:
    """The measurements of one training in a history, in order of steps.

    Where a step was written twice, the later line counts.

    Args:
        path: the history.
        part: index into :func:`parts`; by default the latest.

    Raises:
        ConfigError: the file does not exist, holds neither a measurement nor a loss, or has no such part.
    """
    found = parts(path)
    if not -len(found) <= part < len(found):
        raise ConfigError(f"{path} holds {len(found)} part(s), and there is no part {part}")
    return found[part].measurements


def parts(path: str | Path) -> list[HistoryPart]:
    """The trainings that have written to a history; the one that was begun or resumed last comes last.

    Lines that cannot be parsed are skipped. Numbers under keys that this release does not know are kept.

    Raises:
        ConfigError: the file does not exist, or holds neither a measurement nor a loss.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no history at {path}; give the path of a `history.jsonl`")
    found = [drafted.part() for drafted in _drafts(path) if drafted.measured or drafted.losses]
    if not found:
        raise ConfigError(f"{path} holds no measurement")
    return found


def read_settings(path: str | Path, part: int = -1) -> dict[str, Any]:
    """The latest settings of one training in a history; empty if there are none or the file cannot be read."""
    try:
        drafts = _drafts(Path(path))
    except OSError:
        return {}
    measured = [d for d in drafts if d.measured or d.losses] or drafts
    return measured[part].settings if -len(measured) <= part < len(measured) else {}


@dataclass
class _Draft:
    """A part while its lines are read."""

    run: str
    began: str = ""
    names: set[str] = field(default_factory=set)
    resumed_at: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[tuple[str, int], Measurement] = field(default_factory=dict)
    losses: dict[tuple[str, int], MeanOfLosses] = field(default_factory=dict)

    def take_settings(self, line: dict[str, Any]) -> None:
        self.settings = line["settings"]
        self.began = line["began"] if isinstance(line.get("began"), str) else self.began
        name, step = line.get("name"), line.get("resumed_at")
        self.names.add(name if isinstance(name, str) else "")
        if type(step) is int and abs(step) <= _LARGEST_INTEGER:
            self.resumed_at = [*(s for s in self.resumed_at if s < step), step]
            for own, at in {*self.measured, *self.losses}:  # each optimizer's settings void the lines of its own
                if at >= step and name in (None, "", own):
                    self.measured.pop((own, at), None)
                    self.losses.pop((own, at), None)

    def take(self, measurement: Measurement, line: dict[str, Any]) -> None:
        key = (measurement.optimizer_name, measurement.step)
        if TRAINING_LOSS in line:
            mean, spread = line[TRAINING_LOSS], line.get(_SPREAD)
            value = float(mean) if _is_number(mean) else math.nan
            known = float(spread) if _is_number(spread) else None
            self.losses[key] = MeanOfLosses(measurement.step, value, known, measurement.optimizer_name)
            if measurement == Measurement(measurement.step, measurement.optimizer_name):
                return  # the line holds a loss only
        self.measured.pop(key, None)
        self.measured[key] = measurement

    def part(self) -> HistoryPart:
        measurements = sorted(self.measured.values(), key=lambda m: m.step)
        losses = sorted(self.losses.values(), key=lambda loss: loss.step)
        return HistoryPart(self.run, self.began, tuple(self.resumed_at), self.settings, measurements, losses)


def _drafts(path: Path) -> list[_Draft]:
    """The parts of a history, in the order in which they were last begun or resumed."""
    ordered: list[_Draft] = []
    by_run: dict[str, _Draft] = {}
    latest = ""  # the run of the line before
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        held = as_object(line)
        if held is None:
            continue
        run = held["run"] if isinstance(held.get("run"), str) else latest
        if isinstance(held.get("settings"), dict):
            draft = by_run.get(run) or _joined(ordered, held.get("name")) or _Draft(run)
            by_run[run] = draft
            ordered = [*(d for d in ordered if d is not draft), draft]
            draft.take_settings(held)
        else:
            measurement = as_measurement(held)
            if measurement is None:
                continue
            if run not in by_run:
                by_run[run] = _Draft(run)
                ordered.append(by_run[run])
            by_run[run].take(measurement, held)
        latest = run
    return ordered


def _joined(ordered: list[_Draft], name: Any) -> _Draft | None:
    """The part that a further optimizer's settings belong to: the last one, unless it has an optimizer of that name."""
    if isinstance(name, str) and name and ordered and ordered[-1].names and not {"", name} & ordered[-1].names:
        return ordered[-1]
    return None


def as_object(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; ``None`` where there is none."""
    try:
        held: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def as_measurement(held: dict[str, Any]) -> Measurement | None:
    """The measurement in the object of a line, as :func:`as_line` makes it; ``None`` where it names no step."""
    if type(held.get("step")) is not int or abs(held["step"]) > _LARGEST_INTEGER:
        return None
    step, name, reasons = held["step"], held.get("optimizer_name"), held.get("reasons")
    layers = held.get("layers")
    readings = [
        *_readings(step, {key: value for key, value in held.items() if key not in _NO_VALUES}),
        *(
            reading
            for key, values in (layers.items() if isinstance(layers, dict) else ())
            if isinstance(values, dict)
            for layer, value in values.items()
            for reading in _readings(step, {key: value}, layer)
        ),
    ]
    found = Measurement.from_readings(step, name if isinstance(name, str) else "", readings)
    return found.because(str(r) for r in reasons) if isinstance(reasons, list) else found


def _readings(step: int, values: Mapping[str, Any], layer: str = "") -> list[Reading]:
    """Readings of all numbers among the values. Unknown keys are kept: a later release may have written them."""
    return [
        Reading(KEYS.get(name) or Key(name, "not known to this release"), step, value, layer)
        for name, value in values.items()
        if _is_number(value)
    ]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST_INTEGER)
