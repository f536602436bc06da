"""What measuring needs of several processes that train together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gfs_core.linalg.inner import InnerProduct
from gfs_core.linalg.vectors import Vector


class Processes(Protocol):
    """Exchanges that every process makes, in the same order. Each of them may end in a ``MeasurementError``."""

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""

    def mean_of(self, value: float, vector: Vector) -> float:
        """The mean of a number, and, in place, of a vector."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""

    def inner_product(self, params: Sequence[Tensor]) -> InnerProduct:
        """The inner product of vectors over ``params``, which may be sharded over the processes. No exchange."""


@contextlib.contextmanager
def alone(module: Any) -> Iterator[None]:
    """Without what DistributedDataParallel exchanges in a forward pass: buffers, and gradients that it prepares for."""
    if not isinstance(module, DistributedDataParallel):
        yield
        return
    held, module.require_forward_param_sync = module.require_forward_param_sync, False
    try:
        with module.no_sync():
            yield
    finally:
        module.require_forward_param_sync = held
