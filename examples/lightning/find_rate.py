"""A learning rate that is tried out before `fit`, which would begin with one that is far too low.

Run: python examples/lightning/find_rate.py
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gfs import find_rate

RATE, EPOCHS = 1e-4, 10
Loader = DataLoader[tuple[Tensor, ...]]


class Digits(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # stepped after each epoch


class DigitsData(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
        self.training, self.validation = TensorDataset(x[360:], y[360:]), TensorDataset(x[:360], y[:360])

    def train_dataloader(self) -> Loader:
        return DataLoader(self.training, 64, shuffle=True)

    def val_dataloader(self) -> Loader:
        return DataLoader(self.validation, 60)


def trained(trainer: L.Trainer, module: Digits) -> float:
    """Loss on the validation data after the training."""
    trainer.fit(module, DigitsData())
    return float(trainer.callback_metrics["val_loss"])


def trainer() -> L.Trainer:
    L.seed_everything(0)
    return L.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False)


def main() -> None:
    print(f"rate {RATE:.2g}: loss {trained(trainer(), Digits(RATE)):.3f}")
    own = trainer()
    module = Digits(RATE)
    found = find_rate(own, module, datamodule=DigitsData())
    print(found)
    module.hparams["lr"] *= found.factor
    print(f"rate {found.rate:.2g}: loss {trained(own, module):.3f}")


if __name__ == "__main__":
    main()
