"""The history: one JSON line per measurement, written at once, readable after a crash.

A training's lines are its *part* of the file. It begins with a line of the settings, and each line names the run that
it belongs to, so that a second training, or another process, may write into the same file. A resumed training keeps
its run, writes a line of settings again and says at which step it was resumed.

Under ``training_loss`` a line holds the mean of the training losses since the line before (``null``, where most of them
were not finite), and under ``training_loss_spread`` their standard deviation. The first loss stands by itself. Where
nothing is measured, or before the loss of the step is known, a line for the loss alone comes every 10 steps.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from gfs_core.errors import ConfigError
from gfs_core.run.record import Measurement

TRAINING_LOSS = "training_loss"
_SPREAD = f"{TRAINING_LOSS}_spread"
_NUMBERS = {f.name for f in fields(Measurement)} - {"optimizer_name", "reasons"}
_MOST = 2**63 - 1  # larger integers are no steps and no counts; nothing that reads a history could hold them


class MeanOfLosses(NamedTuple):
    """The mean of the training losses of the steps up to ``step``, since the one before.

    Attributes:
        step: the last of the steps.
        value: the mean; NaN where most of the losses were not finite.
        spread: their standard deviation; ``None`` of a single one.
        optimizer_name: whose steps they are.
    """

    step: int
    value: float
    spread: float | None = None
    optimizer_name: str = ""


@dataclass(frozen=True)
class HistoryPart:
    """What one training has left in a history.

    Attributes:
        run: what its lines are told apart by; empty in a file that does not say.
        began: when it was begun or last resumed, in UTC, as ISO 8601; empty where that is not known.
        resumed_at: the steps at which it was resumed.
        settings: its options and what it measured, the latest ones: plain JSON values by name.
        measurements: in order of steps; there may be none where there are losses.
        losses: means of the training loss, in order of steps; none in a file of an earlier version.
    """

    run: str
    began: str
    resumed_at: tuple[int, ...]
    settings: dict[str, Any]
    measurements: list[Measurement]
    losses: list[MeanOfLosses] = field(default_factory=list)


def new_run() -> str:
    """A name for a run that no other has; takes nothing from the random streams of a training."""
    return uuid.uuid4().hex[:12]


def begin(
    path: Path, settings: Mapping[str, Any], run: str = "", name: str = "", resumed_at: int | None = None
) -> None:
    """Write the line that a training begins with, or is resumed with.

    Args:
        path: the history; it is made where it is not there.
        settings: options and what is measured, as JSON values.
        run: what the training's lines are told apart by.
        name: of the optimizer, where a training writes the measurements of several into one file.
        resumed_at: the step at which it goes on; its lines from there on, of the stretch that was given up, are void.

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
    """Write one line; values that were not had are left out.

    Args:
        path: the history.
        measurement: what was measured.
        run: what the training's lines are told apart by.
        loss: mean and spread of the training losses since the line before; ``None``: not known.

    Raises:
        OSError: the file cannot be written.
    """
    line = {k: v for k, v in asdict(measurement).items() if v is not None and v != ()}
    if loss is not None:
        line |= _of_losses(*loss)
    _write(path, {"run": run, **line} if run else line)


def append_losses(path: Path, losses: MeanOfLosses, run: str = "") -> None:
    """Write one line for losses alone; as :func:`append`, at a third of its price.

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
        # A run that was killed may have left half a line: the new one starts on its own.
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode() + b"\n")


def read(path: str | Path, part: int = -1) -> list[Measurement]:
    """The measurements of one training in a history, in order of steps; of a step written twice the later line counts.

    Args:
        path: the history.
        part: which of :func:`parts`; by default the latest.

    Raises:
        ConfigError: the file is not there, holds no measurement at all, or not so many parts.
    """
    found = parts(path)
    if not -len(found) <= part < len(found):
        raise ConfigError(f"{path} holds {len(found)} part(s), and there is no part {part}")
    return found[part].measurements


def parts(path: str | Path) -> list[HistoryPart]:
    """The trainings that have left something in a history, the one begun or resumed last at the end.

    Lines that are cut off or not a measurement are skipped, unknown fields ignored.

    Raises:
        ConfigError: the file is not there, or holds no measurement and no loss at all.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no history at {path}; give the path of a `history.jsonl`")
    found = [drafted.part() for drafted in _drafts(path) if drafted.measured or drafted.losses]
    if not found:
        raise ConfigError(f"{path} holds no measurement")
    return found


def read_settings(path: str | Path, part: int = -1) -> dict[str, Any]:
    """The latest settings of one training in a history; empty where there are none or it cannot be read."""
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
        if type(step) is int and abs(step) <= _MOST:
            self.resumed_at = [*(s for s in self.resumed_at if s < step), step]
            for own, at in {*self.measured, *self.losses}:  # of several optimizers each says so for its own
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
                return  # written for its loss alone
        self.measured.pop(key, None)
        self.measured[key] = measurement

    def part(self) -> HistoryPart:
        measurements = sorted(self.measured.values(), key=lambda m: m.step)
        losses = sorted(self.losses.values(), key=lambda loss: loss.step)
        return HistoryPart(self.run, self.began, tuple(self.resumed_at), self.settings, measurements, losses)


def _drafts(path: Path) -> list[_Draft]:
    """The parts of a history in the order in which each was begun or resumed last."""
    ordered: list[_Draft] = []
    by_run: dict[str, _Draft] = {}
    latest = ""  # the run of the line before
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        held = _object(line)
        if held is None:
            continue
        run = held["run"] if isinstance(held.get("run"), str) else latest
        if isinstance(held.get("settings"), dict):
            draft = by_run.get(run) or _joined(ordered, held.get("name")) or _Draft(run)
            by_run[run] = draft
            ordered = [*(d for d in ordered if d is not draft), draft]
            draft.take_settings(held)
        else:
            measurement = _parse(held)
            if measurement is None:
                continue
            if run not in by_run:
                by_run[run] = _Draft(run)
                ordered.append(by_run[run])
            by_run[run].take(measurement, held)
        latest = run
    return ordered


def _joined(ordered: list[_Draft], name: Any) -> _Draft | None:
    """The part that the settings of a further optimizer belong to: the last, where its optimizers have other names."""
    if isinstance(name, str) and name and ordered and ordered[-1].names and not {"", name} & ordered[-1].names:
        return ordered[-1]
    return None


def _object(line: str) -> dict[str, Any] | None:
    try:
        held: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def _parse(held: dict[str, Any]) -> Measurement | None:
    if type(held.get("step")) is not int or abs(held["step"]) > _MOST:
        return None
    values: dict[str, Any] = {}
    for name, value in held.items():
        if name == "optimizer_name" and isinstance(value, str):
            values[name] = value
        elif name == "reasons" and isinstance(value, list):
            values[name] = tuple(str(r) for r in value)
        elif name in _NUMBERS and _is_number(value):
            values[name] = value
    return Measurement(**values)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) is float or (type(value) is int and abs(value) <= _MOST)
