"""Squared regression: the diagonal linear network ⟨u∘u − v∘v, x⟩, full batch, fewer examples than weights.

Gradient flow of ½·mean (xᵀβ − y)², β = u² − v², keeps every uᵢ·vᵢ, and more: u(t) = u₀·e^{−2a}, v(t) = v₀·e^{2a} with
a = Xᵀν for some ν in Rⁿ. At its end Xβ = y, which is the optimum of a smooth convex problem in ν (the dual of the
mirror descent problem; Woodworth et al. 2020). So the solution, and its sharpness (4/n)·λ₁(X·diag(u² + v²)·Xᵀ), are
known to rounding from any iterate, with n unknowns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gfs_core as gfs
from examples.paper.scalar import EDGE, RISE, Array

EXAMPLES, FEATURES = 10, 30
LEVELS = (1.0, 1.8, 2.2, 2.6, 3.0, 3.5)  # ηφ at the start


class DiagonalNetwork(nn.Module):
    """xᵀ(u∘u − v∘v)."""

    def __init__(self, u: Array, v: Array) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor(u)), nn.Parameter(torch.tensor(v))

    def forward(self, x: Tensor) -> Tensor:
        """One output per row."""
        return x @ (self.u.square() - self.v.square())


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """½·mean (output − y)²."""
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().mean()
    return loss


def solution(x: Array, y: Array, u: Array, v: Array, guess: Array | None = None) -> tuple[Array, Array, Array]:
    """End of the gradient flow from u, v, and the ν that leads there: damped Newton on the convex dual."""
    nu = np.zeros(len(y)) if guess is None else guess

    def value(nu: Array) -> float:
        a = np.clip(4 * x.T @ nu, -500, 500)
        return float((u**2 * np.exp(-a) + v**2 * np.exp(a)).sum() / 4 + nu @ y)

    for _ in range(500):
        a = 4 * x.T @ nu
        plus, minus = u**2 * np.exp(-a), v**2 * np.exp(a)
        slope = y - x @ (plus - minus)
        if np.abs(slope).max() < 1e-12 * max(1.0, np.abs(y).max()):
            break
        direction = np.linalg.solve(4 * (x * (plus + minus)) @ x.T, slope)
        length, now = 1.0, value(nu)
        while length > 1e-6 and value(nu - length * direction) > now - 1e-4 * length * float(slope @ direction) + 1e-13:
            length /= 2
        nu = nu - length * direction
    a = 2 * x.T @ nu
    return u * np.exp(-a), v * np.exp(a), nu


def phi(x: Array, u: Array, v: Array) -> float:
    """Sharpness where the residual is zero."""
    return float(4 / len(x) * np.linalg.eigvalsh((x * (u**2 + v**2)) @ x.T)[-1])


def sharpness(x: Array, y: Array, u: Array, v: Array) -> float:
    """Sharpness at any weights, by the dense Hessian."""
    n = len(x)
    slope = x.T @ (x @ (u**2 - v**2) - y) / n
    jacobian = np.concatenate([2 * x * u, -2 * x * v], 1)
    return float(np.linalg.eigvalsh(jacobian.T @ jacobian / n + np.diag(np.concatenate([2 * slope, -2 * slope])))[-1])


def compute(smoke: bool) -> dict[str, Any]:
    """Gradient descent from several seeds and rates: φ at every iterate in closed form, and by flow at some."""
    runs = []
    for seed in range(1 if smoke else 10):
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((EXAMPLES, FEATURES))
        sparse = np.where(np.arange(FEATURES) < 4, 1.0, 0.0)
        y = x @ (sparse * generator.choice([-1.0, 1.0], FEATURES))
        first = 0.5 * np.exp(0.3 * generator.standard_normal((2, FEATURES)))
        for level in LEVELS:
            runs.append(_run(x, y, first, level, seed, smoke))
    return {"runs": runs}


def _run(x: Array, y: Array, first: Array, level: float, seed: int, smoke: bool) -> dict[str, Any]:
    u, v = first
    end_u, end_v, nu = solution(x, y, u, v)
    rate = level / phi(x, end_u, end_v)
    values, raw, flows = [], [], []
    steps = 40 if smoke else 600
    marks = (0, 20) if smoke else (0, 1, 5, 20, 100)
    batch = (torch.tensor(x), torch.tensor(y))
    diverged = False
    for t in range(steps + 1):
        end_u, end_v, nu = solution(x, y, u, v, nu)
        gap = float(np.abs(x @ (end_u**2 - end_v**2) - y).max())
        if gap > 1e-9 or not np.isfinite(gap):
            diverged = True
            break
        values.append(phi(x, end_u, end_v))
        raw.append(sharpness(x, y, u, v))
        if t in marks and (seed < 3 or t == 0):
            ours = gfs.gfs_sharpness(
                DiagonalNetwork(u, v), loss_fn, [batch], learning_rate=rate, rtol=1e-4, tol=1e-7, max_grads=200_000
            )
            flows.append({"step": t, "flow": ours.sharpness, "phi": values[-1], "time": ours.time, "raw": raw[-1]})
            flows[-1] |= {"gradients": ours.grad_evals + 2 * ours.hvps, "converged": ours.converged}
        slope = x.T @ (x @ (u**2 - v**2) - y) / len(y)
        u, v = u - rate * 2 * u * slope, v + rate * 2 * v * slope
    after, before = np.array(values[1:]), np.array(values[:-1])
    rise = np.nonzero(after > before * (1 + RISE))[0]
    kept = [0, *sorted({round(t) for t in np.geomspace(1, len(values) - 1, 60)})] if len(values) > 1 else [0]
    return {
        "seed": seed,
        "level": level,
        "rate": rate,
        "covered": level <= EDGE,
        "diverged": diverged,
        "iterates": len(values),
        "rises": len(rise),
        "largest_rise": float((after / before - 1)[rise].max()) if len(rise) else 0.0,
        "first_rise": int(rise[0]) if len(rise) else None,
        "steps": kept,
        "phi": [round(values[t] * rate, 5) for t in kept],
        "raw": [round(raw[t] * rate, 5) for t in kept],
        "flows": flows,
    }
