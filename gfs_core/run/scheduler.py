"""The policies of :mod:`gfs_core.actions.rate` as a learning-rate scheduler of torch."""

from __future__ import annotations

import weakref
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gfs_core.actions.rate import Control
from gfs_core.actions.start import Start
from gfs_core.config import Policy
from gfs_core.errors import ConfigError
from gfs_core.optimizers.learning_rate import set_rate
from gfs_core.optimizers.thresholds import parameters_of, stability_of, unwrap


class EdgeOfStabilityLR(LRScheduler):
    """Scales the learning rate by the distance of the run to the edge of stability, on top of another scheduler.

    Step it once per optimizer step: in Lightning's ``configure_optimizers`` as
    ``{"scheduler": EdgeOfStabilityLR(optimizer), "interval": "step"}``, with transformers as
    ``Trainer(optimizers=(optimizer, EdgeOfStabilityLR(optimizer)))``. The measurements come from a
    :class:`~gfs_core.StabilityMonitor` of the same optimizer, or from a callback of either framework. Frameworks then
    log the controlled rate. To keep the user's rate in the log, use the option ``control`` of the monitor instead.

    Args:
        optimizer: the torch optimizer.
        base_scheduler: the user's own scheduler of this optimizer, stepped by this one; ``None``: a constant rate.
        policy: ``"cap"``, ``"follow"``, ``"warmup"``, ``"cdat"``, ``"start"``, or ``"observe"`` for no control. By
            measurements or, at ``"start"``, by losses, which the monitor has to see.
        margin: stability ratio to stay below, in (0, 1]; ``None``: ¾ for optimizers with second moments, except with
            ``"cdat"``, and ½ otherwise.

    Raises:
        ConfigError: the policy is unknown, the margin is out of range, or the base scheduler is a
            ``ReduceLROnPlateau`` or belongs to another optimizer.

    Example:
        >>> import torch, gfs_core as gfs
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> scheduler = gfs.EdgeOfStabilityLR(optimizer, policy="cap")
        >>> monitor = gfs.StabilityMonitor(model, optimizer)
        >>> scheduler.get_last_lr()  # a hundredth until the first measurements have been made
        [0.01]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base_scheduler: LRScheduler | None = None,
        policy: Policy | Literal["start"] = "cap",
        margin: float | None = None,
    ) -> None:
        known = (*get_args(Policy), "start")
        if policy not in known:
            raise ConfigError(f"`policy` must be one of {', '.join(map(repr, known))}; got {policy!r}")
        if margin is not None and not 0 < margin <= 1:
            raise ConfigError(f"`margin` must be in (0, 1], the edge of stability; got {margin}")
        if isinstance(base_scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau is stepped with a metric, not with the optimizer's steps: keep it as it is, and use "
                "the option `control` of the monitor or callback"
            )
        if base_scheduler is not None and base_scheduler.optimizer is not optimizer:
            raise ConfigError("`base_scheduler` belongs to another optimizer; give one of the same")
        self.base_scheduler = base_scheduler
        adaptive = stability_of(optimizer, parameters_of(optimizer)).adaptive
        self.control = Control("observe" if policy == "start" else policy, margin, adaptive)
        self.start = Start() if policy == "start" else None
        self._users = [float(g["lr"]) for g in optimizer.param_groups]
        super().__init__(optimizer)
        _schedulers[unwrap(optimizer)] = weakref.ref(self)

    @property
    def base_lr(self) -> float:
        """The largest of the user's present rates, without the control's scale."""
        return max(self._users, default=0.0)

    def refresh(self) -> None:
        """Set the optimizer's rates with the control's present scale; a monitor calls it after a measurement."""
        groups = self.optimizer.param_groups
        self._take_in_new_groups()
        scale = self._scale()
        for group, rate in zip(groups, self._users, strict=True):
            set_rate(group, rate * scale)
        self._last_lr = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]

    def get_lr(self) -> list[Any]:
        """The rates of the coming step, one number per group."""
        self._take_in_new_groups()
        if self.last_epoch > 0:
            for counting in (self.control, self.start):
                if counting is not None:
                    counting.step(self.base_lr)  # the step that has been taken
            if self.base_scheduler is not None:
                for group, rate in zip(self.optimizer.param_groups, self._users, strict=True):
                    set_rate(group, rate)  # schedulers compute the next rate from the one that they find
                self.base_scheduler.step()
                self._users = [float(g["lr"]) for g in self.optimizer.param_groups]
        scale = self._scale()
        return [rate * scale for rate in self._users]

    def _scale(self) -> float:
        start = 1.0 if self.start is None else self.start.share(self.base_lr)
        return self.control.scale(self.base_lr) * start

    def _take_in_new_groups(self) -> None:
        """Read the user's rate from groups that were added to the optimizer."""
        groups = self.optimizer.param_groups
        self._users = self._users[: len(groups)] + [float(g["lr"]) for g in groups[len(self._users) :]]

    def state_dict(self) -> dict[str, Any]:
        """The whole state, including those of the base scheduler, of the control and of the start."""
        left_out = ("optimizer", "base_scheduler", "control", "start")
        held = {k: v for k, v in super().state_dict().items() if k not in left_out}
        base = None if self.base_scheduler is None else self.base_scheduler.state_dict()
        start = None if self.start is None else self.start.state_dict()
        return {**held, "base_scheduler": base, "control": self.control.state_dict(), "start": start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        held = dict(state_dict)
        base, control, start = held.pop("base_scheduler", None), held.pop("control", {}), held.pop("start", None)
        super().load_state_dict(held)
        if self.base_scheduler is not None and base is not None:
            self.base_scheduler.load_state_dict(base)
        self.control.load_state_dict(control)
        if self.start is not None and start is not None:
            self.start.load_state_dict(start)


_schedulers: weakref.WeakKeyDictionary[Optimizer, weakref.ref[EdgeOfStabilityLR]] = weakref.WeakKeyDictionary()


def scheduler_of(optimizer: Any) -> EdgeOfStabilityLR | None:
    """The :class:`EdgeOfStabilityLR` of this optimizer; ``None``: it has none."""
    held = _schedulers.get(unwrap(optimizer))
    return None if held is None else held()
