"""The price of a control within the default budget, and without one."""

from __future__ import annotations

import functools
import itertools
from statistics import median
from typing import Any

from benchmarks.lib.store import Store
from benchmarks.lib.tables import table
from benchmarks.limit.rows import MULTIPLES, cell, grouped, times
from benchmarks.limit.training import STEPS, controlled, row_of
from benchmarks.limit.workloads import WORKLOADS
from gfs_core.actions.rate import PROFILE

SEEDS = 3
FREE = PROFILE.free  # measurements that no budget holds back
EXPECTED = len(WORKLOADS) * len(MULTIPLES) * 4 * SEEDS  # runs
PRICE = f"""## The price

*cap* and *follow* over a cosine, {SEEDS} seeds, all with {STEPS} steps: with the default budget of 5 % of wall
time, and without one. *Overhead* is what the last measurement says of the whole run: median (smallest–largest). The
first {FREE} measurements of a controlled run are free of the budget.
"""


def run(store: Store) -> None:
    for seed, (name, workload) in itertools.product(range(SEEDS), WORKLOADS.items()):
        for multiple, policy, budget in itertools.product(MULTIPLES, ("cap", "follow"), (0.05, None)):
            method = controlled(policy, "cosine", max_overhead=budget)
            make = functools.partial(row_of, workload, method, multiple * workload.rate, seed, STEPS)
            store.add("price", (name, policy, budget, multiple, seed), make)


def render(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["price"])
    rows = []
    for (name, workload), policy, budget in itertools.product(WORKLOADS.items(), ("cap", "follow"), ("0.05", "None")):
        own = [groups.get((name, policy, budget, str(m))) for m in MULTIPLES]
        spent = [r["overhead"] for rs in own for r in rs or [] if r["overhead"] is not None]
        share = f"{100 * median(spent):.1f} % ({100 * min(spent):.1f}–{100 * max(spent):.1f})" if spent else "–"
        cells = [cell(rs, workload.accuracy) for rs in own]
        rows.append([name, policy, "5 %" if budget == "0.05" else "none", share, *cells])
    return [PRICE, *table(["workload", "policy", "budget", "overhead", *times(MULTIPLES)], rows), ""]
