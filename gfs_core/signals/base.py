"""What is measured, as types: a key, a reading of it, and a signal that takes readings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Cost(IntEnum):
    """What a signal costs, cheapest first."""

    FREE = 0  # no evaluation of the loss
    GRADIENT = 1  # a gradient or a product, or a few of either
    SOLVE = 2  # an eigenvalue: some tens of products
    FLOW = 3  # a gradient flow: some tens of gradients, or thousands


@dataclass(frozen=True)
class Key:
    """What a value is.

    Attributes:
        name: its log key, without the prefix ``gfs/``.
        help: what it is, in a line.
        unit: empty for a number without one.
        per_layer: whether there is one for each layer.
        scales_with_rate: the power of the learning rate that it goes with, at weights that stay where they are: 1 of a
            stability ratio, -1 of a threshold.
        chart: title of the chart that shows it, empty for none.
        logged: whether loggers get it; otherwise it is in the history alone.
        whole: whether it is a count or a state, an integer.
    """

    name: str
    help: str
    unit: str = ""
    per_layer: bool = False
    scales_with_rate: int = 0
    chart: str = ""
    logged: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Reading:
    """One value at one step.

    Attributes:
        key: what it is a value of.
        step: optimizer steps taken when it was measured.
        value: ``None``: it could not be had, and ``reason`` says why.
        layer: of which layer, by its name in the model; empty for the whole model.
        reason: why there is no value, or what is to be known about it.
    """

    key: Key
    step: int
    value: float | None
    layer: str = ""
    reason: str = ""
