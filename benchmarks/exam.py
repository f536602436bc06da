"""Trainings by both frameworks, with their callbacks as they come, that no threshold was chosen on.

Other models, data, losses, optimizers and batch sizes than in ``destroyed.py``; the faults are of its kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_wine, make_circles, make_classification, make_friedman1
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_gfs
import lightning_gfs
from benchmarks.destroyed import Recurrent, bytes_of, classes, dense, momentum, squares
from benchmarks.lib.data import digits
from benchmarks.lib.harmed import Batch, Ended, Fault, Task, changed, harm, jump, loss_of_all, ramp, task_of

Way = Callable[[Task, Fault, Path, bool], Ended]


def batches_of(task: Task, fault: Fault) -> list[Batch]:
    """The batch of every step, with the fault in those that have it."""
    draws = torch.Generator().manual_seed(0)
    held: list[Batch] = []
    x, y = task.data
    assert task.batch is not None
    for step in range(task.steps):
        pick = torch.randint(len(x), (task.batch,), generator=draws)
        batch: Batch = (x[pick], y[pick])
        held.append(changed(batch, fault, draws) if fault.on(step, task.steps) else batch)
    return held


def set_rate(task: Task, fault: Fault, step: int, rates: list[float]) -> None:
    """The rate of a step, and whatever is done to the weights before it."""
    begun = step - math.ceil(fault.since * task.steps)
    if begun == 0:
        harm(task.model, fault)
    for group, rate in zip(task.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * (fault.rate(begun) if fault.on(step, task.steps) else 1.0)


class Module(L.LightningModule):
    """A task in Lightning."""

    def __init__(self, task: Task, fault: Fault, logged: bool) -> None:
        super().__init__()
        self.task, self.fault, self.logged, self.model = task, fault, logged, task.model
        self.rates = [group["lr"] for group in task.optimizer.param_groups]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.task.loss(batch)
        if self.logged:
            self.log("train_loss", loss)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What goes wrong."""
        set_rate(self.task, self.fault, batch_idx, self.rates)

    def configure_optimizers(self) -> Any:
        """That of the task."""
        return self.task.optimizer


def by_lightning(task: Task, fault: Fault, folder: Path, logged: bool) -> Ended:
    """Train; Lightning logs every 50th loss where the module does, and the callback writes its history."""
    first = loss_of_all(task, None)
    trainer = L.Trainer(
        max_steps=task.steps, logger=CSVLogger(folder, name="", version=""), callbacks=[lightning_gfs.GFSCallback()],
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=task.clip,
    )  # fmt: skip
    trainer.fit(Module(task, fault, logged), DataLoader(batches_of(task, fault), batch_size=None))
    return Ended(first, loss_of_all(task, None))


class WithLoss(nn.Module):
    """A task as a model of transformers: it gives its loss itself."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.of_batch = task.model, task.loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of a batch."""
        return {"loss": self.of_batch((x, labels))}


class InOrder(Trainer):
    """Takes the batches as they come."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Wrong(TrainerCallback):
    """What goes wrong."""

    def __init__(self, task: Task, fault: Fault) -> None:
        self.task, self.fault = task, fault
        self.rates = [group["lr"] for group in task.optimizer.param_groups]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before each step."""
        set_rate(self.task, self.fault, state.global_step, self.rates)


