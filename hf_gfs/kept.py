"""A kept micro-batch of the Trainer: its inputs, and how its loss is weighted in the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gfs_core.run import micro_batches


class Beside(NamedTuple):
    """How the loss of a micro-batch, or of a part of one, is weighted.

    Attributes:
        items: ``num_items_in_batch`` of its step; for a part, its share of them; ``None``: the loss is a mean.
        weight: factor of its loss, so that the mean over the micro-batches is the trainer's objective.
    """

    items: Any = None
    weight: float = 1.0


def end_step(kept: list[dict[str, Any]], sums: bool) -> None:
    """Set, in place, how the losses are weighted, once all micro-batches of a step are known.

    Args:
        kept: the micro-batches.
        sums: whether their losses are shares of a sum over the items of the step, to be added and not averaged.
    """
    held = [micro_batches.opened(batch, rewind=False) for batch in kept]
    labels = sum(labels_in(own.batch) for own in held)
    for own in held:
        beside = own.beside
        if beside["items"] is not None:
            beside["per_label"] = beside["items"] / labels if labels else None
            beside["weight"] = float(len(kept)) if sums else beside["weight"]


def opened(kept: dict[str, Any]) -> tuple[dict[str, Any], Beside]:
    """The inputs and their weighting; for a whole micro-batch the random state is set to the one kept with it.

    The items of a part are counted by its labels. A plain mean over the part would be another loss where the trainer
    counts more items than there are targets. With a causal model, it may count the first label of each row, which is no
    target.
    """
    batch, beside, whole = micro_batches.opened(kept)
    inputs = dict(batch)
    if not beside:
        return inputs, Beside()
    if whole:
        return inputs, Beside(beside["items"], beside["weight"])
    labels, per_label = labels_in(inputs), beside.get("per_label")
    return inputs, Beside(per_label * labels if labels and per_label is not None else None)


def labels_in(inputs: Mapping[str, Any]) -> int:
    """How many labels are not masked; 0 where there are none to count."""
    labels = inputs.get("labels")
    return int((labels != -100).sum()) if isinstance(labels, Tensor) else 0
