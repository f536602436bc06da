"""What each of two processes does in a test; apart, so that a spawned process imports little."""

from __future__ import annotations

import math

import torch

from gfs_core.metrics import Sharpness
from tests.core.reference import cross_entropy, data, make


def batches(rank: int) -> list[list[torch.Tensor]]:
    """Three batches with a sharpness, two on rank 0, and one without on rank 1."""
    x, y = data()
    if rank == 0:
        return [[x[:10], y[:10]], [x[:4], y[:4]]]
    return [[x[10:], y[10:]], [x[:2] * math.inf, y[:2]]]


def measure(rank: int, size: int) -> tuple[float, float, int]:
    """The synced value; and the rank's own total and count after it."""
    metric = Sharpness(make("mlp"), cross_entropy, tol=1e-6)
    for batch in batches(rank):
        metric.update(batch)
    return float(metric.compute()), float(metric.total), int(metric.count)
