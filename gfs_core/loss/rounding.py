"""Whether a loss rounds what depends on the weights: quantised training with a straight-through gradient.

Such a loss is a step function of the weights, and so is its gradient: their differences show single steps, or none at
all. What training feels is the curvature at the rounded weights, which a double backward gives. Gradient descent on a
small network lost stability at 0.6 to 1.1 times the rate that it tells with 2 bits, at 1.2 to 1.8 times with 3 and 4,
and at 1.8 times without rounding; differences put the limit 10 times too high at 2 bits (``benchmarks/rounding.py``).

Rounding is seen in the operations of one forward pass. What is rounded without any influence on the loss does not
count, nor does data. Comparisons and signs of weights alone (``w > 0``, the nearest of a codebook) may round them, or
only guard a division: that is for differences of gradients to tell. Not seen are signs of activations, and what leaves
torch on the way, for NumPy say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gfs_core.loss.objective import Objective

_ROUNDING_OPS = ("round", "floor", "ceil", "trunc", "fake_quantize", "_fake_quantize", "quantize_per")
_COMPARING_OPS = frozenset(
    {"gt", "ge", "lt", "le", "argmax", "argmin", "bucketize", "searchsorted", "topk", "sign", "sgn"}
)
_NO_SLOPE = 0.2  # of what the gradient says, how far a difference of losses may be off
_CONSTANT_OPS = ("lift_fresh", "scalar_tensor")


class Steps(NamedTuple):
    """What steps a loss goes by.

    Attributes:
        rounded: of what depends on the weights.
        compared: what comparisons of weights alone have given, which may be steps.
    """

    rounded: bool = False
    compared: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what depends on ``weights`` through operations, what of it was rounded or compared, and what is data.

    By storages: views are other tensors. A weak reference keeps the address of a storage from being used again.
    """

    def __init__(self, weights: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moving = set(_places(weights))
        self.rounded: set[StorageWeakRef] = set()
        self.compared: set[StorageWeakRef] = set()
        self._no_data = self.moving | set(_places(list(buffers)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken, large = set(_places((args, kwargs))), set(_places((args, kwargs), least=2))
        out = func(*args, **(kwargs or {}))
        made = set(_places(out))
        no_data = large <= self._no_data or func.overloadpacket.__name__ in _CONSTANT_OPS
        if no_data:
            self._no_data |= made
        if not taken.isdisjoint(self.moving):
            self.moving |= made
            if not taken.isdisjoint(self.rounded) or _rounds(func, out):
                self.rounded |= made
            if not taken.isdisjoint(self.compared) or (no_data and func.overloadpacket.__name__ in _COMPARING_OPS):
                self.compared |= made
        return out


def _rounds(func: Any, out: Any) -> bool:
    name = func.overloadpacket.__name__
    if name == "_to_copy" and isinstance(out, Tensor):
        return out.dtype.itemsize == 1 or not (out.dtype.is_floating_point or out.dtype.is_complex)
    return bool(name.startswith(_ROUNDING_OPS))


def _places(tree: Any, least: int = 0) -> Iterator[StorageWeakRef]:
    for item in tree_iter(tree):
        if isinstance(item, Tensor) and item.numel() >= least:
            with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse tensors have none
                yield StorageWeakRef(item.untyped_storage())  # type: ignore[no-untyped-call]


def steps(objective: Objective) -> Steps:
    """Whether the loss on the probe goes by steps in what depends on the weights; costs a forward pass."""
    if objective.sharded:
        return Steps()
    watch = _Watch(objective.weights, objective.model.buffers())
    with watch:
        loss = objective.forward(objective.pieces[0][0])
    of_the_loss = set(_places(loss))
    return Steps(not watch.rounded.isdisjoint(of_the_loss), not watch.compared.isdisjoint(of_the_loss))


def is_stepwise(objective: Objective) -> bool:
    """Whether the loss does not fall along its gradient as that says, as one that goes by steps of the weights.

    Costs a gradient and two forward passes.
    """
    with objective.in_float32():
        norm = objective.inner.norm
        _, gradient = objective.gradient()
        length = norm(gradient)
        if length == 0.0:
            return False
        step = objective.eps ** (1 / 3) * max(1.0, norm(objective.weights)) / length
        ahead, behind = objective.on_both_sides(step, gradient, objective.loss)
        expected = 2 * step * length**2
        rounding = 100 * objective.eps * (abs(ahead) + abs(behind))
        return bool(abs(ahead - behind - expected) > _NO_SLOPE * expected + rounding)
