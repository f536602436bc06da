"""What an action on an alert may ask of Lightning's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gfs_core.run.guard import Guard


class LightningHandle:
    """Saves and stops on behalf of an action.

    Args:
        trainer: Lightning's trainer.
        guard: warns where a checkpoint could not be saved.
    """

    def __init__(self, trainer: Any, guard: Guard) -> None:
        self.trainer, self.guard = trainer, guard
        self._wanted: int | None = None  # the step of an alarm that wants a checkpoint

    def save(self, step: int) -> None:
        """Save a checkpoint once the step has ended: within it, Lightning's counters do not fit the weights."""
        self._wanted = step

    def end_step(self) -> None:
        """Save what is wanted, in the folder of the trainer's own checkpoints; nothing under ``fast_dev_run``."""
        trainer, step, self._wanted = self.trainer, self._wanted, None
        if step is None or trainer.fast_dev_run:
            return
        callback = trainer.checkpoint_callback
        folder = (callback.dirpath if callback is not None else None) or trainer.log_dir or trainer.default_root_dir
        with self.guard.tolerated("the checkpoint at an alarm was not saved"):
            trainer.save_checkpoint(Path(folder) / f"gfs-alarm-step={step}.ckpt")

    def stop(self) -> None:
        """End the training after this batch."""
        self.trainer.should_stop = True
