"""The closure that a step of an optimizer was called with, as a hook before the step sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step pre-hook, the first of which is the optimizer; ``None``: none."""
    return kwargs.get("closure") or next((a for a in args[1:2] if callable(a)), None)


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another closure in place of theirs, as a step pre-hook returns them."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
