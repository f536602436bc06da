"""What does gradient flow cost, beside RK4 with step 1/λ₁? Gradients, and error of the sharpness at the end.

Writes `flow_cost.json` and `flow_cost.md` beside itself. Reference: RK4 at half its step.
Run: python benchmarks/flow_cost.py
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.vectors import Vector, clone, copy

RATE = 0.2
HERE = Path(__file__).parent


def problem(activation: type[nn.Module]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3)[:200], torch.tensor(labels)[:200]
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)]
    return nn.Sequential(*layers).double(), (x, nn.functional.one_hot(y, 10).double())


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()
    return loss


def sharpness(model: nn.Module, batch: Any) -> float:
    return gfs.sharpness(model, loss_fn, batch, tol=1e-7, max_hvps=2000).value


def rk4(model: nn.Module, batch: Any, time: float, per_step: float) -> int:
    """Fixed steps of ``per_step``/λ₁, in place; the gradients used."""
    objective = gfs.Objective(model, loss_fn, [batch])
    steps = max(1, int(-(-time * sharpness(model, batch) / per_step // 1)))
    h, w = time / steps, [p.detach() for p in objective.params]

    def slope(start: Vector, towards: Vector | None, length: float) -> Vector:
        copy(start, w)
        if towards is not None:
            torch._foreach_add_(w, towards, alpha=-length)
        return objective.gradient()[1]

    for _ in range(steps):
        start = clone(w)
        k1 = slope(start, None, 0.0)
        k2 = slope(start, k1, h / 2)
        k3 = slope(start, k2, h / 2)
        k4 = slope(start, k3, h)
        copy(start, w)
        for k, weight in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
            torch._foreach_add_(w, k, alpha=-h * weight / 6)
    return objective.grad_evals


def main() -> None:
    rows = []
    for activation in (nn.Tanh, nn.ReLU):
        model, batch = problem(activation)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        for step in range(801):
            if step in (600, 800):
                state = {k: v.clone() for k, v in model.state_dict().items()}
                for k in (1, 4, 16, 64, 256):
                    rk4(model, batch, k * RATE, 0.5)
                    truth = sharpness(model, batch)
                    model.load_state_dict(state)
                    grads = rk4(model, batch, k * RATE, 1.0)
                    error = abs(sharpness(model, batch) / truth - 1)
                    model.load_state_dict(state)
                    ours = gfs.gfs_sharpness(model, loss_fn, batch, horizon=k, learning_rate=RATE, tol=1e-4)
                    rows.append(
                        {
                            "activation": activation.__name__,
                            "step": step,
                            "k": k,
                            "rk4_gradients": grads,
                            "rk4_error": error,
                            "rkc2_gradients": ours.grad_evals,
                            "rkc2_error": abs(ours.sharpness / truth - 1),
                            "fewer": grads / ours.grad_evals,
                        }
                    )
                    print(rows[-1], flush=True)
            optimizer.zero_grad()
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    environment = {"torch": torch.__version__, "python": platform.python_version()}
    (HERE / "flow_cost.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    lines = [
        "Gradient flow at the edge of stability: digits, 200 examples, width 32, squared loss, η = 0.2, float64,",
        "rtol 1e-2. Errors: relative, of the sharpness at the end, against RK4 at half its step. The Hessian-vector",
        "products that keep the estimate of λ₁ (about 10 at the longer horizons) and the final eigenvalue are not",
        "counted, for either method.",
        "",
        "| activation | step | k | RK4, step 1/λ₁ (error) | RKC2 (error) | RK4 / RKC2 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['activation']} | {r['step']} | {r['k']} | {r['rk4_gradients']} ({r['rk4_error']:.0e}) "
        f"| {r['rkc2_gradients']} ({r['rkc2_error']:.0e}) | {r['fewer']:.1f} |"
        for r in rows
    ]
    (HERE / "flow_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
