"""``control="plateau"`` beside ``ReduceLROnPlateau`` at constant rates. Writes plateau.json and plateau.md.

Run (five minutes): OMP_NUM_THREADS=1 python -m benchmarks.plateau
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from statistics import fmean, median
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import gfs_core as gfs
from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient
from benchmarks.rate import REPORTED, Batches, Workload, validation_of

SEEDS, STEPS = 1, 1000
TIMES = (0.3, 1.0, 3.0)  # the base rate
METHODS: dict[str, dict[str, Any]] = {
    "constant": {},
    "ReduceLROnPlateau": {"factor": 1 / 3, "patience": 3},
    "control=plateau": {},
}
OURS = "control=plateau"
PAGE = f"""# A constant rate, lowered where the loss rests

    OMP_NUM_THREADS=1 python -m benchmarks.plateau

{STEPS} steps at constant rates, one seed, on seven trainings. The numbers were chosen on four others, of those on
digits in `benchmarks/rate.py`, after a first rule, with stretches of 8 blocks for 25, had lowered rates while the loss
still fell: it was worse than a constant rate by up to 41 % there, and by 19 % here. `ReduceLROnPlateau` is stepped with
the mean loss of each epoch, takes a third and has a patience of 3; with its own patience of 10 epochs it does nothing
in so few steps. `control=plateau` has every default. *Over constant*: the validation loss at the end over that at the
constant rate; below 1 is better.
*Share*: of the rate, at the end, the geometric mean.
"""
KEYS = list(itertools.product(REPORTED, TIMES, range(SEEDS)))


def trained(workload: Workload, method: str, rate: float, seed: int) -> Row:
    """The validation loss at the end, and what is left of the rate."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = workload.optimizer(model, rate)
    lowers = ReduceLROnPlateau(optimizer, **METHODS[method]) if method.startswith("Reduce") else None
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(control="plateau")) if method == OURS else None
    train = workload.data()[0]
    epoch = max(1, len(train[1]) // workload.batch)
    losses: list[float] = []
    loss_of = functools.partial(workload.loss, model)
    for step, batch in enumerate(itertools.islice(Batches(train, workload.batch, seed), STEPS)):
        loss = loss_of(batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"loss": None, "share": 1.0}
        gradient(optimizer, loss)
        if monitor is not None:
            monitor.step(loss_of, batch, step, loss=loss)
        optimizer.step()
        if lowers is not None and (step + 1) % epoch == 0:
            lowers.step(fmean(losses[-epoch:]))
    share = optimizer.param_groups[0]["lr"] / rate if monitor is None else monitor.rates.scale()
    model.eval()
    with torch.no_grad():
        value = torch.stack([loss_of(batch) for batch in validation_of(workload)]).mean().item()
    return dict(rounded({"loss": value, "share": share}, 5))


def over(rows: dict[str, Row], name: str, times: float, seed: int, method: str) -> float:
    """The loss of a run over that at a constant rate; infinite where it was lost."""
    row, alone = (rows[f"{name} | {times} | {seed} | {m}"]["loss"] for m in (method, "constant"))
    return math.inf if row is None else row / (alone or math.inf)


def share(rows: dict[str, Row], times: float, method: str) -> float:
    """What is left of the rate at the end of the runs at this rate, in the geometric mean."""
    left = [rows[f"{name} | {times} | {seed} | {method}"]["share"] for name, t, seed in KEYS if t == times]
    return math.exp(fmean(map(math.log, left)))


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows, others = results["runs"], [m for m in METHODS if m != "constant"]
    found = {m: {key: over(rows, *key, m) for key in KEYS} for m in others}
    total = []
    for method, values in found.items():
        less, more = sum(v < 0.98 for v in values.values()), sum(v > 1.02 for v in values.values())
        total.append([method, f"{median(values.values()):.2f}", f"{max(values.values()):.2f}", less, more])
    by_rate = [
        [m, *(f"{median(x for k, x in v.items() if k[1] == t):.2f} ({share(rows, t, m):.2f})" for t in TIMES)]
        for m, v in found.items()
    ]
    by_name = [[n, *(f"{median(x for k, x in v.items() if k[0] == n):.2f}" for v in found.values())] for n in REPORTED]
    head = ["method", "over constant, median", "worst", "better by 2 %", f"worse by 2 %, of {len(KEYS)}"]
    return "\n".join([
        PAGE,
        *table(head, total), "",
        "By the rate over the base rate of the training, the median (share):", "",
        *table(["method", *(f"×{t:g}" for t in TIMES)], by_rate), "",
        "By the training, the median:", "", *table(["training", *others], by_name), "",
    ])  # fmt: skip


def main() -> None:
    """Run what is not there yet, and write the page."""
    warnings.simplefilter("ignore", gfs.GFSWarning)
    store = Store("plateau")
    for seed, (name, workload), times, method in itertools.product(range(SEEDS), REPORTED.items(), TIMES, METHODS):
        run = functools.partial(trained, workload, method, times * workload.rate, seed)
        store.add("runs", (name, times, seed, method), run)
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
