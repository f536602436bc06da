"""The micro-batches of one optimizer step."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from gfs_core.batches import copied
from gfs_core.streams import RandomState

_BATCH = "batch of a step"


class MicroBatch(dict[str, Any]):
    """One micro-batch with its index and the random state that training computes its loss with.

    Both go along into every deep copy. A part of it is a plain dictionary.

    Args:
        batch: the micro-batch.
        index: its ``batch_idx``.
        random: the random state at its start.
    """

    def __init__(self, batch: Any, index: int, random: RandomState) -> None:
        super().__init__({_BATCH: batch})
        self.index, self.random = index, random

    def __deepcopy__(self, memo: dict[int, Any]) -> MicroBatch:
        return MicroBatch(copy.deepcopy(self[_BATCH], memo), self.index, self.random)


def opened(held: Any, index: int) -> tuple[Any, int]:
    """The batch to be given to the loss and its ``batch_idx``; ``index`` where that is not known.

    The random state is set to that of a whole micro-batch.
    """
    if isinstance(held, MicroBatch):
        held.random.restore()
        return held[_BATCH], held.index
    if type(held) is dict and held.keys() == {_BATCH}:  # a part of one, or from a checkpoint
        return held[_BATCH], index
    return held, index


class Window:
    """The micro-batches of an optimizer step, kept until the last of them is there.

    Args:
        keeping: whether the step is to be measured, so that its batches are kept.

    Attributes:
        batches: those kept so far. Where there is one alone, it is as training gave it.
        index: ``batch_idx`` of the latest.
        losses: what training has computed on each micro-batch so far, with the number of its examples, if known.
        over: whether the last micro-batch has begun.
    """

    def __init__(self, keeping: bool = False) -> None:
        self.keeping = keeping
        self.batches: list[Any] = []
        self.index = 0
        self.losses: list[tuple[Tensor, int | None]] = []
        self.over = True

    def keep(self, batch: Any, index: int, module: nn.Module, last: bool) -> None:
        """Keep a micro-batch, of which training may then do what it likes with its own."""
        self.index = index
        if last and not self.batches:
            self.batches.append(batch)
        else:
            own = batch if last else copied(batch)
            self.batches.append(MicroBatch(own, index, RandomState(module.parameters())))

    def forget(self) -> None:
        """Let the micro-batches go."""
        self.keeping = False
        self.batches = []
