"""Recorded trainings that go well, and that go wrong from one step on: losses, gradients, stability ratios and rates.

The recordings are kept in $GFS_ALARM_RUNS (by default a folder of the temporary directory) and not made twice.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import digits, fashion_mnist, text
from benchmarks.lib.models import Characters, cnn, mlp
from benchmarks.lib.trainings import adamw, sgd

FOLDER = Path(__file__).resolve().parent.parent  # where results are
RUNS = Path(os.environ.get("GFS_ALARM_RUNS", Path(tempfile.gettempdir()) / "gfs-alarm-runs"))
BATCH, EVERY = 64, 5  # examples of a batch, steps between measurements
HEALTHY, AFTER, LONG = 300, 200, 600  # steps before the fault, after it, and of a run without one
SEEDS = range(5, 25)  # the rules were chosen on the seeds 0 to 4 and 100 to 102
Batch = tuple[Tensor, Tensor]
Stream = dict[str, list[Any]]  # "loss", "gradient", "ratio", "rate": one value per step; no ratio: None


@dataclass(frozen=True)
class Fault:
    """What goes wrong from one step on; ``k`` counts the steps since, from 0.

    Attributes:
        rate: factor of the learning rate.
        inputs: factor of the inputs (of text: of the embedded characters).
        labels: whether the labels of each batch are shuffled.
        half: whether gradients go through float16 with a loss scale that doubles in every step and is never lowered.
        fresh: whether the optimizer's state is lost.
    """

    rate: Callable[[int], float] = lambda k: 1.0
    inputs: Callable[[int], float] = lambda k: 1.0
    labels: bool = False
    half: bool = False
    fresh: bool = False


OVERFLOW = "float16 overflow"
FAULTS = {
    "rate ×3": Fault(rate=lambda k: 3.0),
    "rate ×10": Fault(rate=lambda k: 10.0),
    "rate ×30": Fault(rate=lambda k: 30.0),
    "ramp 2 %": Fault(rate=lambda k: 1.02 ** (k + 1)),
    "ramp 5 %": Fault(rate=lambda k: 1.05 ** (k + 1)),
    "resume, rate ×5": Fault(rate=lambda k: 5.0, fresh=True),
    "labels shuffled": Fault(labels=True),
    "inputs grow 2 %": Fault(inputs=lambda k: 1.02 ** (k + 1)),
    "one bad batch": Fault(inputs=lambda k: 30.0 if k == 0 else 1.0),
    OVERFLOW: Fault(half=True),
}
RATE_FAULTS, OTHER_FAULTS = list(FAULTS)[:6], list(FAULTS)[6:]
OPTIMIZERS = ("momentum", "AdamW")
WORKLOADS = ("digits, MLP", "Fashion-MNIST, CNN", "text, transformer")


@dataclass
class Training:
    """A training with its monitor; a deep copy goes on from the same state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    overhead: float | None = None
    gain: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        self.monitor = gfs.StabilityMonitor(
            self.model, self.optimizer, gfs.GFSConfig(tier="running", every=EVERY, max_overhead=self.overhead)
        )
        self.rates = [g["lr"] for g in self.optimizer.param_groups]

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""
        x, y = batch
        if x.is_floating_point():
            out = self.model(self.gain[0] * x)
        else:
            handle = self.model.embed.register_forward_hook(lambda _m, _i, out: self.gain[0] * out)  # type: ignore[union-attr]
            out = self.model(x)
            handle.remove()
        return nn.functional.cross_entropy(out.flatten(0, -2), y.flatten())

    def step(self, batch: Batch, step: int, factor: float, scale: float | None) -> tuple[float, float, float | None]:
        """One training step: loss, norm of the gradient, and the running stability ratio where one was measured."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scale is not None:
            for g in grads:
                g.copy_((g * scale).half().float() / scale)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        measurement = self.monitor.step(self.loss, batch, step, loss=loss)
        self.optimizer.step()
        return loss.item(), norm, None if measurement is None else measurement.running_stability_ratio


@dataclass(frozen=True)
class Workload:
    """A model with its data and the rate of each optimizer."""

    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    rates: dict[str, float]

    def training(self, optimizer: str, seed: int, times: float = 1.0, overhead: float | None = None) -> Training:
        """A training at its start, its rate that of the workload times ``times``."""
        torch.manual_seed(seed)
        model = self.model()
        made = {"momentum": sgd, "AdamW": adamw}[optimizer](model, times * self.rates[optimizer])
        return Training(model, made, overhead)


def workloads() -> dict[str, Workload]:
    """The trainings, by name."""
    characters, alphabet = text(2000, 24)
    return {
        "digits, MLP": Workload(lambda: mlp(nn.ReLU), lambda: digits(1437), {"momentum": 0.03, "AdamW": 2e-3}),
        "Fashion-MNIST, CNN": Workload(cnn, lambda: fashion_mnist(3000), {"momentum": 0.03, "AdamW": 2e-3}),
        "text, transformer": Workload(
            lambda: Characters(alphabet, 24, 32), lambda: characters, {"momentum": 0.1, "AdamW": 3e-3}
        ),
    }


def record(workload: Workload, optimizer: str, seed: int, overhead: float | None = None) -> dict[str, Any]:
    """All runs of one seed: two without a fault, and one per fault, from the same state."""
    data = workload.data()
    generator = torch.Generator().manual_seed(1000 + seed)
    total = max(LONG, HEALTHY + AFTER + EVERY)
    epochs = math.ceil(total / (len(data[1]) // BATCH))
    count = len(data[1])
    order = torch.cat([torch.randperm(count, generator=generator)[: count // BATCH * BATCH] for _ in range(epochs)])
    start = HEALTHY + seed % EVERY  # a measurement does not always come with the fault

    def made() -> Training:
        return workload.training(optimizer, seed, overhead=overhead)

    def run(
        training: Training, begin: int, end: int, fault: Fault, schedule: Callable[[int], float] = lambda step: 1.0
    ) -> Stream:
        out: Stream = {"loss": [], "gradient": [], "ratio": []}
        if overhead is not None and begin:  # a run's budget does not grow while another one runs
            training.monitor.load_state_dict({**training.monitor.state_dict(), "budget": spent})
        for step in range(begin, end):
            k = step - begin
            rows = order[step * BATCH : (step + 1) * BATCH]
            x, y = data[0][rows], data[1][rows]
            if fault.labels:
                y = y.flatten()[torch.randperm(y.numel(), generator=generator)].reshape(y.shape)
            if fault.fresh and k == 0:
                training.optimizer.state.clear()
            training.gain[0] = fault.inputs(k)
            scale = 2.0 ** (10 + k) if fault.half else None
            loss, norm, ratio = training.step((x, y), step, fault.rate(k) * schedule(step), scale)
            for name, value in (("loss", loss), ("gradient", norm), ("ratio", ratio)):
                out[name].append(value)
            if not math.isfinite(loss):
                break  # nothing but this follows
        return out

    spent: dict[str, Any] = {}
    training = made()
    before = run(training, 0, start, Fault())
    spent = training.monitor.state_dict()["budget"]
    tails = {name: run(copy.deepcopy(training), start, start + AFTER, fault) for name, fault in FAULTS.items()}
    rest = run(training, start, LONG, Fault())
    constant = {name: before[name] + rest[name] for name in before}
    return {
        "start": start,
        "constant": constant,
        "schedule": run(made(), 0, LONG, Fault(), warm_cosine),
        "faults": tails,
    }


def warm_cosine(step: int) -> float:
    """Factor of the rate: 60 steps of warm-up, and a cosine."""
    return min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * step / LONG))


def recorded(name: str, workload: Workload, optimizer: str, seed: int, overhead: float | None = None) -> dict[str, Any]:
    """What :func:`record` returns, from its file where there is one."""
    budget = "" if overhead is None else f"-{overhead}"
    path = RUNS / f"{name.split(',')[0]}-{optimizer}-{seed}{budget}.json"
    if not path.is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(workload, optimizer, seed, overhead)))
        print(f"recorded {path.name}", flush=True)
    held: dict[str, Any] = json.loads(path.read_text())
    return held


@dataclass(frozen=True)
class Case:
    """One recorded run; ``fault`` starts at step ``start``, ``None``: a healthy run."""

    workload: str
    optimizer: str
    seed: int
    fault: str | None
    start: int
    stream: Stream

    def harm(self) -> int | None:
        """Steps from the fault until the loss is twice what it was and stays there, or is not finite; ``None``: never.

        It stays there if nine in ten of all later losses are as high.
        """
        losses = self.stream["loss"]
        limit = 2 * fmean(losses[self.start - 50 : self.start])
        high = [not loss <= limit for loss in losses]
        for i in range(self.start, len(losses)):
            if not math.isfinite(losses[i]) or (high[i] and fmean(high[i:]) >= 0.9):
                return i - self.start
        return None


def cases(overhead: float | None = None, seeds: range = SEEDS) -> list[Case]:
    """All runs of these seeds, recorded where they are not there yet.

    Args:
        overhead: the budget of the measurements; ``None``: none.
        seeds: of weights and batches.
    """
    out = []
    for name, workload in workloads().items():
        for seed in seeds:
            for optimizer in workload.rates:
                held = recorded(name, workload, optimizer, seed, overhead)
                start = held["start"]
                rates = {"constant": [1.0] * LONG, "schedule": [warm_cosine(step) for step in range(LONG)]}
                for kind, rate in rates.items():
                    out.append(Case(name, optimizer, seed, None, start, {**held[kind], "rate": rate}))
                for fault, after in held["faults"].items():
                    whole = {key: held["constant"][key][:start] + after[key] for key in after}
                    whole["rate"] = [1.0] * start + [FAULTS[fault].rate(k) for k in range(len(after["loss"]))]
                    out.append(Case(name, optimizer, seed, fault, start, whole))
    return out
