"""What else a Lightning trainer does than fit, and what fails beside it: none is ended or changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same

OPTIONS: dict[str, Any] = {"every": 2, "max_overhead": None, "tier": "sharpness", "running_every": None}


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.lr, self.batch_size = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.2)), 0.1, 2

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        data = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(data), self.batch_size)

    val_dataloader = train_dataloader


class Full(CSVLogger):
    """A logger whose disk is full for what is measured."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if any(key.startswith("gfs/") for key in metrics):
            raise OSError("no space left on device")
        super().log_metrics(metrics, step)


def run(folder: Path, does: str, measured: bool, **options: Any) -> tuple[Any, list[str]]:
    L.seed_everything(0, verbose=False)
    module = Small()
    callbacks = [GFSCallback(**(OPTIONS | options))] if measured else []
    kind: dict[str, Any] = {"max_epochs": 1, "default_root_dir": folder, "logger": False, "enable_checkpointing": False}
    found: Any = None
    if does == "barebones":
        kind = {"max_epochs": 1, "barebones": True}
    elif does == "fast_dev_run":
        kind["fast_dev_run"] = 3
    elif does == "full logger":
        kind["logger"] = Full(folder, name="csv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            accelerator="cpu", callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, **kind
        )  # fmt: skip
        if does == "lr_find":
            found = Tuner(trainer).lr_find(module, num_training=6).results
        elif does == "scale_batch_size":
            found = Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)
        elif does == "validate":
            found = trainer.validate(module, verbose=False)
        else:
            trainer.fit(module)
            found = trainer.global_step
    told = [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]
    state = {k: v.clone() for k, v in module.state_dict().items()}
    return (found, state, module.lr, module.batch_size, torch.get_rng_state()), told


@pytest.mark.parametrize("does", ["lr_find", "scale_batch_size", "validate", "barebones", "fast_dev_run"])
def test_what_else_a_trainer_does_is_the_same(tmp_path: Path, does: str) -> None:
    without, _ = run(tmp_path / "plain", does, measured=False)
    measured, told = run(tmp_path / "measured", does, measured=True)
    assert told == []
    assert_same(list(without), list(measured))


@pytest.mark.parametrize("does", ["full logger", "no folder"])
def test_what_cannot_be_written_is_told_once(tmp_path: Path, does: str) -> None:
    (tmp_path / "file").write_text("")
    options = {"history": str(tmp_path / "file" / "history.jsonl")} if does == "no folder" else {}
    without, _ = run(tmp_path / "plain", does, measured=False)
    measured, [text] = run(tmp_path / "measured", does, measured=True, **options)
    assert_same(list(without), list(measured))
    expected = {
        "full logger": "Full has not taken the values (OSError: no space left on device)",
        "no folder": "the history cannot be written (",
    }
    assert expected[does] in text
