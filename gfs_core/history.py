"""The history: one JSON line per measurement, written at once, readable after a crash; one with the settings first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gfs_core.errors import ConfigError
from gfs_core.measurement import Measurement

_NUMBERS = {f.name for f in fields(Measurement)} - {"optimizer_name", "reasons"}
_MOST = 2**63 - 1  # larger integers are no steps and no counts; nothing that reads a history could hold them


def begin(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the line that a run begins with: its options and what it measures. A resumed run writes one again.

    Raises:
        OSError: the file cannot be written.
    """
    _write(path, {"settings": dict(settings)})


def append(path: Path, measurement: Measurement) -> None:
    """Write one line; values that were not had are left out.

    Raises:
        OSError: the file cannot be written.
    """
    _write(path, {k: v for k, v in asdict(measurement).items() if v is not None and v != ()})


def _write(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, allow_nan=False)
    # A run that was killed may have left half a line: the new one starts on its own.
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode() + b"\n")


def read(path: str | Path) -> list[Measurement]:
    """The measurements of a history, in order of steps; of a step written twice (a resumed run) the later line counts.

    Lines that are cut off or not a measurement are skipped, unknown fields ignored.

    Raises:
        ConfigError: the file is not there, or holds no measurement at all.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no history at {path}; give the path of a `history.jsonl`")
    found: dict[tuple[str, int], Measurement] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        measurement = _parse(line)
        if measurement is not None:
            found.pop((measurement.optimizer_name, measurement.step), None)
            found[measurement.optimizer_name, measurement.step] = measurement
    if not found:
        raise ConfigError(f"{path} holds no measurement")
    return sorted(found.values(), key=lambda m: m.step)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The latest settings of a history: plain JSON values by name; empty where it holds none or cannot be read."""
    settings: dict[str, Any] = {}
    with contextlib.suppress(OSError), Path(path).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith('{"settings"'):
                with contextlib.suppress(ValueError, RecursionError):
                    held = json.loads(line)["settings"]
                    settings = held if isinstance(held, dict) else settings
    return settings


def _parse(line: str) -> Measurement | None:
    try:
        held: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or type(held.get("step")) is not int or abs(held["step"]) > _MOST:
        return None
    values: dict[str, Any] = {}
    for name, value in held.items():
        if name == "optimizer_name" and isinstance(value, str):
            values[name] = value
        elif name == "reasons" and isinstance(value, list):
            values[name] = tuple(str(r) for r in value)
        elif name in _NUMBERS and (type(value) is float or (type(value) is int and abs(value) <= _MOST)):
            values[name] = value
    return Measurement(**values)
