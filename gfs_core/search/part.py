"""A part of the training data, gone through again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader


def part_of(batches: Iterable[Any], share: float) -> Iterable[Any]:
    """The first batches of a pass, the same ones each time.

    Args:
        batches: a list or a loader. A ``DataLoader`` is changed: its sampler draws no other examples from now on.
        share: of all batches, in (0, 1].

    Returns:
        What to go through. It is all of them where their number is not known, as of a stream, or where a ``DataLoader``
        has a batch sampler of its own.
    """
    count = _length(batches)
    if share == 1 or count is None:
        return batches
    first = max(1, round(share * count))
    if not isinstance(batches, DataLoader):
        return list(itertools.islice(batches, first))
    sampler = batches.batch_sampler
    if type(sampler) is BatchSampler:
        sampler.sampler = list(itertools.islice(sampler.sampler, first * sampler.batch_size))
    return batches


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None
