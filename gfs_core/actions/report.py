"""The action that shows a warning."""

from __future__ import annotations

from collections.abc import Callable

from gfs_core.actions.base import TrainerHandle
from gfs_core.detectors.base import Alert, AlertLevel


class Warn:
    """Show a warning for every alert, except for a return to quiet.

    Args:
        warn: shows a text.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn

    def act(self, alert: Alert, trainer: TrainerHandle) -> None:
        """Show the alert, if its level is above quiet."""
        if alert.level > AlertLevel.QUIET:
            self.warn(f"{alert.level.name.lower()} at step {alert.step}: {alert.text}")
