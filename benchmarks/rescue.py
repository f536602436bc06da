"""Does a run survive with ``alarm="rescue"``: trainings with a disturbance, beside rules that skip steps or clip.

Writes rescue.json and rescue.md; runs that are there are not made again. The numbers of the actions were chosen on an
MLP with restarts of the rate, which is not among these, and on other seeds.
Run (ten minutes): OMP_NUM_THREADS=1 python -m benchmarks.rescue
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits
from benchmarks.lib.meters import clock
from benchmarks.lib.models import Rows, dense, seeded
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import percent, table
from benchmarks.lib.trainings import entropy
from benchmarks.zoo.breaks import ends_well

STEPS, BATCH, SEEDS = 500, 64, range(10, 13)
SINCE = 250  # the step at which the disturbance begins
AS_WELL = 0.02  # accuracy that a run may lose against the undisturbed one with the same seed and count as saved


class Recurrent(nn.Module):
    """A plain recurrent network that reads a digit as eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNN(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of shape (n, 64)."""
        out: Tensor = self.head(self.cell(x.reshape(-1, 8, 8))[0][:, -1])
        return out


def normed() -> nn.Module:
    """A convolutional network with BatchNorm, for digits given flat."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


SGD = partial(torch.optim.SGD, momentum=0.9)
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], float]] = {
    "deep ReLU network, SGD": (lambda: dense(64, 64, 64, 64, 10, act=nn.ReLU), SGD, 0.05),
    "CNN with BatchNorm, SGD": (normed, SGD, 0.05),
    "transformer, AdamW": (lambda: Rows("gelu", places=True), torch.optim.AdamW, 3e-3),
    "recurrent, AdamW": (Recurrent, torch.optim.AdamW, 3e-3),
}


def usual(step: int) -> float:
    """The factor of the rate at a step: a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def rubbish(step: int, batch: Batch, draws: torch.Generator) -> Batch:
    """Five batches with inputs a hundred times too large, and labels at random."""
    if not SINCE <= step < SINCE + 5:
        return batch
    return batch[0] * 100, torch.randint(10, batch[1].shape, generator=draws)


def not_finite(step: int, batch: Batch, draws: torch.Generator) -> Batch:
    """One batch that holds NaN."""
    return (batch[0] * math.nan, batch[1]) if step == SINCE else batch


def same(step: int, batch: Batch, draws: torch.Generator) -> Batch:
    """The batch as it is."""
    return batch


def jump(factor: float, steps: int, step: int) -> float:
    """The factor of the rate, where it is ``factor`` times as high for so many steps."""
    return usual(step) * (factor if SINCE <= step < SINCE + steps else 1.0)


Change = Callable[[int, Batch, torch.Generator], Batch]
DANGERS: dict[str, tuple[Change, Callable[[int], float]]] = {
    "none": (same, usual),
    "five batches of rubbish": (rubbish, usual),
    "one batch with NaN": (not_finite, usual),
    "rate × 100 for 20 steps": (same, partial(jump, 100.0, 20)),
    "rate × 30 for good": (same, partial(jump, 30.0, STEPS)),
    "rate × 30 from the start": (same, lambda step: 30 * usual(step)),
}
WAYS = ("nothing", "clipping to 1", "skip: gradient", "skip: loss", "alarm=skip", "alarm=rescue")


LOG = "alarm=log"  # for the wall time


class Skips:
    """Skips a step whose value is not finite, or more than four deviations above its mean over the steps taken."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def __call__(self, value: float) -> bool:
        """Whether the step with this value is skipped."""
        recent = self.taken[-100:]
        if math.isfinite(value) and len(recent) >= 20:
            mean = fmean(recent)
            spread = math.sqrt(fmean((v - mean) ** 2 for v in recent))
            if value > mean + 4 * spread:
                return True
        if math.isfinite(value):
            self.taken.append(value)
        return not math.isfinite(value)


def run(workload: str, danger: str, way: str, seed: int) -> Row:
    """Accuracy on all data at the end, seconds of the loop, rollbacks."""
    make, optimizer_of, rate = WORKLOADS[workload]
    change, schedule = DANGERS[danger]
    data, draws = digits(), torch.Generator().manual_seed(seed)
    model = seeded(make, seed)
    optimizer = optimizer_of(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    monitor, skips, back = None, Skips(), 0
    if way.startswith("alarm="):
        alarm: Any = way.removeprefix("alarm=")
        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(alarm=alarm))
        monitor.protect(scheduler)
    began = clock()
    for step in range(STEPS):
        rows = torch.randint(len(data[0]), (BATCH,), generator=draws)
        batch = change(step, (data[0][rows], data[1][rows]), draws)
        loss = entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        skip = False
        if monitor is not None:
            made = monitor.step(partial(entropy, model), batch, loss=loss)
            back += made is not None and any("went back" in reason for reason in made.reasons)
        elif way == "skip: loss":
            skip = skips(loss.item())
        elif way != "nothing":
            most = 1.0 if way == "clipping to 1" else math.inf
            norm = nn.utils.clip_grad_norm_(model.parameters(), most)
            skip = way == "skip: gradient" and skips(norm.item())
        if not skip:
            optimizer.step()
        scheduler.step()
    seconds = clock() - began
    model.eval()
    with torch.no_grad():
        accuracy = (model(data[0]).argmax(1) == data[1]).double().mean().item()
    return {"accuracy": accuracy, "seconds": seconds, "back": back}


