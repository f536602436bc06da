"""Three lines in a Lightning Fabric loop.

Run: python examples/fabric_loop.py
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    fabric = L.Fabric(accelerator="cpu", precision="bf16-mixed")
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        # With mixed precision Fabric allows its wrapper no backward but `fabric.backward`: measure the module itself.
        with fabric.autocast():
            return nn.functional.cross_entropy(model.module(batch[0]), batch[1])

    config = gfs_core.GFSConfig(every=20, max_overhead=None, history="fabric-history.jsonl")
    monitor = gfs_core.StabilityMonitor(model, optimizer, config)
    for _ in range(4):
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            optimizer.zero_grad()
            fabric.backward(loss)
            measurement = monitor.step(loss_of, batch, loss=loss)  # None on most steps
            optimizer.step()
            if measurement is not None:
                ratios = {k: v for k, v in measurement.as_log_dict().items() if k.endswith("stability_ratio")}
                print(f"step {measurement.step:3d}", *(f"{key} {value:.3f}" for key, value in ratios.items()), sep="  ")


if __name__ == "__main__":
    main()
