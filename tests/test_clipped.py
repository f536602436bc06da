"""Gradients that are clipped: every adapter has the norm before clipping, where it can be had, or none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from transformers import Trainer, TrainingArguments

import gfs_core as gfs
import hf_gfs
import lightning_gfs
from tests.lightning.trainers import quiet

STEPS, SIZE, CAP = 8, 16, 0.05
OPTIONS: dict[str, Any] = {"tier": "sharpness", "every": 1, "running_every": None, "max_overhead": None}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS * SIZE, 6, generator=generator), torch.randint(3, (STEPS * SIZE,), generator=generator)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


class Module(L.LightningModule):
    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.inner = Net()
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.inner(*batch)["loss"]
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=CAP, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def expected() -> list[float]:
    """The norm of each step's gradient before clipping."""
    model, norms = Net(), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in zip(*(t.split(SIZE) for t in data()), strict=True):
        optimizer.zero_grad()
        model(*batch)["loss"].backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CAP)))
        optimizer.step()
    return norms


def norms_of(path: Path) -> dict[int, float]:
    return {m.step: m.grad_norm for m in gfs.read_history(path) if m.grad_norm is not None}


@pytest.mark.parametrize("manual", [False, True])
def test_lightning(manual: bool, tmp_path: Path) -> None:
    loss_fn = (lambda module, batch, _: module.inner(*batch)["loss"]) if manual else None
    callback = lightning_gfs.GFSCallback(loss_fn=loss_fn, history=str(tmp_path / "history.jsonl"), **OPTIONS)
    clip = {} if manual else {"gradient_clip_val": CAP}
    trainer = quiet(tmp_path, [callback], max_steps=STEPS, logger=False, **clip)
    trainer.fit(Module(manual), DataLoader(TensorDataset(*data()), SIZE))
    found = norms_of(tmp_path / "history.jsonl")
    if manual:  # it is measured before the step: of the gradient that the optimizer got the step before
        assert found == pytest.approx({step: CAP for step in range(1, STEPS)}, rel=1e-4)
    else:
        assert found == pytest.approx(dict(list(enumerate(expected()))[1:]), rel=1e-4)


@pytest.mark.parametrize("how", ["set_trainer", "add_callback"])
def test_trainer(how: str, tmp_path: Path) -> None:
    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    model = Net()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=SIZE, max_grad_norm=CAP, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    callback = hf_gfs.GFSCallback(**OPTIONS)
    callback.set_trainer(trainer) if how == "set_trainer" else trainer.add_callback(callback)
    clip = trainer.accelerator.clip_grad_norm_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert trainer.accelerator.clip_grad_norm_ == clip  # ours is taken away
    assert all(norm > CAP for norm in expected())
    found = norms_of(tmp_path / "history.jsonl")
    if how == "set_trainer":
        assert found == pytest.approx(dict(list(enumerate(expected()))[1:]), rel=1e-4)
    else:
        assert found == {}
        reasons = [r for m in gfs.read_history(tmp_path / "history.jsonl") for r in m.reasons]
        assert any("clipped to 0.05" in r and "set_trainer" in r for r in reasons)
