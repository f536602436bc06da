"""The classical Runge–Kutta method along gradient flow, as edge-of-stability research uses it."""

from __future__ import annotations

import torch

import gfs_core as gfs
from gfs_core.linalg.vectors import clone, copy, zeros_like

_STAGES = ((0.5, 1), (0.5, 2), (1.0, 2), (0.0, 1))  # how far the next stage lies from the start; weight in the step


def rk4_step(objective: gfs.Objective, h: float) -> None:
    """Move the weights by one step of length ``h``, for four gradients."""
    weights = [p.detach() for p in objective.params]
    start, total = clone(weights), zeros_like(weights)
    for part, weight in _STAGES:
        slope = objective.gradient()[1]
        torch._foreach_add_(total, slope, alpha=weight / 6)
        copy(start, weights)
        torch._foreach_add_(weights, slope, alpha=-part * h)
    copy(start, weights)
    torch._foreach_add_(weights, total, alpha=-h)


def rk4_flow(objective: gfs.Objective, time: float, sharpness: float, per_step: float) -> int:
    """Move the weights for ``time`` in equal steps of at most ``per_step``/λ₁; the gradients used."""
    steps = max(1, int(-(-time * sharpness / per_step // 1)))
    for _ in range(steps):
        rk4_step(objective, time / steps)
    return objective.grad_evals
