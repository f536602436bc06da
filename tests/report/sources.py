"""Small training jobs of users, as the files that they would have."""

from __future__ import annotations

LIGHTNING = """
import argparse
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, lr: float = 0.3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        loss = 0.5 * (self.net(batch[0]) - nn.functional.one_hot(batch[1], 10)).square().sum(1).mean()
        self.log("train_loss", loss)
        self.logger.experiment.add_scalar("own", loss, self.global_step)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits():
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16 - 0.3, dtype=torch.float32)[:50], torch.tensor(y)[:50])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stop = L.pytorch.callbacks.EarlyStopping("val_loss", patience=1)
    trainer = L.Trainer(max_steps=1000, accelerator="cpu", callbacks=[stop], log_every_n_steps=1)
    loader = DataLoader(digits(), batch_size=50)
    trainer.fit(Net(arguments.lr), loader, loader)
    Path("after").touch()
"""

MODULES = '''
import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Net(L.LightningModule):
    """Its loss cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def training_step(self, batch, batch_idx):
        return Square.apply(self.net(batch[0]) - nn.functional.one_hot(batch[1], 10)).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Tied(L.LightningModule):
    """Without an optimizer of its own; one layer is frozen, one stands at two places."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        first, middle = nn.Linear(64, width), nn.Linear(width, width)
        first.requires_grad_(False)
        self.net = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), middle, nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        x, y = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(x / 16 - 0.3, dtype=torch.float32)[:640], torch.tensor(y)[:640])
        return DataLoader(data, self.batch_size, shuffle=True)
'''

CONFIG = """
seed_everything: 0
model:
  class_path: modules.Tied
  init_args: {width: 16}
data:
  class_path: modules.Digits
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.002, weight_decay: 0.1}
trainer:
  max_epochs: 2
  accelerator: cpu
"""

HUGGING_FACE = """
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

text = " ".join(topics[name] for name in sorted(topics)[:12])
alphabet = sorted(set(text))
number = {c: i for i, c in enumerate(alphabet)}
pieces = [torch.tensor([number[c] for c in text[i * 24 : (i + 1) * 24]]) for i in range(400)]
config = GPT2Config(
    vocab_size=len(alphabet), n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
trainer = Trainer(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        "outputs",
        max_steps=200,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=5,
        report_to="tensorboard",
        use_cpu=True,
    ),
    train_dataset=[{"input_ids": p, "labels": p} for p in pieces],
    eval_dataset=[{"input_ids": p, "labels": p} for p in pieces[:8]],
)
trainer.train()
trainer.save_model("outputs/final")
"""

CROWDED = """
import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gfs import GFSCallback


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


x, y = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
callback = GFSCallback(max_memory=0.014)  # half of it is for vectors; 256 examples fit into the rest
trainer = L.Trainer(max_epochs=40, accelerator="cpu", callbacks=[callback])
trainer.fit(Net(), DataLoader(data, batch_size=512, drop_last=True))
"""
