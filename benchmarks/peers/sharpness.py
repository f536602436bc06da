"""Each way to the largest eigenvalue, at the cheapest of its settings that reaches the error that is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import hessian_eigenthings
import numpy as np
from torch import nn

from benchmarks.eigenvalues import methods
from benchmarks.eigenvalues.methods import Method, exact_products, truth
from benchmarks.lib.data import Batch
from benchmarks.lib.meters import clock
from benchmarks.lib.store import Row
from benchmarks.peers.workloads import WANTED, Weights, Workload, flat, random_vector

TOLS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)


def power(load: Any, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, float]:
    """Power iteration from the last eigenvector, until the value changes by less than the tolerance."""
    hessian = exact_products(model, load.loss, batch)
    v = memory.get("vector") or random_vector(hessian.objective.params)
    last = math.inf
    while True:
        length = flat(v).norm()
        v = [a / length for a in v]
        image = hessian(v)
        value = sum(float((a * b).sum()) for a, b in zip(v, image, strict=True))
        memory["vector"] = v = image
        if abs(value - last) <= tol * abs(value) or hessian.hvps >= 100:
            return value, hessian.hvps
        last = value


def eigenthings(steps: int | None = None) -> Method:
    """Power iteration of hessian-eigenthings, or its Lanczos with that many steps: it has no other end."""

    def measure(load: Any, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, float]:
        loss = hessian_eigenthings.supervised_loss(load.criterion)
        operator = hessian_eigenthings.HessianOperator(model, [batch], loss)
        if steps is None:
            found = hessian_eigenthings.power_iteration_one(operator, tol=tol, init=memory.get("vector"), seed=0)
            value, memory["vector"], _, products, _ = found
        else:
            products = steps
            value = float(hessian_eigenthings.lanczos(operator, k=1, max_iter=steps, which="LA", seed=0).eigenvalues[0])
        return value, 1.5 * products - 0.5  # each product makes a new graph: three gradients, none at the start

    return measure


@dataclass(frozen=True)
class Solver:
    """A way to the eigenvalue; the last eigenvector is at hand where ``warm``. What is ours, a peer, or own work."""

    kind: str
    warm: bool
    variants: dict[str, Method]
    tolerances: tuple[float, ...] = TOLS


SMALL = (3, 6)
SOLVERS = {
    "gfs_core, warm": Solver("ours", True, {"": methods.ours}),
    "gfs_core, cold": Solver("ours", False, {"": methods.ours}),
    "PyHessian": Solver("peer", False, {"": methods.pyhessian}),
    "curvlinops + eigsh, warm": Solver("peer", True, {"": methods.curvlinops_eigsh(20)}),
    "scipy eigsh, warm": Solver("peer", True, {"": methods.scipy_eigsh(20)}),
    "curvlinops + eigsh, warm, few vectors": Solver(
        "tuned peer", True, {f", ncv {n}": methods.curvlinops_eigsh(n) for n in SMALL}
    ),
    "scipy eigsh, warm, few vectors": Solver("tuned peer", True, {f", ncv {n}": methods.scipy_eigsh(n) for n in SMALL}),
    "hessian-eigenthings, power iteration, warm": Solver("peer", True, {"": eigenthings()}),
    "hessian-eigenthings, Lanczos, cold": Solver(
        "peer", False, {f", {n} steps": eigenthings(n) for n in (5, 7, 9, 12, 16, 21, 31)}, TOLS[:1]
    ),
    "Lanczos, cold": Solver("own loop", False, {"": methods.lanczos(warm=False)}),
    "power iteration, warm": Solver("own loop", True, {"": power}),
    "Lanczos, warm, all vectors kept": Solver("own loop", True, {"": methods.lanczos(warm=True)}),
}


def _start(n: int) -> Any:
    return np.random.default_rng(1).standard_normal(n)


class Found(NamedTuple):
    """An eigenvalue, and what it took."""

    value: float
    products: float
    seconds: float


def along(load: Workload, states: list[Weights], method: Method, tol: float, warm: bool) -> list[Found]:
    """One method at each state after the first."""
    memory: Row = {}
    out = []
    for state in states if warm else states[1:]:
        model = load.at(state)
        begin = clock()
        value, products = method(load, model, load.probed, memory if warm else {}, tol)
        out.append(Found(value, products, clock() - begin))
    return out[1:] if warm else out


Candidate = tuple[Row, Callable[[], list[Found]]]  # what was found, and how to run it again


def sweep(load: Workload, states: list[Weights], truths: list[float], name: str, limit: float) -> Iterator[Candidate]:
    """A solver's variants, each at tighter and tighter tolerances until the error is reached at every state."""
    solver = SOLVERS[name]
    for label, method in solver.variants.items():
        begin = clock()
        for tol in solver.tolerances:
            again = partial(along, load, states, method, tol, solver.warm)
            row: Row = {"workload": load.name, "method": name, "kind": solver.kind, "setting": f"{tol:g}{label}"}
            try:
                found = again()
            except Exception as error:  # of a peer: to be told, not to end the run
                yield row | {"reached": False, "failed": f"{type(error).__name__}: {error}"[:200]}, again
                break
            errors = [abs(f.value / t - 1) for f, t in zip(found, truths, strict=True)]
            row |= {"gradients": median(1 + 2 * f.products for f in found), "seconds": median(f.seconds for f in found)}
            row |= {"error": max(errors), "median_error": median(errors), "reached": max(errors) <= WANTED}
            print(row, flush=True)
            yield row, again
            if row["reached"] or clock() - begin > limit:
                break


def sharpness(load: Workload, states: list[Weights], limit: float) -> list[Row]:
    """Each solver at the cheapest of its settings that reaches the error; those that do timed again, in turn."""
    truths = [truth(load, load.at(s), load.probed, tol=1e-6, ncv=20, start=_start) for s in states[1:]]
    chosen: list[Candidate] = []
    for name in (name for name in SOLVERS if name not in load.without):
        tried = list(sweep(load, states, truths, name, limit))
        good = [t for t in tried if t[0]["reached"]] or [min(tried, key=lambda t: t[0].get("error", math.inf))]
        best = min(good, key=lambda t: t[0].get("gradients", math.inf))
        middling = [r["gradients"] for r, _ in tried if r.get("median_error", 1) <= WANTED]
        best[0]["gradients_median_state"] = min(middling, default=None)
        chosen.append(best)
    for _ in range(load.repeats - 1):
        for row, again in chosen:
            if row["reached"]:
                row["seconds"] = min(row["seconds"], median(f.seconds for f in again()))
    return [row for row, _ in chosen]
