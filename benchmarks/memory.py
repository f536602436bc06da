"""Copies of the weights that a measurement needs at its peak, beside the activations.

Every storage that torch allocates during a measurement is followed until it is freed. The batch is one example, so that
the activations are small beside the weights; of the running estimate 8, which it cuts, after a check that the loss is
the mean over the parts, and of which it takes pairs. Writes `memory.md`. Run: python benchmarks/memory.py
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gfs_core as gfs


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were allocated while the mode was on."""

    sees_measurements = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key in held or key in self.known or storage.nbytes() == 0:
                    continue
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Residual(nn.Module):
    """A layer beside the identity: deep models have a Hessian of many eigenvalues too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (n, width)."""
        return x + self.inner(x).tanh()


def main() -> None:
    lines = [
        "| tier | optimizer | layers | peak of the first, in copies | peak of the second | kept afterwards |",
        "|---|---|---|---|---|---|",
    ]
    for tier in ("running", "sharpness", "gfs"):
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
                config = gfs.GFSConfig(tier=tier, every=1, running_every=None, max_overhead=None, tol=1e-5)  # type: ignore[arg-type]
                monitor = gfs.StabilityMonitor(model, optimizer, config)
                weights = sum(p.numel() * p.element_size() for p in model.parameters())
                other = torch.randn(count, width)  # so that the solver has something to do
                peaks = []
                with LiveBytes() as live:  # over both: a warm start may go in one storage and come back in another
                    for batch in (x, other):
                        live.peak = live.now
                        monitor.step(loss_of, batch)
                        peaks.append(live.peak / weights)
                gc.collect()
                state = monitor.state_dict()
                warm = sum(v is not None for v in (*state["warm"], state["running"][0]["vector"]))
                row = f"| {tier} | {kind.__name__} | {depth} | {peaks[0]:.1f} | {peaks[1]:.1f} | {warm} |"
                print(row, flush=True)
                lines.append(row)
    head = "Copies of the weights at the peak of the first measurement, and of a warm one on another batch, the warm "
    head += "start included; one example, float32, tol 1e-5, so that the solver fills its basis. With few "
    head += "products it takes less: each product but the first adds a copy, up to six products. "
    head += "The running estimate has 8 examples: its check takes 6 copies, its second measurement a pair of products. "
    head += "With the running estimate beside a dearer tier (the default) one more copy is kept.\n\n"
    Path(__file__).with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
