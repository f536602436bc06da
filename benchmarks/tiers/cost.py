"""What a warm measurement of each tier costs, in training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch
from benchmarks.lib.models import dense
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import step

COST = """## Cost

Medians of warm measurements at 20 consecutive steps (5 above 3e6 parameters, 2 above 3e7) of an MLP with momentum,
batch of 64, as multiples of the time of a training step; in brackets gradients + products. *Running* works on a
sixteenth of the batch. An MLP with so small a batch does little more than read its weights: a product on 4 examples
then costs a third of one on 64, and every further pass over the weights counts. In convolutions and attention over
long sequences it does not. In time a product took three to four steps here, more than the two gradients that it is
counted as above.
"""
TIERS: dict[str, dict[str, Any]] = {
    "directional, product": {"tier": "directional"},
    "running": {"tier": "running"},
    "batch sharpness": {"tier": "batch_sharpness", "running_every": None},
    "sharpness": {"tier": "sharpness", "running_every": None},
    "gfs": {"tier": "gfs", "running_every": None},
}


def cost(width: int, depth: int, examples: int) -> Iterator[Row]:
    """Warm measurements between training steps of an MLP, as a multiple of the time of such a step."""
    for name, options in TIERS.items():
        torch.manual_seed(0)
        model = dense(*[width] * (depth + 1), 10)
        parameters = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x, y = torch.randn(examples, width), torch.randint(10, (examples,))

        def loss_of(batch: Batch, model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(every=1, max_overhead=None, **options))
        count = 20 if parameters < 3e6 else 5 if parameters < 3e7 else 2
        steps, measured, counts = [], [], []
        skipped = 3 if parameters < 3e7 else 2
        for turn in range(count + skipped):
            began = time.perf_counter()
            loss = loss_of((x, y))
            step(optimizer, loss)
            middle = time.perf_counter()
            measurement = monitor.step(loss_of, (x, y), loss=loss)
            ended = time.perf_counter()
            if turn >= skipped and measurement is not None:
                steps.append(middle - began)
                measured.append(ended - middle)
                counts.append(((measurement.grad_evals or 0), (measurement.hvps or 0)))
        yield {
            "parameters": parameters,
            "tier": name,
            "step_ms": 1e3 * median(steps),
            "times_a_step": median(measured) / median(steps),
            "gradients": median(c[0] for c in counts),
            "products": median(c[1] for c in counts),
        }  # fmt: skip


def run() -> Iterator[Row]:
    """One row for each size and tier."""
    for size in ((64, 2, 64), (220, 2, 64), (700, 2, 64), (2200, 2, 64), (5000, 4, 64)):
        yield from cost(*size)


def render(rows: list[Row]) -> list[str]:
    cells, tiers = [], dict.fromkeys(r["tier"] for r in rows)
    for parameters in dict.fromkeys(r["parameters"] for r in rows):
        own = {r["tier"]: r for r in rows if r["parameters"] == parameters}
        shown = [
            f"{r['times_a_step']:.1f} ({r['gradients']:.0f} + {r['products']:.0f})" if (r := own.get(tier)) else "–"
            for tier in tiers
        ]
        cells.append([f"{parameters:.1e}", f"{median(r['step_ms'] for r in own.values()):.1f}", *shown])
    return [COST, *table(["parameters", "step, ms", *tiers], cells)]
