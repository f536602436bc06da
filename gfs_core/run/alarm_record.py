"""The record of an alarm: everything that was read in the steps before it, in a file beside the history.

The first line says what the alarm was. Then comes a line for each step, in the form of the history's lines: the loss,
the rate, the free signals of all layers and what was measured, each at the very step that it belongs to. The history
holds means and latest values instead. Numbers that are not finite, which JSON does not have, are the strings ``nan``,
``inf`` and ``-inf``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.errors import ConfigError
from gfs_core.run import history
from gfs_core.run.record import Measurement


@dataclass(frozen=True)
class AlarmRecord:
    """What was read around an alarm.

    Attributes:
        step: the step at which the history says *alarm*. The alert may be of a step shortly before it.
        alert: the alert.
        run: the training's identifier, as in the history.
        optimizer_name: name of the optimizer.
        measurements: what was read at each step, in order of steps. A value may be not finite.
    """

    step: int
    alert: Alert
    run: str
    optimizer_name: str
    measurements: list[Measurement]


def write(path: Path, record: AlarmRecord) -> None:
    """Write a record; whoever reads the file meanwhile sees the one before or this one, whole.

    Raises:
        OSError: the file cannot be written.
    """
    told = {**asdict(record.alert), "advice": record.alert.advice}
    about = {"step": record.step, "optimizer_name": record.optimizer_name, "alert": told}
    lines = [{"run": record.run, "alarm": about}, *(_written(history.as_line(m)) for m in record.measurements)]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read(path: str | Path) -> AlarmRecord:
    """The record of an alarm. Lines that cannot be parsed are skipped; nothing that is read is executed.

    Args:
        path: a file in the folder ``alarms`` beside a history.

    Raises:
        ConfigError: the file does not exist, or is no record of an alarm.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no record of an alarm at {path}; they lie in the folder `alarms` beside a history")
    lines = [history.as_object(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    held = [line for line in lines if line is not None]
    about: Any = held[0].get("alarm") if held else None
    try:
        told = about["alert"]
        layers = tuple(str(layer) for layer in told.get("layers", ()))
        alert = Alert(int(told["step"]), AlertLevel(told["level"]), str(told["reason"]), str(told["rule"]), layers)
        step, name, run = int(about["step"]), str(about["optimizer_name"]), str(held[0].get("run", ""))
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ConfigError(f"{path} is no record of an alarm: its first line does not say what the alarm was") from None
    measurements = [m for line in held[1:] if (m := history.as_measurement(_read(line))) is not None]
    return AlarmRecord(step, alert, run, name, sorted(measurements, key=lambda m: m.step))


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(held) for key, held in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(held) for key, held in value.items()}
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value
