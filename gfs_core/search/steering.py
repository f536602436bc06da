"""The rates of a trial, given to an optimizer whose own schedulers go on beside it."""

from __future__ import annotations

import math
from typing import Any

from gfs_core.errors import ConfigError
from gfs_core.optimizers.thresholds import unwrap
from gfs_core.search.trial import Trial


class Steering:
    """Sets the rates of each step, until :meth:`close`.

    Args:
        trial: knows the rates.
        optimizer: a torch optimizer, or a wrapper of one.
    """

    def __init__(self, trial: Trial, optimizer: Any) -> None:
        self._trial, self._optimizer = trial, unwrap(optimizer)
        self._rates: list[float] = []
        self._hook = self._optimizer.register_step_pre_hook(self._before_step)

    def set_rates(self) -> None:
        """Set those of the coming step; call it before its gradient is computed."""
        self._trial.set_rates(self._optimizer)
        self._rates = self._now()

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()

    def _now(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def _before_step(self, *_: Any) -> None:
        now = self._now()
        if len(now) != len(self._rates) or not all(map(math.isclose, now, self._rates)):
            raise ConfigError(
                f"within a step the learning rate is set to {max(now):.3g}, by code of the training that is no "
                "scheduler; a rate can be looked for where schedulers alone set it"
            )