HEAD = f"""# Runs that survive

    OMP_NUM_THREADS=1 python -m benchmarks.rescue

torch {{torch}}. Digits, {len(WORKLOADS)} networks ({"; ".join(WORKLOADS)}), {len(SEEDS)} seeds, {STEPS} steps, batches
of {BATCH}, a cosine schedule. The disturbance begins at step {SINCE}. A run is counted as saved if its accuracy on all
data at the end is at most {AS_WELL} below that of the undisturbed run with the same seed. All options but the alarm are
the default ones. "skip: gradient" and "skip: loss" leave out a step whose gradient norm, or loss, is not finite or more
than four deviations above the mean of the last hundred taken.

Share of the runs that are saved, and the mean number of rollbacks with `alarm="rescue"`:
"""
NOTE = """
Where the rate is too high from the start the run has no healthy past to be compared with. The rate that jumps for 20
steps jumps again after a rollback, as the schedule goes back too; and most of the rest is trained at a lower rate. The
statistics of BatchNorm keep a batch with NaN where nothing but the optimizer's step is left out.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    runs = results["runs"]

    def found(danger: str, way: str) -> list[tuple[Row, Row]]:
        keys = [f"{workload} | {{}} | {{}} | {seed}" for workload in WORKLOADS for seed in SEEDS]
        return [(runs[key.format(danger, way)], runs[key.format("none", "nothing")]) for key in keys]

    def saved(danger: str, way: str) -> str:
        return percent(fmean(a["accuracy"] >= b["accuracy"] - AS_WELL for a, b in found(danger, way)))

    rows = [
        [danger, *(saved(danger, way) for way in WAYS), f"{fmean(a['back'] for a, _ in found(danger, WAYS[-1])):.1f}"]
        for danger in DANGERS
    ]
    timed = [*WAYS[:4], LOG, *WAYS[4:]]
    times = [[way, f"{median(a['seconds'] / b['seconds'] for a, b in found('none', way)):.2f}"] for way in timed]
    lines = [
        HEAD.format(**results["environment"]), *table(["disturbance", *WAYS, "rollbacks"], rows), NOTE,
        "Wall time of an undisturbed run, as a multiple of that with nothing. Steps take one to three milliseconds,",
        "the monitors measure too, and the machine was busy:", "",
        *table(["", "median"], times),
    ]  # fmt: skip
    return "\n".join([*lines, *in_danger(results.get("danger", {}))]) + "\n"


IN_DANGER = """
## Trainings in danger

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.live danger && python -m benchmarks.rescue

The trainings of [danger.md](danger.md), {seeds} seeds of each, on which nothing was chosen. A run *ends well* where the
median of its last 50 losses is at most a fifth of the progress above the best that the run had when it was left alone;
so it does not end in what counts as a break there. Where data stays bad nothing here can help. "skip: gradient" and
"skip: loss" leave out a step whose value is not finite or more than six deviations above the mean of the last 128, as
OLMo-core's `SkipStepOptimizer` does.
"""


def in_danger(rows: dict[str, Row]) -> list[str]:
    """The share of runs in danger that end well, by kind and way."""
    if not rows:
        return []
    keys = [key.split(" | ") for key in rows]
    kinds, ways, seeds = (list(dict.fromkeys(column)) for column in zip(*keys, strict=True))

    def well(kind: str, way: str) -> list[bool]:
        found = []
        for seed in seeds:
            row, alone = (rows.get(f"{kind} | {w} | {seed}") for w in (way, "nothing"))
            if row is not None and alone is not None:
                found.append(ends_well(row, alone))
        return found

    done = [kind for kind in kinds if all(len(well(kind, way)) == len(seeds) for way in ways)]
    cells = [[kind, *(percent(fmean(well(kind, way))) for way in ways)] for kind in done]
    cells.append(["**mean**", *(percent(fmean(fmean(well(kind, way)) for kind in done)) for way in ways)])
    times = [rows[f"{k} | {w} | {s}"]["seconds"] / rows[f"{k} | {w} | {s}"]["steps"] for k in done for s in seeds
             for w in ways[-1:]]  # fmt: skip
    alone = [rows[f"{k} | {ways[0]} | {s}"]["seconds"] / rows[f"{k} | {ways[0]} | {s}"]["steps"]
             for k in done for s in seeds]  # fmt: skip
    ratio = median(a / b for a, b in zip(times, alone, strict=True))
    after = f'A step with `alarm="rescue"` took {ratio:.1f} times as long as one without, in the median; steps take\n'
    after += "milliseconds, and the machine was busy."
    return [IN_DANGER.format(seeds=len(seeds)), *table(["kind", *ways], cells), "", after, ""]


def main() -> None:
    """All runs, and the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = Store("rescue")
    for workload in WORKLOADS:
        for seed in SEEDS:
            for danger in DANGERS:
                for way in (*WAYS, LOG) if danger == "none" else WAYS:
                    make = partial(run, workload, danger, way, seed)
                    store.add("runs", (workload, danger, way, seed), make)
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
