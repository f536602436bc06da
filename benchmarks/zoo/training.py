"""A training as a stream: what is known at each of its steps, and the stability ratio at some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.zoo.hooks import Hooks
from gfs_core import GFSConfig, StabilityMonitor
from gfs_core.optimizers.thresholds import parameters_of
from gfs_core.signals.gradients import KEYS, GradientSample, Layout, UpdateSample, readings_of
from gfs_core.signals.layers import layers_of, names_of

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
EVERY = 10  # steps between measurements of the stability ratio


class Step(NamedTuple):
    """A step whose gradient is there, and which is not taken yet.

    Attributes:
        loss: the mean over the batch.
        loss_of: gives that loss; what it draws, it draws from torch's own generator, which measuring leaves as it was.
        batch: what it is the loss of.
    """

    loss: float
    loss_of: Callable[[Any], Tensor]
    batch: Any


@dataclass
class Training:
    """A training that has not begun.

    Attributes:
        model: its layers are named in the stream.
        optimizer: that is watched.
        steps: each step, once its gradient is there; it is taken when the next one is asked for.
        fault: step at which something is done to the training; ``None``: nothing ever is.
    """

    model: nn.Module
    optimizer: Optimizer
    steps: Iterator[Step]
    fault: int | None = None


@dataclass
class Stream:
    """What is known at each step: an array over steps for the whole model, one over steps and layers for the layers.

    Attributes:
        layers: names of the layers.
        loss: of each step, as training computed it.
        rate: the largest learning rate.
        ratio: the running stability ratio; NaN at steps without a measurement.
        whole: by the name of a key, its value for the whole model; NaN: there is none.
        by_layer: by the name of a key, its value in each layer.
        fault: as in :class:`Training`.
    """

    layers: list[str]
    loss: Array
    rate: Array
    ratio: Array
    whole: dict[str, Array]
    by_layer: dict[str, Array]
    fault: int | None = None


def plain(
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: Callable[[Any], Tensor],
    batches: Iterator[Any],
    steps: int,
    *,
    factor: Callable[[int], float] = lambda step: 1.0,
    clip: float | None = None,
    before: Callable[[int], None] = lambda step: None,
    after_backward: Callable[[], None] = lambda: None,
    fault: int | None = None,
) -> Training:
    """An ordinary training.

    Args:
        model: what is trained.
        optimizer: with its usual rates.
        loss_of: the mean loss of a batch.
        batches: without end.
        steps: how many are taken at most; a training ends where its loss or its weights are not finite.
        factor: of the usual rates, by the step.
        clip: largest norm of the gradient.
        before: called before each step.
        after_backward: called once the gradient is there.
        fault: step at which something is done to it.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]

    def run() -> Iterator[Step]:
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            before(step)
            batch = next(batches)
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            after_backward()
            yield Step(loss.item(), loss_of, batch)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

    return Training(model, optimizer, run(), fault)


@dataclass
class _Rows:
    """Values of one key by step: of the whole model, and of each layer."""

    whole: list[float] = field(default_factory=list)
    layers: list[list[float]] = field(default_factory=list)


def recorded(training: Training) -> Stream:
    """Run a training, and record its stream; it ends with the first loss that is not finite."""
    params = parameters_of(training.optimizer)
    layout = Layout.of(params, layers_of(names_of(training.model, params)))
    rows = {key.name: _Rows() for key in KEYS}
    monitor = StabilityMonitor(
        training.model, training.optimizer, GFSConfig(tier="running", every=EVERY, max_overhead=None, alarm="off")
    )
    losses: list[float] = []
    rates: list[float] = []
    ratios: list[float] = []
    held: dict[tuple[str, str], float] = {}

    def take(sample: GradientSample | UpdateSample) -> None:
        for reading in readings_of(sample.step, layout.layers, sample.sums()):
            if reading.value is not None:
                held[reading.key.name, reading.layer] = reading.value

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            take(UpdateSample(len(losses), layout, optimizer))

    handle = training.optimizer.register_step_post_hook(after)
    hooks = Hooks(training.model)
    for loss, loss_of, batch in hooks.steps(training.steps):
        finite = math.isfinite(loss)
        measurement = monitor.step(loss_of, batch, len(losses), loss=loss) if finite else None
        ratio = None if measurement is None else measurement.running_stability_ratio
        ratios.append(math.nan if ratio is None else ratio)
        with torch.no_grad():
            take(GradientSample(len(losses), layout))
        losses.append(loss)
        rates.append(max(float(group["lr"]) for group in training.optimizer.param_groups))
        for name, kept in rows.items():
            kept.whole.append(held.get((name, ""), math.nan))
            kept.layers.append([held.get((name, layer), math.nan) for layer in layout.layers])
        held.clear()  # what comes next is of the update of this step, and written with the step after it
        if not finite:
            break
    monitor.close()
    handle.remove()
    return Stream(
        list(layout.layers), np.array(losses), np.array(rates), np.array(ratios),
        {name: np.array(kept.whole) for name, kept in rows.items()} | {k: np.array(v) for k, v in hooks.whole.items()},
        {name: np.array(kept.layers) for name, kept in rows.items()},
        training.fault,
    )  # fmt: skip
