"""Each estimate of the stability ratio beside the exact one, along trainings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr

import gfs_core as gfs
from benchmarks.lib.data import digits, fashion_mnist
from benchmarks.lib.models import cnn
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import RUNS, Run, adamw, of, relu, sgd, tanh

STEPS, EVERY, FIRST = 600, 20, 40  # steps of a run, between comparisons, of the first comparison
DEFAULT, HALF = "one gradient, every 25", ", bfloat16"
ACCURACY = f"""## Accuracy

Eight runs of {STEPS} steps (seed 0), warm-up and cosine unless it says constant rate. Every {EVERY} steps from step
{FIRST} on, each estimator's latest value is compared with the exact stability ratio: the solved eigenvalue on *all* the
training data. A cell holds: rank correlation over the run · median of estimate / exact · the worst factor it was off ·
cost per training step in gradients of the batch (a product counted as two gradients, a forward pass as a third).
"""
READING = """\
The default estimator is one gradient at a time, of the whole step, by the difference against training's own; a budget
of 5 % allows one in 20 to 25 steps. Its price in the table holds the measurements with which it begins, some 20 in the
first 150 steps; after them it is 4 %. It reaches a rank correlation of 0.9 in {reached} of the {count} runs. The
constant-rate CNN is no such run: there the exact ratio swings by some tens of per cent from one comparison to the next,
and not even the whole batch, solved at ten to thirty times the cost, follows that. Nor is the longer run of the MLP
with AdamW: once it has fitted its data, few examples make up the curvature, and a batch holds one of them or none.
In bfloat16 each takes two gradients here, as training itself is in float32. Where products on parts of a batch are
cheaper than a whole gradient they are taken instead: many small ones on changing parts beat few large ones at the same
cost, and solving on a small part is the worst use of it. Where a schedule moves the ratio over two orders of magnitude,
following it is easy, and even a small fixed probe does well. The worst factors are those of the first hundred steps,
where the curvature changes faster than an average can. What is read along the optimizer's step (directional) or along
the gradient (batch sharpness) is another quantity, and no stand-in for the ratio away from the edge."""


def runs() -> dict[str, Callable[[], Run]]:
    """The trainings by name."""
    return RUNS | {
        "digits, MLP, squared loss, momentum 0.1": lambda: of(tanh, sgd, 0.1, digits(1437), 256, True, True),
        "digits, MLP, AdamW 3e-3": lambda: of(relu, adamw, 3e-3, digits(1437), 64, True),
        "Fashion-MNIST, CNN, momentum 0.03": lambda: of(cnn, sgd, 0.03, fashion_mnist(2000), 256, True),
        "Fashion-MNIST, CNN, AdamW 2e-3": lambda: of(cnn, adamw, 2e-3, fashion_mnist(2000), 256, True),
    }


def candidates(run: Run) -> dict[str, tuple[gfs.StabilityMonitor, float]]:
    """A monitor for each estimator, with the fraction of a batch that it works on."""

    def monitor(tier: Any, every: int, **options: Any) -> gfs.StabilityMonitor:
        beside = {} if tier in ("directional", "running") else {"running_every": None}
        config = gfs.GFSConfig(tier=tier, every=every, max_overhead=None, **{**beside, **options})
        return gfs.StabilityMonitor(run.model, run.optimizer, config)

    made: dict[str, tuple[gfs.StabilityMonitor, float]] = {}
    for name in ("one gradient, every 5", "one gradient, every 10", DEFAULT, f"{DEFAULT}{HALF}"):
        whole = monitor("running", int(name.removesuffix(HALF).split()[-1]))
        whole.measuring.learned.whole_cheaper = True
        made[name] = whole, 1.0
    for every, parts in ((5, 16), (5, 32), (10, 8), (20, 4)):
        running = monitor("running", every)
        running.measuring.learned.parts, running.measuring.learned.whole_cheaper = parts, False
        made[f"products, every {every}, 1/{parts}"] = running, 1 / parts
    for parts in (1, 4, 16):
        size = None if parts == 1 else run.batch // parts
        made[f"solved, every 20, 1/{parts} of the batch"] = monitor("sharpness", EVERY, probe_size=size), 1 / parts
    made["batch sharpness, every 20"] = monitor("batch_sharpness", EVERY), 1.0
    made["directional, every 20, product"] = monitor("directional", EVERY), 1.0
    fixed = monitor("sharpness", EVERY, probe="fixed", probe_size=64)
    made["solved, every 20, fixed probe of 64"] = fixed, 64 / run.batch
    return made


def value(found: gfs.Measurement) -> float | None:
    """The estimate of the stability ratio that a measurement holds."""
    if found.running_stability_ratio is not None:
        return found.running_stability_ratio
    if found.stability_ratio is not None:
        return found.stability_ratio
    if found.batch_sharpness is not None and found.threshold is not None:
        return found.batch_sharpness / found.threshold
    if found.critical_lr is not None and found.learning_rate is not None:
        return found.learning_rate / found.critical_lr
    return None


def in_half(run: Run) -> Callable[[Any], torch.Tensor]:
    """The loss of a run in bfloat16 autocast."""

    def loss(batch: Any) -> torch.Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return run.loss(batch)

    return loss


def follow(name: str, make: Callable[[], Run]) -> Iterator[Row]:
    """All estimators along one run; each measures in isolation, so that none knows of the others."""
    torch.manual_seed(0)
    run = make()
    exact = gfs.StabilityMonitor(
        run.model, run.optimizer, gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gfs.GFSWarning)
        made = candidates(run)
    latest: dict[str, float] = {}
    price = dict.fromkeys(made, 0.0)
    pairs: dict[str, list[tuple[float, float]]] = {k: [] for k in made}
    for step, batch, loss in run.steps(STEPS, seed=1):
        for key, (monitor, fraction) in made.items():
            measurement = monitor.step(in_half(run) if HALF in key else run.loss, batch, step, loss=loss)
            if measurement is not None:
                # A product is counted as two gradients, a forward pass as a third of one.
                counted = (measurement.grad_evals or 0) + 2 * (measurement.hvps or 0)
                price[key] += counted * fraction if step else 0
                if (found := value(measurement)) is not None:
                    latest[key] = found
        if step % EVERY == 0 and step >= FIRST:
            true = exact.step(run.loss, run.data, step)
            assert true is not None
            assert true.stability_ratio is not None
            for key in made:
                if key in latest:
                    pairs[key].append((latest[key], true.stability_ratio))
    for key, held in pairs.items():
        if len(held) < 10:
            continue
        ours, true_values = zip(*held, strict=True)
        errors = [math.log(a / b) for a, b in held if a > 0]
        yield {
            "run": name,
            "estimator": key,
            "gradients_per_step": price[key] / STEPS,
            "rank_correlation": float(spearmanr(ours, true_values)[0]),
            "median_quotient": math.exp(median(errors)),
            "worst_factor": math.exp(max(abs(e) for e in errors)),
            "range": max(true_values) / min(true_values),
        }  # fmt: skip


def run() -> Iterator[Row]:
    """One row for each training and estimate."""
    for name, make in runs().items():
        yield from follow(name, make)


def render(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(r["run"] for r in rows))
    found = {(r["run"], r["estimator"]): r for r in rows}
    cells = [
        [key, *(_cell(found.get((name, key))) for name in names)] for key in dict.fromkeys(r["estimator"] for r in rows)
    ]
    spreads = [
        [i, name, f"{next(r['range'] for r in rows if r['run'] == name):.1f}"] for i, name in enumerate(names, 1)
    ]
    default = [r for r in rows if r["estimator"] == DEFAULT]
    reached = sum(r["rank_correlation"] >= 0.9 for r in default)
    return [
        ACCURACY, *table(["estimator", *range(1, len(names) + 1)], cells), "",
        *table(["", "run", "largest / smallest exact ratio"], spreads), "",
        READING.format(reached=reached, count=len(default)),
    ]  # fmt: skip


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    accuracy = f"{row['rank_correlation']:.2f} · {row['median_quotient']:.2f} · {row['worst_factor']:.1f}"
    return f"{accuracy} · {100 * row['gradients_per_step']:.0f} %"
