"""Sets of runs: which runs an argument names, and what to call each."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gfs_core import ConfigError
from gfs_report.runs import PATTERNS, Run, logs_in, read_run


@dataclass(frozen=True)
class RunSet:
    """Runs that differ in their seed only.

    Attributes:
        name: the argument that names them, without the folders that all arguments share.
        runs: what was read, by the name of the run within the set; in natural order.
        notes: what was left out, in sentences.
    """

    name: str
    runs: dict[str, Run]
    notes: tuple[str, ...]


def read_sets(arguments: Sequence[str]) -> list[RunSet]:
    """Read a set of runs for each argument: a folder of run folders, a glob, or several of these joined by commas.

    A run that cannot be read is left out, with a note.

    Raises:
        ConfigError: there is nothing at an argument, none of its runs can be read, or two arguments share a run.
    """
    of: dict[Path, str] = {}
    sets = []
    for argument in arguments:
        paths = _paths(argument)
        for path in paths:
            if (owner := of.setdefault(path, argument)) != argument or paths.count(path) > 1:
                also = f"`{owner}` and `{argument}`" if owner != argument else f"`{argument}` twice"
                raise ConfigError(f"the run {path} is in {also}; a run can stand for one set only")
        sets.append(_read(argument, paths))
    given = [Path(a) for a in arguments]
    names = _names(given) if len(given) > 1 and all(p.exists() for p in given) else arguments
    return [replace(one, name=name) for one, name in zip(sets, names, strict=True)]


def _read(argument: str, paths: list[Path]) -> RunSet:
    runs, notes = {}, []
    for name, path in zip(_names(paths), paths, strict=True):
        try:
            runs[name] = read_run(path)
        except ConfigError as error:
            notes.append(f"{argument}: {name} was left out: {error}")
            continue
        notes += [f"{argument}: {name}: {note}" for note in runs[name].notes]
    if not runs:
        raise ConfigError(f"no run of `{argument}` can be read: {'; '.join(notes)}")
    return RunSet(argument, runs, tuple(notes))


def _paths(argument: str) -> list[Path]:
    found: list[Path] = []
    parts = [argument] if Path(argument).exists() else [p.strip() for p in argument.split(",") if p.strip()]
    for part in parts or [argument]:
        path = Path(part)
        if path.exists():
            found += _runs_in(path)
            continue
        matches = sorted(glob.glob(part, recursive=True), key=_natural)
        if not matches:
            raise ConfigError(
                f"there is nothing at `{part}`; give a folder that holds a folder per run, a glob in quotes, or "
                "several paths joined by commas"
            )
        for match in matches:
            found += _runs_in(Path(match))
    return [p.resolve() for p in found]


def _runs_in(path: Path) -> list[Path]:
    """The path itself where it is a run, else the folders in it, as deep as they branch."""
    if path.is_file() or logs_in(path):
        return [path]
    inner = sorted((p for p in path.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: _natural(p.name))
    logged = [p for p in inner if any(True for pattern in PATTERNS for _ in p.rglob(pattern))]
    if not logged:
        return [path]
    if len(logged) == 1 and len(deeper := _runs_in(logged[0])) > 1:  # as in lightning_logs/version_0, version_1, …
        return deeper
    return inner


def _names(paths: list[Path]) -> list[str]:
    """The part of each path that tells it from the others; what cannot be printed is replaced."""
    parts = [p.parts for p in paths]
    if len(parts) == 1:
        names = [paths[0].parent.name if paths[0].is_file() else paths[0].name]
    else:
        shortest = min(map(len, parts))
        start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
        end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), shortest - start)
        names = ["/".join(p[start : len(p) - end]) for p in parts]
    if len(set(names)) < len(names) or "" in names:
        names = [str(p) for p in paths]
    return ["".join(c if c.isprintable() else "�" for c in name) for name in names]


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts seed-10 behind seed-2."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]
