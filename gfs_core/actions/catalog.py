"""The actions of a run, by the option ``alarm``."""

from __future__ import annotations

from collections.abc import Callable

from gfs_core.actions.base import Action
from gfs_core.actions.checkpoint import Checkpoint
from gfs_core.actions.report import Warn
from gfs_core.actions.stop import Stop

INCLUDES: dict[str, tuple[str, ...]] = {
    "off": (),
    "log": ("log",),
    "warn": ("log", "warn"),
    "checkpoint": ("log", "warn", "checkpoint"),
    "stop": ("log", "warn", "checkpoint", "stop"),
    "skip": ("log", "warn", "skip"),
    "rescue": ("log", "warn", "skip", "rescue"),
}
"""The values of the option ``alarm``, each with the values whose actions it includes.

What ``skip`` and ``rescue`` do is decided at every step, not at alerts alone: :mod:`gfs_core.actions.rescue`.
"""

# For each action: the value of the option that it belongs to, and a function that makes it from a function that shows a
# warning. A new action is one more line here.
ACTIONS: list[tuple[str, Callable[[Callable[[str], None]], Action]]] = [
    ("warn", Warn),
    ("checkpoint", lambda warn: Checkpoint()),
    ("stop", lambda warn: Stop()),
]


def actions_for(alarm: str, warn: Callable[[str], None]) -> list[Action]:
    """The actions that are taken on each alert, in this order.

    Args:
        alarm: the value of the option ``alarm``.
        warn: shows a text.

    Raises:
        KeyError: the option has no such value.
    """
    return [make(warn) for value, make in ACTIONS if value in INCLUDES[alarm]]
