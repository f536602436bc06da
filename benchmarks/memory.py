"""Memory that a measurement needs at its peak.

Every storage that torch allocates is followed until it is freed. First on one example, so that the activations are
small beside the weights: copies of the weights. Then with a vocabulary of 50,000, where the logits are most of what a
step holds. Adds to memory.json, and writes memory.md. Run (two minutes): OMP_NUM_THREADS=1 python -m benchmarks.memory
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import text_bytes
from benchmarks.lib.meters import LiveBytes
from benchmarks.lib.models import gpt2, seeded
from benchmarks.lib.monitors import kept
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient as take

VOCABULARY, EXAMPLES, LENGTH = 50_000, 16, 32
ALONE: dict[str, Any] = {"every": 1, "running_every": None, "max_overhead": None}
# Of each signal: the options that turn it on, and whether running products are on whole steps.
SIGNALS: dict[str, tuple[dict[str, Any], bool | None]] = {
    "running, one gradient": ({"tier": "running"}, True),
    "running, products on parts": ({"tier": "running", "hvp": "exact"}, None),
    "sharpness, one gradient a product": ({"tier": "sharpness", "hvp": "gradients"}, None),
    "sharpness, exact products": ({"tier": "sharpness", "hvp": "exact"}, None),
    "sharpness, exact products, probe_size=1": ({"tier": "sharpness", "hvp": "exact", "probe_size": 1}, None),
}
HEAD = """# Memory

    OMP_NUM_THREADS=1 python -m benchmarks.memory

Bytes that torch allocates, from the first measurement on and until they are freed.

## Copies of the weights

At the peak of the first measurement, and of a warm one on another batch, the warm start included; one example, float32,
tol 1e-5, so that the solver fills its basis. With few products it takes less: each product but the first adds a copy,
up to six products. The running estimate has 8 examples, and takes one gradient a product, or products on parts, each
but for the first in pairs. The two copies of the weights that the midpoint needs are included. With the running
estimate beside a dearer tier (the default) one more copy is kept.
"""
LOGITS = """## A vocabulary of 50,000

