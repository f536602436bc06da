"""What time, memory and vectors an operation takes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def clock() -> float:
    """Seconds, once an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], clock: Callable[[], float] = clock) -> tuple[float, Any]:
    """Seconds by this clock, and what came of the work."""
    began = clock()
    out = work()
    return clock() - began, out


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were allocated while the mode was on."""

    sees_measurements = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key in held or key in self.known or storage.nbytes() == 0:
                    continue
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Passes(TorchDispatchMode):
    """Counts how often tensors are read or written whole, in elements."""

    sees_measurements = True

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            declared = func._schema.arguments[: len(args)]
            written = [a for a, s in zip(args, declared, strict=True) if s.alias_info and s.alias_info.is_write]
            for tensors in ((args, kwargs), (out, written)):
                each = {t.data_ptr(): t.numel() for t in tree_leaves(tensors) if isinstance(t, Tensor)}
                self.elements += sum(each.values())
        return out
