"""The ways to set the rate, and one training by one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch
from benchmarks.lib.store import Row, rounded
from benchmarks.lib.trainings import adamw, entropy, epochs, gradient, sgd
from benchmarks.limit.workloads import Workload
from gfs_core.actions.rate import PROFILE, ControlProfile

STEPS, BATCH, EVERY = 400, 64, 5
WARMUP = 0.05  # of the steps
PLATEAU = 25  # steps over which the final loss is the mean


@dataclass(frozen=True)
class Method:
    """How the rate is set.

    Attributes:
        shape: what the schedule looks like: constant or cosine.
        warmup: whether there is a linear warm-up.
        options: of the monitor; ``None``: no monitor.
        profile: of the control.
        prepare: what is done to the monitor before the first step.
    """

    shape: str = "constant"
    warmup: bool = False
    options: dict[str, Any] | None = None
    profile: ControlProfile = PROFILE
    prepare: Callable[[gfs.StabilityMonitor], None] | None = None

    def factor(self, step: int, steps: int) -> float:
        """The schedule's factor of the base rate."""
        first = max(1, round(WARMUP * steps)) if self.warmup else 0
        if step < first:
            return (step + 1) / first
        along = (step - first) / (steps - first)
        return 0.5 * (1 + math.cos(math.pi * along)) if self.shape == "cosine" else 1.0


def controlled(policy: str, shape: str, **options: Any) -> Method:
    made = {"tier": "running", "every": EVERY, "control": policy, **options}
    return Method(shape, options=made)


@dataclass
class Training:
    """One training and what is to be known of it.

    Attributes:
        losses: of the steps taken; the last one may not be finite.
        measurements: the monitor's.
        measuring: seconds in the monitor, …
        rest: … and in everything else of the steps.
        times: seconds of each step, all included.
    """

    losses: list[float] = field(default_factory=list)
    measurements: list[gfs.Measurement] = field(default_factory=list)
    measuring: float = 0.0
    rest: float = 0.0
    times: list[float] = field(default_factory=list)
    value: float = math.nan
    lost: bool = False

    @property
    def final(self) -> float:
        """Mean loss of the last steps."""
        return fmean(self.losses[-PLATEAU:])

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, or ends above its start."""
        return not self.final <= self.losses[0]

    def row(self) -> Row:
        """What is stored of it."""
        return {
            "value": rounded(self.value, 6),
            "initial": rounded(self.losses[0], 6),
            "final": rounded(self.final, 6),
            "diverged": self.diverged,
            "steps": len(self.losses),
            "overhead": self.measurements[-1].overhead if self.measurements else None,
            "lost": self.lost,
            "seconds": round(self.measuring + self.rest, 2),
        }


def train(
    workload: Workload,
    method: Method,
    rate: float,
    seed: int,
    steps: int,
    *,
    batch: int = BATCH,
    taken: int | None = None,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
) -> Training:
    """Train for ``taken`` of ``steps`` steps; a run whose loss is not finite ends there."""
    data, held_out, symbols, classes = workload.data()
    torch.manual_seed(seed)
    model = workload.model(symbols, classes)
    made = (optimizer or (adamw if workload.adaptive else sgd))(model, rate)
    run, batches = Training(), epochs(data, batch, torch.Generator().manual_seed(seed))

    def loss_of(batch: Batch) -> Tensor:
        return entropy(model, batch)

    monitor = None
    if method.options is not None:
        monitor = gfs.StabilityMonitor(model, made, gfs.GFSConfig(**method.options))
        monitor.control.profile = method.profile
        if method.prepare is not None:
            method.prepare(monitor)
    for step in range(steps if taken is None else taken):
        for group in made.param_groups:
            group["lr"] = rate * method.factor(step, steps)
        own = next(batches)
        began = time.perf_counter()
        loss = loss_of(own)
        gradient(made, loss)
        before = time.perf_counter()
        measurement = None if monitor is None else monitor.step(loss_of, own, loss=loss)
        after = time.perf_counter()
        made.step()
        ended = time.perf_counter()
        run.rest += ended - after + before - began
        run.measuring += after - before
        run.times.append(ended - began)
        run.losses.append(float(loss.detach()))
        if measurement is not None and measurement.seconds is not None:
            run.measurements.append(measurement)
        if not math.isfinite(run.losses[-1]):
            break
    if monitor is not None:
        run.lost = monitor.control.lost
        monitor.close()
    with torch.no_grad():
        out = model(held_out[0])
        right = (out.argmax(-1) == held_out[1]).float().mean()
        run.value = float(right if workload.accuracy else loss_of(held_out))
    return run


def row_of(workload: Workload, method: Method, rate: float, seed: int, steps: int) -> Row:
    """What is stored of one training."""
    return train(workload, method, rate, seed, steps).row()
