"""A part of the training data, gone through again and again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader


def part_of(batches: Iterable[Any], share: float) -> Iterable[Any]:
    """The first batches of a pass, the same ones each time.

    Args:
        batches: a list or a loader; it stays as it is.
        share: of all batches, in (0, 1].

    Returns:
        What to go through. It is all of them where their number is not known, as of a stream, or where a ``DataLoader``
        has a batch sampler of its own.
    """
    if not isinstance(batches, DataLoader):
        count = _count(batches, share)
        return batches if count is None else list(itertools.islice(batches, count))
    examples = examples_of(batches, share)
    if examples is None:
        return batches
    part, sampler = copy.copy(batches), batches.batch_sampler
    assert isinstance(sampler, BatchSampler)
    vars(part).update(batch_sampler=BatchSampler(examples, sampler.batch_size, sampler.drop_last), _iterator=None)
    return part


def examples_of(loader: DataLoader[Any], share: float) -> list[Any] | None:
    """What the sampler draws for the first batches of a loader; nothing is drawn from random streams of torch.

    ``None``: for all of them, or it is not known.
    """
    sampler, count = loader.batch_sampler, _count(loader, share)
    if count is None or type(sampler) is not BatchSampler:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same ones wherever in a run this is called
        return list(itertools.islice(sampler.sampler, count * sampler.batch_size))


def _count(batches: Any, share: float) -> int | None:
    """Number of batches in a share of them; ``None``: all, or it is not known."""
    try:
        return None if share == 1 else max(1, round(share * len(batches)))
    except TypeError:
        return None
