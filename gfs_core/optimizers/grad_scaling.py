"""Finds the factor that gradient scaling has put on the gradients of an optimizer."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

_DEPTH = 16  # callers to look at: hooks, schedulers and accelerate wrap a step several times


class GradScaling:
    """The gradient scaler that steps an optimizer, if there is one.

    A scaler is known to whoever calls it, not to the optimizer. So the callers of the optimizer's first step are looked
    through for one.

    Args:
        optimizer: a torch optimizer.

    Attributes:
        looked: whether a step has been seen, so that it is known whether there is a scaler.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._scaler: GradScaler | None = None
        self.looked = False

    def look(self) -> None:
        """Find the scaler; to be called from within a step, the first one."""
        self.looked = True
        frame: FrameType | None = sys._getframe(1)
        for _ in range(_DEPTH):
            if frame is None:
                return
            if frame.f_code.co_name in ("step", "_maybe_opt_step"):
                caller: Any = frame.f_locals.get("self")
                if isinstance(caller, GradScaler):
                    self._scaler = caller
                    return
            frame = frame.f_back

    @property
    def active(self) -> bool:
        """Whether a scaler that is enabled steps the optimizer."""
        return self._scaler is not None and self._scaler.is_enabled()

    def scale(self) -> Tensor | float:
        """The factor on the gradients now, where it lies; 1 once they are unscaled."""
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled() or scaler._scale is None:
            return 1.0
        state = scaler._per_optimizer_states.get(id(self._optimizer))
        ready = state is None or state["stage"].value == 0  # neither unscaled nor stepped
        return scaler._scale if ready else 1.0
