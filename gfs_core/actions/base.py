"""The types of acting on alerts."""

from __future__ import annotations

from typing import Protocol

from gfs_core.detectors.base import Alert


class TrainerHandle(Protocol):
    """The requests that an action may make of the training loop. Each adapter implements it."""

    def save(self, step: int) -> None:
        """Save a checkpoint now, or as soon as the step has ended."""

    def stop(self) -> None:
        """End the training after this step."""


class Action(Protocol):
    """An action on alerts."""

    def act(self, alert: Alert, trainer: TrainerHandle) -> None:
        """Act on the alert; do nothing if its level does not call for the action."""
