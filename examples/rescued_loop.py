"""A batch that is not finite, and a rate that jumps by mistake: one run is lost, the others end well.

The last one begins at a hundred times the rate, and finds out in its start.

Run: python examples/rescued_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core


def train(name: str, rate: float, steps: int = 400, **options: Any) -> float:
    """Loss over the last 20 steps."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    monitor = gfs_core.StabilityMonitor(model, optimizer, gfs_core.GFSConfig(tier="running", every=5, **options))
    monitor.protect(scheduler)  # and a gradient scaler, where there is one: a rollback puts their states back too
    losses = []
    for step in range(steps):
        rows = torch.randint(len(x), (64,))
        batch = (x[rows] * float("nan") if step == 60 else x[rows]), y[rows]
        if step == 120:
            optimizer.param_groups[0]["lr"] *= 300
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        measurement = monitor.step(loss_of, batch, loss=loss)
        optimizer.step()  # does nothing where the monitor skips the step
        scheduler.step()
        losses.append(loss.item())
        for reason in () if measurement is None else measurement.reasons:
            if "skipped" in reason or "went back" in reason:
                print(f"{name}: step {step}: {reason}")
    monitor.close()
    return sum(losses[-20:]) / 20


if __name__ == "__main__":
    print(f"log: loss {train('log', 0.2):.3f}")
    print(f"rescue: loss {train('rescue', 0.2, alarm='rescue'):.3f}")
    print(f"start: loss {train('start', 20.0, control='start'):.3f}")
