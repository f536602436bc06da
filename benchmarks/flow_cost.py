"""What does gradient flow cost, beside RK4 with step 1/λ₁ and dopri5? Gradients, and error of the sharpness at the end.

Writes `flow_cost.json` and `flow_cost.md` beside itself. Reference: RK4 at an eighth of its step.
Run (about 5 minutes): pip install --no-deps -r benchmarks/requirements.txt; python -m benchmarks.flow_cost
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.rk4 import rk4_flow
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import squared, step

RATE = 0.2
STEPS = (0, 100, 300, 500, 700, 800, 1000)
HORIZONS = (1, 4, 16, 64, 256)
FULL = ((10, 16, 200), (20, 32, 1000), (50, 32, 800), (20, 16, 600))  # examples, width, step
RK4_AFFORDED = 300_000


def problem(activation: type[nn.Module], examples: int = 200, width: int = 32) -> tuple[nn.Module, Batch]:
    """A network with two hidden layers, and the first examples with one-hot targets, all in float64."""
    x, y = digits(examples, dtype=torch.float64)
    model = seeded(lambda: dense(64, width, width, 10, act=activation)).double()
    return model, (x, nn.functional.one_hot(y, 10).double())


def sharpness(model: nn.Module, batch: Any) -> float:
    return gfs.sharpness(model, squared, batch, tol=1e-7, max_hvps=2000).value


def rk4(model: nn.Module, batch: Any, time: float, per_step: float) -> int:
    """Fixed steps of ``per_step``/λ₁, in place; the gradients used."""
    return rk4_flow(gfs.Objective(model, squared, [batch]), time, sharpness(model, batch), per_step)


def dopri5(model: nn.Module, batch: Any, time: float) -> int:
    """The dopri5 of torchdiffeq at rtol 1e-3, atol 1e-6, in place; the gradients used."""
    from torchdiffeq import odeint

    objective = gfs.Objective(model, squared, [batch])

    def field(_time: Tensor, w: Tensor) -> Tensor:
        vector_to_parameters(w, model.parameters())
        return -torch.cat([g.reshape(-1) for g in objective.gradient()[1]])

    start = parameters_to_vector(model.parameters()).detach().clone()
    times = torch.tensor([0.0, time], dtype=torch.float64)
    end = odeint(field, start, times, rtol=1e-3, atol=1e-6, method="dopri5")[-1]
    vector_to_parameters(end, model.parameters())
    return objective.grad_evals


def horizons(activation: type[nn.Module]) -> Iterator[Row]:
    model, batch = problem(activation)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for now in range(max(STEPS) + 1):
        if now in STEPS:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            for k in HORIZONS:
                after = {}
                for name, integrate in (
                    ("quarter", lambda t: rk4(model, batch, t, 0.25)),
                    ("eighth", lambda t: rk4(model, batch, t, 0.125)),
                    ("rk4", lambda t: rk4(model, batch, t, 1.0)),
                    ("dopri5", lambda t: dopri5(model, batch, t)),
                ):
                    model.load_state_dict(state)
                    gradients = integrate(k * RATE)
                    after[name] = (gradients, sharpness(model, batch))
                model.load_state_dict(state)
                ours = gfs.gfs_sharpness(model, squared, batch, horizon=k, learning_rate=RATE, tol=1e-4)
                truth = after["eighth"][1]
                yield {
                    "activation": activation.__name__,
                    "step": now,
                    "k": k,
                    "floor": abs(after["quarter"][1] / truth - 1),
                    "rk4": after["rk4"][0],
                    "rk4_error": abs(after["rk4"][1] / truth - 1),
                    "dopri5": after["dopri5"][0],
                    "dopri5_error": abs(after["dopri5"][1] / truth - 1),
                    "rkc2": ours.grad_evals,
                    "rkc2_error": abs(ours.sharpness / truth - 1),
                }
        step(optimizer, squared(model, batch))


def full_solution(examples: int, width: int, steps: int) -> Row:
    """The full solution, and what RK4 needs for the same flow time."""
    model, batch = problem(nn.Tanh, examples, width)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(steps):
        step(optimizer, squared(model, batch))
    start = sharpness(model, batch)
    ours = gfs.gfs_sharpness(model, squared, batch, learning_rate=RATE, rtol=1e-3, max_grads=200_000)
    row: Row = {"examples": examples, "width": width, "step": steps, "start": start}
    row |= {"time": ours.time, "sharpness": ours.sharpness, "rkc2": ours.grad_evals + 2 * ours.hvps}
    row |= {"converged": ours.converged, "rk4_needed": int(4 * ours.time * min(start, ours.sharpness))}
    if row["rk4_needed"] <= RK4_AFFORDED:
        row["rk4_run"] = rk4(model, batch, ours.time, 1.0)
        row["difference"] = abs(sharpness(model, batch) / ours.sharpness - 1)
    return row


def full_solutions() -> Iterator[Row]:
    for settings in FULL:
        yield full_solution(*settings)


HEAD = """# Gradients that a gradient flow costs

