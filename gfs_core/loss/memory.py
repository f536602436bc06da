"""How much memory a measurement takes, and a limit on it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gfs_core.config import Tier
from gfs_core.linalg.vectors import is_half, local

GIB = 2**30
# Copies of the weights at the peak of a measurement without and with a preconditioner, the layer in work aside; what
# the running estimate keeps comes on top. The running estimate's peak is its start, not its pairs (5 and 6 copies).
# Measured: benchmarks/memory.md.
_COPIES: dict[Tier, tuple[int, int]] = {
    "directional": (4, 4),
    "running": (7, 8),
    "batch_sharpness": (4, 5),
    "sharpness": (10, 12),
    "gfs": (11, 13),
    "gfs_full": (11, 13),
}
_CHECK = 6  # … of the check of the parts


class OverLimit(torch.OutOfMemoryError):
    """A measurement would take more memory than it may."""


def vector_bytes(params: Sequence[Tensor], tiers: Collection[Tier], preconditioned: bool) -> int:
    """Bytes of the vectors of a measurement at its peak, on this process, float32 copies of half precision included."""
    copies = max(_COPIES[tier][preconditioned] for tier in tiers) + ("running" in tiers and len(tiers) > 1)
    return _bytes_of(params, copies)


def bytes_of_check(params: Sequence[Tensor]) -> int:
    """The same of the check whether batches can be cut into parts."""
    return _bytes_of(params, _CHECK)


def _bytes_of(params: Sequence[Tensor], copies: int) -> int:
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
            if storage.data_ptr() not in known:  # what a graph keeps stays where it is, so the place tells it apart
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
