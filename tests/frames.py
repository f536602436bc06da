"""Whether a training's own code runs now, or a measurement that calls it again."""

from __future__ import annotations

import sys


def measured() -> bool:
    """Whether an adapter's ``_loss`` is among the next three callers of the function that asks.

    ``inspect.stack`` would look at every loaded module for each frame.
    """
    frame = sys._getframe(1).f_back
    for _ in range(3):
        if frame is None:
            return False
        if frame.f_code.co_name == "_loss":
            return True
        frame = frame.f_back
    return False
