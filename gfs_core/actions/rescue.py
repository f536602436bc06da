"""When a step is skipped, and when the run goes back to a snapshot.

A step is skipped where an alarm is raised at it, or where an alarm lasts and the loss of the step is *bad*: not finite,
or above every loss of the last 50 quiet steps and back by a quarter of the way that it has fallen since the start (of
half the first loss at least, as that of a game of two networks never falls). So a small loss may rise, as after a
restart of the rate. A batch that is bad by itself has no effect then.

Where losses go on being bad although steps are skipped, the weights are to blame, and the run goes back. Only the loss
can call for that. An alarm of which the loss shows nothing is a forecast, and going back pays only where the run is
worse now than it was there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from enum import Enum
from statistics import median
from typing import Any

from gfs_core.detectors.base import Alert, AlertLevel

# None of these was varied in a table.
SKIPS = 10  # steps of an alarm: a stretch of bad data ends, and a run whose weights are bad recovers by steps alone
BAD, LOOKED = 4, 8  # losses that are bad among so many since the alarm: three bad batches in a row are skipped alone
SHARE = 0.25  # of the way from the usual loss to the first one; at 0, healthy runs with restarts of the rate went back
QUIET = 50  # quiet losses that a bad one is above: as many as the early warning's loss rule takes for the usual one
ROLLBACKS = 5  # in a row: after five halvings, each held twice as long as the one before, the rate is not to blame
APART = 1000  # steps after a rollback from which on the next one is a first one again


class Decision(Enum):
    """What is done about the coming step."""

    TAKE = "take"
    SKIP = "skip"
    GO_BACK = "go back"


class Rescue:
    """Decides before each step whether it is taken, skipped, or replaced by a way back.

    Args:
        goes_back: whether there is a way back; otherwise steps are skipped only.

    Attributes:
        began: the step at which the present alarm was raised; ``None``: there is none.
    """

    def __init__(self, goes_back: bool) -> None:
        self.goes_back = goes_back
        self.began: int | None = None
        self._first: float | None = None  # the first loss of the run
        self._quiet: deque[float] = deque(maxlen=QUIET)
        self._bad: deque[bool] = deque(maxlen=LOOKED)  # of the losses since the alarm
        self._skipped = 0  # since the alarm
        self._rollbacks: list[int] = []  # steps of those in a row

    def decide(self, step: int, level: int, alerts: Iterable[Alert], losses: Iterable[float]) -> Decision:
        """What to do about the step.

        Args:
            step: optimizer steps taken so far.
            level: the level of the early warning, after it has seen this step.
            alerts: those of this step.
            losses: that of this step, and of earlier ones that were not known before.
        """
        if level != AlertLevel.ALARM:
            self.began, self._skipped = None, 0
            self._bad.clear()
            finite = [loss for loss in losses if math.isfinite(loss)]
            self._first = next(iter(finite), None) if self._first is None else self._first
            self._quiet += finite if level == AlertLevel.QUIET else []
            return Decision.TAKE
        alarmed = any(alert.level is AlertLevel.ALARM for alert in alerts)
        highest = self._highest()
        bad = [not loss <= highest or math.isinf(loss) for loss in losses]
        self.began = step if self.began is None else self.began
        self._bad += bad
        if self.goes_back and sum(self._bad) >= BAD:
            return Decision.GO_BACK
        self._skipped = 0 if alarmed else self._skipped
        if (alarmed or any(bad)) and self._skipped < SKIPS:
            self._skipped += 1
            return Decision.SKIP
        return Decision.TAKE

    def _highest(self) -> float:
        """The loss above which one is bad."""
        if self._first is None or not self._quiet:
            return math.inf
        usual = median(self._quiet)
        return max(*self._quiet, usual + SHARE * max(self._first - usual, abs(self._first) / 2))

    def may_go_back(self, step: int) -> bool:
        """Whether there were not too many rollbacks in a row already."""
        if self._rollbacks and step - self._rollbacks[-1] > APART:
            self._rollbacks = []
        return len(self._rollbacks) < ROLLBACKS

    @property
    def in_a_row(self) -> int:
        """Rollbacks in a row so far."""
        return len(self._rollbacks)

    def went_back(self, step: int) -> None:
        """The run has gone back at ``step``: there is no alarm any more."""
        self._rollbacks.append(step)
        self.began, self._skipped = None, 0
        self._bad.clear()

    def stayed(self) -> None:
        """The run could not go back: the step is taken, and the losses after it are counted anew."""
        self._bad.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on."""
        return {
            "began": self.began,
            "first": self._first,
            "quiet": list(self._quiet),
            "bad": list(self._bad),
            "skipped": self._skipped,
            "rollbacks": self._rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.began = None if state["began"] is None else int(state["began"])
        self._first = None if state["first"] is None else float(state["first"])
        self._quiet = deque(map(float, state["quiet"]), QUIET)
        self._bad = deque(map(bool, state["bad"]), LOOKED)
        self._skipped, self._rollbacks = int(state["skipped"]), [int(s) for s in state["rollbacks"]]
