"""Short deterministic trainings of one description: in a plain loop, with Lightning, with the Trainer of transformers.

:mod:`benchmarks.golden` records what is measured in them. They use the public names of the packages alone.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import gfs_core as gfs
import hf_gfs
import lightning_gfs

BATCH = 64  # examples of an optimizer step

Batch = dict[str, Tensor]


# --- models -----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Gives its loss where it is given labels, as models of transformers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits of images (n, 64) with their labels (n,)."""
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(nn.Module):
    """A net that sees an image as a sequence of its eight rows, by recurrence or attention."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.mix: nn.Module = (
            nn.GRU(8, 8, batch_first=True)
            if recurrent
            else nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 64)."""
        mixed = self.mix(x.reshape(-1, 8, 8))
        logits: Tensor = self.head((mixed[0] if self.recurrent else mixed).mean(1))
        return logits


def mlp() -> nn.Module:
    return Classifier(nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)))


class Regression(nn.Module):
    """A small net that can be fitted to the end: half the squared distance to the labels / 10, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and outputs of images (n, 64) with their labels (n,)."""
        out = self.net(x.double())[:, 0]
        return {"loss": 0.5 * (out - labels / 10).square().mean(), "logits": out}


def normalised() -> nn.Module:
    return Classifier(nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10)))


def recurrent() -> nn.Module:
    return Classifier(Rows(recurrent=True))


def attention() -> nn.Module:
    return Classifier(Rows(recurrent=False))


def gpt2() -> nn.Module:
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    return model


@cache
def examples(text: bool) -> list[Batch]:
    """The digits one by one: as images, or as a text of the sixteen grey values in their middle."""
    images, labels = load_digits(return_X_y=True)
    if text:
        tokens = torch.tensor(images[:, 24:40], dtype=torch.int64)
        return [{"input_ids": row, "labels": row} for row in tokens]
    pixels, classes = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return [{"x": x, "labels": y} for x, y in zip(pixels, classes, strict=True)]


# --- scenarios --------------------------------------------------------------------------------------------------------


def momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def momentum_and_decay(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3)


def adamax(model: nn.Module) -> Optimizer:
    return torch.optim.Adamax(model.parameters(), 3e-3)  # its threshold is not known


def constant(step: int) -> float:
    return 1.0


def jump(step: int) -> float:
    return 8.0 if step >= 50 else 1.0


def explosion(step: int) -> float:
    return 1e30 if step == 50 else 1.0


def steep(step: int) -> float:
    return 8.0


@dataclass(frozen=True)
class Scenario:
    """One training.

    Attributes:
        options: of ``GFSConfig``.
        adapter: a function of this file that trains.
        model: what is trained.
        optimizer: with its rate.
        factor: of that rate, by the step.
        accumulate: micro-batches of a step.
        autocast: whether the loss is computed in bfloat16.
        steps: optimizer steps.
        resume: the step at which everything is saved, and goes on from what was saved; 0: none.
        unfreeze: the step before which the first layer is frozen; plain loop only.
        scheduler: the policy of an ``EdgeOfStabilityLR``; plain loop only.
    """

    options: dict[str, Any]
    adapter: Callable[[Scenario, Path], nn.Module]
    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], Optimizer] = momentum
    factor: Callable[[int], float] = constant
    accumulate: int = 1
    autocast: bool = False
    steps: int = 13
    resume: int = 0
    unfreeze: int = 0
    scheduler: Any = None

    def config(self, folder: Path) -> dict[str, Any]:
        """All options: no clock decides what is measured."""
        return {"every": 4, "max_overhead": None, "history": str(folder / "history.jsonl"), **self.options}

    def data(self) -> list[Batch]:
        """The examples."""
        return examples(text=self.model is gpt2)

    def loader(self) -> DataLoader[Batch]:
        """Their micro-batches, in order."""
        return DataLoader(cast("Dataset[Batch]", self.data()), BATCH // self.accumulate)


def plain(scenario: Scenario, folder: Path) -> nn.Module:
    """Train in a loop of one's own."""
    model, optimizer, schedule, monitor = _made(scenario, folder)

    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=scenario.autocast):
            loss: Tensor = model(**batch)["loss"]
        return loss

    loader = scenario.loader()
    batches = itertools.chain.from_iterable(itertools.repeat(list(loader)))
    for step in range(scenario.steps):
        if scenario.unfreeze:
            next(iter(model.parameters())).requires_grad_(step >= scenario.unfreeze)
        if scenario.resume == step > 0:
            saved = io.BytesIO()
            torch.save([part.state_dict() for part in (model, optimizer, schedule, monitor)], saved)
            monitor.close()
            model, optimizer, schedule, monitor = _made(scenario, folder)
            held = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
            for part, state in zip((model, optimizer, schedule, monitor), held, strict=True):
                part.load_state_dict(state)
        micro = list(itertools.islice(batches, scenario.accumulate))
        optimizer.zero_grad()
        loss = torch.stack([loss_of(batch) for batch in micro]).mean()
        torch.autograd.backward(loss)
        monitor.step(loss_of, micro, step, micro_batches=True, loss=loss)
        optimizer.step()
        schedule.step()
    monitor.close()
    return model


