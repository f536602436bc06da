"""Three lines in an Accelerate loop.

Run: python examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
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
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = gfs_core.GFSConfig(every=20, max_overhead=None, history="accelerate-history.jsonl")
    monitor = gfs_core.StabilityMonitor(model, optimizer, config)
    for _ in range(4):
        for batch in loader:
            loss = loss_of(batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            measurement = monitor.step(loss_of, batch, loss=loss)  # None on most steps
            optimizer.step()
            if measurement is not None:
                ratios = {k: v for k, v in measurement.as_log_dict().items() if k.endswith("stability_ratio")}
                print(f"step {measurement.step:3d}", *(f"{key} {value:.3f}" for key, value in ratios.items()), sep="  ")


if __name__ == "__main__":
    main()
