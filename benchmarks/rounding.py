"""The rate at which gradient descent loses stability where weights are rounded, beside what the sharpness tells.

Writes rounding.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.rounding
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits
from benchmarks.lib.store import FOLDER
from benchmarks.lib.tables import row, table
from benchmarks.lib.trainings import entropy
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.loss.differences import Differences

BITS = (2, 3, 4, 8, None)
SEEDS = 5
STEPS = 60
GRID = [1.1**i for i in range(-12, 40)]  # rates, in units of 2 / sharpness
LOST = 1.5  # the loss has been this many times that at the start


ABOUT = f"""# Where weights are rounded

Digits, 256 examples, MLP 64–32–10 (tanh), weights rounded with one step for each layer and a straight-through
gradient, after 300 steps of gradient descent; {SEEDS} seeds, least to largest. *Lost*: the smallest rate, in
units of 2 / sharpness, at which the loss grows to {LOST} times that at the start within {STEPS} further steps
(tried in steps of a tenth). The sharpness is that at the rounded weights. *Differences*: the eigenvalue by
differences of gradients over it, which is what a measurement without this knowledge gives.
"""


class Rounded(nn.Linear):
    """Rounds its weights to so many bits; the gradient goes straight through."""

    def __init__(self, inputs: int, outputs: int, bits: int | None) -> None:
        super().__init__(inputs, outputs)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """A linear map by the rounded weights."""
        w = self.weight
        if self.bits is not None:
            step = w.detach().abs().max() / (2 ** (self.bits - 1) - 1)
            w = w + ((w / step).round() * step - w).detach()
        return nn.functional.linear(x, w, self.bias)


def descend(model: nn.Module, batch: Batch, rate: float, steps: int) -> list[float]:
    """Losses of gradient descent on one batch; the model moves."""
    losses = []
    params = list(model.parameters())
    for _ in range(steps):
        loss = entropy(model, batch)
        losses.append(loss.item())
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.data.sub_(g, alpha=rate)
    return losses


def by_differences(model: nn.Module, batch: Batch) -> float:
    """The largest eigenvalue by differences of gradients, which the package refuses here."""
    with gfs.StateSnapshot(model) as isolation:
        objective = gfs.Objective(model, entropy, [batch], isolation=isolation)
        generator = torch.Generator().manual_seed(0)
        products = Differences(objective)
        return largest_eigenvalues(products, objective.weights, max_hvps=50, generator=generator).value


def main() -> None:
    """Writes the table."""
    warnings.simplefilter("ignore", gfs.GFSWarning)
    batch = digits(256, centre=0.0)
    rows = []
    for bits in BITS:
        limits, ratios = [], []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = nn.Sequential(Rounded(64, 32, bits), nn.Tanh(), Rounded(32, 10, bits))
            start = descend(model, batch, 0.05, 300)[-1]
            value = gfs.sharpness(model, entropy, batch, max_hvps=500).value
            ratios.append(by_differences(model, batch) / value)
            lost = (c for c in GRID if max(descend(copy.deepcopy(model), batch, 2 * c / value, STEPS)) > LOST * start)
            limits.append(next(lost, float("inf")))
        of = "not rounded" if bits is None else f"{bits} bits"
        found = f"{min(limits):.2f} – {max(limits):.2f}"
        rows.append([of, found, f"{min(ratios):.2f} – {max(ratios):.2f}"])
        print(row(rows[-1]), flush=True)
    (FOLDER / "rounding.md").write_text("\n".join([ABOUT, *table(["weights", "lost", "differences"], rows)]) + "\n")


if __name__ == "__main__":
    main()
