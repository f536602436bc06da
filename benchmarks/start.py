"""What ``control="start"`` does, on the trainings on which its numbers were chosen. Writes start.json and start.md.

Run (less than ten minutes of one core): OMP_NUM_THREADS=1 python -m benchmarks.start [PART …]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from statistics import fmean, median
from typing import Any
from unittest import mock

import numpy as np
import torch

import gfs_core as gfs
from benchmarks import rate
from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient
from benchmarks.rate import CHOSEN, GRID, SEEDS, Batches, Workload, validation_of
from benchmarks.zoo import design, trial
from benchmarks.zoo.training import Training, plain
from gfs_core.actions.start import FIRST, GROWTH, HELD, SHARE, Start
from gfs_core.search.ramp import knee_of

MULTIPLES = {"×1": 0, "×3.2": 1, "×10": 2, "×32": 3}  # steps of the grid above the tuned rate
NUMBERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a twentieth of the rate at which it was lost": {"SHARE": 0.05},
    "a fifth": {"SHARE": 0.2},
    "growth of 1.06": {"GROWTH": 1.06},
    "growth of 1.25": {"GROWTH": 1.25},
    "by the losses of 5 steps alone": {"_RULES": ((5, 0.75, 4.0),)},
}
OF_NUMBERS = ("×10", "×32")  # with the first seed
HEALTHY_STEPS = 500
OPTIONS: dict[str, Any] = {"tier": "running", "control": "start"}
PARTS = ("rates", "signals", "numbers", "healthy", "further")
FURTHER = [
    (trial, "small LM"),
    (trial, "LoRA"),
    (trial, "matrix factorisation"),
    (trial, "GRU"),
    (design, "attention"),
    (design, "skip-gram"),
    (design, "fitted"),
]  # all with Adam or AdamW
FACTORS = (1, 10, 30)
RISEN = 3.0  # times the median of the gradient's norms so far


def tuned(references: dict[str, Row], name: str) -> int:
    """The place in the grid of the rate with the least mean log loss, over all seeds."""
    rows = [list(references[f"{name} | {seed}"].values()) for seed in range(SEEDS)]
    means = [fmean(math.log(v) if v else math.inf for v in column) for column in zip(*rows, strict=True)]
    return means.index(min(means))


def start_of(monitor: gfs.StabilityMonitor) -> Start:
    start = monitor.rates.start
    assert start is not None
    return start


def started(workload: Workload, users: float, seed: int, numbers: dict[str, Any] | None = None) -> Row:
    """A whole training with a start: its validation loss, and what the start did."""
    model, optimizer, schedule = rate.start(workload, users, seed)
    loss_of = functools.partial(workload.loss, model)
    with mock.patch.multiple("gfs_core.actions.start", **(numbers or {"SHARE": SHARE})):
        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**OPTIONS))
        monitor.protect(schedule)
        over = None
        for i, batch in enumerate(itertools.islice(Batches(workload.data()[0], workload.batch, seed), workload.steps)):
            loss = loss_of(batch)
            gradient(optimizer, loss)
            monitor.step(loss_of, batch, loss=loss)
            over = i if over is None and not start_of(monitor).rising else over
            optimizer.step()
            schedule.step()
        monitor.close()
    model.eval()
    with torch.no_grad():
        value = torch.stack([loss_of(batch) for batch in validation_of(workload)]).mean().item()
    lowered = monitor.rates.lowered
    assert lowered is not None
    row = {"loss": value, "scale": start_of(monitor).share(users), "over": over, "lowered": lowered.share}
    return dict(rounded(row, 5))


def signals(workload: Workload, users: float, seed: int) -> Row:
    """The rates in the rise at which the loss is lost, the gradient's norm has risen, and a knee is seen first."""
    model, optimizer, schedule = rate.start(workload, users, seed)
    loss_of = functools.partial(workload.loss, model)
    options = {**OPTIONS, "every": 2, "max_overhead": None}
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**options))
    start, norms = start_of(monitor), list[float]()
    rates, ratios, seen = list[float](), list[float](), dict[str, float | None]()
    for batch in itertools.islice(Batches(workload.data()[0], workload.batch, seed), workload.steps):
        loss = loss_of(batch)
        gradient(optimizer, loss)
        norms.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)))
        used = start.last * optimizer.param_groups[0]["lr"]
        made = monitor.step(loss_of, batch, loss=loss)
        if not start.rising:
            seen["lost"] = used
            break
        if norms[-1] > RISEN * median(norms):
            seen.setdefault("gradient", used)
        if made is not None and (ratio := made.running_stability_ratio) is not None and ratio > 0:
            rates.append(float(np.nextafter(max([used, *rates]), math.inf)))
            ratios.append(ratio)
            if "knee" not in seen and (knee := knee_of(rates, ratios)) is not None:
                seen |= {"knee": knee.rate, "seen": used}
        optimizer.step()
        schedule.step()
    monitor.close()
    return dict(rounded({name: seen.get(name) for name in ("lost", "gradient", "knee", "seen")}, 4))


