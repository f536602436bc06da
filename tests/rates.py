"""The learning rates that an optimizer really uses."""

from __future__ import annotations

from typing import Any


def tell_rates(optimizer: Any, told: list[float]) -> None:
    """Have the optimizer's own code tell the rate that each step uses."""
    step = type(optimizer)._init_group

    def watched(own: Any, group: Any, *rest: Any) -> Any:
        if group is own.param_groups[0]:
            told.append(float(group["lr"]))
        return step(own, group, *rest)

    optimizer._init_group = watched.__get__(optimizer)