def by_trainer(task: Task, fault: Fault, folder: Path, logged: bool) -> Ended:
    """Train; the Trainer logs the mean loss of 500 steps by default, and so none, or of 25."""
    first = loss_of_all(task, None)
    batches = batches_of(task, fault)
    rows = [{"x": x, "labels": y} for b in batches for x, y in zip(*b, strict=True)]
    arguments = TrainingArguments(
        str(folder), max_steps=task.steps, per_device_train_batch_size=task.batch or 1, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=25 if logged else 500, save_strategy="steps", save_steps=task.steps,
        lr_scheduler_type="constant", max_grad_norm=task.clip or 0,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(task.optimizer, lambda step: 1.0)
    trainer = InOrder(WithLoss(task), arguments, train_dataset=rows, optimizers=(task.optimizer, constant),
                      callbacks=[Wrong(task, fault), hf_gfs.GFSCallback()])  # fmt: skip
    trainer.train()
    return Ended(first, loss_of_all(task, None))


# --- losses ---------------------------------------------------------------------------------------------------------


def likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-density of a normal distribution, mean and log-deviation by the network: it falls below 0."""
    mean, log_deviation = model(batch[0]).unbind(1)
    return (0.5 * ((batch[1] - mean) / log_deviation.exp()).square() + log_deviation).mean()


def contrast(model: nn.Module, batch: Batch) -> Tensor:
    """InfoNCE: which of the others is the second view of each."""
    a, b = (nn.functional.normalize(model(view), dim=1) for view in batch)
    return nn.functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def pixels(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of grey pixels: its floor is their entropy."""
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


# --- data -----------------------------------------------------------------------------------------------------------


def _wine() -> Batch:
    x, y = load_wine(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


def _rare() -> Batch:
    x, y = make_classification(1500, 20, n_informative=8, weights=[0.93], class_sep=1.5, random_state=0)
    return torch.tensor(x / x.std(0), dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


def _rings() -> Batch:
    x, y = make_circles(1000, noise=0.08, factor=0.5, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


def _friedman() -> Batch:
    x, y = make_friedman1(800, noise=1.0, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor((y - y.mean()) / y.std()).float()[:, None]


def _wave() -> Batch:
    draws = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(1000, 1, generator=draws) - 2
    return x, (2 * x).sin()[:, 0] + 0.05 * (1 + x[:, 0].abs()) * torch.randn(1000, generator=draws)


def _views() -> Batch:
    x, draws = digits()[0], torch.Generator().manual_seed(0)
    a, b = (x + 0.15 * torch.randn(x.shape, generator=draws) for _ in range(2))
    return a, b


def _grey() -> Batch:
    x = digits()[0]
    x = (x - x.min()) / (x.max() - x.min())
    return x, x


class Normed(nn.Module):
    """Residual blocks with LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(64, 48), nn.Linear(48, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.out(x)
        return out


def nesterov(parameters: Any, rate: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.8."""
    return torch.optim.SGD(parameters, rate, momentum=0.8, nesterov=True)


TASKS: dict[str, tuple[Way, bool, Callable[[], Task]]] = {
    "logistic regression, SGD, batch of 1": (by_lightning, False, lambda: task_of(
        lambda: nn.Linear(13, 3), 31, torch.optim.SGD, 0.02, classes, _wine(), 1, 400)),
    "rare class, Adam": (by_lightning, True, lambda: task_of(
        lambda: dense(20, 32, 2, act=nn.Tanh), 32, torch.optim.Adam, 3e-3, classes, _rare(), 32, 400)),
    "rings, momentum": (by_lightning, False, lambda: task_of(
        lambda: dense(2, 32, 32, 2), 33, momentum, 0.05, classes, _rings(), 16, 400)),
    "noisy targets, Adamax, batch of 2": (by_lightning, False, lambda: task_of(
        lambda: dense(10, 32, 1), 34, torch.optim.Adamax, 3e-3, squares, _friedman(), 2, 400)),
    "likelihood, Adam": (by_lightning, True, lambda: task_of(
        lambda: dense(1, 48, 48, 2, act=nn.Tanh), 35, torch.optim.Adam, 5e-3, likelihood, _wave(), 16, 400)),
    "contrastive, AdamW": (by_lightning, False, lambda: task_of(
        lambda: dense(64, 64, 32, act=nn.GELU), 36, torch.optim.AdamW, 2e-3, contrast, _views(), 48, 300)),
    "grey pixels, Nesterov": (by_lightning, False, lambda: task_of(
        lambda: dense(64, 24, 64), 37, nesterov, 2.0, pixels, _grey(), 24, 400)),
    "bytes, LSTM, Adam": (by_trainer, False, lambda: task_of(
        lambda: Recurrent(48, nn.LSTM), 38, torch.optim.Adam, 5e-3, classes, bytes_of(400, 24), 12, 250, clip=1.0)),
    "LayerNorm, AdamW": (by_trainer, True, lambda: task_of(
        Normed, 39, torch.optim.AdamW, 1e-3, classes, digits(), 32, 300, clip=1.0)),
}  # fmt: skip

_BAD_BATCH, _SHUFFLED = Fault(0.5, 0.502, inputs=30.0), Fault(0.5, labels=True)
WRONG: dict[str, dict[str, Fault]] = {
    "logistic regression, SGD, batch of 1": {
        "rate ×300": jump(300.0), "labels shuffled": _SHUFFLED, "jump ×100 late": jump(100.0, 0.9),
    },
    "rare class, Adam": {"rate ×300": jump(300.0), "ramp 3 %": ramp(3.0), "one bad batch": _BAD_BATCH},
    "rings, momentum": {
        "rate ×100": jump(100.0), "jump ×40 for a while": jump(40.0, 0.5, 0.55),
        "labels shuffled": Fault(0.6, labels=True),
    },
    "noisy targets, Adamax, batch of 2": {
        "rate ×300": jump(300.0), "weights ×20": Fault(0.7, weights=20.0),
        "NaN batch": Fault(0.6, 0.602, inputs=math.nan),
    },
    "likelihood, Adam": {
        "jump ×40 at half": jump(40.0, 0.5), "inputs blank": Fault(0.5, inputs=0.0), "one bad batch": _BAD_BATCH,
    },
    "contrastive, AdamW": {
        "rate ×200": jump(200.0), "labels shuffled": _SHUFFLED, "jump ×200 late": jump(200.0, 0.93),
    },
    "grey pixels, Nesterov": {
        "rate ×0.003": jump(0.003), "ramp 4 %": ramp(4.0), "dead from half": Fault(0.5, bias=-100.0),
    },
    "bytes, LSTM, Adam": {
        "rate ×100": jump(100.0), "jump ×50 at half": jump(50.0, 0.5), "weights ×30 late": Fault(0.9, weights=30.0),
    },
    "LayerNorm, AdamW": {
        "rate ×300": jump(300.0), "NaN batch": Fault(0.9, 0.905, inputs=math.nan), "one bad batch": _BAD_BATCH,
    },
}  # fmt: skip
