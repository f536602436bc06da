"""The action that saves a checkpoint, so that there is one from before the damage."""

from __future__ import annotations

from gfs_core.actions.base import TrainerHandle
from gfs_core.detectors.base import Alert, AlertLevel


class Checkpoint:
    """Save a checkpoint at every alarm."""

    def act(self, alert: Alert, trainer: TrainerHandle) -> None:
        """Request a checkpoint, if the alert is an alarm."""
        if alert.level is AlertLevel.ALARM:
            trainer.save(alert.step)
