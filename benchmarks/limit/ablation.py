"""What it is that works: one thing of a control changed at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import gfs_core as gfs
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.limit.rows import cell, grouped, values
from benchmarks.limit.training import STEPS, Method, controlled, train
from benchmarks.limit.workloads import IMAGES, WORKLOADS, Workload
from gfs_core.actions.rate import PROFILE, ControlProfile

SEEDS, MULTIPLES = 3, (1.0, 30.0)
ABLATION = f"""## What it is that works

`follow` over a cosine, {SEEDS} seeds (GFS_4: one), {STEPS} steps, one thing changed at a time: median
accuracy. *Momentum* and *AdamW*: mean over all runs of a line (worst run). *Overhead* is the median of what the monitor
says.
"""


def _plain(values: Mapping[str, float], noisy: bool) -> float | None:
    return values.get("running_stability_ratio")


def _short_horizon(values: Mapping[str, float], noisy: bool) -> float | None:
    return values.get("gfs_stability_ratio")


def _larger(values: Mapping[str, float], noisy: bool) -> float | None:
    return max((values[n] for n in ("running_stability_ratio", "mean_square_bound") if n in values), default=None)


def _growth(factor: float) -> ControlProfile:
    return replace(PROFILE, growth=factor, growth_adaptive=factor)


def _parts(count: int) -> Callable[[gfs.StabilityMonitor], None]:
    def prepare(monitor: gfs.StabilityMonitor) -> None:
        monitor.measuring.learned.parts = count

    return prepare


def _follow(
    profile: ControlProfile = PROFILE, prepare: Callable[[gfs.StabilityMonitor], None] | None = None, **options: Any
) -> Method:
    made = controlled("follow", "cosine", max_overhead=None, **options)
    return replace(made, profile=profile, prepare=prepare)


DEFAULT = "default: every 5, 1/16, mean square; momentum: margin 0.5, growth 1.02; AdamW: 0.75, 1.05"
SOLVED: dict[str, Any] = {"tier": "sharpness", "running_every": None, "every": 10}
VARIANTS: dict[str, Method] = {
    DEFAULT: _follow(),
    **{f"measured every {n}": _follow(every=n) for n in (2, 10, 20, 50)},
    **{f"on 1/{n} of a batch": _follow(prepare=_parts(n)) for n in (4, 8, 32)},
    **{f"margin {m}": _follow(margin=m) for m in (0.25, 0.5, 0.75, 1.0)},
    **{f"growth {g}": _follow(_growth(g)) for g in (1.005, 1.02, 1.05, 1.1)},
    "growth not limited": _follow(_growth(math.inf)),
    "by the plain running ratio": _follow(replace(PROFILE, ratio=_plain)),
    "by the larger of the plain and the mean-square ratio": _follow(replace(PROFILE, ratio=_larger)),
    "by the solved ratio of the batch, every 10": _follow(**SOLVED),
    "by the solved ratio of a fixed probe of 64, every 10": _follow(**SOLVED, probe="fixed", probe_size=64),
    "by the GFS_4 ratio of the batch, every 10": _follow(
        replace(PROFILE, ratio=_short_horizon), **{**SOLVED, "tier": "gfs"}
    ),
}
DEAR = list(VARIANTS)[-1]  # one seed only
COUNTS = ("hvps", "grad_evals")
EXPECTED = len(IMAGES) * len(MULTIPLES) * (len(VARIANTS) * SEEDS - (SEEDS - 1))  # runs


def run(store: Store) -> None:
    def made(workload: Workload, method: Method, rate: float, seed: int) -> Row:
        run = train(workload, method, rate, seed, STEPS)
        counts = {n: sum(getattr(m, n) or 0 for m in run.measurements) / len(run.losses) for n in COUNTS}
        return {**run.row(), **{n: round(c, 3) for n, c in counts.items()}}

    runs = list(itertools.product(range(SEEDS), IMAGES, VARIANTS, (1.0, 30.0)))
    for seed, name, key, multiple in sorted(runs, key=lambda run: run[2] == DEAR):
        if key != DEAR or seed == 0:
            rate = multiple * WORKLOADS[name].rate
            make = functools.partial(made, WORKLOADS[name], VARIANTS[key], rate, seed)
            store.add("ablation", (name, key, multiple, seed), make)


def render(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["ablation"])
    rows = []
    means: dict[str, tuple[float, float]] = {}
    for key in VARIANTS:
        places = list(itertools.product(IMAGES, ("1.0", "30.0")))
        cells = [_short(groups.get((name, key, multiple))) for name, multiple in places]
        own = [(name, r) for name, multiple in places for r in groups.get((name, key, multiple), [])]
        if not own:
            continue
        kinds = [values([r for name, r in own if WORKLOADS[name].adaptive is kind], True) for kind in (False, True)]
        if all(kinds):
            means[key] = (fmean(kinds[0]), fmean(kinds[1]))
        spent = [r["overhead"] for _, r in own if r["overhead"] is not None]
        lost = sum(r["lost"] for _, r in own)
        cells += [f"{fmean(kind):.3f} ({min(kind):.3f})" if kind else "–" for kind in kinds]
        cells.append((f"{100 * median(spent):.0f} %" if spent else "–") + (f", lost in {lost}" if lost else ""))
        rows.append([key, *cells])
    short = [f"{name}, {times}" for name, times in itertools.product(IMAGES, ("×1", "×30"))]
    head = ["variant of `follow`", *short, "momentum", "AdamW", "overhead"]
    return [ABLATION, *table(head, rows), "", *_reading(means)]


def _short(rows: list[Row] | None) -> str:
    whole = cell(rows, True)
    return whole.split(" (")[0] + "".join(whole.partition(" †")[1:])


def _reading(means: dict[str, tuple[float, float]]) -> list[str]:
    """What the means of the two kinds of optimizers say; in points of accuracy against the default."""
    if DEFAULT not in means:
        return []
    out = []
    for kind, name in enumerate(("momentum", "AdamW")):
        change = {key: 100 * (mean[kind] - means[DEFAULT][kind]) for key, mean in means.items() if key != DEFAULT}
        for what, held in (
            ("more than 1 point better than the default", {k: c for k, c in change.items() if c > 1}),
            ("within 1 point of it", {k: c for k, c in change.items() if -1 <= c <= 1}),
            ("worse by more than 1 point", {k: c for k, c in change.items() if c < -1}),
        ):
            ordered = sorted(held.items(), key=lambda item: -item[1])
            said = "; ".join(f"{key} ({c:+.1f})" for key, c in ordered) or "none"
            out.append(f"- *{name}*, {what}: {said}.")
    return [*out, ""]
