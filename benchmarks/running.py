"""The running estimate: how soon an eigenvalue that overtakes is found, and what is mixed in costs in accuracy.

Writes running.json and running.md. Run (some ten minutes of one core): OMP_NUM_THREADS=1 python -m benchmarks.running
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits, fashion_mnist
from benchmarks.lib.models import cnn, dense
from benchmarks.lib.monitors import put_running
from benchmarks.lib.store import Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import RUNS, Run, adamw, of, relu, sgd, step, tanh
from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.linalg.power import RunningSharpness, Sample
from gfs_core.linalg.vectors import Vector
from gfs_core.signals.curvature import RunningCurvature

FACTORS = (1.3, 2.0, 4.0, 10.0)
BEFORE, AFTER = 25, 25  # measurements
STEPS, COMPARED_EVERY, FIRST = 400, 20, 40
Estimate = RunningSharpness | RunningBlocks


# --- an eigenvalue that overtakes -------------------------------------------------------------------------------------


class Networks(nn.Module):
    """Several networks that share no weight; the loss is a weighted sum of theirs."""

    def __init__(self, count: int, hidden: list[int], squared: bool) -> None:
        super().__init__()
        sizes = [64, *hidden, 1 if squared else 10]
        self.members = nn.ModuleList(dense(*sizes) for _ in range(count))
        self.squared, self.scales = squared, [1.0] * count

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, or the squared error of one number."""
        x, y = batch
        each = [
            (m(x)[:, 0] - y.float() / 5 + 1).square().mean() if self.squared else nn.functional.cross_entropy(m(x), y)
            for m in self.members
        ]
        return torch.stack([s * e for s, e in zip(self.scales, each, strict=True)]).sum()


SCENES: dict[str, tuple[int, list[int], bool, int, int, bool]] = {
    # networks, hidden sizes, squared loss, steps of training before, examples of a part, whether a gradient is free
    "2 networks, 60 steps, 16 examples": (2, [48], False, 60, 16, True),
    "2 networks, 400 steps, 4 examples": (2, [48], False, 400, 4, True),
    "5 networks, 150 steps, 8 examples": (5, [32, 32], False, 150, 8, True),
    "twin critics, 200 steps, 16 examples": (2, [32, 32], True, 200, 16, True),
    "twin critics, at the start, 4 examples": (2, [48], True, 0, 4, True),
    "2 networks, at the start, 16 examples, gradient not free": (2, [48], False, 0, 16, False),
}


