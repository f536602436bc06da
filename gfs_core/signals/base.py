"""The types of measuring: a key names a quantity, a reading is one value of it, a signal takes readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from gfs_core.signals.context import StepContext
    from gfs_core.signals.lab import Lab


class Cost(IntEnum):
    """The cost classes of signals, cheapest first."""

    FREE = 0  # no evaluation of the loss
    GRADIENT = 1  # a few gradients or Hessian-vector products
    SOLVE = 2  # an eigenvalue: tens of products
    FLOW = 3  # a gradient flow: tens to thousands of gradients


@dataclass(frozen=True)
class Key:
    """A quantity that is measured.

    Attributes:
        name: its log key, without the prefix ``gfs/``.
        help: its meaning, in one line.
        unit: its unit; empty for a number without one.
        per_layer: whether each layer has its own value.
        scales_with_rate: the power of the learning rate that it is proportional to, at fixed weights: 1 for a
            stability ratio, -1 for a threshold, 0 if it does not depend on the rate.
        chart: title of the chart that shows it; empty for none.
        logged: whether loggers get it; otherwise only the history holds it. Of a quantity that each layer has, they
            get the value of the whole model; those of layers only where a reading says so, see :attr:`unlogged`.
        only_layers: whether there is no value of the whole model.
        whole: whether it is an integer: a count or a level.
    """

    name: str
    help: str
    unit: str = ""
    per_layer: bool = False
    scales_with_rate: int = 0
    chart: str = ""
    logged: bool = True
    whole: bool = False
    only_layers: bool = False

    @cached_property
    def unlogged(self) -> Key:
        """The same quantity where only the history holds it, as the values of most layers."""
        return replace(self, logged=False)


class Reading(NamedTuple):
    """One value at one step.

    Attributes:
        key: the quantity.
        step: optimizer steps taken when it was measured.
        value: the value; ``None``: it could not be measured, and ``reason`` says why.
        layer: the layer's name in the model; empty for the whole model.
        reason: why there is no value, or a remark about it.
    """

    key: Key
    step: int
    value: float | None
    layer: str = ""
    reason: str = ""


class Signal(Protocol):
    """A family of quantities that is measured at intervals. It keeps the state that the next measurement needs.

    Attributes:
        name: its name in options, budget and docs.
        keys: the keys of all readings that it may take.
        cost: its cost class.
        copies: copies of the weights in memory at the peak of a measurement, without and with a preconditioner;
            temporary memory for the layer that is being computed is not included.
        needs: names of the signals that are measured before it at the same step.
        past: how many steps it looks back: it needs the weights before each of them.
        every: steps between its measurements, whatever the options ask for; ``None``: the options decide.
    """

    name: str
    cost: Cost

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of all readings that it may take."""

    @property
    def copies(self) -> tuple[int, int]:
        """Copies of the weights in memory at its peak, without and with a preconditioner."""

    @property
    def every(self) -> int | None:
        """Steps between its measurements; ``None``: the options decide."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that are measured before it at the same step."""

    @property
    def past(self) -> int:
        """How many steps it looks back; while the weights before them are not kept, ``needs`` is measured instead."""

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Take readings at this step.

        Args:
            step: the optimizer step.
            lab: the loss and its derivatives, isolated from training.

        Raises:
            MeasurementError: nothing could be measured.
        """

    def forget(self) -> None:
        """Drop the state: other weights are trained from now on."""

    def broke_off(self) -> None:
        """Drop state that may have been half changed when a measurement failed."""

    def state_dict(self) -> dict[str, Any]:
        """All state that the next measurement depends on; loadable with ``weights_only=True``."""

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; vectors that do not fit ``params`` are dropped."""


class Stateless:
    """A signal that keeps nothing from one measurement to the next."""

    def forget(self) -> None:
        """Do nothing."""

    def broke_off(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Do nothing."""
