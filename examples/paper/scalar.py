"""Scalar networks π(w) = ∏ wᵢ with loss ½(π − 1)²: everything about them is known in closed form.

Gradient flow conserves wᵢ² − wⱼ². At π = 1 the Hessian is v·vᵀ with vᵢ = 1/wᵢ, so the sharpness φ of the gradient flow
solution is Σ 1/uᵢ² with uᵢ² = c + wᵢ² − minⱼ wⱼ², c solving ∏ uᵢ² = 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import gfs_core as gfs

Array = NDArray[np.float64]

DEPTHS = (2, 3, 4, 5)
EDGE = 2 * math.sqrt(2)  # as we understand the paper, its theorem starts from ηφ ≤ 2√2
RISE = 1e-9  # a relative rise of φ below this is rounding
KNOWN = (((3.0, 0.34), 0.25), ((2.0, 1.5, 0.1), 0.20), ((2.0, 1.5, 1.0, 0.33), 0.05))  # start, rate


def with_product(balances: Array, product: Array) -> Array:
    """The weights (n×D) whose wᵢ² − minⱼ wⱼ² are ``balances`` (n×D, least 0) and whose product is ``product`` (n).

    A negative product makes the smallest weight negative. Newton's method in x = log c, from above: Σ log(eˣ + dᵢ) is
    convex and rising, so it cannot overshoot.
    """
    target = np.log(np.maximum(product**2, 1e-300))
    x = target / balances.shape[1]
    for _ in range(100):
        c = np.exp(x)[:, None]
        change = (np.log(c + balances).sum(1) - target) / (c / (c + balances)).sum(1)
        x = x - change
        if np.abs(change).max(initial=0.0) < 1e-13:
            break
    w = np.sqrt(np.exp(x)[:, None] + balances)
    rows = np.arange(len(w))
    w[rows, balances.argmin(1)] *= np.where(product < 0, -1.0, 1.0)
    return np.asarray(w)


def balances_of(w: Array) -> Array:
    """wᵢ² − minⱼ wⱼ² of each row."""
    return np.asarray(w**2 - (w**2).min(1, keepdims=True))


def phi(w: Array) -> Array:
    """Sharpness of the gradient flow solution from each row of ``w``."""
    return np.asarray((1 / with_product(balances_of(w), np.ones(len(w))) ** 2).sum(1))


def step(w: Array, rate: Array) -> Array:
    """One step of gradient descent for each row."""
    product = w.prod(1, keepdims=True)
    return np.asarray(w - rate[:, None] * (product - 1) * product / w)


class Product(nn.Module):
    """π(w) as a module, for the package's own flow."""

    def __init__(self, w: Array) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self) -> Tensor:
        """The product."""
        return self.w.prod()


def by_flow(w: Array, rate: float) -> gfs.FlowResult:
    """The gradient flow solution from ``w`` by the package's own flow, as for any other model."""
    return gfs.gfs_sharpness(
        Product(w), lambda model, _: 0.5 * (model() - 1) ** 2, [None], learning_rate=rate, rtol=1e-5, tol=1e-8
    )


def starts(depth: int, count: int, product: tuple[float, float], generator: np.random.Generator) -> Array:
    """Random weights: balances of weights from (0, 3), then a product from the interval given."""
    balances = balances_of(generator.uniform(0, 3, (count, depth)))
    return with_product(balances, generator.uniform(*product, count))


def trajectories(smoke: bool) -> dict[str, Any]:
    """φ along gradient descent by the closed form, and at some iterates by the package's flow."""
    generator, rows = np.random.default_rng(0), []
    chosen = [(np.array(w), rate, "known") for w, rate in KNOWN]
    for depth in DEPTHS:
        for w in starts(depth, 0 if smoke else 4, (0.05, 1.0), generator):
            chosen.append((w, float(generator.uniform(0.5, EDGE) / phi(w[None])[0]), "random"))
    for w, rate, kind in chosen:
        path, steps = w[None], []
        for t in range(101):
            value = float(phi(path)[0])
            row: dict[str, Any] = {"step": t, "phi": value}
            if t in ((5,) if smoke else (0, 1, 5, 20, 100)):
                ours = by_flow(path[0], rate)
                row |= {"flow": ours.sharpness, "gradients": ours.grad_evals + 2 * ours.hvps, "time": ours.time}
            steps.append(row)
            path = step(path, np.array([rate]))
        rows.append({"depth": len(w), "start": w.tolist(), "rate": rate, "kind": kind, "steps": steps})
    return {"runs": rows}


def rises(before: Array, after: Array) -> Array:
    """Which of the values rose by more than rounding, or are no longer finite."""
    return np.asarray(~(after <= before * (1 + RISE)))