def healthy(make: Callable[[int], Training]) -> Row:
    """The first steps of a training of the zoo at its own rate, with a start."""
    training = make(0)
    monitor = gfs.StabilityMonitor(training.model, training.optimizer, gfs.GFSConfig(**OPTIONS))
    start, over = start_of(monitor), None
    for i, step in enumerate(itertools.islice(training.steps, HEALTHY_STEPS)):
        monitor.step(step.loss_of, step.batch, loss=step.loss)
        over = i if over is None and not start.rising else over
    monitor.close()
    return dict(rounded({"scale": start.share(start.peak), "over": over}, 4))


def further(zoo: Any, kind: str, factor: float, start: bool) -> Row:
    """A short training of the zoo at a multiple of its rate: the median of its last 50 losses, and the scale."""

    def at_a_multiple(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *rest: Any, **options: Any) -> Training:
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return plain(model, optimizer, *rest, **options)

    with mock.patch.multiple(zoo, plain=at_a_multiple, STEPS=HEALTHY_STEPS):
        training = zoo.HEALTHY[kind](0)
    options = OPTIONS if start else {"alarm": "off", "tier": "running"}
    monitor = gfs.StabilityMonitor(training.model, training.optimizer, gfs.GFSConfig(**options))
    losses = []
    for step in itertools.islice(training.steps, HEALTHY_STEPS):
        if start:
            monitor.step(step.loss_of, step.batch, loss=step.loss)
        losses.append(step.loss)
    scale = start_of(monitor).share(start_of(monitor).peak) if start else 1.0
    monitor.close()
    return dict(rounded({"loss": median(losses[-50:]), "scale": scale}, 4))


def run(store: Store, parts: list[str]) -> None:
    """Make what is missing of these parts."""
    references = Store("rate").results["chosen: reference"]
    for (name, workload), seed in itertools.product(CHOSEN.items(), range(SEEDS)):
        place = tuned(references, name)
        for multiple, up in MULTIPLES.items():
            users = workload.rate * GRID[0] * 10 ** ((place + up) / 2)
            if "rates" in parts:
                store.add("rates", (name, multiple, seed), functools.partial(started, workload, users, seed))
                alone = functools.partial(rate.trained, workload, users, seed)
                store.add("nothing", (name, multiple, seed), lambda a=alone: {"loss": rounded(a(), 5)})  # type: ignore[misc]
            if "signals" in parts and up == max(MULTIPLES.values()):
                store.add("signals", (name, seed), functools.partial(signals, workload, users, seed))
            if "numbers" in parts and multiple in OF_NUMBERS and not seed:
                for words, numbers in NUMBERS.items():
                    make = functools.partial(started, workload, users, seed, numbers)
                    store.add("numbers", (words, name, multiple), make)
    if "healthy" in parts:
        for zoo in (design, trial):
            for kind, of in zoo.HEALTHY.items():
                store.add("healthy", (zoo.__name__.split(".")[-1], kind), functools.partial(healthy, of))

    if "further" in parts:
        for (zoo, kind), factor, start in itertools.product(FURTHER, FACTORS, (False, True)):
            store.add("further", (kind, factor, start), functools.partial(further, zoo, kind, factor, start))