Digits, 200 examples, width 32, squared loss, full batch, η = 0.2, float64; flow for k·η from seven points of
the training. RKC2 at the default rtol 1e-2; RK4 with step 1/λ₁; dopri5 of torchdiffeq at rtol 1e-3.
In brackets: relative error of the sharpness at the end, against RK4 at an eighth of its step. *Floor*: how
far RK4 at a quarter of its step is from that reference. Along a ReLU network the Hessian jumps at kinks, and
no method's error can be told below that. The products that follow λ₁ (at most 10) and the final eigenvalue
are not counted.
"""
INITIAL = """
The initial state apart: nothing is stiff there, the flow moves fast, and RK4's fourth order pays.
"""
SOLUTIONS = """
## Full gradient flow solution

tanh, rtol 1e-3, to the end of the flow. Here everything is counted for RKC2, each product as two gradients.
*RK4 needs*: 4·T·λ₁ gradients with the lower of the sharpness at start and end. Where that was affordable RK4
was run, and the difference between the two values of the sharpness is given.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows, pooled, solved = [], [], []
    for r in results["rows"]:
        methods = [f"{r[m]} ({r[f'{m}_error']:.0e})" for m in ("rkc2", "rk4", "dopri5")]
        floor, ratio = f"{r['floor']:.0e}", f"{r['rk4'] / r['rkc2']:.1f}"
        rows.append([r["activation"], r["step"], r["k"], *methods, floor, ratio])
    for activation, k in itertools.product(("Tanh", "ReLU"), HORIZONS):
        initial, *some = (r for r in results["rows"] if (r["activation"], r["k"]) == (activation, k))
        ratios, errors = [r["rk4"] / r["rkc2"] for r in some], [r["rkc2_error"] for r in some]
        cells = [f"{initial['rk4'] / initial['rkc2']:.1f}", f"{min(ratios):.1f}, {median(ratios):.1f}"]
        cells += [f"{min(r['dopri5'] / r['rkc2'] for r in some):.1f}", f"{median(errors):.0e}, {max(errors):.0e}"]
        pooled.append([activation, k, *cells])
    for r in results["full"]:
        settled = "" if r["converged"] else " (not settled)"
        cells = [r["examples"], r["width"], r["step"], f"{r['time']:.3g}", f"{r['sharpness']:.4f}{settled}", r["rkc2"]]
        difference = format(r["difference"], ".0e") if "difference" in r else "not run"
        solved.append([*cells, r["rk4_needed"], f"{r['rk4_needed'] / r['rkc2']:.0f}", difference])
    head = ["activation", "k", "step 0: RK4 / RKC2", "from step 100: RK4 / RKC2, least and median"]
    columns = ["examples", "width", "step", "T", "GFS sharpness", "RKC2", "RK4 needs", "ratio", "RK4 run: difference"]
    lines = [
        HEAD, *table(["activation", "step", "k", "RKC2", "RK4", "dopri5", "floor", "RK4 / RKC2"], rows),
        INITIAL, *table([*head, "dopri5 / RKC2, least", "error, median and largest"], pooled),
        SOLUTIONS, *table(columns, solved),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    store = Store("flow_cost", fresh=True)
    store.collect("rows", itertools.chain(horizons(nn.Tanh), horizons(nn.ReLU)))
    store.collect("full", full_solutions())
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
