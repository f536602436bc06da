"""The precision in which the loss is computed while it is measured.

Hessian-vector products by double backward tolerate half precision: under bfloat16 autocast the sharpness was off by
0.03 to 2 % (measured, `benchmarks/precision.md`). Differences of gradients and a flow of the weights do not: they may
show nothing but rounding. So ``"auto"`` uses the precision of training for exact products, and float32 for everything
else. Where training is in float16, which underflows, it uses float32 throughout.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.linalg.vectors import HALVES, is_half
from gfs_core.loss.batches import changed
from gfs_core.loss.learned import PrecisionChoice


class Precision:
    """Turns autocast off, and half-precision weights into float32 copies, during parts of a measurement.

    Args:
        choice: ``"auto"``; ``"training"``: nothing is ever changed; ``"float32"``: exact products are in float32 too.
        model: its half-precision buffers are treated like the weights.
        parameters: the weights.
        proven: whether the loss is known to work in float32.

    Attributes:
        choice: as given; ``"auto"`` is replaced by another choice where it turns out not to work.
        proven: whether the loss need not be tried in float32: as given, once it was tried, or not ``"auto"``.
        reason: why ``"auto"`` was replaced; empty where it was not.
        half: the half-precision type in which the loss is computed outside :meth:`full`; ``None``: none was seen.
    """

    def __init__(
        self, choice: PrecisionChoice, model: nn.Module, parameters: Iterable[Tensor], proven: bool = False
    ) -> None:
        self.choice, self.proven = choice, proven or choice != "auto"
        self.reason = ""
        held = [*parameters, *model.buffers()]
        self._halves = [t for t in held if is_half(t) and not hasattr(t, "to_local")]
        self._devices = sorted({t.device.type for t in held if torch.amp.is_autocast_available(t.device.type)})
        self._fixed = _dtype_of_fsdp(model)
        self.half = self._halves[0].dtype if self._halves else self._fixed
        self._full = False

    @contextlib.contextmanager
    def governing(self) -> Iterator[None]:
        """Context of a whole measurement: sees which autocast the loss enters, and turns it off where needed.

        A loss may enter autocast deep inside the user's code. So ``torch.autocast.__enter__`` is replaced, for all
        threads. ``torch.set_default_dtype`` is replaced too: Lightning's ``bf16-true`` calls it around every step.
        """
        enter: Any = torch.autocast.__enter__
        set_default = torch.set_default_dtype

        def watched(autocast: Any) -> Any:
            entered = enter(autocast)
            self._entered(autocast.device)
            return entered

        def set_unless_half(dtype: torch.dtype) -> None:
            set_default(torch.float32 if self._full and dtype in HALVES else dtype)

        torch.autocast.__enter__ = watched  # type: ignore[method-assign]
        torch.set_default_dtype = set_unless_half
        try:
            with contextlib.ExitStack() as stack:
                for device in self._devices:  # an autocast that is on already
                    if torch.is_autocast_enabled(device):
                        stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device)))
                yield
        finally:
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]
            torch.set_default_dtype = set_default

    def _entered(self, device: str) -> None:
        """Note an autocast that the loss has entered, and turn it off where needed."""
        if not torch.is_autocast_enabled(device):
            return
        torch.set_autocast_cache_enabled(False)  # it would keep casts of weights that then move
        dtype = torch.get_autocast_dtype(device)
        if self._full or (self.choice == "auto" and dtype is torch.float16):
            torch.set_autocast_enabled(device, False)  # leaving the autocast restores the state before it
        self.half = dtype

    @property
    def is_full(self) -> bool:
        """Whether the loss is computed in float32 now."""
        return self._full

    @property
    def moves(self) -> bool:
        """Whether :meth:`full` replaces half-precision weights by float32 copies."""
        return bool(self._halves) and self.choice != "training"

    @property
    def eps(self) -> float | None:
        """Machine epsilon of the half precision in which the loss is computed now; ``None``: it is in none."""
        dtype = self._fixed if self._full else self.half
        return None if dtype is None else torch.finfo(dtype).eps

    @property
    def full_for_products(self) -> bool:
        """Whether exact products are computed in float32."""
        return self.choice == "float32" or (self.choice == "auto" and self.half is torch.float16)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Context in which the loss is computed in float32 (in float64 where the weights are).

        Half-precision weights and buffers are float32 copies in here; changes to the copies are discarded on exit.
        """
        if self._full or self.choice == "training":
            yield
            return
        held = [t.data for t in self._halves]
        default = torch.get_default_dtype()
        self._full = True
        try:
            with contextlib.ExitStack() as stack:
                for device in self._devices:
                    stack.enter_context(torch.autocast(device, enabled=False))
                if self.half is not None and "torch._dynamo" in sys.modules:  # compiled code has a fixed precision
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                if default in HALVES:
                    torch.set_default_dtype(torch.float32)
                for t in self._halves:
                    t.data = t.data.float()
                yield
        finally:
            self._full = False
            torch.set_default_dtype(default)
            for t, data in zip(self._halves, held, strict=True):
                t.data = data

    def of(self, batch: Any) -> Any:
        """The batch, with half-precision tensors in float32 where the weights are float32 copies.

        A dictionary is changed in place; of another batch the result is new.
        """
        if not (self._full and self._halves):
            return batch
        full = changed(batch, lambda t: t.float() if is_half(t) else t)
        if not isinstance(batch, dict):
            return full
        batch.update(full)  # in place: its class may hold more than its items
        return batch


def _dtype_of_fsdp(model: nn.Module) -> torch.dtype | None:
    """The half precision that ``fully_shard`` computes in; it cannot be changed for a measurement."""
    for module in model.modules():
        state: Any = getattr(module, "_get_fsdp_state", None)
        dtype = getattr(getattr(state() if state else None, "_mp_policy", None), "param_dtype", None)
        if dtype in HALVES:
            return dtype  # type: ignore[no-any-return]
    return None
