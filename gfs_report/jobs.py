"""A user's own training job, run unchanged in a process of its own with something added to its trainer.

What is added is in :mod:`gfs_report.instrument`; :mod:`gfs_report.worker` is the process. They leave in the run's
folder ``metrics.csv`` (loss, seconds and rate of each step), ``history.jsonl``, ``output.txt`` (what the job printed)
and ``outcome.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gfs_core import ConfigError, GFSError

_LOOK = 0.1  # seconds between two looks at the job
_LEAVE = 30.0  # seconds that a job has for leaving once all was had
_LINES = 15  # of its output, where it went wrong
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class JobFailed(GFSError):
    """The user's job did not come as far as it was to; where it broke off, the text ends with its last output."""


@dataclass(frozen=True)
class Target:
    """What is to be run.

    Attributes:
        name: as the user gave it: a script, a LightningCLI config or an import path.
        kind: which of them.
        arguments: of the script or the config.
        data: import path of the data, with an import path.
    """

    name: str
    kind: Literal["script", "config", "path"]
    arguments: tuple[str, ...] = ()
    data: str | None = None


def target(name: str, arguments: Sequence[str] = (), data: str | None = None) -> Target:
    """What ``name`` means.

    Raises:
        ConfigError: nothing that can be run, or options that do not belong to it.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".py", ".yaml", ".yml"):
        if not Path(name).is_file():
            raise ConfigError(f"there is no file {name}; give a training script or a LightningCLI config")
        if data is not None:
            raise ConfigError(f"--data is for an import path, and {name} brings its own data; leave it out")
        return Target(name, "script" if suffix == ".py" else "config", tuple(arguments))
    if not _IMPORT_PATH.fullmatch(name):
        raise ConfigError(
            f"`{name}` is neither a script (train.py), nor a LightningCLI config (config.yaml), nor the import path of "
            "a LightningModule (package.module:Name)"
        )
    if arguments:
        raise ConfigError(
            f"an import path takes no arguments, and got `{' '.join(arguments)}`; give a function that returns the "
            "module"
        )
    if data is not None and not _IMPORT_PATH.fullmatch(data):
        raise ConfigError(f"--data must be an import path such as package.module:function, got `{data}`")
    return Target(name, "path", (), data)


@dataclass(frozen=True)
class Plan:
    """What is added to the job.

    Attributes:
        steps: optimizer steps after which it ends.
        options: of the :class:`~gfs_core.GFSConfig` that is measured with, where the job does not set its own.
        factor: on every learning rate that it uses.
        begin: steps taken before the first measurement.
        intervals: steps between measurements of signals that the options do not turn on, by name.
        rates: the largest learning rate of each step, in the place of the schedule's; the job then ends where its loss
            is lost. ``None``: its own, times the factor.
        schedule: number of steps over which its own schedule is recorded among the facts; 0: as many as its trainer
            would take; ``None``: it is not recorded.
        judge: whether losses of validation batches are computed after the last step, for the facts.
        share: of the training data, that the job goes through again and again; 1: all of them.
    """

    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    begin: int = 0
    intervals: dict[str, int] = field(default_factory=dict)
    rates: list[float] | None = None
    schedule: int | None = None
    judge: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """How the job ended.

    Attributes:
        folder: where its files are.
        ended: after the steps asked for, earlier by itself, or because its loss stayed non-finite.
        steps: optimizer steps taken.
        facts: of model, data, optimizer and measuring, by name; what is not known is absent.
    """

    folder: Path
    ended: Literal["steps", "itself", "diverged"]
    steps: int
    facts: dict[str, Any]


def run(
    job: Target, plan: Plan, folder: Path, *, patience: float = 600.0, told: Callable[[int], None] = lambda step: None
) -> Outcome:
    """Run the job until it has taken its steps.

    Args:
        job: what to run; in the present folder, as the user would.
        plan: what to add to it.
        folder: for everything that is written; emptied first.
        patience: seconds without a step and without output after which the job counts as hung, and is ended.
        told: called with the number of steps taken, now and then.

    Raises:
        ConfigError: the target is not what it was taken for; nothing was trained; the folder holds something else.
        JobFailed: it crashed or hung.
        OSError: the folder cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "output.txt").is_file():
        raise ConfigError(f"{folder} is there already, and is not that of a run; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder = folder.resolve()
    request = folder / "request.json"
    request.write_text(json.dumps({"job": asdict(job), "plan": asdict(plan)}), encoding="utf-8")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gfs_report.worker", str(request)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that it ends together with the processes that it has started
        )
    try:
        hung = _follow(process, folder, patience, told)
    finally:
        _end(process)
    request.unlink()
    return _outcome(job, folder, process.returncode, hung)


def _follow(process: subprocess.Popen[bytes], folder: Path, patience: float, told: Callable[[int], None]) -> str:
    """Wait for the end; a description of what it hangs at, empty where it does not."""
    seen: list[int] = []
    since, done = time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(_LOOK)
        files = ("metrics.csv", "history.jsonl", "output.txt", "outcome.json")
        sizes = [(folder / name).stat().st_size if (folder / name).exists() else 0 for name in files]
        if sizes != seen:
            seen, since = sizes, time.monotonic()
            told(_steps(folder))
        if sizes[-1]:
            done = done or time.monotonic()
            if time.monotonic() - done > _LEAVE:
                return ""
        elif time.monotonic() - since > patience:
            if hasattr(signal, "SIGUSR1"):  # it prints where it stands
                process.send_signal(signal.SIGUSR1)
                time.sleep(1.0)
            return f"hangs: no step and no output for {patience:g} seconds"
    told(_steps(folder))
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is still running of it: at first politely."""
    for name in ("SIGTERM", "SIGKILL"):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, getattr(signal, name)) if hasattr(os, "killpg") else process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)


def _outcome(job: Target, folder: Path, status: int, hung: str) -> Outcome:
    """What the worker has left behind."""
    held: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        held = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    if "refused" in held:
        raise ConfigError(held["refused"])
    if "ended" in held:
        return Outcome(folder, held["ended"], held["steps"], held["facts"])
    if "unmeasurable" in held:
        raise JobFailed(f"{job.name} cannot be measured as it is: {held['unmeasurable']}")
    steps = _steps(folder)
    when = f"after {steps} optimizer steps" if steps else "before its first optimizer step"
    if hung:
        problem = f"{job.name} {hung}, {when}"
    elif status < 0:
        memory = " (out of memory?)" if status == -9 else ""
        problem = f"{job.name} was ended by signal {-status}{memory} {when}"
    else:
        problem = f"{job.name} failed {when}: {held.get('error', f'it left with status {status}')}"
    lines = last_lines(folder / "output.txt")
    raise JobFailed(f"{problem}\nThe last lines of its output:\n{lines}" if lines else f"{problem}; it printed nothing")


def last_lines(path: Path, count: int = _LINES) -> str:
    """The end of a text file, indented, without colours and without lines that were written over."""
    try:
        text = path.read_bytes()[-100_000:].decode(errors="replace")
    except OSError:
        return ""
    lines = [_CODES.sub("", line.rstrip().rpartition("\r")[2]) for line in text.splitlines()]
    return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-count:])


def _steps(folder: Path) -> int:
    """Steps taken so far."""
    try:
        with (folder / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
            complete = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    return int(complete[-1].split(b",")[0]) + 1 if complete and complete[-1][:1].isdigit() else 0
