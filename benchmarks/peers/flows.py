"""Each integrator of gradient flow, at the cheapest of its settings that reaches the error that is wanted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gfs_core as gfs
from benchmarks.eigenvalues.methods import exact_products
from benchmarks.lib.data import Batch
from benchmarks.lib.meters import clock
from benchmarks.lib.rk4 import rk4_flow
from benchmarks.lib.store import Row
from benchmarks.peers.workloads import WANTED, Weights, Workload, flat
from gfs_core.linalg.eigen import EigenResult, largest_eigenvalues
from gfs_core.linalg.vectors import clone
from gfs_core.loss.learned import Learned
from gfs_core.loss.objective import Objective
from gfs_core.signals.flowing import Flowing
from gfs_core.signals.lab import Lab


@dataclass
class Start:
    """Where a flow starts: a model, whose weights it moves, and the sharpness there."""

    load: Any
    model: nn.Module
    batch: Batch
    top: EigenResult
    most: int = 10**9  # gradients allowed


Integrate = Callable[[Start, float], int]  # flows for a time in place; the gradients used, a product counted as two


def rkc2(rtol: float) -> Integrate:
    def integrate(start: Start, length: float) -> int:
        objective = Objective(start.model, start.load.loss, [start.batch])
        lab = Lab(objective, learned=Learned(double_backward_verified=True))
        known = dataclasses.replace(start.top, vectors=[clone(start.top.vector)])
        flow = Flowing(lab, known, None, rtol, start.most).flow
        flow.advance(flow.start(), length)
        return objective.grad_evals + 2 * lab.hessian.hvps

    return integrate


def rk4(per_step: float) -> Integrate:
    def integrate(start: Start, length: float) -> int:
        return rk4_flow(Objective(start.model, start.load.loss, [start.batch]), length, start.top.value, per_step)

    return integrate


def of_torchdiffeq(method: str, rtol: float = 1e-3, per_step: float | None = None) -> Integrate:
    def integrate(start: Start, length: float) -> int:
        objective = Objective(start.model, start.load.loss, [start.batch])

        def field(_time: Tensor, w: Tensor) -> Tensor:
            if objective.grad_evals > start.most:
                raise gfs.MeasurementError(f"stopped after {start.most} gradients")
            vector_to_parameters(w, start.model.parameters())
            return -flat(objective.gradient()[1])

        options = None if per_step is None else {"step_size": per_step / start.top.value}
        weights, times = parameters_to_vector(start.model.parameters()).detach(), torch.tensor([0.0, length])
        tolerances = {"rtol": rtol, "atol": 1e-3 * rtol}
        end = torchdiffeq.odeint(field, weights, times.to(weights), method=method, options=options, **tolerances)[-1]
        vector_to_parameters(end, start.model.parameters())
        return objective.grad_evals

    return integrate


FLOWS: dict[str, dict[str, Integrate]] = {
    "gfs_core": {f"rtol {r:g}": rkc2(r) for r in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)},
    "RK4, step 1/λ₁": {"": rk4(1.0)},
    "RK4, longest step": {f"{p:g}/λ₁": rk4(p) for p in (2.5, 2.0, 1.5, 1.0)},
    "dopri5": {f"rtol {r:g}": of_torchdiffeq("dopri5", r) for r in (1e-1, 1e-2, 1e-3, 1e-4)},
    "implicit_adams": {f"step {p:g}/λ₁": of_torchdiffeq("implicit_adams", 1e-4, p) for p in (2.0, 1.0, 0.5, 0.25)},
}


def top_of(loss: Any, model: nn.Module, batch: Batch, tol: float = 1e-3) -> EigenResult:
    hessian = exact_products(model, loss, batch)
    return largest_eigenvalues(hessian, hessian.objective.params, tol=tol, max_hvps=500)


class Flown(NamedTuple):
    """Where a flow is to start and to end, by RK4 at half of 1/λ₁, and the gradients that this took."""

    start: Start
    state: Weights
    sharpness: float
    gradients: int


def reference(load: Workload, state: Weights, length: float) -> Flown:
    model = load.at(state)
    start = Start(load, model, load.probed, top_of(load.loss, model, load.probed))
    gradients = rk4(0.5)(start, length)
    return Flown(start, state, top_of(load.loss, model, load.probed).value, gradients)


def attempt(load: Workload, references: list[Flown], integrate: Integrate, length: float) -> Row:
    """What an integrator takes from all the starts, and its largest error."""
    gradients, seconds, errors = 0, 0.0, []
    for known in references:
        start = dataclasses.replace(known.start, model=load.at(known.state), most=2 * known.gradients)
        begin = clock()
        try:
            gradients += integrate(start, length)
        except (gfs.MeasurementError, AssertionError) as error:
            return {"reached": False, "failed": str(error) or type(error).__name__}
        seconds += clock() - begin
        errors.append(abs(top_of(load.loss, start.model, load.probed).value / known.sharpness - 1))
    return {"reached": max(errors) <= WANTED, "error": max(errors), "gradients": gradients, "seconds": seconds}


def flows(load: Workload, states: list[Weights], horizon: int, limit: float) -> list[Row]:
    """Each integrator at the cheapest of its settings that reaches the error at every start; then those timed again.

    After ``limit`` seconds no further setting is tried.
    """
    length = horizon * load.rate
    references = [reference(load, state, length) for state in states]
    scaled = [load.rate * r.start.top.value for r in references]
    chosen: list[tuple[Row, Integrate]] = []
    for name, settings in FLOWS.items():
        tried, begin = [], clock()
        for setting, integrate in settings.items():
            row: Row = {"workload": load.name, "horizon": horizon, "rate_times_sharpness": scaled, "method": name}
            row |= {"setting": setting} | attempt(load, references, integrate, length)
            print(row, flush=True)
            tried.append((row, integrate))
            if row["reached"] or clock() - begin > limit:
                break
        chosen.append(min(tried, key=lambda t: t[0].get("error", math.inf)))
    for _ in range(load.repeats - 1):
        for row, integrate in chosen:
            if row["reached"]:
                row["seconds"] = min(row["seconds"], attempt(load, references, integrate, length)["seconds"])
    return [row for row, _ in chosen]
