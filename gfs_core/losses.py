"""The losses that training computes: taken in at every step, brought to the host only when they are needed."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from gfs_core.ranks import Ranks

_LOSS_MEMORY = 0.9  # per training step, in the mean loss; with more it lags behind a loss that falls fast
_TRANSFER = 5  # steps whose losses an accelerator hands over together: each transfer waits for it


class MeanLoss:
    """Exponential mean of the training loss, from values that stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._new: deque[Tensor] = deque(maxlen=256)  # older ones would not count any more

    def add(self, loss: Tensor | float) -> None:
        """Take in the loss of one training batch; no transfer from its device."""
        self._new.append(_scalar(loss))

    def value(self) -> float | None:
        """The mean; ``None`` before the first finite loss."""
        if self._new:
            for loss in torch.stack([t.double() for t in self._new]).tolist():
                if math.isfinite(loss):
                    self._mean = loss if self._mean is None else _LOSS_MEMORY * self._mean + (1 - _LOSS_MEMORY) * loss
            self._new.clear()
        return self._mean

    def load(self, value: float | None) -> None:
        """Go on from a saved value."""
        self._mean = None if value is None else float(value)
        self._new.clear()


class RecentLosses:
    """The loss of each step since they were last asked for, the mean over its micro-batches.

    Args:
        ranks: the processes over which the mean is taken as well, a few steps together; ``None``: this one alone.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self._open: list[Tensor | float] = []  # of the step that has not ended yet
        self._held: list[tuple[int, Tensor | float]] = []

    def add(self, loss: Tensor | float) -> None:
        """Take in the loss of one training batch; no transfer from its device."""
        if isinstance(loss, Tensor):
            self._open.append(loss.item() if loss.device.type == "cpu" else _scalar(loss))
        else:
            self._open.append(float(loss))

    def up_to(self, step: int, now: bool) -> list[tuple[int, float]]:
        """End ``step``, and hand over the steps held with their losses: on a CPU always, elsewhere a few together.

        Args:
            step: the step that the losses added since the last call belong to.
            now: hand over in any case; the same on all processes.

        Raises:
            RanksLost: another process does not answer.
        """
        if self._open:
            self._held.append((step, sum(self._open) / len(self._open)))
            self._open = []
        if self.ranks is not None:
            return self._together(self.ranks, step, now)
        if not self._held or not (now or isinstance(self._held[-1][1], float) or len(self._held) >= _TRANSFER):
            return []
        return self._take()

    def _take(self) -> list[tuple[int, float]]:
        held, self._held = self._held, []
        away = [loss for _, loss in held if isinstance(loss, Tensor)]
        arrived = iter(torch.stack(away).tolist() if away else [])  # one transfer
        return [(s, next(arrived) if isinstance(loss, Tensor) else loss) for s, loss in held]

    def _together(self, ranks: Ranks, step: int, now: bool) -> list[tuple[int, float]]:
        """The mean over the processes that have a loss; the steps that are told of are the same on all of them."""
        if not now and step % _TRANSFER != _TRANSFER - 1:
            return []
        steps = range(step - _TRANSFER + 1, step + 1)
        own = dict(self._take())
        said = ranks.total([v for s in steps for v in ((own[s], 1.0) if s in own else (0.0, 0.0))])
        return [(s, said[2 * i] / said[2 * i + 1]) for i, s in enumerate(steps) if said[2 * i + 1]]

    def state(self) -> list[tuple[int, float]]:
        """The steps held with their losses, as numbers."""
        return [(step, float(loss)) for step, loss in self._held]

    def load(self, state: list[tuple[int, float]]) -> None:
        """Go on where ``state`` left off."""
        self._open, self._held = [], [(int(step), float(loss)) for step, loss in state]


def _scalar(loss: Tensor | float) -> Tensor:
    # A copy: the memory of a loss that a CUDA graph has computed is written again by the next step.
    return loss.detach().reshape(()).clone() if isinstance(loss, Tensor) else torch.tensor(float(loss))