class Scene:
    """Trained networks whose losses are scaled so that each has a known largest eigenvalue."""

    def __init__(self, name: str, seed: int) -> None:
        count, hidden, squared, steps, self.part, self.free = SCENES[name]
        torch.manual_seed(seed)
        self.model, self.data = Networks(count, hidden, squared), digits(1437)
        self.weights, self.products = list(self.model.parameters()), 0
        optimizer = torch.optim.Adam(self.weights, 3e-3)
        self.parts = self._drawn(torch.Generator().manual_seed(seed), 64)
        for _ in range(steps):
            step(optimizer, self.model.loss(next(self.parts)))
        self.largest = [self._largest(member) for member in range(count)]

    def _drawn(self, generator: torch.Generator, count: int) -> Iterator[Batch]:
        x, y = self.data
        while True:
            rows = torch.randint(len(y), (count,), generator=generator)
            yield x[rows], y[rows]

    def _largest(self, member: int) -> float:
        self.model.scales = [float(i == member) for i in range(len(self.model.scales))]
        weights = list(self.model.members[member].parameters())
        return largest_eigenvalues(self.operator(self.data, weights), weights, tol=1e-4, max_hvps=300).value

    def operator(self, batch: Batch, weights: list[Tensor]) -> Callable[[Vector], Vector]:
        """Products with the Hessian on one batch."""

        def product(vector: Vector) -> Vector:
            self.products += 1
            gradient = torch.autograd.grad(self.model.loss(batch), weights, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            return [h.detach() for h in torch.autograd.grad(along, weights)]

        return product

    def play(self, estimate: Estimate, factor: float) -> tuple[list[float], int]:
        """Values / true one after the last network's eigenvalue rose to ``factor`` times the first's; products."""
        self.products, parts = 0, self._drawn(torch.Generator().manual_seed(7), self.part)
        values = []
        for at in range(BEFORE + AFTER):
            last = factor if at >= BEFORE else 0.5
            tops = [1.0, *[0.5] * (len(self.largest) - 2), last]
            self.model.scales = [t / found for t, found in zip(tops, self.largest, strict=True)]
            batch = next(parts)
            other = self.operator(next(parts), self.weights) if estimate.wants_pair else None

            def gradient(dear: bool, batch: Batch = batch) -> Vector | None:
                return list(torch.autograd.grad(self.model.loss(batch), self.weights)) if self.free or dear else None

            found: Any = estimate.update(Sample(self.operator(batch, self.weights), self.weights, other, gradient))
            with torch.no_grad():
                relative = float(self.model.loss(batch)) / float(self.model.loss(self.data))
            value = estimate.average(found, relative)
            values.append((value or 0.0) / factor)
        return values[BEFORE:], self.products


def overtaking(seeds: range) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in SCENES:
        scenes = [Scene(name, seed) for seed in seeds]
        for kind, made in (("one direction", RunningSharpness), ("a direction in each block", RunningBlocks)):
            cells: dict[str, Any] = {}
            for factor in FACTORS:
                played = [scene.play(made(), factor) for scene in scenes]
                cells[str(factor)] = {
                    "at_10": [values[9] for values, _ in played],
                    "needed": [next((i + 1 for i, v in enumerate(values) if v >= 0.8), None) for values, _ in played],
                    "products": [products for _, products in played],
                }
            rows[f"{name} | {kind}"] = cells
            print(name, "|", kind, {f: [round(v, 2) for v in c["at_10"]] for f, c in cells.items()}, flush=True)
    return rows


# --- what is mixed into the direction, along trainings ----------------------------------------------------------------


class Unmixed(RunningBlocks):
    """Without what is mixed in."""

    def update(self, sample: Sample) -> list[float]:
        """The same, without the gradient."""
        return super().update(replace(sample, gradient=None))


def unmixed() -> RunningCurvature:
    """The signal with such an estimate."""
    signal = RunningCurvature()
    signal.estimate = Unmixed()
    return signal


def trainings() -> dict[str, Callable[[], Run]]:
    return RUNS | {
        "digits, MLP, momentum 0.03, batch of 32, constant rate": lambda: of(relu, sgd, 0.03, digits(1437), 32, False),
        "digits, MLP, squared loss, momentum 0.05": lambda: of(tanh, sgd, 0.05, digits(1437), 64, True, True),
        "Fashion-MNIST, CNN, AdamW 2e-3, batch of 64": lambda: of(cnn, adamw, 2e-3, fashion_mnist(2000), 64, True),
    }


def along(make: Callable[[], Run], seed: int) -> dict[str, list[tuple[float, float]]]:
    """Pairs of running and exact ratio of both kinds, which see the same parts and know nothing of each other."""
    torch.manual_seed(seed)
    run = make()

    def monitor(**options: Any) -> gfs.StabilityMonitor:
        return gfs.StabilityMonitor(run.model, run.optimizer, gfs.GFSConfig(max_overhead=None, alarm="off", **options))

    exact = monitor(tier="sharpness", every=1, running_every=None)
    monitors = {"mixed": monitor(tier="running", every=5), "not mixed": monitor(tier="running", every=5)}
    put_running(monitors["not mixed"], unmixed())
    pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in monitors}
    latest: dict[str, float] = {}
    for now, batch, loss in run.steps(STEPS, seed + 1):
        for kind, each in monitors.items():
            found = each.step(run.loss, batch, now, loss=loss)
            if found is not None and found.running_stability_ratio is not None:
                latest[kind] = found.running_stability_ratio
        if now % COMPARED_EVERY == 0 and now >= FIRST:
            true = exact.step(run.loss, run.data, now)
            if true is not None and true.stability_ratio is not None:
                for kind, value in latest.items():
                    pairs[kind].append((value, true.stability_ratio))
    return pairs


