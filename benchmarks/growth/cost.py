"""What products and measurements cost against the number of parameters and the size of the probe; their memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gfs_core as gfs
from benchmarks.growth.model import measurement
from benchmarks.growth.workload import EXAMPLES, WIDTHS, Run, batch_of
from benchmarks.growth.workload import processor as timed
from benchmarks.lib.meters import LiveBytes
from benchmarks.lib.monitors import kept
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from gfs_core.linalg.vectors import random_like
from gfs_core.loss.batches import rotating_part
from gfs_core.loss.learned import Learned

TIERS: tuple[Any, ...] = ("running", "sharpness", "gfs")
COST = """Medians of interleaved repeats, in gradients (forward and backward pass on the whole batch). In brackets:
gradients and products of a warm measurement, then measured / predicted by [the model of cost](../docs/cost.md). A graph
counts as a gradient. A measurement follows at every step, on a new batch. *StateSnapshot* is entering and leaving it.
"""
MEMORY = """Copies of the weights. One example: the peak of a warm measurement with the warm start, as in
[memory.md](memory.md). A graph is what the loss keeps for its backward pass on the whole batch; for exact products, the
gradient's graph with it.
"""


def entered(run: Run) -> None:
    with gfs.StateSnapshot(run.model, run.params):
        pass


def cost(width: int, kind: Any, examples: int, repeats: int, tiers: tuple[Any, ...] = TIERS) -> dict[str, Any]:
    """Gradients, products and measurements by turns, between training steps; then their memory."""
    run = Run(width, kind)
    for _ in range(3):
        run.step(batch_of(examples))
    monitors = {tier: run.monitor(tier) for tier in tiers}
    multiples: dict[str, list[float]] = {}
    counts: dict[str, list[tuple[int, int]]] = {tier: [] for tier in tiers}
    gradients, fixed, drawn = [], [], []
    for repeat in range(repeats + 1):
        batch = batch_of(examples)
        with gfs.StateSnapshot(run.model, run.params) as isolation:
            seconds = products(run, batch, isolation)
        gradient = [timed(lambda b=batch: run.gradient(b))[0]]
        for tier, monitor in monitors.items():
            seconds[tier], found = timed(lambda m=monitor, b=batch: m.step(run.loss, b))
            counts[tier].append((found.grad_evals, found.hvps))
            gradient.append(timed(lambda b=batch: run.gradient(b))[0])
        part = rotating_part(batch, 16, repeat)
        seconds["part"] = timed(lambda b=part: run.gradient(b))[0]
        if repeat:  # the first one is cold
            gradients.append(median(gradient))
            fixed.append(timed(lambda: entered(run))[0])
            drawn.append(timed(lambda: random_like(run.params, torch.Generator()))[0])
            for name, value in seconds.items():
                multiples.setdefault(name, []).append(value / gradients[-1])
        run.optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in run.params)
    middle = {t: [median(c[i] for c in counts[t][1:]) for i in (0, 1)] for t in tiers}
    times = {k: median(v) for k, v in multiples.items()}
    row = {
        "parameters": sum(p.numel() for p in run.params), "optimizer": kind.__name__, "examples": examples,
        "gradient": median(gradients), "multiples": times,
        "cold": {t: counts[t][0] for t in tiers}, "warm": middle,
        "model": {t: measurement(*middle[t]) if t != "running" else 3 * times["part"] for t in tiers},
        "isolation": median(fixed), "random": median(drawn), "weights": weights,
        "memory": memory(run, monitors, batch_of(examples), weights), "loss": float(run.loss(batch_of(512)).detach()),
    }  # fmt: skip
    return row


def products(run: Run, batch: Tensor, isolation: gfs.StateSnapshot) -> dict[str, float]:
    """Seconds of one product of each kind; each kind has made one before."""
    objective = gfs.Objective(run.model, lambda _, b: run.loss(b), [batch], isolation=isolation)
    vector = random_like(run.params, torch.Generator().manual_seed(1))
    seconds = {}
    for name, method in (("exact", "exact"), ("difference", "gradients")):
        hessian = gfs.Hessian(objective, method, Learned(double_backward_verified=True))  # type: ignore[arg-type]
        hessian(vector)
        seconds[name] = timed(lambda h=hessian: h(vector))[0]
    return seconds


def memory(run: Run, monitors: dict[Any, gfs.StabilityMonitor], batch: Tensor, weights: int) -> dict[str, float]:
    """Copies of the weights: what the two kinds of graph keep, and the peak of measurements with what they keep."""
    run.optimizer.zero_grad()
    copies = {}
    with LiveBytes() as live:
        loss = run.loss(batch)
        copies["graph"] = live.now / weights
        gradients = torch.autograd.grad(loss, run.params, create_graph=True)
        copies["graph kept"] = live.now / weights - 1  # but for the gradients
    del loss, gradients
    for name, examples in (("whole", batch), ("one", batch[:1])):
        for tier, monitor in monitors.items():
            if name == "whole" and tier != "sharpness":
                continue
            gc.collect()
            held = kept(monitor)
            with LiveBytes() as live:
                monitor.step(run.loss, examples)
            copies[f"{tier}, {name}"] = live.peak / weights + held
    return copies


def by_probe(quick: bool) -> Iterator[Row]:
    """One row for each number of examples."""
    for examples in (8, 32, 128) if quick else (8, 16, 32, 64, 128, 256, 512, 1024):
        yield cost(WIDTHS[1e6], torch.optim.SGD, examples, 2 if examples > 64 else 4, ("running", "sharpness"))


def by_parameters(quick: bool) -> Iterator[Row]:
    """One row for each size and optimizer."""
    repeats = {1e4: 9, 1e5: 9, 1e6: 7, 1e7: 3, 1e8: 1}
    for size in list(repeats)[: 3 if quick else None]:
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            yield cost(WIDTHS[size], kind, EXAMPLES, 2 if quick else repeats[size])


def render(rows: list[Row], part: str, first: str) -> list[str]:
    """Two tables: of times and of memory; ``first`` is what grows."""
    costs, copies = [], []
    for r in rows:
        m, c = r["multiples"], r["memory"]
        name = [f"{r[first]:.1e}" if first == "parameters" else r[first], r["optimizer"]]
        cells = [
            f"{m[t]:.1f} ({r['warm'][t][0]:.0f} + {r['warm'][t][1]:.0f}; {m[t] / r['model'][t]:.1f})" if t in m else "–"
            for t in TIERS
        ]
        fixed = [f"{1e3 * r['isolation']:.1f} ({r['isolation'] / r['gradient']:.2f})", f"{1e3 * r['random']:.1f}"]
        ways = [f"{1e3 * r['gradient']:.1f}", f"{m['exact']:.1f}", f"{m['difference']:.1f}"]
        costs.append([*name, *ways, *cells, *fixed])
        own = [f"{c[f'{t}, one']:.1f}" if t in m else "–" for t in TIERS]
        graphs = [f"{c[k]:.1f} ({c[k] * r['weights'] / 2**20:.3g})" for k in ("graph", "graph kept")]
        copies.append([*name, *own, *graphs, f"{c['sharpness, whole']:.1f}"])
    head = [first, "optimizer"]
    ways = ["gradient, ms", "exact product", "from differences"]
    graphs = ["graph (MiB)", "graph kept for products (MiB)", "peak of sharpness, whole batch"]
    return [
        f"## Against the {'number of parameters' if part == 'parameters' else 'size of the probe'}", "",
        COST, *table([*head, *ways, *TIERS, "isolation, ms (gradients)", "random vector, ms"], costs), "",
        MEMORY, *table([*head, *(f"{t}, one example" for t in TIERS), *graphs], copies), "",
    ]  # fmt: skip
