"""The learning rate of an optimizer: read, set, and scaled for each step by a hook."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gfs_core.errors import ConfigError
from gfs_core.linalg.inner import WHOLE
from gfs_core.linalg.vectors import local
from gfs_core.optimizers.closures import closure_of, with_closure
from gfs_core.optimizers.thresholds import unwrap


class RateControl(Protocol):
    """Decides the factor by which the learning rate of each step is multiplied."""

    def step(self, rate: float) -> float:
        """The factor for the step that is taken now, where the user's rate is ``rate``."""


def rate_of(optimizer: Any) -> float:
    """The largest learning rate among the optimizer's groups; 0 where none of its parameters is trainable.

    Factors and limits of the rate refer to this one.
    """
    groups = unwrap(optimizer).param_groups
    for group in groups:
        for p in group["params"]:
            if p.requires_grad:
                return max([float(g["lr"]) for g in groups if "lr" in g], default=0.0)
    return 0.0


def first_rate(optimizer: Any) -> float | None:
    """The learning rate of the first group, if it is a number that lies on the host."""
    rate = unwrap(optimizer).param_groups[0].get("lr")
    return rate if isinstance(rate, float) else None


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set the rate of one group. A tensor is changed in place: compiled and captured steps read it there."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class LearningRateHook:
    """Multiplies the learning rates of an optimizer during each of its steps.

    The rates of all groups are multiplied just before the optimizer uses them, and put back after the step. So
    schedulers, checkpoints and logs see the user's rates, and a closure runs at them. A step that gradient scaling
    skips is not scaled. Tensor rates are changed in place, so that compiled and captured steps see the change.

    The class acts through torch's hooks on ``optimizer.step``. An optimizer that moves the weights by other methods
    (the two halves of a sharpness-aware step, a step inside the backward pass) bypasses the hooks; :meth:`look` detects
    that.

    Args:
        optimizer: a torch optimizer or a wrapper of one.
        control: decides the factor.

    Attributes:
        passed_by: how many times :meth:`look` has found the weights moved since the hooks last saw a step.

    Raises:
        ConfigError: the optimizer chooses the length of its steps itself (LBFGS).
    """

    def __init__(self, optimizer: Any, control: RateControl) -> None:
        self.optimizer, self.control = unwrap(optimizer), control
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times per step and chooses its own step length; its rate cannot be "
                "controlled: use control='observe'"
            )
        self._held: list[tuple[dict[str, Any], float | Tensor]] = []  # groups and their rates while scaled
        self.passed_by, self._stepped = 0, False
        self._length: float | None = None  # length of the weights, when `look` last saw no step
        # A compiled step would treat the factor of its first call as a constant.
        before, after = (torch.compiler.disable(hook) for hook in (self._before, self._after))  # type: ignore[no-untyped-call]
        self._handles: list[Any] = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
            self.optimizer.register_state_dict_pre_hook(lambda optimizer: self._restore()),
        ]

    def close(self) -> None:
        """Restore the rates and remove the hooks."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def look(self, anywhere: Callable[[bool], bool] = bool) -> None:
        """Check whether the weights move without a step that the hooks see. Call it once per training step.

        Weights that do not move (gradient scaling skipped the step, or the rate is 0) count neither way.

        Args:
            anywhere: whether a condition holds on any of the processes that train together.
        """
        if self._stepped:
            self._stepped, self._length = False, None
            return
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if not is_lazy(p)]
        # For sharded weights this is the length of this process's part: it changes when the weights do.
        length = WHOLE.norm([local(p) for p in weights]) if weights else 0.0
        if self._length is not None and anywhere(math.isfinite(length) and length != self._length):
            self.passed_by += 1
        self._length = length

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stepped, self.passed_by = True, 0
        self._restore()  # the last step may have failed half-way
        closure = closure_of(args, kwargs)
        if closure is None:
            self._apply()
            return None

        def at_the_users_rate() -> Any:
            self._restore()
            loss = closure()
            self._apply()
            return loss

        return with_closure(args, kwargs, at_the_users_rate)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._restore()

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Context in which all rates are multiplied by ``scale``."""
        self._multiply(scale)
        try:
            yield
        finally:
            self._restore()

    def _apply(self) -> None:
        self._multiply(self.control.step(rate_of(self.optimizer)))

    def _multiply(self, scale: float) -> None:
        if scale == 1.0:
            return
        groups = [g for g in self.optimizer.param_groups if "lr" in g]
        self._held = [(g, g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"]) for g in groups]
        for group in groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(scale)
            else:
                group["lr"] = group["lr"] * scale

    def _restore(self) -> None:
        for group, rate in self._held:
            set_rate(group, rate)
        self._held = []
