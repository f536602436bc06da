"""What can be done at an alarm, each in a run of its own that is the same up to the alarm."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from benchmarks.zoo.design import Make
from benchmarks.zoo.training import Array, Stream, Training
from gfs_core.detectors.advice import BACK

REST = 500  # steps that are looked at from an alarm on
LEFT_OUT, PAST = 20, 100  # steps: to leave out, and whose gradients count as usual


class Before:
    """What is known from before the alarm.

    Attributes:
        alarm: its step.
        gradient: the median of the gradient's norm.
        step: the one to go back to, :data:`BACK` steps before the alarm.
        rate: of that step.
        state: of the model and the optimizer, at that step.
    """

    def __init__(self, stream: Stream, at: int) -> None:
        self.alarm = at
        gradients = stream.whole["grad_norm"][max(at - PAST, 0) : at]
        self.gradient = float(np.nanmedian(gradients)) if np.isfinite(gradients).any() else math.inf
        self.step = max(at - BACK, 0)
        self.rate = float(stream.rate[self.step])
        self.state: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


Remedy = Callable[[Training, int, Before], None]
"""Called from the alarm on with a gradient that no step was taken with yet, and with the steps since the alarm.

The schedule sets the rate anew before the next gradient.
"""


def nothing(training: Training, since: int, before: Before) -> None:
    """Go on."""


def divide(factor: float, training: Training, since: int, before: Before) -> None:
    """A lower rate for good."""
    for group in training.optimizer.param_groups:
        group["lr"] /= factor


def limit(factor: float, training: Training, since: int, before: Before) -> None:
    """A rate that is never again above that of before, or a part of it."""
    for group in training.optimizer.param_groups:
        group["lr"] = min(group["lr"], before.rate / factor)


def clip(training: Training, since: int, before: Before) -> None:
    """No gradient larger than the median before."""
    nn.utils.clip_grad_norm_(training.model.parameters(), before.gradient)


def leave_out(training: Training, since: int, before: Before) -> None:
    """No step for a while."""
    if since < LEFT_OUT:
        for p in training.model.parameters():
            p.grad = None


def go_back(factor: float, training: Training, since: int, before: Before) -> None:
    """The weights, the optimizer and the rate of before, or a part of the rate."""
    if since == 0:
        model, optimizer = before.state
        training.model.load_state_dict(model)
        training.optimizer.load_state_dict(optimizer)
        for p in training.model.parameters():
            p.grad = None  # it is of the weights that are left
    limit(factor, training, since, before)


REMEDIES: dict[str, Remedy] = {
    "nothing": nothing, "rate / 3": partial(divide, 3.0), "rate / 10": partial(divide, 10.0),
    "rate of before": partial(limit, 1.0), "clip": clip, "leave out": leave_out, "go back": partial(go_back, 1.0),
    "go back, rate / 3": partial(go_back, 3.0), "go back, rate / 10": partial(go_back, 10.0),
}  # fmt: skip


def losses_with(make: Make, seed: int, before: Before) -> dict[str, Array]:
    """The losses with each remedy, without that of the alarm's step and those of batches that are left out."""
    training, losses = make(seed), list[float]()
    for step, (loss, _, _) in enumerate(itertools.islice(training.steps, before.alarm + 1)):
        if step == before.step:
            before.state = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
        losses.append(loss)
    return {
        name: np.array([*losses[:-1], *_in_a_copy(partial(_rest, training, remedy, before))])
        for name, remedy in REMEDIES.items()
    }


def _rest(training: Training, remedy: Remedy, before: Before) -> list[float]:
    losses = list[float]()
    remedy(training, 0, before)
    for since, (loss, _, _) in enumerate(itertools.islice(training.steps, REST - 1), 1):
        remedy(training, since, before)
        if remedy is not leave_out or since >= LEFT_OUT:
            losses.append(loss)
        if since > LEFT_OUT and not math.isfinite(loss):
            break
    return losses


def _in_a_copy(make: Callable[[], list[float]]) -> list[float]:
    """What is made in a copy of this process, so that the training is still at the alarm for the next remedy."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: send.send(make()))
    child.start()
    send.close()
    found: list[float] = receive.recv()
    child.join()
    return found
