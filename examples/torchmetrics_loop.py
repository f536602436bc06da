"""Sharpness and stability ratio beside the accuracy, as torchmetrics in a training loop without a framework.

Run: python examples/torchmetrics_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics import Accuracy, MetricCollection

from gfs_core.metrics import Sharpness, StabilityRatio


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    metrics = MetricCollection(
        {
            "accuracy": Accuracy("multiclass", num_classes=10),
            "sharpness": Sharpness(model, loss_of),
            "stability ratio": StabilityRatio(model, loss_of, optimizer),
        }
    )
    for epoch in range(8):
        for rows in torch.randperm(1500).split(128):
            optimizer.zero_grad()
            loss_of(model, (x[rows], y[rows])).backward()
            optimizer.step()
        for batch in zip(x[1500:].split(99), y[1500:].split(99), strict=True):  # held-out examples
            with torch.no_grad():
                metrics.update(preds=model(batch[0]), target=batch[1], batch=batch)
        print(f"epoch {epoch}  " + "  ".join(f"{name} {value:.2f}" for name, value in metrics.compute().items()))
        metrics.reset()


if __name__ == "__main__":
    main()
