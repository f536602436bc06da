"""Is there an edge at 1? The ratios of runs at constant rates, damaged and healthy."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import shown, table
from benchmarks.lib.trainings import adamw, sgd
from benchmarks.limit.rows import Groups, grouped
from benchmarks.limit.training import PLATEAU, STEPS, controlled, train
from benchmarks.limit.workloads import IMAGES, WORKLOADS, Workload

SEEDS = 3
DAMAGE, DAMAGED_LOSS = 3.0, 0.2  # times the best final loss of the same kind of run, and above this
EDGE_MODELS = {"digits, MLP": WORKLOADS[IMAGES[1]], "Fashion-MNIST, CNN": WORKLOADS[IMAGES[3]]}
EDGE_OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, float], torch.optim.Optimizer], float]] = {
    "SGD": (lambda model, rate: torch.optim.SGD(model.parameters(), rate), 0.5),
    "momentum": (sgd, 0.05),
    "AdamW": (adamw, 3e-3),
}
EDGE_RATES = (0.3, 1.0, 3.0, 10.0)
EDGE_BATCHES = (16, 64, 256)
RATIOS = {"plain": "running_stability_ratio", "mean_square": "mean_square_bound"}
WINDOWS = {"first": (0.0, 1 / 8), "middle": (1 / 3, 2 / 3), "last": (2 / 3, 1.0)}
EXPECTED = len(EDGE_MODELS) * len(EDGE_OPTIMIZERS) * len(EDGE_BATCHES) * len(EDGE_RATES) * SEEDS  # runs
EDGE = f"""## Is there an edge at 1?

