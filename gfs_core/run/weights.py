"""Which weights are trained: what was measured of others does not fit any more."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gfs_core.linalg.vectors import Vector, is_half, local
from gfs_core.loss.batches import changed


class Weights:
    """The trained weights when they were last looked at.

    A weight counts as another one where it is another parameter (unfrozen, added, replaced), or the same one with
    another shape, dtype or device. None of them is kept alive.

    Attributes:
        device: where the first of them was; ``None`` before the first look.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], tuple[Any, ...]]] = []
        self.device: torch.device | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Weights, ()  # a copy, or one that is pickled, has seen nothing: its weights are others

    def changed(self, params: Sequence[Tensor]) -> bool:
        """Whether ``params`` are others than those of the last call; at the first one they are not."""
        kinds = [_kind(p) for p in params]
        same = len(params) == len(self._seen) and all(
            ref() is p and kind == seen for p, kind, (ref, seen) in zip(params, kinds, self._seen, strict=True)
        )
        first = self.device is None
        if not same:
            self._seen = [(weakref.ref(p), kind) for p, kind in zip(params, kinds, strict=True)]
            self.device = params[0].device if params else self.device
        return not (same or first)


def fitted(vector: Vector | None, params: Sequence[Tensor]) -> Vector | None:
    """A copy of ``vector`` where ``params`` are, in the precision of a vector; ``None``: its shapes are others."""
    weights = [local(p) for p in params]
    if vector is None or [t.shape for t in vector] != [w.shape for w in weights]:
        return None
    dtypes = [torch.float32 if is_half(w) else w.dtype for w in weights]
    return [t.to(device=w.device, dtype=dtype, copy=True) for t, w, dtype in zip(vector, weights, dtypes, strict=True)]


def moved(batch: Any, source: torch.device | None, target: torch.device | None) -> Any:
    """The batch, its tensors on ``source`` brought to ``target``."""
    return changed(batch, lambda t: t.to(target) if t.device == source else t)


def to_come(model: nn.Module, params: Iterable[Tensor]) -> bool:
    """Whether weights or buffers have no shape yet: those of lazy modules get one in training's first forward pass."""
    return any(is_lazy(t) for held in (params, model.parameters(), model.buffers()) for t in held)


def _kind(param: Tensor) -> tuple[Any, ...]:
    return (None if is_lazy(param) else param.shape, param.dtype, param.device)
