"""Copies of the weights that a measurement needs at its peak, beside the activations.

Every storage that torch allocates during a measurement is followed until it is freed. The batch is one example, so that
the activations are small beside the weights; of the running estimate 8, which it cuts, after a check that the loss is
the mean over the parts, and of which it takes pairs. Writes `memory.md`. Run: python benchmarks/memory.py
"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.meters import LiveBytes
from benchmarks.lib.monitors import kept
from benchmarks.lib.store import FOLDER
from benchmarks.lib.tables import row, table

ABOUT = (
    "Copies of the weights at the peak of the first measurement, and of a warm one on another batch, the warm start "
    "included; one example, float32, tol 1e-5, so that the solver fills its basis. With few products it takes less: "
    "each product but the first adds a copy, up to six products. The running estimate has 8 examples: its check takes "
    "6 copies, its second measurement a pair of products. The two copies of the weights that the midpoint needs are "
    "included. With the running estimate beside a dearer tier (the default) one more copy is kept.\n"
)


class Residual(nn.Module):
    """A layer beside the identity: deep models have a Hessian of many eigenvalues too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (n, width)."""
        return x + self.inner(x).tanh()


def main() -> None:
    head = ["tier", "optimizer", "layers", "peak of the first, in copies", "peak of the second", "kept afterwards"]
    rows = []
    for tier in ("running", "sharpness", "midpoint", "gfs"):
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
                config = gfs.GFSConfig(tier=tier, every=1, running_every=None, max_overhead=None)
                monitor = gfs.StabilityMonitor(model, optimizer, config)
                monitor.measuring.accuracy = replace(monitor.measuring.accuracy, tol=1e-5)
                weights = sum(p.numel() * p.element_size() for p in model.parameters())
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
                rows.append([tier, kind.__name__, depth, f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", kept(monitor)])
                print(row(rows[-1]), flush=True)
    (FOLDER / "memory.md").write_text("\n".join([ABOUT, *table(head, rows)]) + "\n")


if __name__ == "__main__":
    main()
