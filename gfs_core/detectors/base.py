"""Levels and alerts of the early warning, and what a detector is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from gfs_core.detectors.advice import WHAT_TO_DO, advice
from gfs_core.signals.base import Reading


class AlertLevel(IntEnum):
    """How the run looks."""

    QUIET = 0
    WATCH = 1
    ALARM = 2


@dataclass(frozen=True)
class Alert:
    """A change of the level, or a new rise while an earlier one lasts.

    Attributes:
        step: the training step at which it was seen.
        level: the level from now on.
        reason: why, in a sentence.
        rule: which rule spoke: ``gradient``, ``second moment``, ``rise``, ``growth``, ``rate``, ``spike``, ``loss``,
            ``not finite``, or ``calm`` on the way down.
        layers: in which it began, the worst first, as far as the rule knows.
    """

    step: int
    level: AlertLevel
    reason: str
    rule: str
    layers: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """What to do, in a few words; empty below an alarm, and where nothing is known to help."""
        return advice(self.rule, self.step) if self.level is AlertLevel.ALARM else ""

    @property
    def text(self) -> str:
        """The reason, and what to do."""
        return self.reason + (f"{WHAT_TO_DO}{self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Finding:
    """What one reading says, by the rules of one detector.

    Attributes:
        level: how grave it is.
        reason: why, in a sentence.
        rule: which rule says so.
        usual: the usual value that the reading was compared with; ``None``: with none.
        rising: whether what the rule looks at still rises. One that lags behind may find a rise on the way back.
        layers: in which it began, the worst first; empty: not known.
    """

    level: AlertLevel = AlertLevel.QUIET
    reason: str = ""
    rule: str = "calm"
    usual: float | None = None
    rising: bool = True
    layers: tuple[str, ...] = ()


QUIET = Finding()
"""What nearly all readings say."""


class Detector(Protocol):
    """Rules that read the same stream of values, and the level that they have raised.

    A detector is made with the :class:`~gfs_core.detectors.profile.Profile` and the
    :class:`~gfs_core.detectors.context.Context` of its early warning, and listed in
    :mod:`~gfs_core.detectors.early_warning`.

    Attributes:
        name: under which its state is saved; no two detectors share one.
        reads: names of the keys whose readings it is given.
        by_layer: whether it is given those of layers too.
        track: its level.
    """

    name: str
    reads: tuple[str, ...]
    by_layer: bool
    track: Track

    def observe(self, reading: Reading) -> Finding | None:
        """Take in a reading that has a value, which may be not finite.

        Returns:
            What :meth:`Track.take` returned; ``None`` where the reading was passed over.
        """

    def forget(self) -> None:
        """Drop what was learnt of weights that are no longer trained."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next finding depends on: numbers, strings, lists and dictionaries."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off. A damaged state raises an exception of any type."""


_AT_LEAST = 5  # readings that take a level down, however many steps lie between them


class Ladder:
    """A level that goes up at once, and down by one after ``patience`` steps whose readings are all below it."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.level, self.calm = AlertLevel.QUIET, 0

    def take(self, found: AlertLevel, steps: int = 1) -> None:
        """Take in the level of one reading, so many steps after the one before."""
        if found >= self.level:
            self.level, self.calm = found, 0
        else:
            self.calm += min(steps, max(self.patience // _AT_LEAST, 1))
            if self.calm >= self.patience:
                self.level, self.calm = AlertLevel(self.level - 1), 0


class Track:
    """The level of one detector. It goes down when the run is *back*, not when it has got used to being broken.

    What is usual follows the run. So a reading may look quiet beside the latest ones while the run is still broken.
    Two ladders tell these apart: ``lately`` goes by the latest readings, and where it rises something new has begun;
    ``shown`` goes down only by readings that are also near what the run did before the rise.

    Args:
        readings: what the detector reads, in the plural, for messages.
        patience: readings in a row that take a ladder down one level; fewer where steps lie between them.
        rise_began: called where ``lately`` rises from quiet.

    Attributes:
        lately: the level beside what the run did lately.
        shown: the level until the run is back.
        usual: the usual value before the rise, of several rises the lowest; ``None`` where there is none.
        stood: the highest usual value while quiet; 0 before there is one.
    """

    def __init__(self, readings: str, patience: int, rise_began: Callable[[], None]) -> None:
        self.readings, self.patience, self._rise_began = readings, patience, rise_began
        self.reset()

    def reset(self) -> None:
        """Begin anew, quiet."""
        self.lately, self.shown = Ladder(self.patience), Ladder(self.patience)
        self._step = -1  # of the last reading that was told with its step
        self.usual: float | None = None
        self.stood = 0.0

    @property
    def level(self) -> AlertLevel:
        """The level until the run is back."""
        return self.shown.level

    def take(self, finding: Finding, back: bool = True, step: int | None = None) -> Finding | None:
        """Take in what a reading says.

        Args:
            finding: what it says beside the latest readings.
            back: whether it is near what the run did before the rise as well.
            step: of the reading, where steps may lie between readings; ``None``: none do.

        Returns:
            The finding; ``None`` where all was quiet and stays so.
        """
        steps = 1 if step is None else max(step - self._step, 1)
        self._step = self._step if step is None else step
        if finding.level is self.level is AlertLevel.QUIET:
            return None
        was_quiet = self.lately.level is AlertLevel.QUIET
        self.lately.take(finding.level, steps)
        if was_quiet and self.lately.level is not AlertLevel.QUIET:
            if finding.usual is not None:
                self.usual = finding.usual if self.usual is None else min(self.usual, finding.usual)
            self._rise_began()
        self.shown.take(finding.level if back else max(finding.level, self.level), steps)
        if self.level is AlertLevel.QUIET:
            self.usual = None
        return finding

    def stands(self, value: float) -> None:
        """Take in a usual value: while all is quiet the run stands it."""
        if self.level is AlertLevel.QUIET:
            self.stood = max(self.stood, value)

    def state_dict(self) -> dict[str, Any]:
        """Both ladders, the usual value before the rise, and what the run stood."""
        ladders = {"lately": self.lately, "shown": self.shown}
        saved: dict[str, Any] = {name: [int(ladder.level), ladder.calm] for name, ladder in ladders.items()}
        return {**saved, "usual": self.usual, "stood": self.stood, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            ValueError: a number is none that this can have saved.
        """
        for name, ladder in (("lately", self.lately), ("shown", self.shown)):
            level, calm = state[name]
            ladder.level, ladder.calm = AlertLevel(level), int(calm)
        usual = state["usual"]
        self.usual, self.stood = None if usual is None else positive(usual), float(state["stood"])
        self._step = int(state["step"])


def is_positive(value: float) -> bool:
    """Whether a number is finite and > 0; a ratio or a rate that is not is no measurement."""
    return 0 < value < math.inf


def positive(value: Any) -> float:
    """A saved number that has to be finite and > 0.

    Raises:
        ValueError: it is not.
    """
    if not is_positive(float(value)):
        raise ValueError(f"{value} is no positive number")
    return float(value)
