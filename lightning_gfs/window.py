"""The micro-batches of one optimizer step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gfs_core.streams import RandomState


class Window:
    """The micro-batches of an optimizer step, kept until the last of them is there.

    Args:
        keeping: whether the step is to be measured, so that its batches are kept.

    Attributes:
        batches: those kept so far.
        losses: what training has computed on each micro-batch so far, with the number of its examples, if known.
        over: whether the last micro-batch has begun.
    """

    def __init__(self, keeping: bool = False) -> None:
        self.keeping = keeping
        self.batches: list[Any] = []
        self.losses: list[tuple[Tensor, int | None]] = []
        self.over = True
        self._indices: list[int] = []
        self._random: list[RandomState] = []

    def keep(self, batch: Any, batch_idx: int, module: nn.Module) -> None:
        """Keep a micro-batch with the random state that training computes its loss with."""
        self.batches.append(batch)
        self._indices.append(batch_idx)
        self._random.append(RandomState(module.parameters()))

    def rewind_to(self, batch: Any) -> int:
        """Set the random state to that of a micro-batch, and give its ``batch_idx``; of a part of one the latest."""
        place = next((i for i, kept in enumerate(self.batches) if kept is batch), None)
        if place is None:
            return self._indices[-1]
        self._random[place].restore()
        return self._indices[place]

    def forget(self) -> None:
        """Let the micro-batches go."""
        self.keeping = False
        self.batches, self._indices, self._random = [], [], []