def map_of_rises(smoke: bool) -> dict[str, Any]:
    """Where one step of gradient descent raises φ, over ηφ and the product; and whole runs from the covered region."""
    generator, depths = np.random.default_rng(1), []
    edges = np.linspace(0, 4, 41), np.linspace(-1, 3, 41)
    for depth in DEPTHS:
        w = starts(depth, 4_000 if smoke else 400_000, (-1.0, 3.0), generator)
        before, level, product = phi(w), generator.uniform(0, 4, len(w)), w.prod(1)
        rose = rises(before, phi(step(w, level / before)))
        tried, _, _ = np.histogram2d(product, level, (edges[1], edges[0]))
        counts, _, _ = np.histogram2d(product[rose], level[rose], (edges[1], edges[0]))
        regions = {}
        for name, inside in {
            "0 ≤ π ≤ 1, ηφ ≤ 2√2": (product >= 0) & (product <= 1) & (level <= EDGE),
            "π < 0, ηφ ≤ 2√2": (product < 0) & (level <= EDGE),
            "π > 1, ηφ ≤ 2": (product > 1) & (level <= 2),
            "π > 1, 2 < ηφ ≤ 2√2": (product > 1) & (level > 2) & (level <= EDGE),
            "0 ≤ π ≤ 1, ηφ > 2√2": (product >= 0) & (product <= 1) & (level > EDGE),
            "π > 1, ηφ > 2√2": (product > 1) & (level > EDGE),
        }.items():
            regions[name] = [int((rose & inside).sum()), int(inside.sum())]
        depths.append({"depth": depth, "rose": counts.astype(int).tolist(), "tried": tried.astype(int).tolist()})
        depths[-1] |= {"regions": regions, "runs": _whole_runs(depth, 200 if smoke else 5_000, generator)}
    return {"level": edges[0].round(6).tolist(), "product": edges[1].round(6).tolist(), "depths": depths}


def _whole_runs(depth: int, count: int, generator: np.random.Generator) -> dict[str, int]:
    """Gradient descent for 300 steps from starts in the covered region: in how many runs φ rose at any step."""
    w = starts(depth, count, (0.0, 1.0), generator)
    value = phi(w)
    rate = generator.uniform(0, EDGE, count) / value
    ever, checked = np.zeros(count, bool), 0
    for _ in range(300):
        w = step(w, rate)
        after = phi(w)
        ever |= rises(value, after)
        checked += count
        value = after
    settled = np.abs(w.prod(1) - 1) < 1e-6
    never = rate * depth > 2
    return {
        "runs": count,
        "steps": checked,
        "rose": int(ever.sum()),
        "settled": int(settled.sum()),
        "rate × D > 2": int(never.sum()),
        "of those settled": int((never & settled).sum()),
    }


def convergence(smoke: bool) -> dict[str, Any]:
    """Where gradient descent ends from near a minimum with ηφ = 2 − δ (Theorem B as we understand it) and 2 + e."""
    generator = np.random.default_rng(2)
    below, above = [], []
    count, steps = (5, 2_000) if smoke else (100, 20_000)
    for depth in DEPTHS:
        for delta in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
            # ½(π − 1)² ≤ δ²/200
            w = with_product(balances_of(generator.uniform(0, 3, (count, depth))), np.full(count, 1 - delta / 10))
            rate = (2 - delta) / phi(w)
            least, loss = 0.5 * (w.prod(1) - 1) ** 2, 0.5 * (w.prod(1) - 1) ** 2
            worst = np.ones(count)
            for t in range(1, steps):
                w = step(w, rate)
                now = 0.5 * (w.prod(1) - 1) ** 2
                if least.max() * (1 - delta) ** (2 * t) < 1e-24:
                    break
                worst = np.maximum(worst, now / (loss * (1 - delta) ** (2 * t)))
            end = rate * phi(w)
            found: dict[str, Any] = {"depth": depth, "delta": delta, "starts": count, "worst": float(worst.max())}
            below.append(found | {"end": [float(end.min()), float(end.max())]})
        balances = balances_of(generator.uniform(0, 3, (12 * count, depth)))
        w = with_product(balances, np.full(12 * count, 0.999))
        level = generator.uniform(2, EDGE, len(w))
        rate = level / phi(w)
        for _ in range(steps):
            w = step(w, rate)
        done = np.abs(w.prod(1) - 1) < 1e-6
        above.append({"depth": depth, "start": level[done].round(4).tolist(), "unsettled": int((~done).sum())})
        above[-1] |= {"end": (rate * phi(w))[done].round(4).tolist()}
        above[-1] |= {"rate × D > 2": int((rate * depth > 2).sum())}
        above[-1] |= {"of those settled": int((done & (rate * depth > 2)).sum())}
    return {"below": below, "above": above, "steps": steps}


def bifurcation(smoke: bool) -> dict[str, Any]:
    """Gradient descent with its balances frozen, over ηφ; and real gradient descent, which drifts through the picture.

    Frozen: after each step the balances are put back, and only the product moves. Then φ is a constant, and the product
    follows a map of one variable, with a bifurcation where ηφ passes 2.
    """
    pictures = []
    for depth, rate in ((2, 0.8), (4, 0.2), (8, 0.1)):
        levels = np.linspace(1.8, 3.0, 40 if smoke else 160)
        # half of the weights a, half 1/a: φ = D/2·(a² + 1/a²)
        mean = levels / rate / depth
        large = mean + np.sqrt(mean**2 - 1)
        frozen = np.repeat((large - 1 / large)[:, None], depth, 1)
        frozen[:, : depth // 2] = 0.0
        w, rates = with_product(frozen, np.full(len(levels), 0.9)), np.full(len(levels), rate)
        seen = []
        for t in range(1_000):
            w = with_product(frozen, step(w, rates).prod(1))
            if t >= 1_000 - 24:
                seen.append([None if abs(p) > 10 else round(float(p), 3) for p in w.prod(1)])
        start = with_product(frozen[[int(np.abs(levels - 2.4).argmin())]], np.array([0.9]))
        path = []
        for _ in range(400):
            path.append([round(float(rate * phi(start)[0]), 4), round(float(start.prod()), 4)])
            start = step(start, rates[:1])
        pictures.append(
            {"depth": depth, "rate": rate, "level": levels.round(4).tolist(), "product": seen, "path": path}
        )
    return {"pictures": pictures}
