"""What training itself tells, at no cost: the loss of a step, the examples behind it, and the rate of the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_high

from gfs_core.signals.base import Key, Reading

LOSS = Key("loss", "loss of the training batch, the mean over its examples; may be not finite", logged=False)
EXAMPLES = Key("examples", "examples of the training batch", logged=False, whole=True)
STEP_RATE = Key("lr_effective", "learning rate that the coming step really uses", scales_with_rate=1)

_SIZES = 6  # batches whose sizes make up the usual one: few, for sizes that change for good; of two in turn the larger
_SHORT = 0.5  # of the usual size: below it, the mean over a batch scatters too much to be compared with the others


class BatchSizes:
    """Sizes of the latest batches, to know one that is short, such as the rest that ends an epoch."""

    def __init__(self, seen: Sequence[int] = ()) -> None:
        self.seen = deque(map(int, seen), maxlen=_SIZES)

    def short(self, examples: int | None) -> bool:
        """Take in the size of a batch, and say whether it is less than half the usual; an unknown one, 0, is not."""
        if not examples:
            return False
        self.seen.append(examples)
        return examples < _SHORT * median_high(self.seen)


def loss_readings(step: int, loss: float, examples: int | None = None) -> list[Reading]:
    """Readings of the loss of a training batch.

    Args:
        step: optimizer steps taken before it.
        loss: the mean over the batch; any number, also not finite.
        examples: those of the batch; ``None`` or 0: not known.

    Returns:
        The examples, where they are known, and then the loss: whoever reads both needs the size first.
    """
    known = [Reading(EXAMPLES, step, examples)] if examples else []
    return [*known, Reading(LOSS, step, loss)]
