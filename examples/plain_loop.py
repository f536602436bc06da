"""Three lines in a training loop without a framework; the values are printed and kept in a history file.

Run: python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = gfs_core.GFSConfig(every=20, max_overhead=None, history="plain-history.jsonl")
    monitor = gfs_core.StabilityMonitor(model, optimizer, config)
    for _ in range(200):
        rows = torch.randint(len(x), (128,))
        batch = x[rows], y[rows]
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        measurement = monitor.step(loss_of, batch, loss=loss)  # None on most steps
        optimizer.step()
        if measurement is not None:
            ratios = {k: v for k, v in measurement.as_log_dict().items() if k.endswith("stability_ratio")}
            print(f"step {measurement.step:3d}", *(f"{key} {value:.3f}" for key, value in ratios.items()), sep="  ")


if __name__ == "__main__":
    main()
