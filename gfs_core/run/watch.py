"""The early warning of a run: its input, and the actions on its alerts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gfs_core.actions.base import Action, TrainerHandle
from gfs_core.detectors.base import Alert
from gfs_core.detectors.early_warning import EarlyWarning
from gfs_core.run.notices import Notices
from gfs_core.run.record import Measurement
from gfs_core.signals.base import Reading
from gfs_core.signals.training import STEP_RATE, loss_readings


class Requests:
    """An alarm's requests to a plain training loop.

    Attributes:
        should_stop: the loop should end the training.
        wants_checkpoint: the loop should save a checkpoint, and then set this to ``False``.
    """

    def __init__(self) -> None:
        self.should_stop = self.wants_checkpoint = False

    def save(self, step: int) -> None:
        """Request a checkpoint."""
        self.wants_checkpoint = True

    def stop(self) -> None:
        """Request the end of the training."""
        self.should_stop = True


class Watch:
    """An early warning, with the actions on its alerts.

    Args:
        warning: the early warning; ``None``: there is none.
        actions: taken on each alert, in this order.
        trainer: receives the requests of the actions.
        notices: reports that an action failed.
        function: called with each alert, after the actions; it may end the training by an exception of its own.
    """

    def __init__(
        self,
        warning: EarlyWarning | None,
        actions: Sequence[Action],
        trainer: TrainerHandle,
        notices: Notices,
        function: Callable[[Alert], object] | None = None,
    ) -> None:
        self.warning, self.actions, self.trainer = warning, actions, trainer
        self.notices, self.function = notices, function
        self._waiting: list[Alert] = []  # alerts that the function has not been called with yet

    @property
    def level(self) -> int | None:
        """The present level; ``None``: there is no early warning."""
        return None if self.warning is None else int(self.warning.level)

    def observe(
        self,
        step: int,
        losses: Iterable[tuple[int, float, int]],
        rate: float | None,
        measurement: Measurement | None,
        free: Iterable[Reading] = (),
    ) -> list[Alert]:
        """Pass the data of a step to the early warning, and act on its alerts.

        Args:
            step: optimizer steps taken so far.
            losses: for each step: the step, its loss, and the number of examples behind it (0: not known).
            rate: the rate that the coming step uses; ``None``: the rate is not judged.
            measurement: the measurement of this step, if there is one.
            free: readings of the free signals that have arrived, each of the step that it belongs to.

        Returns:
            The alerts.

        Raises:
            Exception: with ``strict=True``, an action failed.
        """
        if self.warning is None:
            return []
        readings = [] if rate is None else [Reading(STEP_RATE, step, rate)]
        for seen in losses:
            readings += loss_readings(*seen)
        readings += self.warning.in_order(free)
        if measurement is not None:
            readings += self.warning.in_order(measurement.readings)
        alerts = [alert for reading in readings if (alert := self.warning.observe(reading)) is not None]
        for alert in alerts:
            self._act(alert)
        return alerts

    def forget(self, step: int) -> None:
        """Tell the early warning that other weights are trained from now on."""
        alert = None if self.warning is None else self.warning.forget(step)
        if alert is not None:
            self._act(alert)

    def _act(self, alert: Alert) -> None:
        for action in self.actions:
            with self.notices.harmless(f"{type(action).__name__} did not act on an alert", alone=True):
                action.act(alert, self.trainer)
        if self.function is not None:
            self._waiting.append(alert)

    def call(self) -> None:
        """Call the function with each alert that it has not been called with yet.

        Raises:
            Exception: what the function raises.
        """
        while self._waiting and self.function is not None:
            self.function(self._waiting.pop(0))

    def state_dict(self) -> dict[str, Any] | None:
        """The state of the early warning; ``None``: there is none."""
        return None if self.warning is None else self.warning.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned."""
        if self.warning is not None and state is not None:
            self.warning.load_state_dict(state)