def _excess(loss: float | None, references: dict[str, Row], name: str, seed: int) -> float:
    best = min(v for v in references[f"{name} | {seed}"].values() if v is not None)
    return math.inf if loss is None else loss / best - 1


def _percent(value: float) -> str:
    return "lost" if value > 100 else f"{value:+.0%}"


HEAD = f"""# The start of a training, by a ramp of its rate

    OMP_NUM_THREADS=1 python -m benchmarks.start

`control="start"` in trainings with a warm-up of 5 % and cosine, {SEEDS} seeds, on the workloads of [rate.md](rate.md)
on which thresholds were chosen. **The numbers of the start were chosen on these very trainings**, so that this page
shows that they can be had, and not what to expect of others. *Tuned*: the best of {len(GRID)} rates half a decade
apart, over both seeds. The user's rate is a multiple of it. *Excess*: of the validation loss over the least of all
{len(GRID)} rates with the same seed, so that it is rarely 0 at ×1. "Nothing": the same training without a start.

The first limit is {FIRST:g} of the user's rate and grows by a factor of {GROWTH:g} per step. Of the rate at which the
loss is lost {SHARE:g} is kept, and it may be lost for {HELD} steps at the user's rate.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    references = Store("rate").results["chosen: reference"]
    rows, every = [], dict[str, dict[str, list[float]]]()
    for name in CHOSEN:
        cells = []
        for multiple in MULTIPLES:
            own = {
                part: [results[part][f"{name} | {multiple} | {s}"] for s in range(SEEDS)]
                for part in ("nothing", "rates")
            }
            excess = {k: [_excess(r["loss"], references, name, s) for s, r in enumerate(v)] for k, v in own.items()}
            for part, values in excess.items():
                every.setdefault(multiple, {}).setdefault(part, []).extend(values)
            scales = "–".join(dict.fromkeys(f"{r['scale']:.2g}" for r in own["rates"]))
            before, after = (", ".join(map(_percent, excess[part])) for part in ("nothing", "rates"))
            cells.append(f"{before} → {after} ({scales})")
        rows.append([name, *cells])
    for words, of in (("**median**", median), ("worst", max)):
        cells = [" → ".join(_percent(of(every[m][part])) for part in ("nothing", "rates")) for m in MULTIPLES]
        rows.append([words, *cells])
    lines = [HEAD, "Nothing → start, each seed, and the scale that is left of the user's rate:", ""]
    lines += [
        *table(["workload", *MULTIPLES], rows),
        "",
        *_signals(results, references),
        *_numbers(results, references),
    ]
    return "\n".join([*lines, *_healthy(results), *_further(results), *REMARKS, ""])


def _further(results: dict[str, Any]) -> list[str]:
    """Trainings with Adam at rates that are too high."""
    rows = []
    for _, kind in FURTHER:
        cells = []
        for factor in FACTORS:
            nothing, start = (results["further"][f"{kind} | {factor} | {so}"] for so in (False, True))
            cells.append(f"{nothing['loss']:.3g} → {start['loss']:.3g} ({start['scale']:.2g})")
        rows.append([kind, *cells])
    head = [
        "Trainings of the zoo with Adam or AdamW, at multiples of its rates: the median of the last 50 losses of",
        f"{HEALTHY_STEPS} steps, nothing → start, and the scale that is left:",
    ]
    return [*head, "", *table(["training", *(f"×{f}" for f in FACTORS)], rows), ""]


def _signals(results: dict[str, Any], references: dict[str, Row]) -> list[str]:
    """What each signal of the rise says of the tuned rate."""
    rows, ratios = [], dict[str, list[float]]()
    for name, workload in CHOSEN.items():
        best = workload.rate * GRID[0] * 10 ** (tuned(references, name) / 2)
        own = [results["signals"][f"{name} | {seed}"] for seed in range(SEEDS)]
        cells = []
        for key in ("lost", "gradient", "knee", "seen"):
            cells.append(", ".join("–" if r[key] is None else f"{r[key] / best:.2g}" for r in own))
            ratios.setdefault(key, []).extend(math.log10(r[key] / best) for r in own if r[key] is not None)
        rows.append([name, *cells])
    spread = [f"{max(v) - min(v):.2g} in {len(v)}" if v else "–" for v in ratios.values()]
    columns = ["workload", "loss lost", "gradient up", "knee", "… seen at"]
    return [
        "## Which signal to go by",
        "",
        "In the rise at ×32: the rate, over the tuned one, at which the loss is lost, at which the norm of the",
        f"gradient is first above {RISEN:g} times its median, and at which the ratio, measured at every other step,",
        "first shows a knee; and the rate of the step at which that is seen. *Spread*: decades from the least to the",
        "largest, and of how many.",
        "",
        *table(columns, [*rows, ["**spread**", *spread]]),
        "",
    ]


def _numbers(results: dict[str, Any], references: dict[str, Row]) -> list[str]:
    """Other numbers than those that were chosen."""
    rows = []
    for words in NUMBERS:
        cells = []
        for multiple in OF_NUMBERS:
            losses = {name: results["numbers"][f"{words} | {name} | {multiple}"]["loss"] for name in CHOSEN}
            excess = [_excess(loss, references, name, 0) for name, loss in losses.items()]
            cells.append(f"{_percent(median(excess))}, {_percent(max(excess))}")
        rows.append([words, *cells])
    head = "Excess with other numbers, median and worst over the workloads, first seed:"
    return ["## Other numbers", "", head, "", *table(["", *OF_NUMBERS], rows), ""]


def _healthy(results: dict[str, Any]) -> list[str]:
    """Healthy trainings of the zoo."""
    rows = results["healthy"]
    held = [f"{k.split(' | ')[1]} ({r['scale']:.2g})" for k, r in rows.items() if r["scale"] != 1]
    late = [r["over"] for r in rows.values() if r["scale"] == 1 and r["over"] is not None]
    return [
        "## Healthy trainings",
        "",
        f"The first {HEALTHY_STEPS} steps of the healthy trainings of `benchmarks/zoo/design.py` and `trial.py`, at",
        f"their own rates: {len(rows) - len(held)} of {len(rows)} come to the user's rate to the bit. The start is",
        f"over after {median(late):.0f} steps in the median, and later where the schedule's rate rises for longer.",
        f"Not: {', '.join(held)}. The two are games of two networks, in which the loss of the one",
        "that is watched rises by itself.",
        "",
    ]


REMARKS = [
    "## What follows",
    "",
    "The loss says best where the rise has come to: it is lost at 6 to 11 times the tuned rate in ten of fourteen, and",
    "at 22 to 30 times in the others. The ratio shows a knee in seven only, at a third of the tuned rate to 2.6 times",
    "it, and it takes a gradient more at every other step to see that. The norm of the gradient rises anywhere between",
    "0.6 and 7 times the tuned rate. So a start goes by the losses alone, and nothing is measured for it.",
    "",
    "A CNN that AdamW trains at ten times the tuned rate does not lose its loss, and ends 76 % above the best: a start",
    "does not find a rate that is merely too high. At ×3.2 the same holds for several. Of the seven of the zoo with",
    "Adam two are lost at thirty times their rates and come back; the other five lose nothing, and keep the rate. The",
    "rise costs 0 to 12 % of the loss after 500 steps there, at their own rates.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS)
    store = Store("start")
    warnings.simplefilter("ignore", gfs.GFSWarning)
    run(store, list(parser.parse_args().parts))
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
