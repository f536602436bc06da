"""By what factor training multiplies its gradients after they were accumulated, as clipping by norm does.

A few tensors show it: the length of their gradient is noted by a hook when it is accumulated, and again before the
optimizer step. Where their factors differ, as with clipping by value, no factor is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gfs_core.linalg.vectors import is_half, on_host

_SAMPLES = 3  # tensors whose gradients are looked at: the smallest of the first, middle and last third
_SAME = 1e-3  # relative distance of factors that count as one


class ClippingFactor:
    """The factor of a coming step; its hooks are on the weights only from :meth:`expect` to :meth:`taken`."""

    def __init__(self) -> None:
        self._handles: list[tuple[Any, Tensor]] = []  # of each hook, and its weight
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # by place: the weight, and the length of its gradient

    def __reduce__(self) -> tuple[type[ClippingFactor], tuple[()]]:
        """A copy expects nothing: the hooks are on the weights of the original, and cannot be pickled."""
        return ClippingFactor, ()

    def expect(self, params: Sequence[Tensor]) -> None:
        """Note the gradients of the coming backward passes; the last accumulation counts."""
        self.close()
        for place, p in enumerate(_samples(params)):
            handle: Any = p.register_post_accumulate_grad_hook(self._noting(place))  # type: ignore[no-untyped-call]
            self._handles.append((handle, p))

    def taken(self) -> float | None:
        """The factor since the last accumulation; ``None``: it is not known."""
        held = [(before, p.grad) for p, before in self._held.values() if p.grad is not None]
        self.close()
        values = on_host([*(before for before, _ in held), *(_length(gradient) for _, gradient in held)])
        before, after = values[: len(held)], values[len(held) :]
        factors = [a / b for a, b in zip(after, before, strict=True) if 0 < b < float("inf")]
        if not factors or not min(factors) > 0 or max(factors) > (1 + _SAME) * min(factors):
            return None
        return 1.0 if abs(factors[0] - 1) < _SAME else factors[0]

    def close(self) -> None:
        """Take the hooks off."""
        for handle, p in self._handles:
            handle.remove()
            if not p._post_accumulate_grad_hooks:
                p._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as before the first
        self._handles, self._held = [], {}

    def _noting(self, place: int) -> Any:
        def note(p: Tensor) -> None:
            with contextlib.suppress(Exception):  # it runs inside of training's backward pass
                if p.grad is not None:
                    self._held[place] = (p, _length(p.grad))

        return note


def _length(gradient: Tensor) -> Tensor:
    with torch.no_grad():
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        length: Tensor = torch.linalg.vector_norm(values.detach().float() if is_half(values) else values.detach())
        return length


def _samples(params: Sequence[Tensor]) -> list[Tensor]:
    """A small tensor out of each third of the weights; none where they are sharded."""
    trained = [p for p in params if p.requires_grad and p.is_leaf and not is_lazy(p)]
    if any(hasattr(p, "to_local") for p in trained):
        return []
    third = -(-len(trained) // _SAMPLES)
    return [min(trained[i : i + third], key=lambda p: p.numel()) for i in range(0, len(trained), max(third, 1))]