Constant rates, nothing controlled, {SEEDS} seeds; base rates 0.5 (SGD), 0.05 (momentum), 0.003 (AdamW). A run
is *damaged* if its loss is not finite, or its rate is above the best one for the same data, optimizer and batch, and
the mean loss of its last {PLATEAU} steps above {DAMAGED_LOSS} and more than {DAMAGE:g} times what that rate came to.
The ratios are medians over a part of the run (of the steps taken, where it ended early), and over seeds; where there
was none (–), it counts as 0. Once such a run has come to the plateau at a loss of log 10 = 2.30, where its network
gives all inputs the same answer, the ratio is low again, and only the first eighth tells of what happened.
*Mean square* is `mean_square_bound` here and below, from single products, by which a control goes. It is no
`mean_square_stability_ratio`: these runs are older than that one's formula, for which there is no such table.
"""
AREAS = """Area under the ROC curve for *damaged* (½: tells nothing), of the median of the first eighth, of the larger
one of the middle and the last third, and of the largest of the three:
"""
ONE = """Damaged · healthy runs in which that is 1 or above:
"""


def run(store: Store) -> None:
    def made(workload: Workload, optimizer: Any, rate: float, batch: int, seed: int) -> Row:
        options = {"max_overhead": None}
        run = train(
            workload, controlled("observe", "constant", **options), rate, seed, STEPS, batch=batch, optimizer=optimizer
        )
        row = run.row()
        for (name, attribute), (window, (low, high)) in itertools.product(RATIOS.items(), WINDOWS.items()):
            found = [(m.step, getattr(m, attribute)) for m in run.measurements]
            held = [(step, ratio) for step, ratio in found if ratio is not None and math.isfinite(ratio)]
            inside = [ratio for step, ratio in held if low * len(run.losses) <= step <= high * len(run.losses)]
            inside = inside or [ratio for _, ratio in held[-1:]]  # a run that ended within a few steps
            row[f"{name}_{window}"] = rounded(median(inside), 6) if inside else None
        return row

    for seed, (name, workload) in itertools.product(range(SEEDS), EDGE_MODELS.items()):
        for (key, (optimizer, base)), batch in itertools.product(EDGE_OPTIMIZERS.items(), EDGE_BATCHES):
            for multiple in EDGE_RATES:
                make = functools.partial(made, workload, optimizer, multiple * base, batch, seed)
                store.add("edge", (name, key, batch, multiple, seed), make)


def render(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["edge"])
    runs = damaged_runs(groups)
    head = ["data, model", "optimizer", "batch", "rate", "damaged", "final loss"]
    head += [f"{name}: {window}" for name in ("plain", "mean square") for window in ("first eighth", "middle", "last")]
    rows = []
    for key, own in groups.items():
        marks = [bad for k, bad, _ in runs if k == key]
        finals = [math.inf if r["final"] is None else r["final"] for r in own]
        cells = [_middle([r[f"{n}_{w}"] for r in own]) for n, w in itertools.product(RATIOS, WINDOWS)]
        model, optimizer, batch, multiple = key
        damaged = f"{sum(marks)} of {len(marks)}"
        rows.append([model, optimizer, batch, f"×{float(multiple):g}", damaged, shown(median(finals), 3), *cells])
    return [EDGE, *table(head, rows), "", *areas(runs)]


def damaged_runs(groups: Groups) -> list[tuple[tuple[str, ...], bool, Row]]:
    """Every run with its group and whether it is damaged."""
    finals = {key: median(_final(r) for r in rows) for key, rows in groups.items()}
    out = []
    for key, rows in groups.items():
        best = min((k for k in finals if k[:3] == key[:3]), key=lambda k: finals[k])
        above = float(key[3]) > float(best[3])
        for row in rows:
            bad = not _final(row) <= max(DAMAGE * finals[best], DAMAGED_LOSS)
            out.append((key, bad and (above or math.isinf(_final(row))), row))
    return out


def _final(row: Row) -> float:
    return math.inf if row["final"] is None else float(row["final"])


def _middle(found: list[float | None]) -> str:
    there = [f for f in found if f is not None]
    return shown(median(there), 2) if there else "–"


BOTH = "larger of both"
LOOKS = {"first eighth": ("first",), "thirds": ("middle", "last"), "any": ("first", "middle", "last")}


def largest(row: Row, name: str, look: str) -> float:
    """The largest median of this ratio over the parts of the run looked at; 0 where nothing was measured."""
    names = list(RATIOS) if name == BOTH else [name]
    return max(row[f"{n}_{window}"] or 0.0 for n, window in itertools.product(names, LOOKS[look]))


def area(bad: list[float], good: list[float]) -> float:
    """Area under the ROC curve: the share of pairs in which the damaged run has the larger value."""
    if not bad or not good:
        return math.nan
    return fmean((b > g) + 0.5 * (b == g) for b in bad for g in good)


def areas(runs: list[tuple[tuple[str, ...], bool, Row]]) -> list[str]:
    """Areas under the ROC curve, and what a threshold of 1 tells."""
    looks = list(itertools.product((*RATIOS, BOTH), LOOKS))
    under, at_one = [], []
    for label in ("all", *EDGE_OPTIMIZERS, *map(str, EDGE_BATCHES), *EDGE_MODELS):
        own = [(bad, row) for key, bad, row in runs if label in (*key, "all")]
        bad, good = ([row for b, row in own if b is is_bad] for is_bad in (True, False))
        start = [f"batch {label}" if label.isdigit() else label, str(len(bad)), str(len(good))]
        found = [([largest(r, *look) for r in bad], [largest(r, *look) for r in good]) for look in looks]
        under.append(start + [f"{area(*f):.2f}" for f in found])
        at_one.append(start + [f"{sum(v >= 1 for v in b)} · {sum(v >= 1 for v in g)}" for b, g in found])
    head = ["runs", "damaged", "healthy", *(f"{name}: {look}".replace("_", " ") for name, look in looks)]
    return [AREAS, *table(head, under), "", ONE, *table(head, at_one), "", *_edge_reading(runs)]


def _edge_reading(runs: list[tuple[tuple[str, ...], bool, Row]]) -> list[str]:
    def found(label: str, name: str, look: str) -> tuple[list[float], list[float]]:
        own = [(bad, largest(row, name, look)) for key, bad, row in runs if label in (*key, "all")]
        return [v for bad, v in own if bad], [v for bad, v in own if not bad]

    areas_ = {(n, look): area(*found("all", n, look)) for n, look in itertools.product(RATIOS, LOOKS)}
    better = areas_["mean_square", "thirds"] > max(areas_["plain", "thirds"], 0.5)
    plain, square = (found("momentum", n, "first eighth") for n in RATIOS)
    return [
        f"Over all runs, by the thirds: {areas_['mean_square', 'thirds']:.2f} for the mean-square ratio, "
        f"{areas_['plain', 'thirds']:.2f} for the plain one: the mean-square ratio "
        f"{'tells' if better else 'does not tell'} damaged runs from healthy ones there. In the first eighth: "
        f"{areas_['mean_square', 'first eighth']:.2f} and {areas_['plain', 'first eighth']:.2f}. What differs there is "
        f"where the edge lies with momentum: of {len(plain[0])} damaged runs {sum(v >= 1 for v in square[0])} are at 1 "
        f"or above by the mean-square ratio and {sum(v >= 1 for v in plain[0])} by the plain one, whose largest value "
        f"is {max(plain[0], default=math.nan):.2f}; of {len(plain[1])} healthy runs {sum(v >= 1 for v in square[1])} "
        "are, by the mean-square ratio.",
        "",
    ]
