"""Trainings whose weights break, by two processes under either framework, with ``control="guard"``."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_gfs
import lightning_gfs
from tests.hf.rows import Rows

STEPS, BAD, BREAKS = 70, 30, 60  # the first process has a bad batch at step BAD; the weights break at step BREAKS


class Model(nn.Module):
    """Notes its weights before each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.kept: list[list[Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        bad = len(self.kept) - 1 == BAD and torch.distributed.get_rank() == 0
        return {"loss": nn.functional.cross_entropy(self.net(x), labels) * (math.nan if bad else 1.0)}

    def begin(self, step: int) -> None:
        self.kept.append([p.detach().clone() for p in self.parameters()])
        if step == BREAKS:
            with torch.no_grad():
                self.net[0].weight.fill_(math.nan)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.model.begin(index)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Begins(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].begin(state.global_step)


def fit(folder: str, rank: int, options: dict[str, Any]) -> Model:
    module, rows = Module(), Rows(16 * STEPS * 2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        callbacks=[lightning_gfs.GFSCallback(**options)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=16, sampler=DistributedSampler(rows, 2, rank, shuffle=False)))
    return module.model


def by_trainer(folder: str, rank: int, options: dict[str, Any]) -> Model:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = Model()
    trainer = Trainer(model, arguments, train_dataset=Rows(16 * STEPS * 2), callbacks=[Begins()])
    hf_gfs.GFSCallback(**options).set_trainer(trainer)
    trainer.train()
    return model


def train(folder: str, mode: str) -> None:
    rank = int(os.environ["RANK"])
    options = {"tier": "running", "every": 5, "control": "guard", "history": f"{folder}/history.jsonl"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = {"lightning": fit, "trainer": by_trainer}[mode](folder, rank, options)
    torch.save({"kept": model.kept}, f"{folder}/{rank}.pt")