def _made(scenario: Scenario, folder: Path) -> tuple[nn.Module, Optimizer, Any, gfs.StabilityMonitor]:
    model = scenario.model()
    optimizer = scenario.optimizer(model)
    schedule: Any = LambdaLR(optimizer, scenario.factor)
    if scenario.scheduler is not None:
        schedule = gfs.EdgeOfStabilityLR(optimizer, schedule, scenario.scheduler)
    return model, optimizer, schedule, gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**scenario.config(folder)))


class Module(L.LightningModule):
    """The training of a scenario, for Lightning."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.scenario, self.net = scenario, scenario.model()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss: Tensor = self.net(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer with its schedule."""
        optimizer = self.scenario.optimizer(self.net)
        schedule = LambdaLR(optimizer, self.scenario.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lightning(scenario: Scenario, folder: Path) -> nn.Module:
    """Train with Lightning."""
    checkpoint: Path | None = None
    for steps in filter(None, (scenario.resume, scenario.steps)):
        module = Module(scenario)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            accumulate_grad_batches=scenario.accumulate,
            precision="bf16-mixed" if scenario.autocast else "32-true",
            callbacks=[lightning_gfs.GFSCallback(**scenario.config(folder))],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = scenario.loader()
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        checkpoint = folder / "saved.ckpt"
        trainer.save_checkpoint(checkpoint)
    return module.net


class InOrder(Trainer):  # type: ignore[misc]
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def trainer(scenario: Scenario, folder: Path, own: bool = True) -> nn.Module:
    """Train with the Trainer of transformers; ``own``: the callback replays its ``compute_loss``, not the model's."""
    for steps in filter(None, (scenario.resume, scenario.steps)):
        model = scenario.model()
        optimizer = scenario.optimizer(model)
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH // scenario.accumulate,
            gradient_accumulation_steps=scenario.accumulate,
            max_grad_norm=0,
            bf16=scenario.autocast,
            save_strategy="steps" if scenario.resume else "no",
            save_steps=scenario.resume or steps,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        schedule = LambdaLR(optimizer, scenario.factor)
        job = InOrder(model, arguments, train_dataset=scenario.data(), optimizers=(optimizer, schedule))
        job.remove_callback(PrinterCallback)
        callback = hf_gfs.GFSCallback(**scenario.config(folder))
        if own:
            callback.set_trainer(job)
        else:
            job.add_callback(callback)
        job.train(resume_from_checkpoint=steps != scenario.resume > 0)
    return model


def added(scenario: Scenario, folder: Path) -> nn.Module:
    """Train with the Trainer of transformers, the callback added as any other."""
    return trainer(scenario, folder, own=False)
