"""The data of one optimizer step: everything that a signal sees of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gfs_core.linalg.vectors import Vector
from gfs_core.optimizers.thresholds import Stability, parameters_of, stability_of
from gfs_core.signals.layers import layers_of, names_of


@dataclass
class StepContext:
    """One optimizer step, before it is taken.

    Attributes:
        step: optimizer steps taken so far.
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-dim tensor, the mean over one micro-batch.
        batches: the micro-batches of the step, or the batches of a second data set; they are not changed.
        probe: the batches on which signals are measured that do not select their own.
        current: the same as ``batches``, limited to the size of a probe.
        past: the weights before the last step, before the one before it, and so on as far as they were kept.
        mean_loss: mean training loss over the steps before; ``None``: not known.
        rate_only_lowered: whether the learning rate is controlled by a policy that only lowers it.
        trained: whether ``batches`` are what training computes its gradient on; not so with a second data set.
        gradient: the ``.grad`` of each weight, before the step; ``None``: not known.
        clipped: by what factor the gradients were multiplied since they were accumulated; ``None``: not known.
    """

    step: int
    model: nn.Module
    optimizer: Any
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    probe: list[Any]
    current: list[Any]
    past: Sequence[Vector] = ()
    mean_loss: float | None = None
    rate_only_lowered: bool = False
    trained: bool = True
    gradient: Sequence[Tensor | None] | None = None
    clipped: float | None = None

    @cached_property
    def params(self) -> list[Tensor]:
        """The trained weights; the tensors of every vector are in this order."""
        return parameters_of(self.optimizer)

    @cached_property
    def names(self) -> list[str]:
        """The name of each weight in the user's model; ``parameter i`` for one that the model does not hold."""
        return names_of(self.model, self.params)

    @cached_property
    def layers(self) -> list[str]:
        """The layer of each weight, see :mod:`gfs_core.signals.layers`."""
        return layers_of(self.names)

    @cached_property
    def stability(self) -> Stability:
        """The optimizer's threshold and preconditioner at this step."""
        return stability_of(self.optimizer, self.params)
