"""A rate a hundred times too high, held at the edge of stability; and an early warning that ends the training.

Run: python examples/controlled_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core


def train(control: str, steps: int = 200) -> float:
    """Loss over the last 20 steps, with a control of the learning rate."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = gfs_core.GFSConfig(tier="running", every=5, control=control, alarm="stop")  # type: ignore[arg-type]
    monitor = gfs_core.StabilityMonitor(model, optimizer, config, on_alarm=lambda alert: print(alert.reason))
    losses = []
    for step in range(steps):
        rows = torch.randint(len(x), (64,))
        batch = x[rows], y[rows]
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        measurement = monitor.step(loss_of, batch, loss=loss)
        if monitor.should_stop:
            print(f"{control}: stopped at step {step}")
            break
        optimizer.step()  # at the rate times the control's scale
        scheduler.step()
        losses.append(loss.item())
        if measurement is not None and measurement.lr_scale is not None and step % 50 == 0:
            print(f"{control}: step {step}, rate used {measurement.lr_effective:.3g}, scale {measurement.lr_scale:.3g}")
    monitor.close()
    return sum(losses[-20:]) / len(losses[-20:])


if __name__ == "__main__":
    for control in ("observe", "follow"):
        print(f"{control}: loss {train(control):.3f}")
