"""Whether a loss rounds what depends on the weights: quantised training with a straight-through gradient.

Such a loss is a step function of the weights, and so is its gradient: their differences show single steps, or none at
all. What training feels is the curvature at the rounded weights, which a double backward gives. Gradient descent on a
small network lost stability at 0.6 to 1.1 times the rate that it tells with 2 bits, at 1.2 to 1.8 times with 3 and 4,
and at 1.8 times without rounding; differences put the limit 10 times too high at 2 bits (``benchmarks/rounding.py``).

Rounding is seen in the operations of one forward pass. What is rounded without any influence on the loss does not
count, nor does data, nor a step made of comparisons (``w > 0``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gfs_core.objective import Objective

_ROUNDING = ("round", "floor", "ceil", "trunc", "sign", "sgn", "fake_quantize", "_fake_quantize", "quantize_per")


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what depends on ``weights`` through operations, and what of it was rounded.

    By storages: views are other tensors. A weak reference keeps the address of a storage from being used again.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moving = {place for w in weights for place in _places(w)}
        self.rounded: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = set(_places((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        if not taken.isdisjoint(self.moving):
            made = set(_places(out))
            self.moving |= made
            if not taken.isdisjoint(self.rounded) or _rounds(func, out):
                self.rounded |= made
        return out


def _rounds(func: Any, out: Any) -> bool:
    name = func.overloadpacket.__name__
    if name == "_to_copy" and isinstance(out, Tensor):
        return out.dtype.itemsize == 1 or not (out.dtype.is_floating_point or out.dtype.is_complex)
    return bool(name.startswith(_ROUNDING))


def _places(tree: Any) -> Iterator[StorageWeakRef]:
    for item in tree_iter(tree):
        if isinstance(item, Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse tensors have none
                yield StorageWeakRef(item.untyped_storage())  # type: ignore[no-untyped-call]


def rounds(objective: Objective) -> bool:
    """Whether the loss on the probe goes by rounded values of what depends on the weights; costs a forward pass."""
    if objective.sharded:
        return False
    watch = _Watch(objective.weights)
    with watch:
        loss = objective.forward(objective.pieces[0][0])
    return not watch.rounded.isdisjoint(_places(loss))
