"""The process in which a user's job runs: ``python -m gfs_report.worker request.json``; see :mod:`gfs_report.jobs`.

Imports nothing of its own before the job does: a script is started as ``python script.py`` would, and its trainer is
changed while it is being imported.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import random
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_PACKAGES = ("gfs_core", "lightning_gfs", "hf_gfs", "gfs_report")
_OWN = (__file__, runpy.__file__, "<frozen runpy>", importlib.__file__, "<frozen importlib._bootstrap>")


class Refused(Exception):
    """The target is not what it was taken for."""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it has been imported."""

    def __init__(self, hooks: dict[str, Callable[[Any], None]]) -> None:
        self.hooks = {name: hook for name, hook in hooks.items() if name not in sys.modules}
        for name in hooks.keys() - self.hooks.keys():
            hooks[name](sys.modules[name])

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader calls the function at the end."""
        hook = self.hooks.pop(fullname, None)
        spec = None if hook is None else importlib.util.find_spec(fullname)
        if hook is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main(request: Path) -> int:
    """Run what is asked for; the exit status."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    job, plan, folder = asked["job"], asked["plan"], request.parent
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, chain=False)
    random.seed(0)
    sys.meta_path.insert(0, _AfterImport(_hooks(plan, folder)))
    run = {"script": _script, "config": _config, "path": _path}[job["kind"]]
    outcome = folder / "outcome.json"
    try:
        run(job, plan, folder)
    except Refused as refusal:
        _write(outcome, {"refused": str(refusal)})
        return 2
    except SystemExit as left:
        if left.code in (None, 0) and not outcome.exists():
            return _nothing(job, outcome)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        _print(error)
        if outcome.exists():  # all was had; what failed is the user's tidying up
            return 0
        if _is_ours(error):
            _write(outcome, {"unmeasurable": str(error)})
            return 1
        text = str(error).strip().splitlines()
        _write(outcome, {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__})
        return 1
    return 0 if outcome.exists() else _nothing(job, outcome)


def _hooks(plan: dict[str, Any], folder: Path) -> dict[str, Callable[[Any], None]]:
    def instrumented(how: str) -> Callable[[Any], None]:
        def hook(module: Any) -> None:
            from gfs_report import instrument, jobs

            getattr(instrument, how)(module, jobs.Plan(**plan), folder)

        return hook

    return {
        "numpy.random": lambda module: module.seed(0),  # the same start in every run, unless the job sets its own
        "torch": lambda module: module.manual_seed(0),
        "lightning.pytorch.trainer.trainer": instrumented("lightning"),
        "pytorch_lightning.trainer.trainer": instrumented("lightning"),
        "transformers.trainer": instrumented("transformers"),
    }


def _script(job: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    sys.argv = [job["name"], *job["arguments"]]
    sys.path[0] = str(Path(job["name"]).resolve().parent)
    runpy.run_path(job["name"], run_name="__main__")


def _config(job: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    try:
        from jsonargparse import ArgumentError
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise Refused(f"a LightningCLI config needs {error.name}: pip install 'lightning[pytorch-extra]'") from None
    name = job["name"]
    nested = _is_nested(Path(name))
    sys.argv = [name]
    given = ["--config", name, "fit"] if nested else ["fit", "--config", name]
    quiet = {"exit_on_error": False}
    try:
        LightningCLI(args=[*given, *job["arguments"]], parser_kwargs={**quiet, "fit": dict(quiet)})
    except ArgumentError as error:
        raise Refused(f"{name} is refused by LightningCLI: {error}") from None


def _is_nested(config: Path) -> bool:
    """Whether a LightningCLI config has its parts under `fit`; refused, if it cannot be one or names no model."""
    import yaml  # type: ignore[import-untyped]

    try:
        held = yaml.safe_load(config.read_bytes())
    except Exception as error:  # not YAMLError alone: of `!!int ""` and the like it lets through what Python raises
        raise Refused(f"{config} is not YAML: {error}") from None
    nested = isinstance(held, dict) and isinstance(held.get("fit"), dict)
    model = (held["fit"] if nested else held).get("model") if isinstance(held, dict) else None
    if not isinstance(model, str) and not (isinstance(model, dict) and "class_path" in model):
        raise Refused(
            f"{config} does not say which class its model is (no `class_path` under `model`); give the script that "
            f"calls LightningCLI in its place, followed by `-- fit --config {config}`"
        )
    return nested


def _path(job: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    module = _made(job["name"])
    roots = [base.__module__.partition(".")[0] for base in type(module).__mro__]
    if "LightningModule" not in [base.__name__ for base in type(module).__mro__]:
        raise Refused(f"`{job['name']}` gives a {type(module).__name__}, and is to give a LightningModule")
    flavour = importlib.import_module("lightning.pytorch" if "lightning" in roots else "pytorch_lightning")
    data = {} if job["data"] is None else {"train_dataloaders": _made(job["data"])}
    if hasattr(data.get("train_dataloaders"), "train_dataloader"):
        data = {"datamodule": data["train_dataloaders"]}
    trainer = flavour.Trainer(max_steps=plan["steps"], devices=1, default_root_dir=folder, logger=False)
    trainer.fit(module, **data)


def _made(path: str) -> Any:
    """What an import path names; of a class or function, what it gives without arguments."""
    name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Refused(f"`{path}`: there is no module {error.name} in {Path.cwd()} or among those installed") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [n for n, v in vars(found).items() if callable(v) and getattr(v, "__module__", None) == name]
            raise Refused(f"`{path}`: {name} has no `{attribute}`; it has {', '.join(own) or 'nothing of its own'}")
        found = getattr(found, part)
    if not isinstance(found, type) and not inspect.isroutine(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise Refused(f"`{path}` cannot be called without arguments ({error}); give a function that can") from None
    return found()


def _nothing(job: dict[str, Any], outcome: Path) -> int:
    text = (
        f"{job['name']} ended without training: neither Lightning's Trainer.fit nor the Hugging Face Trainer.train was "
        "called. A plain loop is measured with gfs_core.StabilityMonitor"
    )
    _write(outcome, {"refused": text})
    return 2


def _is_ours(error: BaseException) -> bool:
    """Whether it says that this job cannot be measured as it is."""
    if type(error).__name__ not in ("ConfigError", "MisconfigurationException"):
        return False
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _PACKAGES


def _print(error: BaseException) -> None:
    """The traceback, from the user's code on."""
    start: TracebackType | None = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename in _OWN:
        start = start.tb_next
    traceback.print_exception(type(error), error, start)


def _write(path: Path, held: dict[str, Any]) -> None:
    path.write_text(json.dumps(held), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
