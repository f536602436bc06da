"""The losses that training computes: recorded at every step, transferred to the host only when they are needed."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean as mean
from statistics import stdev

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError
from gfs_core.run.ranks import Ranks

_LOSS_MEMORY = 0.95  # weight of the past in the mean loss, per step; a larger one lags behind a loss that falls
_APART = 10  # steps after the last written mean, from which on the next one is due
_TRANSFER = 5  # steps whose losses are transferred together, as every transfer waits for the accelerator


class MeanLoss:
    """Exponential mean of the training loss over the steps that have ended.

    The loss of the present step is not included, because some adapters measure before it is known. Values on an
    accelerator stay there until the mean is asked for.
    """

    def __init__(self) -> None:
        self._mean: float | None = None
        self._open: list[Tensor | float] = []  # micro-batches of the step that has not ended yet
        self._new: deque[Tensor | float] = deque(maxlen=256)  # the weight of older ones is negligible

    def add(self, loss: Tensor | float) -> None:
        """Record the loss of one training batch, as :func:`kept` returns it."""
        self._open.append(loss)

    def end_step(self) -> None:
        """End a step: the losses added since the last call are those of its micro-batches."""
        if len(self._open) == 1:
            self._new.append(self._open[0])
        elif self._open:
            losses = [torch.as_tensor(loss) for loss in self._open]
            self._new.append(sum(losses[1:], losses[0]) / len(losses))
        self._open = []

    def value(self) -> float | None:
        """The mean over the finite losses; ``None`` before the first step with a finite loss has ended."""
        for loss in _on_host(list(self._new)):
            if math.isfinite(loss):
                self._mean = loss if self._mean is None else _LOSS_MEMORY * self._mean + (1 - _LOSS_MEMORY) * loss
        self._new.clear()
        return self._mean

    def load(self, value: float | None) -> None:
        """Go on from a saved value."""
        self._mean = None if value is None else float(value)
        self._open = []
        self._new.clear()


class MeansOfLosses:
    """Means of the losses for the history, each over the steps since the previous one; the first loss by itself."""

    def __init__(self) -> None:
        self.step = 0  # of the latest loss
        self._taken: int | None = None  # step at which the mean was taken last
        self._finite: list[float] = []
        self._count = 0  # losses since then, finite or not

    def add(self, step: int, loss: float) -> None:
        """Record the loss of a step."""
        self.step, self._count = step, self._count + 1
        if math.isfinite(loss):
            self._finite.append(loss)

    @property
    def due(self) -> bool:
        """Whether the mean should be written now even without a measurement."""
        return self._count > 0 and (self._taken is None or self.step - self._taken >= _APART)

    def take(self) -> tuple[float, float | None] | None:
        """Mean and standard deviation of the finite losses since the last call, which are then dropped.

        Returns:
            The mean is NaN where fewer than half of the losses are finite. The standard deviation is ``None`` for a
            single loss. ``None`` in place of both: there was no loss.
        """
        finite, count = self._finite, self._count
        if not count:
            return None
        self._taken, self._finite, self._count = self.step, [], 0
        if 2 * len(finite) < count:
            return math.nan, None
        return mean(finite), (stdev(finite) if len(finite) > 1 else None)

    def resume(self, step: int | None) -> None:
        """Continue after ``step``, up to which all losses have been written; ``None``: there was no loss yet."""
        self.step, self._taken, self._finite, self._count = step or 0, step, [], 0

    @property
    def seen(self) -> int | None:
        """The step of the latest loss; ``None`` before the first."""
        return None if self._taken is None and not self._count else self.step


class RecentLosses:
    """The losses of the steps since they were last asked for, each the mean over the micro-batches of the step.

    Args:
        ranks: the processes over which the mean is taken too, for a few steps together; ``None``: this process only.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self._open: list[Tensor | float] = []  # micro-batches of the step that has not ended yet
        self._examples = 0  # examples in them; 0: not known
        self._held: list[tuple[int, Tensor | float, int]] = []

    def add(self, loss: Tensor | float, examples: int | None = None) -> None:
        """Record the loss of one training batch, as :func:`kept` returns it, and its number of examples if known."""
        self._examples += examples or 0
        self._open.append(loss)

    def up_to(self, step: int, now: bool) -> list[tuple[int, float, int]]:
        """End ``step``, and return the losses that are ready: on a CPU at every step, elsewhere a few steps together.

        Args:
            step: the step that the losses added since the last call belong to.
            now: return all losses now; must be the same on all processes.

        Returns:
            For each step: the step, its loss, and the number of examples behind it (0: not known).

        Raises:
            OtherRankFailed: another process has failed since the last exchange.
            RanksLost: another process does not answer.
        """
        if self._open:
            self._held.append((step, sum(self._open) / len(self._open), self._examples))
            self._open, self._examples = [], 0
        if self.ranks is not None:
            return self._together(self.ranks, step, now)
        if not self._held or not (now or isinstance(self._held[-1][1], float) or len(self._held) >= _TRANSFER):
            return []
        return self._take()

    def _take(self) -> list[tuple[int, float, int]]:
        held, self._held = self._held, []
        if len(held) == 1:
            [(step, loss, count)] = held
            if isinstance(loss, float):  # at most steps on a CPU
                return [(step, loss, count)]
        losses = _on_host([loss for _, loss, _ in held])
        return [(step, loss, count) for (step, _, count), loss in zip(held, losses, strict=True)]

    def _together(self, ranks: Ranks, step: int, now: bool) -> list[tuple[int, float, int]]:
        """Losses as means over the processes that have one; every process exchanges the same steps."""
        if not now and step % _TRANSFER != _TRANSFER - 1:
            return []
        steps = range(step - _TRANSFER + 1, step + 1)
        own = {s: (loss, 1.0, float(count)) for s, loss, count in self._take()}
        said = ranks.total([v for s in steps for v in own.get(s, (0.0, 0.0, 0.0))])
        heard = zip(steps, said[0::3], said[1::3], said[2::3], strict=True)
        return [(s, loss / processes, int(count)) for s, loss, processes, count in heard if processes]

    def state(self) -> list[tuple[int, float, int]]:
        """The losses that were not returned yet, as (step, loss, examples)."""
        return [(step, float(loss), count) for step, loss, count in self._held]

    def load(self, state: list[tuple[int, float, int]]) -> None:
        """Go on where ``state`` left off."""
        self._open, self._examples = [], 0
        self._held = [(int(step), float(loss), int(count)) for step, loss, count in state]


def kept(loss: Tensor | float) -> Tensor | float:
    """A loss in the form in which it is stored: a number if it is on the CPU, otherwise a detached copy.

    A copy is needed because a CUDA graph writes its next loss into the same memory.

    Raises:
        MeasurementError: the tensor does not hold exactly one number.
    """
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1:
        raise MeasurementError(f"it has the shape {tuple(loss.shape)}, and is no number")
    return loss.item() if loss.device.type == "cpu" else loss.detach().reshape(()).clone()


def _on_host(losses: list[Tensor | float]) -> list[float]:
    """The losses as numbers, with one transfer."""
    away = [loss.double() for loss in losses if isinstance(loss, Tensor)]
    arrived = iter(torch.stack(away).tolist() if away else [])
    return [next(arrived) if isinstance(loss, Tensor) else loss for loss in losses]
