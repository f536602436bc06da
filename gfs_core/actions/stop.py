"""The action that ends the training."""

from __future__ import annotations

from gfs_core.actions.base import TrainerHandle
from gfs_core.detectors.base import Alert, AlertLevel


class Stop:
    """End the training at an alarm."""

    def act(self, alert: Alert, trainer: TrainerHandle) -> None:
        """Request the end of the training, if the alert is an alarm."""
        if alert.level is AlertLevel.ALARM:
            trainer.stop()
