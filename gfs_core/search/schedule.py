"""The rates of a whole schedule, read off its scheduler before the training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from gfs_core.optimizers.learning_rate import set_rate

_ALSO = ("momentum", "betas")  # what schedulers change beside the rate


class Setting(NamedTuple):
    """What a schedule sets at one step, for each group of the optimizer.

    Attributes:
        rates: the learning rates.
        other: momentum or betas, where there are some.
    """

    rates: tuple[float, ...]
    other: tuple[dict[str, Any], ...]

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return max(self.rates)

    def apply(self, optimizer: Optimizer, factor: float) -> None:
        """Let the optimizer have it, its rates multiplied."""
        for group, rate, other in zip(optimizer.param_groups, *self, strict=True):
            set_rate(group, rate * factor)
            group.update(other)


def recorded(
    optimizer: Optimizer, schedulers: Sequence[Any], steps: int, advance: Callable[[int], object]
) -> list[Setting]:
    """What is set at each of so many steps; schedulers and optimizer are put back.

    Args:
        optimizer: the torch optimizer.
        schedulers: all that set its rate.
        steps: of the training, ≥ 1.
        advance: called with each step but the first, before it; steps the schedulers.
    """
    groups = optimizer.param_groups
    held = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"} for g in groups]
    states = [copy.deepcopy(s.state_dict()) for s in schedulers]
    out = []
    try:
        for step in range(steps):
            if step:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the optimizer takes no step in between
                    advance(step)
            other = tuple({k: g[k] for k in _ALSO if k in g} for g in groups)
            out.append(Setting(tuple(float(g["lr"]) for g in groups), other))
    finally:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, values in zip(groups, held, strict=True):
            set_rate(group, values.pop("lr"))
            group.update(values)
    return out
