"""The learning rate under a control: the rate that a step uses, and checks that the control acts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor

from gfs_core.actions.lowered import Lowered
from gfs_core.actions.plateau import Plateau
from gfs_core.actions.rate import Control
from gfs_core.actions.start import Start
from gfs_core.config import BY_LOSSES, GFSConfig, Policy
from gfs_core.errors import ConfigError
from gfs_core.optimizers.learning_rate import LearningRateHook, RateControl, rate_of
from gfs_core.optimizers.thresholds import unwrap
from gfs_core.run.measurable import unrescuable
from gfs_core.run.notices import Notices
from gfs_core.run.record import Measurement
from gfs_core.run.scheduler import scheduler_of

_SURE = 3  # steps in a row that bypass the control before a warning says so


class _Together:
    """Several controls of one rate, whose scales are multiplied."""

    def __init__(self, controls: list[RateControl]) -> None:
        self.controls = controls

    def step(self, rate: float) -> float:
        return math.prod(control.step(rate) for control in self.controls)


class Rates:
    """The rates of an optimizer, and the control that scales them.

    Args:
        optimizer: a torch optimizer or a wrapper of one.
        config: holds the policy and its margin.
        adaptive: whether the optimizer divides by second moments.
        notices: reports that the control does not act.

    Attributes:
        control: decides the scale.
        lowered: the share of the rate after trouble; ``None``: trouble does not lower it.
        plateau: the share of the rate where the loss rests; ``None``: that does not lower it.
        start: the share of the rate in the first part of the training; ``None``: it is the user's from the first step.
        why: why the control has no stability ratio yet.

    Raises:
        ConfigError: the rate has a second control, or the rate of this optimizer cannot be controlled.
    """

    def __init__(self, optimizer: Any, config: GFSConfig, adaptive: bool, notices: Notices) -> None:
        self.optimizer, self.notices = optimizer, notices
        policy: Policy = "observe" if config.control in BY_LOSSES else cast(Policy, config.control)
        self.control = Control(policy, config.margin, adaptive)
        self.start = Start() if config.control == "start" and not unrescuable(optimizer) else None
        self.why = "no measurement was made"
        self._name = f"control={config.control!r}" if config.control != "observe" else f"alarm={config.alarm!r}"
        self._scheduler = scheduler_of(optimizer)
        self._hook: LearningRateHook | None = None
        if self._scheduler is not None:
            if config.control not in ("observe", "guard", "plateau"):
                raise ConfigError(
                    f"control={config.control!r} beside an EdgeOfStabilityLR, which controls the rate already: use one"
                )
            self.control, self.start = self._scheduler.control, self._scheduler.start
            if self.start is not None and config.alarm == "off":
                raise ConfigError(
                    "EdgeOfStabilityLR(policy='start') goes by alarms, and `alarm` is 'off'; use 'log', 'warn' or "
                    "'stop'"
                )
        guarded = config.guarded or self.start is not None
        self.lowered = Lowered() if guarded and not unrescuable(optimizer) else None
        self.plateau = Plateau() if config.control == "plateau" and self.lowered is not None else None
        if self.lowered is not None or policy != "observe":
            self.act(self.control)

    @property
    def scheduled(self) -> bool:
        """Whether an :class:`~gfs_core.EdgeOfStabilityLR` controls the rate."""
        return self._scheduler is not None

    @property
    def acting(self) -> bool:
        """Whether the rate of a step may be another one than the user's."""
        return self.lowered is not None or self.control.policy != "observe"

    def act(self, control: Control) -> None:
        """Let ``control`` scale each step of the optimizer."""
        self.close()
        self.control = control
        acting = [self.lowered, self.plateau, *([] if self.scheduled else [control, self.start])]
        self._hook = LearningRateHook(self.optimizer, _Together([c for c in acting if c is not None]))

    def base_lr(self) -> float:
        """The rate that the user's scheduler sets, without the control's scale."""
        return rate_of(self.optimizer) if self._scheduler is None else self._scheduler.base_lr

    def scale(self) -> float:
        """The scale of the coming step; 1 where the control does not act."""
        if self._hook is None and self._scheduler is None:
            return 1.0
        if self._hook is not None and self._hook.passed_by > 0:
            return 1.0
        start = 1.0 if self.start is None else self.start.share(self.base_lr())
        return self.control.scale(self.base_lr()) * start * self._lowered()

    def _lowered(self) -> float:
        """What is left of the rate after trouble, and where the loss rests."""
        return math.prod(of.share for of in (self.lowered, self.plateau) if of is not None)

    def scaled(self, scale: float) -> AbstractContextManager[None]:
        """A context in which the optimizer holds the rates that the coming step uses, at this scale."""
        if self._hook is None:
            return contextlib.nullcontext()
        return self._hook.scaled(scale if self._scheduler is None else self._lowered())

    def effective(self) -> float | None:
        """The rate that the coming step uses.

        ``None``: measurements or a start decide it now, or reading it would wait for an accelerator.
        """
        if self.control.holding or (self.start is not None and self.start.rising):
            return None
        for group in unwrap(self.optimizer).param_groups:
            if isinstance(rate := group.get("lr"), Tensor) and rate.device.type != "cpu":
                return None
        return self.base_lr() * self.scale()

    def look(self, label: str, anywhere: Callable[[bool], bool]) -> None:
        """Check, once a step, that the control acts; warn once if it does not.

        Args:
            label: name of the optimizer.
            anywhere: returns whether its argument is true on any process.

        Raises:
            MeasurementError: with ``strict=True``, the control does not act.
        """
        policy, profile = self.control.policy, self.control.profile
        if self.control.lost:
            self.notices.complain(
                f"control={policy!r} starts from {profile.first} stability ratios, and had {self.control.seen} in "
                f"{profile.patience} steps ({self.why}). It leaves the rate alone until it has them: lr_scale is 1. "
                "Mend what is in brackets, or use control='observe'"
            )
        if self._hook is not None:
            self._hook.look(anywhere)
            if self._hook.passed_by >= _SURE:
                self.notices.complain(
                    f"{self._name} does not act: the weights move without `optimizer.step()`, by other methods "
                    f"of {label} or inside the backward pass, and it holds the rate of such steps alone. "
                    "lr_scale is 1. Step with `optimizer.step()` (sharpness-aware optimizers: with a closure), or use "
                    "control='observe'"
                )

    def take_in(self, measurement: Measurement, before: float, along_the_step: bool) -> Measurement:
        """Pass a measurement to the control, and return it converted to the scale of the coming step.

        Args:
            measurement: the measurement.
            before: the scale at which it was made.
            along_the_step: whether its stability ratio was measured along the last step.
        """
        if not self.acting:
            return measurement
        rate = self.base_lr()
        last = math.prod(c.last for c in (self.control, self.lowered, self.start) if c is not None)
        along = before / last  # values along the last step belong to the rate at which it was taken
        if measurement.critical_lr is not None:
            measurement = measurement.having(critical_lr=measurement.critical_lr / along)
        if along_the_step and measurement.stability_ratio is not None:
            measurement = measurement.having(stability_ratio=measurement.stability_ratio * along)
        self.control.measured(rate * before, measurement.values())
        if self.control.waiting:
            self.why = "; ".join(measurement.reasons) or "the curvature found was not positive"
        scale = self.scale()
        self.refresh()
        return measurement.at_scale(scale / before).having(lr_scale=scale, lr_effective=rate * scale)

    def renew(self) -> None:
        """Start the control again: other weights are trained now, and their curvature has not been measured."""
        self.control.renew()
        self.refresh()

    def refresh(self) -> None:
        """Let an :class:`~gfs_core.EdgeOfStabilityLR` set the rate anew, as what it goes by has changed."""
        if self._scheduler is not None:
            self._scheduler.refresh()

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        if self._hook is not None:
            self._hook.close()
            self._hook = None