def mixing(seeds: range) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, make in trainings().items():
        rows[name] = {"mixed": [], "not mixed": []}
        for seed in seeds:
            for kind, pairs in along(make, seed).items():
                ratios = [a / b for a, b in pairs]
                rows[name][kind].append(
                    {
                        "rank": float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic),
                        "median": median(ratios),
                        "worst": max(max(ratios), 1 / min(ratios)),
                    }
                )
        print(name, rows[name], flush=True)
    return rows


# --- the page ---------------------------------------------------------------------------------------------------------


HEAD = """# The running estimate

    OMP_NUM_THREADS=1 python -m benchmarks.running

torch {torch}, Python {python}. The estimator: `gfs_core/linalg/power.py`, `gfs_core/linalg/blocks.py`.

## An eigenvalue that overtakes in another network

Networks that share no weight, on scikit-learn's digits; weights held still, one product on a new part of the
data in each measurement. After {before} of them the last network's largest eigenvalue jumps from 0.5 to
the factor times the first's. A cell: estimate / true value 10 measurements later, median and smallest of
{seeds} seeds · of how many seeds it is at 0.8 or more by then. *Products*: in all {measurements}
measurements, median; the solver's first products and the search for blocks included.
"""
MIXING = f"""
With one direction an eigenvalue in another network is found once what is mixed into the direction has
grown. With a direction in each block the value follows at once; what is left is the average over
measurements, and how far a direction that single parts of the data turn lies from the eigenvector: from 4
examples of a trained network either estimate is about half the true value. The search for blocks and the
first turns cost some ten products once, after that one in 50.

## What is mixed into the direction

Trainings of {STEPS} steps, measured every 5, no budget; every {COMPARED_EVERY} steps the running ratio is
held against the solved one on *all* the training data. Rank correlation · median of estimate / exact · worst
factor, of each seed; mixed: a little of the gradient and of a random vector in every turn, the default.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for name, cells in results.get("overtaking", {}).items():
        each = []
        for factor in FACTORS:
            cell = cells[str(factor)]
            soon = sum(n is not None and n <= 10 for n in cell["needed"])
            each.append(f"{median(cell['at_10']):.2f}, {min(cell['at_10']):.2f} · {soon} of {len(cell['needed'])}")
        products = median(p for f in FACTORS for p in cells[str(f)]["products"])
        rows.append([name.replace(" | ", ": "), *each, f"{products:.0f}"])
    kinds = ("mixed", "not mixed")
    mixed = [
        [
            name,
            *("<br>".join(f"{r['rank']:.2f} · {r['median']:.2f} · {r['worst']:.1f}" for r in found[k]) for k in kinds),
        ]
        for name, found in results.get("mixing", {}).items()
    ]
    made, counts = results["environment"], {"before": BEFORE, "measurements": BEFORE + AFTER}
    head = HEAD.format(torch=made["torch"], python=made["python"], seeds=results["seeds"], **counts)
    lines = [head, *table(["", *(f"×{f:g}" for f in FACTORS), "products"], rows), MIXING, *table(["", *kinds], mixed)]
    ranks = {k: [r["rank"] for row in results.get("mixing", {}).values() for r in row[k]] for k in kinds}
    if all(ranks.values()):
        both = ", ".join(f"{sum(v) / len(v):.3f} {k}" for k, v in ranks.items())
        lines += ["", f"Mean rank correlation: {both}.", ""]
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore", gfs.GFSWarning)
    asked = sys.argv[1:]
    store = Store("running", fresh=not asked)
    store.put("seeds", 3)
    if not asked or "overtaking" in asked:
        store.put("overtaking", overtaking(range(3)))
    if not asked or "mixing" in asked:
        store.put("mixing", mixing(range(2)))
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
