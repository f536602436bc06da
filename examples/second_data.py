"""A second data set: the curvature of what was learnt first, while something else is trained.

A network that knows the digits 0 to 4 goes on with the digits 5 to 9: once on these alone, once with as many of the old
ones mixed in. In both, the monitor measures the loss of the old digits and its sharpness, at the weights of the run.

Run: python examples/second_data.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core


def digits(low: int, high: int) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    keep = (labels >= low) & (labels <= high)
    return TensorDataset(torch.tensor(images[keep] / 16 - 0.3, dtype=torch.float32), torch.tensor(labels[keep]))


def main() -> None:
    old, new = digits(0, 4), digits(5, 9)
    for mixed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss_of(batch: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def step(batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            return loss

        for _ in range(100):
            step(old[torch.randint(len(old), (128,))])
            optimizer.step()

        config = gfs_core.GFSConfig(tier="sharpness", every=10, running_every=None, max_overhead=None)
        probe = DataLoader(old, batch_size=512, shuffle=True)
        monitor = gfs_core.StabilityMonitor(model, optimizer, config, probe=probe)
        print("half of each batch from the old digits" if mixed else "new digits alone")
        for _ in range(51):
            batch = new[torch.randint(len(new), (64 if mixed else 128,))]
            if mixed:
                again = old[torch.randint(len(old), (64,))]
                batch = torch.cat([batch[0], again[0]]), torch.cat([batch[1], again[1]])
            measured = monitor.step(loss_of, batch, loss=step(batch))
            optimizer.step()
            if measured is not None:
                loss, sharpness = measured.loss_probe, measured.sharpness
                print(f"  step {measured.step:2d}  loss of old {loss:.3f}  sharpness {sharpness:.2f}")


if __name__ == "__main__":
    main()
