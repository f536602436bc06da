"""Reads gradients before the trainer clips them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def before_clipping(trainer: Any, read: Callable[[], None]) -> Callable[[], None]:
    """Call ``read`` whenever the trainer is about to clip the gradients of a step.

    Trainers clip, and compute the norm that they log, by their accelerator's ``clip_grad_norm_``, which is wrapped.

    Returns:
        A function that takes the wrapper away.
    """
    accelerator = trainer.accelerator
    own, users = accelerator.clip_grad_norm_, vars(trainer.accelerator).get("clip_grad_norm_")

    @functools.wraps(own)
    def watched(*args: Any, **kwargs: Any) -> Any:
        read()
        return own(*args, **kwargs)

    def put_back() -> None:
        if users is None:
            vars(accelerator).pop("clip_grad_norm_", None)
        else:
            accelerator.clip_grad_norm_ = users

    accelerator.clip_grad_norm_ = watched
    return put_back
