"""What does it cost to tell the end of a flow from a saddle? Price of full solutions, each product as two gradients.

Run (about 6 minutes): python -m benchmarks.flow_end; with PYTHONPATH at another version's root, it measures that one.
"""

from __future__ import annotations

import torch
from torch import nn

import gfs_core as gfs
from benchmarks.flow_cost import problem
from benchmarks.lib.trainings import squared, step

CASES = (
    (nn.Tanh, 10, 16, 1e-3),
    (nn.Tanh, 20, 32, 1e-3),
    (nn.Tanh, 20, 32, 1e-2),
    (nn.ReLU, 20, 32, 1e-2),
    (nn.Tanh, 50, 32, 1e-2),
)  # activation, examples, width, rtol
STEPS = (0, 200, 500)


def main() -> None:
    for act, examples, width, rtol in CASES:
        model, batch = problem(act, examples, width)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for now in range(max(STEPS) + 1):
            if now in STEPS:
                r = gfs.gfs_sharpness(model, squared, batch, learning_rate=0.2, rtol=rtol, max_grads=20_000)
                price = r.grad_evals + 2 * r.hvps
                print(act.__name__, examples, width, rtol, now, f"{r.sharpness:.5f} {price} {r.converged}", flush=True)
            step(optimizer, squared(model, batch))


if __name__ == "__main__":
    main()
