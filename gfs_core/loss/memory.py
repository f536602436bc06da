"""How much memory a measurement takes, and a limit on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfs_core.linalg.vectors import is_half, local

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What an evaluation of the loss may hold at once.

    Attributes:
        examples: larger batches are cut into pieces of so many; ``None``: none is.
        graph: bytes that the graph of a piece may keep for its backward pass; ``None``: any number.
    """

    examples: int | None = None
    graph: int | None = None


NO_LIMITS = Limits()


class OverLimit(torch.OutOfMemoryError):
    """A measurement would take more memory than it may."""


def vector_bytes(params: Sequence[Tensor], copies: int) -> int:
    """Bytes of so many vectors over ``params`` on this process, and of float32 copies of half-precision weights."""
    own = [local(p) for p in params]
    copies += any(is_half(t) for t in own)
    return copies * sum(t.numel() * max(t.element_size(), 4) for t in own)


class Allowance:
    """Bytes that a graph may keep for its backward pass.

    Args:
        limit: in bytes; ``None``: any number.
        weights: tensors that are kept anyway.
    """

    def __init__(self, limit: int | None, weights: Sequence[Tensor]) -> None:
        self.limit = limit
        self._weights = {local(w).untyped_storage().data_ptr() for w in weights}
        self._counting = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What graphs built in here keep is counted together.

        Raises:
            OverLimit: as soon as it is more than the limit.
        """
        if self.limit is None or self._counting:
            yield
            return
        kept, limit = 0, self.limit
        known = set(self._weights)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:  # what a graph keeps is not moved, so its address identifies it
                known.add(storage.data_ptr())
                kept += storage.nbytes()
            if kept > limit:
                raise OverLimit(f"a measurement would keep more than `max_memory` allows ({limit / GIB:.3g} GiB of it)")
            return tensor

        self._counting = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            self._counting = False
