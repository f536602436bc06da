"""The micro-batches of one optimizer step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gfs_core.loss.batches import batch_size, copied
from gfs_core.loss.streams import RandomState

_BATCH, _BESIDE = "batch of a step", "beside the batch"


def _kept(batch: Any, index: int, random: RandomState) -> dict[str, Any]:
    """One micro-batch with its index and the random state that training computes its loss with.

    Plain data, which goes along into copies, parts and checkpoints.
    """
    beside = {"index": index, "examples": batch_size(batch), "random": random.as_text()}
    return {_BATCH: batch, _BESIDE: beside}


def opened(held: Any, index: int) -> tuple[Any, int]:
    """The batch to be given to the loss and its ``batch_idx``; ``index`` where that is not known.

    The random state is set to that of a whole micro-batch.
    """
    if type(held) is not dict or held.keys() != {_BATCH, _BESIDE}:
        return held, index
    batch, beside = held[_BATCH], held[_BESIDE]
    if batch_size(batch) == beside["examples"]:
        RandomState.from_text(beside["random"]).restore()
    return batch, beside["index"]


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
            self.batches.append(_kept(own, index, RandomState(module.parameters())))

    def forget(self) -> None:
        """Let the micro-batches go."""
        self.keeping = False
        self.batches = []
