"""The buffers of a model as they were before the forward passes of a step, which update some of them.

A batch that is not finite leaves a BatchNorm with statistics that are not finite, even if its step is skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gfs_core.linalg.vectors import local

_SMALL = 1 << 16  # elements up to which a buffer is copied at every step: BatchNorm's do not count their changes


class _Held:
    """A buffer and its copy."""

    __slots__ = ("copy", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copy, self.version = tensor, local(tensor).clone(), tensor._version


class Buffers:
    """Copies of the buffers, on their device. A large one, such as a mask, is copied again only if it was changed.

    Args:
        model: the module; buffers that are registered later are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str]] = [
            (module._buffers, name) for module in model.modules() for name in module._buffers
        ]
        self._held: dict[int, _Held] = {}  # by place

    def note(self) -> None:
        """Copy the buffers as they are now."""
        copies, tensors = [], []
        for place, (owner, name) in enumerate(self._places):
            tensor, held = owner.get(name), self._held.get(place)
            if tensor is None or is_lazy(tensor) or tensor.is_inference():
                self._held.pop(place, None)
            elif held is None or held.tensor is not tensor or held.copy.shape != local(tensor).shape:
                self._held[place] = _Held(tensor)
            elif tensor.numel() <= _SMALL or tensor._version != held.version:
                held.version = tensor._version
                copies.append(held.copy)
                tensors.append(local(tensor))
        if copies:
            torch._foreach_copy_(copies, tensors)

    def put_back(self) -> None:
        """Put the buffers back to where they were when they were noted."""
        with torch.no_grad():
            for place, held in self._held.items():
                owner, name = self._places[place]
                local(held.tensor).copy_(held.copy)
                owner[name] = held.tensor
