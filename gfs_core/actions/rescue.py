"""When a step is skipped, when the rate is lowered, and when the run goes back to a snapshot.

A step is skipped where an alarm is raised at it, or where an alarm lasts and the loss of the step is *bad*: not finite,
or above every loss of the last 50 quiet steps and back by a quarter of the way that it has fallen since the start (of
half the first loss at least, as that of a game of two networks never falls). So a small loss may rise, as after a
restart of the rate. A batch that is bad by itself has no effect then.

Where losses go on being bad although steps are skipped, the weights are to blame, and the run goes back. Only the loss
can call for that. An alarm of which the loss shows nothing is a forecast, and going back pays only where the run is
worse now than it was there. Where losses of an alarm are *high*, above all of the last 50 quiet ones, and not bad, the
rate is lowered. An alarm of which the loss shows nothing lowers nothing: most of those in healthy runs are such.

A run that has just begun has no quiet losses, and the early warning knows little of it. There a loss is bad that is
above three times the first one, without an alarm as well, and the run goes back if its weights have moved far, too. Of
the first 60 losses of 35 healthy trainings in ``benchmarks/zoo`` no eight in a row held four above 1.8 times the first.
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
WAIT = 20  # steps for which a lowered rate is given time to act on the losses
BEGINNING = 3.0  # times the first loss


class Decision(Enum):
    """What is done about the coming step."""

    TAKE = "take"
    SKIP = "skip"
    LOWER = "lower the rate"
    GO_BACK = "go back"


class Rescue:
    """Decides before each step whether it is taken, skipped, taken at a lower rate, or replaced by a way back.

    Args:
        goes_back: whether there is a way back and a rate to lower; otherwise steps are skipped only.

    Attributes:
        began: the step at which the present alarm was raised, or the first bad loss of a beginning was seen; ``None``:
            there is neither.
    """

    def __init__(self, goes_back: bool) -> None:
        self.goes_back = goes_back
        self.began: int | None = None
        self._first: float | None = None  # the first loss of the run
        self._again = False  # whether the next loss is of the first weights again
        self._quiet: deque[float] = deque(maxlen=QUIET)
        self._high: deque[bool] = deque(maxlen=LOOKED)  # of the losses since the alarm
        self._bad: deque[bool] = deque(maxlen=LOOKED)
        self._skipped = 0  # since the alarm
        self._lowered = -WAIT  # step at which the rate was lowered last

    @property
    def beginning(self) -> bool:
        """Whether the run has too few quiet losses yet to know its usual ones."""
        return len(self._quiet) < QUIET

    def decide(self, step: int, level: int, alerts: Iterable[Alert], losses: Iterable[float]) -> Decision:
        """What to do about the step.

        Args:
            step: optimizer steps taken so far.
            level: the level of the early warning, after it has seen this step.
            alerts: those of this step.
            losses: that of this step, and of earlier ones that were not known before.
        """
        losses = list(losses)
        self._note_first(losses)
        if level != AlertLevel.ALARM:
            return self._without_alarm(step, level, losses)
        alarmed = any(alert.level is AlertLevel.ALARM for alert in alerts)
        bad = [_above(loss, self._worst()) for loss in losses]
        self.began = step if self.began is None else self.began
        self._bad += bad
        self._high += [_above(loss, max(self._quiet, default=math.inf)) for loss in losses]
        if self.goes_back and sum(self._bad) >= BAD:
            return Decision.GO_BACK
        self._skipped = 0 if alarmed else self._skipped
        if (alarmed or any(bad)) and self._skipped < SKIPS:
            self._skipped += 1
            return Decision.SKIP
        if self.goes_back and sum(self._high) >= BAD and step - self._lowered >= WAIT:
            return Decision.LOWER
        return Decision.TAKE

    def _note_first(self, losses: list[float]) -> None:
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite or (self._first is not None and not self._again):
            return
        self._first = finite[0] if self._first is None else max(self._first, finite[0], key=abs)
        self._again = False

    def _without_alarm(self, step: int, level: int, losses: list[float]) -> Decision:
        if self.goes_back and self.beginning and self._first is not None:
            limit = BEGINNING * abs(self._first)
            self._bad += [_above(loss, limit) for loss in losses]
            self.began = step if self.began is None and any(self._bad) else self.began
            if sum(self._bad) >= BAD:
                return Decision.GO_BACK
            losses = [loss for loss in losses if loss <= limit]
        if not (self.beginning and any(self._bad) and self.goes_back):
            self._end()
        self._quiet += [loss for loss in losses if math.isfinite(loss)] if level == AlertLevel.QUIET else []
        return Decision.TAKE

    def _end(self) -> None:
        """Begin anew: there is no trouble any more."""
        self.began, self._skipped = None, 0
        self._bad.clear()
        self._high.clear()

    def _worst(self) -> float:
        """The loss above which one is bad during an alarm."""
        if self._first is None or not self._quiet:
            return math.inf
        usual = median(self._quiet)
        return max(*self._quiet, usual + SHARE * max(self._first - usual, abs(self._first) / 2))

    def lowered(self, step: int) -> None:
        """The rate was lowered at ``step``: the losses after it are counted anew."""
        self._lowered = step
        self._high.clear()

    def went_back(self, step: int) -> None:
        """The run has gone back at ``step``, and its rate was lowered: there is no alarm any more."""
        self._again = self.beginning
        self._lowered = step
        self._end()

    def stayed(self) -> None:
        """The run could not go back: the step is taken, and the losses after it are counted anew."""
        self._bad.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on."""
        return {
            "began": self.began,
            "first": self._first,
            "again": self._again,
            "quiet": list(self._quiet),
            "high": list(self._high),
            "bad": list(self._bad),
            "skipped": self._skipped,
            "lowered": self._lowered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.began = None if state["began"] is None else int(state["began"])
        self._first, self._again = None if state["first"] is None else float(state["first"]), bool(state["again"])
        self._quiet = deque(map(float, state["quiet"]), QUIET)
        self._high, self._bad = deque(map(bool, state["high"]), LOOKED), deque(map(bool, state["bad"]), LOOKED)
        self._skipped, self._lowered = int(state["skipped"]), int(state["lowered"])


def _above(loss: float, limit: float) -> bool:
    return not math.isfinite(loss) or loss > limit
