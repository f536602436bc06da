"""What each of two processes does in a test; apart, so that a spawned process imports little."""

from __future__ import annotations

import math
import os

import torch

from gfs_core.metrics import Sharpness
from tests.core.reference import cross_entropy, data, make


def batches(rank: int) -> list[list[torch.Tensor]]:
    """Three batches with a sharpness, two on rank 0, and one without on rank 1."""
    x, y = data()
    if rank == 0:
        return [[x[:10], y[:10]], [x[:4], y[:4]]]
    return [[x[10:], y[10:]], [x[:2] * math.inf, y[:2]]]


def measure(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=2)
    metric = Sharpness(make("mlp"), cross_entropy, tol=1e-6)
    for batch in batches(rank):
        metric.update(batch)
    value = metric.compute()
    torch.save((float(value), float(metric.total), int(metric.count)), f"{out}/{rank}.pt")
    torch.distributed.barrier()  # a rank that leaves while the other still talks can abort it
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads, not ours, can abort the interpreter's own way out (seen once: SIGABRT)
