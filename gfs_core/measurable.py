"""Whether a model and its optimizer can be measured at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from gfs_core.stability import parameters_of


def unmeasurable(model: Any, optimizer: Any) -> str:
    """Why nothing can be measured with these two, in words; empty where something can.

    Args:
        model: what is trained.
        optimizer: its optimizer, or a wrapper of one.
    """
    if not isinstance(model, nn.Module):
        return f"the model is no torch.nn.Module, but {_named(model)}"
    wrapper, seen = optimizer, 0
    while wrapper is not None and seen < 10:
        if "deepspeed" in f"{type(wrapper).__module__}.{type(wrapper).__name__}".lower():
            return (
                f"DeepSpeed ({_named(wrapper)}) takes its steps inside of the backward pass, on weights that it keeps "
                "for itself: nothing can be measured beside it"
            )
        wrapper, seen = getattr(wrapper, "optimizer", None), seen + 1
    try:
        params = parameters_of(optimizer)
    except TypeError as error:
        return str(error)
    if params:
        return ""
    why = "nothing to measure: the optimizer holds no parameter with `requires_grad=True`"
    if any(p.requires_grad for p in model.parameters()):
        why += (
            f", though the model does: {_named(optimizer)} was made before they were unfrozen, or it is layer-wise and "
            "steps inside of the backward pass, where the weights of a step are gone before they can be measured"
        )
    return why


def _named(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
