"""A learning rate that is tried out before the training, which begins with one that is far too low.

Run: python examples/find_rate.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import gfs_core

STEPS, RATE = 400, 2e-3
Batch = tuple[Tensor, Tensor]


class Job:
    """A small classifier of digits, with momentum and a cosine."""

    def __init__(self, rate: float) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
        self.batches = DataLoader(TensorDataset(x[360:], y[360:]), 64, shuffle=True)
        self.validation = DataLoader(TensorDataset(x[:360], y[:360]), 60)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)

    def loss_of(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def train(self) -> float:
        """Loss on the validation data after the training."""
        batches = iter(self.batches)
        for step in range(STEPS):
            if step and step % len(self.batches) == 0:
                batches = iter(self.batches)
            self.optimizer.zero_grad()
            self.loss_of(next(batches)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
        with torch.no_grad():
            return sum(float(self.loss_of(batch)) for batch in self.validation) / len(self.validation)


def main() -> None:
    job = Job(RATE)
    found = gfs_core.find_rate(
        job.model, job.optimizer, job.loss_of, job.batches, STEPS, scheduler=job.scheduler, validation=job.validation
    )
    print(found)
    for rate in (RATE, found.rate):
        print(f"rate {rate:.2g}: loss {Job(rate).train():.3f}")


if __name__ == "__main__":
    main()
