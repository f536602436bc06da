"""A micro-batch with what belongs to it beside its inputs.

That goes along under a key of its own, as plain data, into copies, parts and checkpoints: a micro-batch of a fixed
probe is measured long after its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gfs_core.loss.batches import batch_size
from gfs_core.loss.streams import RandomState

_BESIDE = "beside the inputs"


class Beside(NamedTuple):
    """What belongs to a micro-batch, or to a part of one.

    Attributes:
        whole: whether it is all of the micro-batch.
        items: ``num_items_in_batch`` of its step; of a part, its share of them; ``None``: the loss is a mean.
        weight: of its loss, so that the mean over micro-batches is the trainer's objective.
    """

    whole: bool = False
    items: Any = None
    weight: float = 1.0


def keep(inputs: Mapping[str, Any], random: RandomState, items: Any, weight: float) -> dict[str, Any]:
    """The inputs of one micro-batch with what belongs to them."""
    beside = {"examples": batch_size(dict(inputs)), "random": random.as_text(), "items": items, "weight": weight}
    return {**inputs, _BESIDE: beside}


def end_step(kept: list[dict[str, Any]], sums: bool) -> None:
    """All micro-batches of a step are known, and so how many items there are for each label.

    Args:
        kept: the micro-batches.
        sums: whether their losses are shares of a sum over the items of the step, to be added and not averaged.
    """
    labels = sum(map(labels_in, kept))
    for batch in kept:
        beside = batch[_BESIDE]
        if beside["items"] is not None:
            beside["per_label"] = beside["items"] / labels if labels else None
            beside["weight"] = float(len(kept)) if sums else beside["weight"]


def opened(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Beside]:
    """The inputs, and what belongs to them; the random state is set to that of a whole micro-batch.

    The items of a part are counted by its labels. Its mean is another loss where the trainer counts more items than
    there are targets: of a causal model it may count the first label of each row, which is none.
    """
    inputs = {key: value for key, value in batch.items() if key != _BESIDE}
    beside = batch.get(_BESIDE)
    if beside is None:
        return inputs, Beside()
    if batch_size(inputs) == beside["examples"]:
        RandomState.from_text(beside["random"]).restore()
        return inputs, Beside(True, beside["items"], beside["weight"])
    labels, per_label = labels_in(inputs), beside.get("per_label")
    return inputs, Beside(False, per_label * labels if labels and per_label is not None else None)


def labels_in(inputs: Mapping[str, Any]) -> int:
    """How many labels are not masked; 0 where there are none to count."""
    labels = inputs.get("labels")
    return int((labels != -100).sum()) if isinstance(labels, Tensor) else 0
