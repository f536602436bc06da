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

Losses = list[tuple[Tensor | float, int | None]]
"""The loss of each micro-batch of a step, with its number of examples if known."""


class Uneventful(NamedTuple):
    """What training said of a step that waits.

    Attributes:
        step: optimizer steps taken before it.
        losses: of the step.
        rate: that of the optimizer's first group; ``None``: not known.
    """

    step: int
    losses: Losses
    rate: float | None


class Waiting:
    """The steps that wait, in their order."""

    def __init__(self) -> None:
        self.steps: list[Uneventful] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._highest = -math.inf  # of the latest losses
        self._rate: float | None = None  # the last one passed on

    def takes(self, step: int, losses: Losses, rate: float | None) -> bool:
        """Let a step wait, if it is no news; returns whether it waits."""
        if len(self.steps) >= _TOGETHER - 1 or not self._is_usual(rate):
            return False
        for loss, _ in losses:  # one on an accelerator is not looked at: reading it would wait
            if isinstance(loss, float) and not loss <= self._highest:
                return False
        self.steps.append(Uneventful(step, losses, rate))
        return True

    def _is_usual(self, rate: float | None) -> bool:
        return rate == self._rate or (rate is not None and self._rate is not None and rate <= _RISE * self._rate)

    def taken(self) -> list[Uneventful]:
        """The steps, which then wait no more."""
        held, self.steps = self.steps, []
        return held

    def passed_on(self, losses: Losses, rate: float | None) -> None:
        """Note what is usual now."""
        self._rate = rate
        self._recent.extend(loss for loss, _ in losses if isinstance(loss, float) and math.isfinite(loss))
        self._highest = max(self._recent, default=-math.inf)
