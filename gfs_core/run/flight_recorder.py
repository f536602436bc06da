"""The flight recorder: it holds the readings of the latest steps, and writes them to a file when there is an alarm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.run import alarm_record
from gfs_core.run.alarm_record import AlarmRecord
from gfs_core.run.journal import Journal
from gfs_core.run.notices import Notices
from gfs_core.run.record import Measurement
from gfs_core.signals.base import Reading
from gfs_core.signals.training import LOSS, STEP_RATE

FOLDER = "alarms"  # beside the history
STEPS = 100  # up to an alarm
AFTER = 10  # steps after it, which show what came of it
FILES = 8  # of one run; the oldest is removed for a ninth
_LATE = 10  # steps by which a reading may come later than what it belongs to


# What was said at a step, as it came: the step, losses, the rate, a measurement, and readings of steps before it.
_Step: TypeAlias = tuple[int, Sequence[tuple[int, float, int]], float | None, Measurement | None, Sequence[Reading]]


class FlightRecorder:
    """Holds the readings of the latest steps, and writes a record of each alarm.

    A step costs a reference to what was read at it. An alarm is recorded when the level rises to it; further rises
    while it lasts are part of it. The file is written at once, in case the training ends there, and again
    :data:`AFTER` steps later. What was held is not part of a saved state: a resumed run begins anew.

    Args:
        journal: says where the history is, and which run this is; without a history nothing is held.
        label: returns the optimizer's name.
        notices: reports that a file cannot be written.
    """

    def __init__(self, journal: Journal, label: Callable[[], str], notices: Notices) -> None:
        self._journal, self._label, self._notices = journal, label, notices
        self._held: deque[_Step] = deque(maxlen=STEPS + AFTER + _LATE)
        self._latest = -1
        self._alarmed = False
        # An alarm whose later steps are still to come, and its file.
        self._open: tuple[int, Alert, Path | None] | None = None

    def take(
        self,
        step: int,
        losses: Sequence[tuple[int, float, int]],
        rate: float | None,
        measurement: Measurement | None,
        free: Sequence[Reading],
    ) -> None:
        """Take in what was read at a step.

        Args:
            step: optimizer steps taken so far.
            losses: for each step whose loss has arrived: the step, the loss, and the number of examples.
            rate: the learning rate of the coming step; ``None``: not known.
            measurement: the measurement of this step, if there is one.
            free: readings of the free signals that have arrived.
        """
        if self._journal.path is None:
            return
        if step < self._latest:  # training went back: what came after this step is no longer its past
            self.finish()
            self._held = deque((held for held in self._held if held[0] < step), self._held.maxlen)
        self._latest = step
        self._held.append((step, losses, rate, measurement, free))

    def look(self, step: int, alerts: Sequence[Alert], level: int | None) -> None:
        """Begin a record where the level has risen to *alarm*, and finish one whose steps are complete.

        Args:
            step: the step at which the history tells of the alerts.
            alerts: in their order.
            level: the present level; ``None``: there is no early warning.
        """
        for alert in alerts:
            if alert.level >= AlertLevel.ALARM and not self._alarmed and self._journal.path is not None:
                self.finish()
                self._open = (step, alert, None)
                self._write()
            self._alarmed = alert.level >= AlertLevel.ALARM
        self._alarmed = level is not None and level >= AlertLevel.ALARM
        if self._open is not None and step >= self._open[0] + AFTER:
            self.finish()

    def finish(self) -> None:
        """Write the record that is open, if there is one, with all that has come since."""
        if self._open is not None:
            self._write()
            self._open = None

    def forget(self, level: int | None) -> None:
        """Begin anew, at this level: a saved state was loaded, and what was held is not the past of the coming step."""
        self._held.clear()
        self._latest = -1
        self._alarmed = level is not None and level >= AlertLevel.ALARM

    def _write(self) -> None:
        assert self._open is not None
        step, alert, path = self._open
        with self._notices.harmless("an alarm is not recorded", alone=True):
            try:
                if path is None:
                    assert self._journal.path is not None
                    path = self._free_path(self._journal.path.parent / FOLDER, step)
                    self._open = (step, alert, path)
                found = self._measurements(step - STEPS + 1, step + AFTER)
                alarm_record.write(path, AlarmRecord(step, alert, self._journal.run, self._label(), found))
                for old in self._own_files(path.parent)[:-FILES]:
                    old.unlink(missing_ok=True)
            except OSError as error:
                self._notices.warn_once(
                    f"the record of an alarm cannot be written ({error}); training goes on without it"
                )
                self._open = None

    def _measurements(self, first: int, last: int) -> list[Measurement]:
        """What was read at each step, from ``first`` to ``last``."""
        readings: dict[int, list[Reading]] = {}
        reasons: dict[int, tuple[str, ...]] = {}
        for at, losses, rate, measurement, free in self._held:
            found = [Reading(LOSS, step, loss) for step, loss, _ in losses]
            found += [] if rate is None else [Reading(STEP_RATE, at, rate)]
            found += free
            if measurement is not None:
                found += measurement.readings
                reasons[at] = measurement.reasons
            for reading in found:
                readings.setdefault(reading.step, []).append(reading)
        label = self._label()
        return [
            Measurement.from_readings(step, label, readings[step], reasons.get(step, ()))
            for step in sorted(readings)
            if first <= step <= last
        ]

    def _own_files(self, folder: Path) -> list[Path]:
        """The records of this run, the oldest first."""
        found = folder.glob(f"step-*-{self._run}*.jsonl")
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def _free_path(self, folder: Path, step: int) -> Path:
        """A name that no file has: a run that was resumed may come to the same step again."""
        path, count = folder / f"step-{step:08d}-{self._run}.jsonl", 1
        while path.exists():
            count += 1
            path = folder / f"step-{step:08d}-{self._run}-{count}.jsonl"
        return path

    @property
    def _run(self) -> str:
        """The run's identifier, which may come from a saved state, as a part of a file's name."""
        return "".join(filter(str.isalnum, self._journal.run))
