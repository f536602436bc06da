"""Readings that training itself provides at no cost: the loss of a step, its examples, and the learning rate."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_high

from gfs_core.signals.base import Key, Reading

LOSS = Key("loss", "loss of the training batch, the mean over its examples; may be not finite", logged=False)
EXAMPLES = Key("examples", "examples of the training batch", logged=False, whole=True)
STEP_RATE = Key("step_rate", "learning rate of the coming step, before it is taken", scales_with_rate=1, logged=False)

_SIZES = 6  # latest batches whose upper median is the usual size; few, so that it soon follows a lasting change
_SHORT = 0.5  # of the usual size; the mean over a smaller batch is too noisy to be compared with the others


class BatchSizes:
    """Sizes of the latest batches; they tell which batch is short, such as the last one of an epoch."""

    def __init__(self, seen: Sequence[int] = ()) -> None:
        self.seen = deque(map(int, seen), maxlen=_SIZES)

    def short(self, examples: int | None) -> bool:
        """Record the size of a batch, and return whether it is less than half the usual one.

        An unknown size, ``None`` or 0, is not recorded and not short.
        """
        if not examples:
            return False
        self.seen.append(examples)
        return examples < _SHORT * median_high(self.seen)


def loss_readings(step: int, loss: float, examples: int | None = None) -> list[Reading]:
    """Readings of the loss of a training batch.

    Args:
        step: optimizer steps taken before it.
        loss: the mean over the batch; any number, even one that is not finite.
        examples: number of examples in the batch; ``None`` or 0: not known.

    Returns:
        The number of examples, if known, and then the loss. A detector that reads both needs the number first.
    """
    known = [Reading(EXAMPLES, step, examples)] if examples else []
    return [*known, Reading(LOSS, step, loss)]
