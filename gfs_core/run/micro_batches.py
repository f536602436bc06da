"""A micro-batch that is kept for a later measurement, with the random state with which training computes its loss.

It is plain data, so that it can be copied, cut into parts and saved. A fixed probe needs that: it is measured long
after the step that its batches come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from gfs_core.loss.batches import batch_size
from gfs_core.loss.streams import RandomState

_BATCH, _BESIDE = "batch of a step", "beside the batch"


class Opened(NamedTuple):
    """A micro-batch, or a part of one.

    Attributes:
        batch: the input of the loss.
        beside: the data that :func:`keep` stored with it; empty for a batch that did not come from :func:`keep`.
        whole: whether it is the whole micro-batch.
    """

    batch: Any
    beside: dict[str, Any]
    whole: bool


def keep(batch: Any, weights: Iterable[Tensor], **beside: Any) -> dict[str, Any]:
    """Pack a micro-batch that training is about to use, together with the present random state.

    Args:
        batch: a copy that nobody else changes.
        weights: the model's weights; the random streams of their devices are stored.
        **beside: other data that the loss needs, as plain data.
    """
    random = RandomState(weights).as_text()
    return {_BATCH: batch, _BESIDE: {"examples": batch_size(batch), "random": random, **beside}}


def opened(held: Any, rewind: bool = True) -> Opened:
    """Unpack a micro-batch, or a part of one.

    Args:
        held: the result of :func:`keep`, or a part of it; anything else is a plain batch and is returned as it is.
        rewind: restore the stored random state, if it is the whole micro-batch.
    """
    if type(held) is not dict or held.keys() != {_BATCH, _BESIDE}:
        return Opened(held, {}, True)
    batch, beside = held[_BATCH], held[_BESIDE]
    whole = batch_size(batch) == beside["examples"]
    if whole and rewind:
        RandomState.from_text(beside["random"]).restore()
    return Opened(batch, beside, whole)
