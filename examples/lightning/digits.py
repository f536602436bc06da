"""A small convolutional classifier of handwritten digits, trained with Adam, with one line added.

Run:  python examples/lightning/digits.py
Then: tensorboard --logdir lightning_logs
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gfs import GFSCallback


class Digits(L.LightningModule):
    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class DigitsData(L.LightningDataModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images / 16 - 0.3, dtype=torch.float32).reshape(-1, 1, 8, 8)
        return DataLoader(TensorDataset(x, torch.tensor(labels)), batch_size=self.hparams["batch_size"], shuffle=True)


def main() -> None:
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=8,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[GFSCallback(progress_bar=True)],  # the one line
    )
    trainer.fit(Digits(), DigitsData())


if __name__ == "__main__":
    main()
