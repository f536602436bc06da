"""Results of a benchmark: NAME.json beside the scripts, and the page NAME.md that is made from it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def environment() -> Row:
    """What the results depend on beside the code."""
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}


def rounded(value: Any, digits: int) -> Any:
    """Numbers to so many significant digits, those that are not finite as ``None``: they are no JSON."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


class Store:
    """Results by part, saved whenever a part has grown.

    Args:
        name: of the files.
        folder: where they are.
        fresh: whether to begin without what is there.
        made_with: more of the environment: versions, the device.

    Attributes:
        results: the parts, each a list or a dictionary of rows, and "environment": that of the newest results. A
            "remark" is written by hand, about what the results do not hold, and printed with them.
    """

    def __init__(self, name: str, folder: Path = FOLDER, fresh: bool = False, **made_with: Any) -> None:
        self.made_with = made_with
        self.path = folder / f"{name}.json"
        held = self.path.is_file() and not fresh
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if held else {}

    def put(self, part: str, value: Any) -> None:
        """Replace a part, and save."""
        self.results |= {"environment": environment() | self.made_with, part: value}
        self.save()

    def collect(self, part: str, rows: Iterable[Row]) -> None:
        """Replace a part by rows that come one at a time; each is printed and saved at once."""
        held: list[Row] = []
        for row in rows:
            held.append(row)
            print(row, flush=True)
            self.put(part, held)

    def add(self, part: str, key: tuple[Any, ...], make: Callable[[], Row]) -> Row:
        """The row of this run, made only where it is not there yet."""
        rows, name = self.results.get(part, {}), " | ".join(map(str, key))
        if name not in rows:
            began = time.perf_counter()
            rows[name] = make()
            print(f"{part} | {name}: {rows[name]} ({time.perf_counter() - began:.1f} s)", flush=True)
            self.put(part, rows)
        found: Row = rows[name]
        return found

    def save(self) -> None:
        """Write the results, a line per row; a run that is cut off leaves the former file."""
        written = self.path.with_suffix(".tmp")
        written.write_text(dumped(self.results))
        written.replace(self.path)

    def write_page(self, text: str) -> None:
        """Write the page."""
        self.path.with_suffix(".md").write_text(text, encoding="utf-8")


class SharedStore(Store):
    """As :class:`Store`, for several processes at once that make different rows of the same file."""

    def add(self, part: str, key: tuple[Any, ...], make: Callable[[], Row]) -> Row:
        """The row of this run, made only where no process has made it yet."""
        name = " | ".join(map(str, key))
        if name not in self.results.get(part, {}):
            began = time.perf_counter()
            row = make()
            print(f"{part} | {name}: {row} ({time.perf_counter() - began:.1f} s)", flush=True)
            with self._alone():
                if self.path.is_file():
                    self.results = json.loads(self.path.read_text())
                self.put(part, self.results.get(part, {}) | {name: row})
        found: Row = self.results[part][name]
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def dumped(results: dict[str, Any]) -> str:
    """As JSON, in which each row of a part is a line."""
    parts = []
    for name, value in results.items():
        if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
            lines = ",\n".join(f"  {_json(k)}: {_json(v)}" for k, v in value.items())
            parts.append(f" {_json(name)}: {{\n{lines}\n }}")
        elif isinstance(value, list) and value:
            lines = ",\n".join(f"  {_json(v)}" for v in value)
            parts.append(f" {_json(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {_json(name)}: {_json(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
