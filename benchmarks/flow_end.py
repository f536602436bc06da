"""What does it cost to tell the end of a flow from a saddle? Price of full solutions, each product as two gradients.

Run (about 6 minutes): python -m benchmarks.flow_end; with PYTHONPATH at another version's root, it measures that one.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core as gfs

CASES = (
    (nn.Tanh, 10, 16, 1e-3),
    (nn.Tanh, 20, 32, 1e-3),
    (nn.Tanh, 20, 32, 1e-2),
    (nn.ReLU, 20, 32, 1e-2),
    (nn.Tanh, 50, 32, 1e-2),
)  # activation, examples, width, rtol
STEPS = (0, 200, 500)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()
    return loss


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    for act, examples, width, rtol in CASES:
        x, y = torch.tensor(images / 16 - 0.3)[:examples], torch.tensor(labels)[:examples]
        torch.manual_seed(0)
        layers = [nn.Linear(64, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 10)]
        model, batch = nn.Sequential(*layers).double(), (x, nn.functional.one_hot(y, 10).double())
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                r = gfs.gfs_sharpness(model, loss_fn, batch, learning_rate=0.2, rtol=rtol, max_grads=20_000)
                price = r.grad_evals + 2 * r.hvps
                print(act.__name__, examples, width, rtol, step, f"{r.sharpness:.5f} {price} {r.converged}", flush=True)
            optimizer.zero_grad()
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


if __name__ == "__main__":
    main()
