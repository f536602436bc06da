"""The two pictures of docs/reading.md: the same small network, trained in health and with a rate that creeps up.

Run: python docs/figures/reading.py   (half a minute; writes healthy.png and sick.png beside this file)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from gfs_report.cli import app
from lightning_gfs import GFSCallback

STEPS = 400
SICK_STEPS = 230  # the loss overflows soon after
RATE = 0.15
CREEP = 1.02  # the sick run: 2 % more per step, from CREEPS on
CREEPS = 150


class Digits(LightningModule):
    """A tanh network; the rate has a cosine schedule, or creeps up by mistake."""

    def __init__(self, sick: bool) -> None:
        super().__init__()
        self.sick = sick
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Half the squared distance to the one-hot label."""
        loss: Tensor = 0.5 * (self.net(batch[0]) - nn.functional.one_hot(batch[1], 10)).square().sum(1).mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        """SGD with momentum."""
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)
        if self.sick:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: CREEP ** max(0, step - CREEPS))
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=RATE / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def picture(name: str, sick: bool, folder: Path) -> None:
    """Train, and write the report on it as one image of at most 64 colours."""
    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels))
    logger = CSVLogger(folder, name=name, version="")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=SICK_STEPS if sick else STEPS,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[GFSCallback(tier="sharpness", every=5, running_every=5, max_overhead=None)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(sick), DataLoader(data, batch_size=256, shuffle=True, drop_last=True))
    out = Path(__file__).with_name(f"{name}.png")
    done = CliRunner().invoke(app, ["report", str(folder / name), "-o", str(out)])
    print(done.output)
    assert done.exit_code in (0, 1)
    with Image.open(out) as image:
        small = image.convert("RGB").resize((image.width * 2 // 3, image.height * 2 // 3)).quantize(64)
    small.save(out, optimize=True)


def main() -> None:
    """Both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        picture("healthy", sick=False, folder=Path(folder))
        picture("sick", sick=True, folder=Path(folder))


if __name__ == "__main__":
    main()
