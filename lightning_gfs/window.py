"""The micro-batches of one optimizer step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gfs_core.loss.batches import copied
from gfs_core.run.micro_batches import keep


class Window:
    """The micro-batches of one optimizer step, kept until the step is measured.

    Args:
        keeping: whether the step is to be measured, so that its micro-batches are kept.

    Attributes:
        batches: the micro-batches kept so far.
        index: ``batch_idx`` of the latest.
        examples: number of examples in the latest, if known.
        losses: training's loss on each micro-batch so far, with the number of its examples if known.
        over: whether the last micro-batch has begun; true before the first step.
        measured: whether the step was already measured or looked at. A closure, and with it the hook, may run several
            times in a step.
    """

    def __init__(self, keeping: bool = False) -> None:
        self.keeping = keeping
        self.batches: list[Any] = []
        self.index = 0
        self.examples: int | None = None
        self.losses: list[tuple[Tensor, int | None]] = []
        self.over, self.measured = True, False

    def keep(self, batch: Any, index: int, module: nn.Module) -> None:
        """Keep a copy of a micro-batch, with the random state of now; training may then change its own."""
        self.index = index
        self.batches.append(keep(copied(batch), module.parameters(), index=index))

    def forget(self) -> None:
        """Release the micro-batches once the step was measured."""
        self.keeping, self.measured = False, True
        self.batches = []
