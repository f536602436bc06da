"""Sends the values to everything in ``report_to`` and to the log history, without the trainer's own logging."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from gfs_core import GFSWarning
from gfs_core.charts import WandbPanel, add_to_tensorboard

_EVENTS = "events.out.tfevents"
_STEP = "train/global_step"  # the trainer's key for the step


class Publisher:
    """Writes values under their own keys, at the trainer's step.

    The trainer's ``log`` is not used: trainers rewrite the keys of what it gets, and then drop their own next record.
    The values go directly to the TensorBoard folder, to the active W&B, trackio or MLflow run, and to
    ``state.log_history``. Where the trainer is known, they also go to its other reporting callbacks.

    Args:
        args: the training arguments.
        trainer: the trainer, where it is known.
    """

    def __init__(self, args: Any, trainer: Any = None) -> None:
        self.args, self.trainer = args, trainer
        self._writer: Any = None
        self._panel: WandbPanel | None = None
        unreached = [t for t in args.report_to or [] if t not in ("tensorboard", "wandb", "trackio", "mlflow")]
        if trainer is None and unreached:
            warnings.warn(
                f"gfs: `add_callback` alone cannot reach {', '.join(unreached)}; use "
                "`GFSCallback(...).set_trainer(trainer)` for that. The values are in the history file all the same",
                GFSWarning,
                stacklevel=4,
            )
        self._own_writer = False

    def publish(self, values: dict[str, float], state: Any, control: Any) -> None:
        """Log ``values`` at ``state.global_step``."""
        state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        if not state.is_world_process_zero:
            return
        targets = self.args.report_to or []
        if "tensorboard" in targets:
            self._tensorboard(values, state.global_step)
        wandb = sys.modules.get("wandb")
        if "wandb" in targets and wandb is not None and wandb.run is not None:
            if self._panel is None:
                self._panel = WandbPanel(wandb.run, _STEP)
            wandb.run.log({**values, _STEP: state.global_step})
            self._panel.add(values, state.global_step)
        trackio = sys.modules.get("trackio")
        if "trackio" in targets and trackio is not None and trackio.context_vars.current_run.get() is not None:
            trackio.log({**values, _STEP: state.global_step})
        if self.trainer is not None:
            for callback in self._others():
                callback.on_log(self.args, state, control, logs=dict(values), model=None)
            return
        mlflow = sys.modules.get("mlflow")
        if "mlflow" in targets and mlflow is not None and mlflow.active_run() is not None:
            mlflow.log_metrics(values, step=state.global_step)

    def close(self) -> None:
        """Close the event file if this object opened it, and draw the panel for the last time."""
        if self._panel is not None:
            self._panel.draw()
            self._panel = None
        if self._own_writer and self._writer is not None:
            self._writer.close()
        self._writer = None

    def _tensorboard(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._open()
            add_to_tensorboard(self._writer)
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def _open(self) -> Any:
        for callback in self._callbacks():
            if type(callback).__name__ == "TensorBoardCallback" and getattr(callback, "tb_writer", None) is not None:
                return callback.tb_writer
        folder = self._folder()
        if folder is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        self._own_writer = True
        return SummaryWriter(str(folder))

    def _folder(self) -> Path | None:
        """The trainer's TensorBoard folder: where its callback, which ran before this one, has made an event file."""
        named = os.environ.get("TENSORBOARD_LOGGING_DIR")
        if named:
            return Path(named).expanduser()
        files = list(Path(self.args.output_dir, "runs").glob(f"*/**/{_EVENTS}*"))
        return max(files, key=lambda f: f.stat().st_mtime).parent if files else None

    def _callbacks(self) -> list[Any]:
        return list(self.trainer.callback_handler.callbacks) if self.trainer is not None else []

    def _others(self) -> list[Any]:
        """The trainer's reporting callbacks, without those whose targets have been reached directly."""
        ours = ("TensorBoardCallback", "WandbCallback", "TrackioCallback")
        return [
            c
            for c in self._callbacks()
            if type(c).__module__.startswith("transformers.integrations") and type(c).__name__ not in ours
        ]