GPT-2 of {weights} weights and {vocabulary} tokens, {examples} × {length} tokens of text, AdamW, float32, on a CPU. One
copy of the weights is {copy:.0f} MiB, the logits of the batch are {logits:.0f} MiB. A training step (forward, backward,
optimizer) holds {step:.0f} MiB at its peak, beside the weights and the optimizer's state. A measurement begins when
training's own graph is freed; the gradient that training has computed is in its peak. *Above the step* is its peak over
that of the step, in copies of the weights: up to 3, it fits where the step fits and three copies are free. Double
backward through the cross-entropy keeps several times the logits.
"""


class Residual(nn.Module):
    """A layer beside the identity: deep models have a Hessian of many eigenvalues too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (n, width)."""
        return x + self.inner(x).tanh()


def vectors() -> Iterator[Row]:
    """Copies of the weights in each tier, where activations are small."""
    for tier, whole in (("running", True), ("running", False), ("sharpness", None), ("midpoint", None), ("gfs", None)):
        for kind in (torch.optim.SGD, torch.optim.Adam):
            for depth in (4, 32):
                width = 1024 // int(depth**0.5)
                torch.manual_seed(0)
                model = nn.Sequential(*(Residual(width) for _ in range(depth)))
                optimizer = kind(model.parameters(), lr=1e-3)
                count = 8 if tier == "running" else 1
                x = torch.randn(count, width)

                def loss_of(batch: Tensor, model: nn.Module = model) -> Tensor:
                    return (model(batch) - 1).square().mean()

                loss_of(x).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                config = gfs.GFSConfig(**ALONE | {"tier": tier})
                monitor = gfs.StabilityMonitor(model, optimizer, config)
                monitor.measuring.accuracy = replace(monitor.measuring.accuracy, tol=1e-5)
                monitor.measuring.learned.whole_cheaper = whole
                weights = _bytes_of(model)
                other = torch.randn(count, width)  # so that the solver has something to do
                peaks = []
                with LiveBytes() as live:  # over both: a warm start may go in one storage and come back in another
                    for batch in (x, other):
                        for _ in range(2 if tier == "midpoint" else 0):  # it needs the weights before two steps
                            monitor.measuring.keep_weights(monitor.count, 2)
                            monitor.count += 1
                            optimizer.step()
                        live.peak = live.now
                        monitor.step(loss_of, batch)
                        peaks.append(live.peak / weights)
                gc.collect()
                name = tier if whole is None else f"running, {'one gradient' if whole else 'products on parts'}"
                yield {
                    "tier": name, "optimizer": kind.__name__, "layers": depth, "first": peaks[0], "second": peaks[1],
                    "kept": kept(monitor),
                }  # fmt: skip
                monitor.close()


def logits() -> Iterator[Row]:
    """Bytes at the peak of each signal beside those of the step itself, with a large vocabulary."""
    model = seeded(lambda: gpt2(64, 2, LENGTH, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    inputs, targets = text_bytes(4 * EXAMPLES, LENGTH)
    batches = list(zip(inputs.split(EXAMPLES), targets.split(EXAMPLES), strict=True))

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten())

    def step(batch: tuple[Tensor, Tensor]) -> None:
        take(optimizer, loss_of(batch))
        optimizer.step()

    def take_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_of(batch)
        take(optimizer, loss)
        return loss.detach()

    step(batches[0])  # makes the optimizer's state
    own = _peak(lambda: step(batches[1]))
    facts = {"weights": sum(p.numel() for p in model.parameters()), "copy": _bytes_of(model), "step": own}
    for name, (options, whole) in SIGNALS.items():
        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**ALONE | options))
        monitor.measuring.learned.whole_cheaper = whole

        found: list[gfs.Measurement | None] = []
        peaks = []
        with LiveBytes() as live:
            for batch in batches:
                step(batch)
                loss = take_of(batch)
                live.peak = live.now
                found.append(monitor.step(loss_of, batch, loss=loss))
                peaks.append(live.peak)
        gc.collect()
        reasons = [reason for measurement in found if measurement for reason in measurement.reasons]
        yield facts | {"signal": name, "first": peaks[0], "warm": max(peaks[1:]), "reasons": reasons}
        monitor.close()


def _peak(work: Callable[[], Any]) -> int:
    with LiveBytes() as live:
        work()
    return live.peak


def _bytes_of(model: nn.Module) -> int:
    """Bytes of one copy of the weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def render(results: dict[str, Any]) -> str:
    """The page."""
    lines = [HEAD]
    head = ["tier", "optimizer", "layers", "peak of the first, in copies", "peak of the second", "kept afterwards"]
    rows = [
        [r["tier"], r["optimizer"], r["layers"], f"{r['first']:.1f}", f"{r['second']:.1f}", r["kept"]]
        for r in results["vectors"]
    ]
    lines += [*table(head, rows), ""]
    found = results["logits"]
    mib, copy = 2**20, found[0]["copy"]
    sizes = {"copy": copy / mib, "logits": 4 * EXAMPLES * LENGTH * VOCABULARY / mib, "step": found[0]["step"] / mib}
    facts = {"weights": f"{found[0]['weights']:,}", "vocabulary": f"{VOCABULARY:,}"}
    lines.append(LOGITS.format(examples=EXAMPLES, length=LENGTH, **sizes, **facts))
    head = ["signal", "peak of the first, MiB", "above the step, copies", "of the next three, MiB", "above the step"]
    cells = []
    for row in found:
        both = [(row[name] / mib, (row[name] - row["step"]) / copy) for name in ("first", "warm")]
        cells.append([row["signal"], *(form for peak, above in both for form in (f"{peak:.0f}", f"{above:+.1f}"))])
    return "\n".join([*lines, *table(head, cells)]) + "\n"


def main() -> None:
    """Measure both, and write the page."""
    store = Store("memory")
    store.collect("vectors", vectors())
    store.collect("logits", logits())
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
