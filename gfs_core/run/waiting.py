"""Uneventful steps that wait to be passed on to the early warning and the history together.

After a training step the processor's caches hold its tensors, and every line of Python is several times as slow as in
a loop of its own. So a few uneventful steps are passed on one after the other. A step that may be news does not wait.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from torch import Tensor

_TOGETHER = 5  # steps that are passed on together
_RECENT = 50  # latest losses, above the highest of which one is passed on at once
_RISE = 1.1  # a rate that is so much higher than the last one passed on is passed on at once


class Uneventful(NamedTuple):
    """What training said of a step.

    Attributes:
        step: optimizer steps taken before it.
        losses: the loss of each micro-batch, with its number of examples if known.
        rate: the rate that the step uses; ``None``: it is not judged.
    """

    step: int
    losses: list[tuple[Tensor | float, int | None]]
    rate: float | None


class Waiting:
    """The steps that wait, in their order."""

    def __init__(self) -> None:
        self.steps: list[Uneventful] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._rate = math.inf

    def add(self, step: Uneventful) -> bool:
        """Let a step wait; returns whether all that wait are to be passed on now."""
        self.steps.append(step)
        news = len(self.steps) >= _TOGETHER or (step.rate is not None and step.rate > _RISE * self._rate)
        for loss, _ in step.losses:
            if isinstance(loss, float):  # another one is on an accelerator, and reading it would wait
                news = news or not (self._recent and loss <= max(self._recent))
                if math.isfinite(loss):
                    self._recent.append(loss)
        return news

    def take(self) -> list[Uneventful]:
        """The steps, which then wait no more."""
        held, self.steps = self.steps, []
        if held and held[-1].rate is not None:
            self._rate = held[-1].rate
        return held
