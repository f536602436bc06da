"""What a step costs at which nothing is measured, and the import."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gfs_core as gfs
from benchmarks.growth.workload import EXAMPLES, WIDTHS, Run, batch_of
from benchmarks.growth.workload import processor as timed
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table

IMPORT = """## Import, ms of processor time

Fresh interpreters by turns, with byte code beside the sources, as an installed package has it. *gfs_core* is timed
inside one that holds torch already; *difference*: of whole ones.
"""


def _steps(monitor: gfs.StabilityMonitor, loss_of: Any, batch: Tensor, steps: range, loss: Tensor | None) -> None:
    for step in steps:
        monitor.step(loss_of, batch, step, loss=loss)


def idle_step(quick: bool) -> list[dict[str, Any]]:
    """Microseconds of a step at which nothing is measured."""
    rows = []
    for size in (1e4, 1e6):
        run = Run(WIDTHS[size])
        batch = batch_of(EXAMPLES)
        never = run.monitor("gfs", every=10**9, running_every=10**9)
        spent = run.monitor("gfs", every=10, running_every=5, max_overhead=1e-9)
        for name, monitor, loss in (("nothing due", never, None), ("nothing due, loss given", never, torch.tensor(1.0)),
                                    ("defaults, budget spent, loss given", spent, torch.tensor(1.0))):  # fmt: skip
            monitor.step(run.loss, batch, 0)
            blocks = []
            for block in range(5 if quick else 20):
                steps = range(1 + 500 * block, 501 + 500 * block)
                work = partial(_steps, monitor, run.loss, batch, steps, loss)
                blocks.append(1e6 * timed(work)[0] / 500)
            rows.append({"parameters": size, "case": name, "least": min(blocks), "median": median(blocks)})
    return rows


def imports(quick: bool) -> dict[str, Any]:
    """Milliseconds of fresh interpreters, by turns; and of `import gfs_core` alone, after `import torch`.

    With byte code beside the sources, as an installed package has it.
    """
    compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    seconds: dict[str, list[float]] = {"torch": [], "torch, gfs_core": [], "gfs_core": []}
    after = "import torch, time; t = time.process_time(); import gfs_core; print(time.process_time() - t)"
    for turn in range(6 if quick else 22):
        for names, held in seconds.items():
            code = after if names == "gfs_core" else f"import {names}, time; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, env=compiled)
            if turn > 0:  # the first may have compiled
                held.append(1e3 * float(done.stdout))
    both, one = seconds["torch, gfs_core"], seconds["torch"]
    rows = {k: {"least": min(v), "median": median(v)} for k, v in seconds.items()}
    return {**rows, "difference": {"least": min(both) - min(one), "median": median(both) - median(one)}}


def render_step(rows: list[Row]) -> list[str]:
    cells = [[f"{r['parameters']:.0e}", r["case"], f"{r['least']:.1f}", f"{r['median']:.1f}"] for r in rows]
    return ["## A step without a measurement, µs", "", *table(["parameters", "case", "least", "median"], cells), ""]


def render_imports(rows: Row) -> list[str]:
    cells = [[k, f"{v['least']:.0f}", f"{v['median']:.0f}"] for k, v in rows.items()]
    return [IMPORT, *table(["import", "least", "median"], cells), ""]
