"""The start: a control beside no warm-up and a linear one."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.limit.rows import grouped, times
from benchmarks.limit.training import STEPS, Method, controlled, train
from benchmarks.limit.workloads import WORKLOADS, Workload

SEEDS, MULTIPLES = 5, (1.0, 10.0, 30.0)
START_STEPS = 200  # of STEPS
SPIKE = 1.5  # times the initial loss, within the first tenth of the steps
STARTS = {
    "no warm-up": Method(),
    "linear warm-up of 5 %": Method(warmup=True),
    "control='warmup'": controlled("warmup", "constant"),
}
EXPECTED = len(WORKLOADS) * len(MULTIPLES) * len(STARTS) * SEEDS  # runs
START = f"""## The start

Constant rate after the start, {SEEDS} seeds, the first {START_STEPS} of {STEPS} steps. Each cell: runs
diverged · runs whose loss rose above {SPIKE} times the first within a tenth of {STEPS} steps.
"""


def run(store: Store) -> None:
    def made(workload: Workload, method: Method, rate: float, seed: int) -> Row:
        run = train(workload, method, rate, seed, STEPS, taken=START_STEPS)
        early = run.losses[: STEPS // 10]
        return {**run.row(), "spiked": not max(early) <= SPIKE * early[0] or not math.isfinite(early[-1])}

    for seed, (name, workload) in itertools.product(range(SEEDS), WORKLOADS.items()):
        for multiple, (key, method) in itertools.product(MULTIPLES, STARTS.items()):
            make = functools.partial(made, workload, method, multiple * workload.rate, seed)
            store.add("start", (name, key, multiple, seed), make)


def render(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["start"])
    rows = []
    for name, key in itertools.product((*WORKLOADS, "all"), STARTS):
        cells = []
        for multiple in map(str, MULTIPLES):
            own = [r for k, rs in groups.items() if k[1:] == (key, multiple) and name in (k[0], "all") for r in rs]
            bad, spiked = (sum(r[n] for r in own) for n in ("diverged", "spiked"))
            cells.append(f"{bad} · {spiked} of {len(own)}")
        rows.append([name, key, *cells])
    return [START, *table(["workload", "start", *times(MULTIPLES)], rows), ""]
