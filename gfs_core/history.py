"""The history: one JSON line per measurement, written at once, readable after a crash."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gfs_core.errors import ConfigError
from gfs_core.measurement import Measurement

_FIELDS = {f.name for f in fields(Measurement)}


def append(path: Path, measurement: Measurement) -> None:
    """Write one line; values that were not had are left out.

    Raises:
        OSError: the file cannot be written.
    """
    line = {k: v for k, v in asdict(measurement).items() if v is not None and v != ()}
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


def _parse(line: str) -> Measurement | None:
    try:
        held: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(held, dict) or type(held.get("step")) is not int:
        return None
    values: dict[str, Any] = {}
    for name, value in held.items():
        if name == "optimizer_name" and isinstance(value, str):
            values[name] = value
        elif name == "reasons" and isinstance(value, list):
            values[name] = tuple(str(r) for r in value)
        elif name in _FIELDS and type(value) in (int, float):
            values[name] = value
    return Measurement(**values)
