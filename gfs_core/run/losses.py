"""The losses that training computes: taken in at every step, brought to the host only when they are needed."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean as mean
from statistics import stdev

import torch
from torch import Tensor

from gfs_core.run.ranks import Ranks

_LOSS_MEMORY = 0.9  # per training step, in the mean loss; with more it lags behind a loss that falls fast
_APART = 10  # steps between two means that are written down, at most
_TRANSFER = 5  # steps whose losses an accelerator hands over together: each transfer waits for it


class MeanLoss:
    """Exponential mean of the training loss over the steps that have ended.

    Every adapter measures at another moment of a step, and one of them before its loss is known, so that of the present
    step counts in none. The values stay on their device until they are asked for.
    """

    def __init__(self) -> None:
        self._mean: float | None = None
        self._open: list[Tensor] = []  # of the step that has not ended yet
        self._new: deque[Tensor] = deque(maxlen=256)  # older ones would not count any more

    def add(self, loss: Tensor | float) -> None:
        """Take in the loss of one training batch; no transfer from its device."""
        self._open.append(_scalar(loss))

    def end_step(self) -> None:
        """The losses added since the last call are the micro-batches of one step."""
        if self._open:
            self._new.append(sum(self._open[1:], self._open[0]) / len(self._open))
            self._open = []

    def value(self) -> float | None:
        """The mean; ``None`` before the first step with a finite loss has ended."""
        if self._new:
            for loss in torch.stack([t.double() for t in self._new]).tolist():
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
    """The mean of the losses since it was last taken, to be written down; the first loss by itself."""

    def __init__(self) -> None:
        self.step = 0  # of the latest loss
        self._taken: int | None = None  # step at which the mean was taken last
        self._finite: list[float] = []
        self._count = 0  # of the losses since then, finite or not

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step."""
        self.step, self._count = step, self._count + 1
        if math.isfinite(loss):
            self._finite.append(loss)

    @property
    def due(self) -> bool:
        """Whether it is time to take the mean, whatever else there is to be written."""
        return self._count > 0 and (self._taken is None or self.step - self._taken >= _APART)

    def take(self) -> tuple[float, float | None] | None:
        """Mean and standard deviation of the finite ones; NaN where these are fewer than half; ``None``: no loss."""
        finite, count = self._finite, self._count
        if not count:
            return None
        self._taken, self._finite, self._count = self.step, [], 0
        if 2 * len(finite) < count:
            return math.nan, None
        return mean(finite), (stdev(finite) if len(finite) > 1 else None)

    def resume(self, step: int | None) -> None:
        """Go on after ``step``, where there was one: what came before it has been written down."""
        self.step, self._taken, self._finite, self._count = step or 0, step, [], 0

    @property
    def seen(self) -> int | None:
        """The step of the latest loss; ``None`` before the first."""
        return None if self._taken is None and not self._count else self.step


class RecentLosses:
    """The loss of each step since they were last asked for, the mean over its micro-batches.

    Args:
        ranks: the processes over which the mean is taken as well, a few steps together; ``None``: this one alone.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self._open: list[Tensor | float] = []  # of the step that has not ended yet
        self._examples = 0  # … that they are the means of; 0: not known
        self._held: list[tuple[int, Tensor | float, int]] = []

    def add(self, loss: Tensor | float, examples: int | None = None) -> None:
        """Take in the loss of one training batch of ``examples``, if known; no transfer from its device."""
        self._examples += examples or 0
        if isinstance(loss, Tensor):
            self._open.append(loss.item() if loss.device.type == "cpu" else _scalar(loss))
        else:
            self._open.append(float(loss))

    def up_to(self, step: int, now: bool) -> list[tuple[int, float, int]]:
        """End ``step``, and hand over the steps held with their losses: on a CPU always, elsewhere a few together.

        Args:
            step: the step that the losses added since the last call belong to.
            now: hand over in any case; the same on all processes.

        Returns:
            Each step, its loss, and the examples that it is the mean of; 0: not known.

        Raises:
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
        away = [loss for _, loss, _ in held if isinstance(loss, Tensor)]
        arrived = iter(torch.stack(away).tolist() if away else [])  # one transfer
        return [(s, next(arrived) if isinstance(loss, Tensor) else loss, count) for s, loss, count in held]

    def _together(self, ranks: Ranks, step: int, now: bool) -> list[tuple[int, float, int]]:
        """The mean over the processes that have a loss; the steps that are told of are the same on all of them."""
        if not now and step % _TRANSFER != _TRANSFER - 1:
            return []
        steps = range(step - _TRANSFER + 1, step + 1)
        own = {s: (loss, 1.0, float(count)) for s, loss, count in self._take()}
        said = ranks.total([v for s in steps for v in own.get(s, (0.0, 0.0, 0.0))])
        heard = zip(steps, said[0::3], said[1::3], said[2::3], strict=True)
        return [(s, loss / processes, int(count)) for s, loss, processes, count in heard if processes]

    def state(self) -> list[tuple[int, float, int]]:
        """The steps held with their losses and examples, as numbers."""
        return [(step, float(loss), count) for step, loss, count in self._held]

    def load(self, state: list[tuple[int, float, int]]) -> None:
        """Go on where ``state`` left off."""
        self._open, self._examples = [], 0
        self._held = [(int(step), float(loss), int(count)) for step, loss, count in state]


def _scalar(loss: Tensor | float) -> Tensor:
    # A copy: the memory of a loss that a CUDA graph has computed is written again by the next step.
    return loss.detach().reshape(()).clone() if isinstance(loss, Tensor) else torch.tensor(float(loss))
