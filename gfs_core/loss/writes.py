"""Large tensors, copied just before the loss first writes to them.

A data set or a table of embeddings that a module holds is too large to be copied at each measurement, and is hardly
ever written to. So a dispatch mode watches the operations of the loss, and a tensor is copied only when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class BeforeWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``keep`` with each of ``tensors`` before an operation writes to it, or to a view of it."""

    sees_measurements = True

    def __init__(self, tensors: Sequence[Tensor], keep: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keep = keep
        self._at: dict[int, list[Tensor]] = {}  # by the address of their storage
        for tensor in tensors:
            self._at.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    for tensor in tree_iter(given):
                        if isinstance(tensor, Tensor):
                            self._written(tensor)
        return func(*args, **kwargs)

    def _written(self, tensor: Tensor) -> None:
        try:
            place = tensor.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage
            return
        for held in self._at.pop(place, ()):
            self._keep(held)
