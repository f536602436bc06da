"""What the default configuration spends on measuring, and how often it comes to it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, fashion_mnist
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient

BUDGET = """## Budget

The default configuration, `max_overhead=0.05`, on Fashion-MNIST with AdamW: seconds of all measurements but those that
held the first of a kind, over wall time; all of them; and what the log says.
"""


def connected(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), *layers, nn.Linear(width, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def budget(name: str, make: Callable[[], nn.Module], examples: int, seconds: float) -> Row:
    """The default configuration for some time: what was spent after each tier's first measurement, and how often."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = fashion_mnist(2000)

    def loss_of(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    began = time.perf_counter()
    monitor = gfs.StabilityMonitor(model, optimizer)
    found, step = [], 0
    while time.perf_counter() - began < seconds:
        rows = torch.randint(len(x), (examples,))
        batch = x[rows], y[rows]
        loss = loss_of(batch)
        gradient(optimizer, loss)
        measurement = monitor.step(loss_of, batch, loss=loss)
        found += [measurement] if measurement is not None else []
        optimizer.step()
        step += 1
    wall = time.perf_counter() - began
    kinds = ("running_sharpness", "sharpness", "gfs_sharpness")
    firsts = {next((i for i, m in enumerate(found) if getattr(m, kind) is not None), None) for kind in kinds}
    firsts.add(0)
    later = sum(m.seconds or 0.0 for i, m in enumerate(found) if i not in firsts)
    often = [m.step for m in found if m.running_sharpness is not None]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": 1e3 * (wall - sum(m.seconds or 0.0 for m in found)) / step,
        "steps": step,
        "after_the_first": later / wall,
        "with_the_first": sum(m.seconds or 0.0 for m in found) / wall,
        "logged": found[-1].overhead,
        "steps_between_running": median(b - a for a, b in itertools.pairwise(often)) if often[1:] else None,
        "running": len(often),
        "gfs": sum(m.gfs_sharpness is not None for m in found),
    }


def run() -> Iterator[Row]:
    """One row for each model."""
    yield budget("MLP, batch 32", lambda: connected(64, 1), 32, 40.0)
    yield budget("MLP, batch 256", lambda: connected(512, 3), 256, 60.0)
    yield budget("MLP, batch 256", lambda: connected(2048, 3), 256, 150.0)
    yield budget("CNN with BatchNorm, batch 128", convolutional, 128, 90.0)


def render(rows: list[Row]) -> list[str]:
    head = ["model", "parameters", "step, ms", "steps", "after the first", "with the first", "as logged"]
    cells = []
    for r in rows:
        spent = [f"{100 * r[name]:.2f} %" for name in ("after_the_first", "with_the_first", "logged")]
        often = f"{r['running']} ({r['steps_between_running']})"
        cells.append([r["model"], f"{r['parameters']:.1e}", f"{r['step_ms']:.2f}", r["steps"], *spent, often, r["gfs"]])
    return [BUDGET, *table([*head, "running: measurements (steps between)", "GFS_4"], cells)]
