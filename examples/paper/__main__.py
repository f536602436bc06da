"""``python -m examples.paper [NAME …] [--again] [--smoke] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.paper import figures, horizon, networks, regression, rk4, scalar, tables

HERE = Path(__file__).parent


class Results:
    """Results in ``folder``, computed where they are not there yet."""

    def __init__(self, folder: Path, again: bool, smoke: bool) -> None:
        self.folder, self.again, self.smoke = folder, again, smoke
        self.done: set[str] = set()

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored result, or a new one."""
        path = self.folder / f"{name}.json"
        if path.exists() and (not self.again or name in self.done):
            return json.loads(path.read_text())
        began = time.perf_counter()
        result = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(result), separators=(",", ":")) + "\n")
        self.done.add(name)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return json.loads(path.read_text())

    def runs(self, *workloads: networks.Workload) -> dict[str, Any]:
        """One training each."""
        return {w.name: self.get(w.name, functools.partial(networks.run, w)) for w in workloads}


def _rounded(value: Any) -> Any:
    """Ten significant digits are enough for a data file."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


NAMES = ("scalar", "map", "convergence", "bifurcation", "regression", "networks", "beyond", "horizon")


def data(name: str, results: Results) -> Any:
    """What the figure ``name`` is drawn from."""
    covered = networks.SMALL if results.smoke else networks.COVERED
    beyond = networks.SMALL_BEYOND if results.smoke else networks.BEYOND
    if name == "networks":
        return results.runs(*covered)
    if name == "beyond":
        return results.runs(*beyond)
    if name == "horizon":
        return horizon.compute(results.runs(*covered, *beyond))
    if name == "rk4":
        return results.get(name, lambda: rk4.compute(results.runs(*covered), results.smoke))
    compute = {
        "scalar": scalar.trajectories,
        "map": scalar.map_of_rises,
        "convergence": scalar.convergence,
        "bifurcation": scalar.bifurcation,
        "regression": regression.compute,
    }[name]
    return results.get(name, lambda: compute(results.smoke))


def main(arguments: list[str] | None = None) -> None:
    """Compute what is missing, draw the figures asked for, and write the tables once all is there."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description="The paper, reproduced, with its limits."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"figures: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--again", action="store_true", help="compute anew what is stored (half an hour on two cores)")
    parser.add_argument(
        "--smoke", action="store_true", help="everything very small, in under a minute; give --out as well"
    )
    parser.add_argument("--out", type=Path, help="folder for results/ and figures/ (default: the stored ones)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no figure is called {unknown[0]!r}; there are: {', '.join(NAMES)}")
    if options.smoke and options.out is None:
        parser.error("--smoke needs --out, so that the stored results stay as they are")
    results_folder = HERE / "results" if options.out is None else options.out / "results"
    pictures = HERE.parent.parent / "docs" / "figures" if options.out is None else options.out / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # matrices this small are faster on one core
    results = Results(results_folder, options.again, options.smoke)
    found = {}
    for name in options.names or NAMES:
        found[name] = data(name, results)
        figures.draw(name, found[name], pictures / f"paper-{name}.png")
        print(pictures / f"paper-{name}.png", flush=True)
    if len(found) == len(NAMES):
        found["rk4"] = data("rk4", results)
        (results_folder / "tables.md").write_text(tables.write(found))
        print(results_folder / "tables.md")


if __name__ == "__main__":
    main()
