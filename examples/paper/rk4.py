"""The solutions that matter most once more, by RK4 with step 1/λ₁, as edge-of-stability research uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import gfs_core as gfs
from benchmarks.lib.rk4 import rk4_step
from examples.paper.networks import COVERED, SMALL, build, load, optimizer_of, squared

CHECKED = {"cnn": (25, 50, 75), "cnn-slower": (40, 80, 440)}
_RENEWED = 100  # steps after which λ₁ is measured again


def compute(runs: Mapping[str, dict[str, Any]], smoke: bool) -> list[dict[str, Any]]:
    """φ by RK4 at the iterates of ``CHECKED``, beside the stored one; in a smoke run GFS_64 at the start."""
    rows = []
    for workload in SMALL if smoke else COVERED:
        model, full = build(workload), load(workload)
        optimizer, found = optimizer_of(workload, model), {i["step"]: i for i in runs[workload.name]["iterates"]}
        steps = (0,) if smoke else CHECKED.get(workload.name, ())
        for step in range(max(steps, default=-1) + 1):
            if step in steps:
                ours = found[step]
                horizon, value = (64, ours["short"]["64"]) if smoke else (ours["time"], ours["phi"])
                phi, gradients = _flow(model, full, horizon * workload.rate)
                rows.append({"name": workload.name, "step": step, "phi": value, "error": ours["error"]})
                rows[-1] |= {"rk4": phi, "rk4 gradients": gradients, "gradients": ours["gradients"]}
            optimizer.zero_grad()
            squared(model, full).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return rows


def _flow(model: torch.nn.Module, full: Any, time: float) -> tuple[float, int]:
    """Sharpness after flow for ``time``, and the gradients used; the weights are put back."""
    objective = gfs.Objective(model, squared, [full])
    weights = [p.detach() for p in objective.params]
    held, now, steps, h = [w.clone() for w in weights], 0.0, 0, 0.0
    while now < time * (1 - 1e-12):
        if steps % _RENEWED == 0:
            h = 1 / gfs.sharpness(model, squared, full, tol=1e-2, max_hvps=1000).value
        h = min(h, time - now)
        rk4_step(objective, h)
        now, steps = now + h, steps + 1
    phi = gfs.sharpness(model, squared, full, tol=1e-7, max_hvps=3000).value
    for w, s in zip(weights, held, strict=True):
        w.copy_(s)
    return phi, objective.grad_evals
