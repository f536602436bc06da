"""Whether a model and its optimizer can be measured at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.config import GFSConfig
from gfs_core.errors import ConfigError
from gfs_core.linalg.vectors import spread
from gfs_core.loss.memory import GIB, vector_bytes
from gfs_core.optimizers.thresholds import parameters_of, unwrap
from gfs_core.signals.base import Signal
from gfs_core.signals.measuring import copies_of


def unmeasurable(model: Any, optimizer: Any) -> str:
    """Why this model and optimizer cannot be measured, in words; empty if they can.

    Args:
        model: the module that is trained.
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
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return why
    name = _named(unwrap(optimizer))
    if any(p._post_accumulate_grad_hooks for p in trained):
        return (
            f"{why}: {name} is layer-wise, steps inside of the backward pass by hooks on the weights, and the weights "
            "of a step are gone before they can be measured. Choose an optimizer that is not layer-wise"
        )
    return f"{why}, though the model does: {name} was made before they were unfrozen, or from another model's"


def unrescuable(optimizer: Any) -> str:
    """Why no step of this optimizer can be skipped and its state not be put back, in words; empty if they can.

    Args:
        optimizer: a torch optimizer, or a wrapper of one.
    """
    inner = unwrap(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        return "LBFGS evaluates the loss several times per step and moves the weights in between"
    if type(inner).__name__ == "ZeroRedundancyOptimizer" or any(spread(p) for p in parameters_of(inner)):
        return "the weights, or the state of the optimizer, are spread over several processes"
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in parameters_of(inner)):
        return "FSDP keeps the weights for itself"
    return ""


def check_memory(params: Sequence[Tensor], config: GFSConfig, signals: Sequence[Signal], preconditioned: bool) -> None:
    """Check that the vectors of these signals fit into the option ``max_memory``.

    Args:
        params: the weights.
        config: the options.
        signals: the signals that are on.
        preconditioned: whether the optimizer's operator differs from the Hessian.

    Raises:
        ConfigError: they do not fit.
    """
    if config.max_memory is None:
        return
    needed = vector_bytes(params, copies_of(signals, preconditioned)) / GIB
    if needed >= config.max_memory:
        raise ConfigError(
            f"`max_memory` is {config.max_memory} GiB, and the vectors of tier={config.tier!r} alone take "
            f"{needed:.3g}; allow more, or use a cheaper tier ('running', 'directional')"
        )


def _named(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
