"""Trainings by the Hugging Face Trainer, by one process or by several."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_gfs import GFSCallback
from tests.core.options import tuned_callback
from tests.core.processes import BATCH, examples, net
from tests.distributed.lightning_run import OPTIONS, TUNED


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"logits": out} if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        parts = [examples(step) for step in range(12)]
        self.x, self.y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


def train(folder: str, mode: str) -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH // size // 2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    model, callback = Model(), tuned_callback(GFSCallback(**OPTIONS), **TUNED)
    trainer = Trainer(model, arguments, train_dataset=Rows())
    if mode == "add_callback":
        trainer.add_callback(callback)
    elif mode == "set_trainer":
        callback.set_trainer(trainer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    rows: list[Any] = [row for row in trainer.state.log_history if any(k.startswith("gfs/") for k in row)]
    torch.save(
        {
            "weights": [p.detach().clone() for p in model.parameters()],
            "rows": rows,
            "told": [str(w.message) for w in told if "gfs:" in str(w.message)],
        },
        f"{folder}/{trainer.args.process_index}.pt",
    )
