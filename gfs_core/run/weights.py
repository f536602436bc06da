"""Notices when other weights are trained than before, as earlier measurements do not hold for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FROZEN = "every weight that the optimizer holds is frozen: nothing is measured until one is trained"


class Weights:
    """The trained weights at the last call of :meth:`changed`.

    A weight has changed if it is another parameter (unfrozen, added, replaced), or the same parameter with another
    shape, dtype or device. Its values do not matter. Only weak references are held.

    Attributes:
        device: device of the first weight; ``None`` before the first call.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], tuple[Any, ...]]] = []
        self.device: torch.device | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Weights, ()  # a copied or unpickled object starts afresh, as its weights are other objects

    def changed(self, params: Sequence[Tensor]) -> bool:
        """Whether ``params`` differ from those of the last call; ``False`` at the first call."""
        kinds = [_kind(p) for p in params]
        same = len(params) == len(self._seen) and all(
            ref() is p and kind == seen for p, kind, (ref, seen) in zip(params, kinds, self._seen, strict=True)
        )
        first = self.device is None
        if not same:
            self._seen = [(weakref.ref(p), kind) for p, kind in zip(params, kinds, strict=True)]
            self.device = params[0].device if params else self.device
        return not (same or first)


def to_come(model: nn.Module, params: Iterable[Tensor]) -> bool:
    """Whether weights or buffers have no shape yet; lazy modules get theirs in training's first forward pass."""
    return any(is_lazy(t) for held in (params, model.parameters(), model.buffers()) for t in held)


def _kind(param: Tensor) -> tuple[Any, ...]:
    return (None if is_lazy(param) else param.shape, param.dtype, param.device)
