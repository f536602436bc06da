"""What an action on an alert may ask of the Trainer."""

from __future__ import annotations

from typing import Any


class TrainerControlHandle:
    """Sets the flags of a Trainer's control.

    Attributes:
        control: the control object of the present hook; the Trainer may pass another one to the next.
    """

    def __init__(self) -> None:
        self.control: Any = None

    def save(self, step: int) -> None:
        """Ask for a checkpoint after this step."""
        self.control.should_save = True

    def stop(self) -> None:
        """End the training after this step."""
        self.control.should_training_stop = True
