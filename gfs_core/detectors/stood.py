"""What a run has stood: a rise that it came through before is no news when it comes again."""

from __future__ import annotations

from collections import deque
from typing import Any

from gfs_core.detectors.context import Context
from gfs_core.detectors.profile import Profile


class Stood:
    """The highest score of a rule that no harm followed, and the strictness that follows from it.

    A score counts once so many steps have passed, and the loss was never far above its best meanwhile.

    Args:
        alarm: the score from which on the rule is an alarm.
        profile: how long a score waits, and how much stricter the rule may become.
        context: what the losses say.
    """

    def __init__(self, alarm: float, profile: Profile, context: Context) -> None:
        self._alarm, self._profile, self._context = alarm, profile, context
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.highest = 0.0
        self._waiting: deque[tuple[int, float]] = deque()

    def add(self, step: int, score: float) -> None:
        """Take in the score of a step; 0 while nothing is judged."""
        self._waiting.append((step, score))
        if self._context.harmed:
            self._waiting.clear()
        while self._waiting and self._waiting[0][0] <= step - self._profile.stood_steps:
            self.highest = max(self.highest, self._waiting.popleft()[1])

    @property
    def strictness(self) -> float:
        """What the thresholds of the rule are multiplied by, ≥ 1."""
        above = self._profile.above_stood * self.highest / self._alarm
        return min(max(above, 1.0), self._profile.most_strict)

    def state(self) -> dict[str, Any]:
        """The highest score, and those that wait."""
        return {"highest": self.highest, "waiting": [list(held) for held in self._waiting]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` left off."""
        self.highest = float(state["highest"])
        self._waiting = deque((int(step), float(score)) for step, score in state["waiting"])
