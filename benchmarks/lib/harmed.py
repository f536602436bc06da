"""Small trainings with a fault, recorded as a user would have them.

Losses and history (default options) are written into a folder. What became of a training is measured apart, by the loss
on all its data, and is not in that folder.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gfs_core as gfs

Batch = tuple[Tensor, ...]


@dataclass
class Task:
    """A training without a fault.

    Attributes:
        model: what is trained.
        optimizer: with its usual rate.
        loss: mean loss of a batch.
        data: inputs and targets, all of them.
        batch: examples of a batch; ``None``: all.
        steps: how long it trains.
        clip: largest norm of the gradient.
        warmup: steps over which the rate grows.
        draw: the batch of a step, where it is not drawn from ``data``.
        before: called before each step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], Tensor]
    data: Batch
    batch: int | None
    steps: int
    clip: float | None = None
    warmup: int = 0
    draw: Callable[[int, torch.Generator], Batch] | None = None
    before: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class Fault:
    """What goes wrong, over a part of the steps.

    Attributes:
        since: fraction of the steps after which it begins.
        until: fraction of the steps after which it ends.
        rate: factor of the rate, by the steps since it began.
        inputs: factor of the inputs (text is not changed).
        labels: whether the targets of each batch are shuffled.
        weights: factor of all weights, once.
        bias: added to all biases but the last one, once: large and negative, it kills units.
        fit: train on these first examples only: what is easy is fitted to the end.
    """

    since: float = 0.0
    until: float = 1.0
    rate: Callable[[int], float] = lambda k: 1.0
    inputs: float = 1.0
    labels: bool = False
    weights: float = 1.0
    bias: float = 0.0
    fit: int | None = None

    def on(self, step: int, steps: int) -> bool:
        """Whether the fault is there at a step of so many."""
        return self.since * steps <= step < self.until * steps


def jump(factor: float, since: float = 0.0, until: float = 1.0) -> Fault:
    """The rate is ``factor`` times what it should be."""
    return Fault(since, until, rate=lambda k: factor)


def ramp(percent: float, since: float = 0.3) -> Fault:
    """The rate grows by ``percent`` in every step."""
    return Fault(since, rate=lambda k: min((1 + percent / 100) ** (k + 1), 1e12))


@dataclass
class Ended:
    """What became of a training, by the loss on all its data and its true targets: before the first step, and after."""

    first: float
    last: float


def train(
    task: Task, fault: Fault, folder: Path, *, log_every: int = 1, logged: bool = True, seed: int = 0, **options: object
) -> Ended:
    """Train, and leave ``history.jsonl`` and ``metrics.csv`` in ``folder``.

    Args:
        task: what to train.
        fault: what goes wrong.
        folder: for what a user would have.
        log_every: steps between logged losses, each the mean since the one before.
        logged: whether the losses are logged at all.
        seed: of the batches.
        options: of the monitor, other than the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator().manual_seed(seed)
    config = gfs.GFSConfig.from_options(history=str(folder / "history.jsonl"), **options)
    monitor = gfs.StabilityMonitor(task.model, task.optimizer, config)
    rates = [group["lr"] for group in task.optimizer.param_groups]
    x, y = (t[: fault.fit] for t in task.data[:2])
    first = loss_of_all(task, fault.fit)
    held: list[float] = []
    rows: list[tuple[int, float]] = []
    for step in range(task.steps):
        on = fault.on(step, task.steps)
        begun = step - math.ceil(fault.since * task.steps)
        if begun == 0:
            harm(task.model, fault)
        for group, rate in zip(task.optimizer.param_groups, rates, strict=True):
            warm = min(1.0, (step + 1) / task.warmup) if task.warmup else 1.0
            group["lr"] = rate * warm * (fault.rate(begun) if on else 1.0)
        task.before(step)
        if task.draw is not None:
            batch = task.draw(step, draws)
        else:
            pick = slice(None) if task.batch is None else torch.randint(len(x), (task.batch,), generator=draws)
            batch = changed((x[pick], y[pick]), fault, draws) if on else (x[pick], y[pick])
        loss = task.loss(batch)
        task.optimizer.zero_grad()
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
        monitor.step(task.loss, batch, loss=loss.detach())
        task.optimizer.step()
        held.append(loss.item())
        if (step + 1) % log_every == 0:
            rows.append((step, sum(held) / len(held)))
            held = []
    monitor.close()
    if logged:
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "train_loss"), *rows])
    return Ended(first, loss_of_all(task, fault.fit))


def changed(batch: Batch, fault: Fault, draws: torch.Generator) -> Batch:
    """A batch with the fault in it."""
    inputs, targets = batch
    if fault.labels:
        targets = targets[torch.randperm(len(targets), generator=draws)]
    return (inputs * fault.inputs if inputs.is_floating_point() else inputs), targets


def harm(model: nn.Module, fault: Fault) -> None:
    """What the fault does to the weights."""
    with torch.no_grad():
        for p in model.parameters():
            p *= fault.weights
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None]
        for layer in layers[:-1]:
            layer.bias += fault.bias


def loss_of_all(task: Task, examples: int | None) -> float:
    """The loss on all data and their true targets, or on the first ``examples``."""
    with torch.no_grad():
        parts = list(zip(*(t[:examples].split(256) for t in task.data), strict=True))
        sizes = [len(x) for x, _ in parts]
        return sum(float(task.loss(part)) * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes)


def task_of(make: Callable[[], nn.Module], seed: int, optimizer: Callable[..., torch.optim.Optimizer], rate: float,
          loss: Callable[[nn.Module, Batch], Tensor], data: Batch, batch: int | None, steps: int,
          **more: float) -> Task:  # fmt: skip
    torch.manual_seed(seed)
    model = make()
    return Task(model, optimizer(model.parameters(), rate), lambda b: loss(model, b), data, batch, steps, **more)  # type: ignore[arg-type]
