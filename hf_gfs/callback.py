"""The Trainer callback: finds the micro-batches and the loss, and logs what the monitor measures."""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gfs_core import Alert, ConfigError, GFSConfig, GFSWarning, Measurement, MeasurementError, StabilityMonitor
from gfs_core.errors import own_fault
from gfs_core.help import filled_in
from gfs_core.optimizers.thresholds import parameters_of
from gfs_core.run.budget import OverheadBudget
from gfs_core.run.guard import Guard, guarded
from gfs_core.run.measurable import unmeasurable
from gfs_core.run.second_data import SecondData, split_off
from hf_gfs.agreement import GradientMissing, Reference, disagreement
from hf_gfs.clipping import before_clipping
from hf_gfs.handle import TrainerControlHandle
from hf_gfs.publish import Publisher
from hf_gfs.replay import GivenLoss, ModelReplay, Replay, StepReplay, TrainerReplay

STATE_FILE = "gfs_state.pt"
_SET_TRAINER = "use `GFSCallback(...).set_trainer(trainer)` in place of `trainer.add_callback(GFSCallback(...))`"
_GIVE_LOSS = "give a loss that can be evaluated beside training, `GFSCallback(loss_fn=...)`"
_TRIES = 3  # due steps at which the loss fails before measuring ends: one bad batch is no reason
_measured: weakref.WeakKeyDictionary[nn.Module, tuple[int, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


class GFSCallback(TrainerCallback):  # type: ignore[misc]
    """Logs how close the optimizer is to instability.

    Just before an optimizer step that is due, the loss of that step is evaluated again on its own micro-batches, with
    the same dropout masks. Its effects are undone: training goes on bitwise as without the callback. There are three
    ways to the loss:

    - ``trainer.add_callback(GFSCallback())`` takes the loss that the model returns. Before the first measurement its
      gradient is compared with the trainer's. Where they differ (label smoothing, ``compute_loss_func``, an overridden
      ``compute_loss``), nothing is measured.
    - ``GFSCallback().set_trainer(trainer)`` calls the trainer's own ``compute_loss`` again. It is compared likewise.
    - ``GFSCallback(loss_fn=...).set_trainer(trainer)`` is for a trainer whose ``training_step`` never calls
      ``compute_loss``.

    Args:
        config: all options at once, for instance from :class:`~hf_gfs.GFSArguments`.
        loss_fn: ``loss_fn(model, inputs)``, the mean loss of one micro-batch, a 0-dim tensor, to measure instead of the
            trainer's. After ``set_trainer``, ``inputs`` is what ``training_step`` gets. Without it, ``inputs`` is a
            dictionary of what the model's ``forward`` gets, and the early warning uses the stability ratios alone. One
            warning tells where its gradient is not the trainer's.
        on_alarm: called with each :class:`~gfs_core.Alert` of the early warning.
        **options: those of :class:`~gfs_core.GFSConfig`, by name:
            {options}

    Logs, under the number of optimizer steps taken so far:
        {keys}

    Raises:
        ConfigError: an option is unknown or out of its range; at the start of training, where one does not fit the
            optimizer.
        MeasurementError: with ``strict=True``, in training, where a measurement fails or nothing can be measured.

    Example:
        >>> from hf_gfs import GFSCallback
        >>> GFSCallback(every=50, tier="sharpness").config.every
        50
    """

    def __init__(
        self,
        config: GFSConfig | None = None,
        *,
        loss_fn: GivenLoss | None = None,
        on_alarm: Callable[[Alert], Any] | None = None,
        **options: Any,
    ) -> None:
        self._loader = split_off(options)
        if config is not None and options:
            raise ConfigError(f"give either a config or options by name, not both ({', '.join(options)})")
        if config is not None and not isinstance(config, GFSConfig):
            raise ConfigError(f"`config` must be a GFSConfig, got {type(config).__name__}; see GFSArguments.config()")
        self.config = GFSConfig.from_options(**options) if config is None else config
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigError(f"`loss_fn` must be a function of the model and its inputs, got {loss_fn!r}")
        self.loss_fn, self.on_alarm = loss_fn, on_alarm
        self._guard = Guard(self.config.strict, self._close, on_alarm, self._budgets)
        self.monitor: StabilityMonitor | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._replay: Replay | None = None
        self._reference: Reference | None = None
        self._publisher: Publisher | None = None
        self._unhook: Callable[[], object] | None = None
        self._handle = TrainerControlHandle()
        self._verified = False
        self._failures = 0  # how often the loss failed before it was verified

    def set_trainer(self, trainer: Any) -> GFSCallback:
        """Measure the trainer's own loss, or ``loss_fn``; add this callback to the trainer unless it is there.

        Raises:
            ConfigError: ``trainer`` is not a trainer of transformers.
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None or not hasattr(trainer, "compute_loss"):
            raise ConfigError(f"`set_trainer` needs a transformers Trainer, got {type(trainer).__name__}")
        self._trainer = weakref.ref(trainer)
        if not any(c is self for c in handler.callbacks):
            trainer.add_callback(self)
        return self

    @guarded
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the monitor; load its state where training resumes from a checkpoint that holds it."""
        self._close()
        trainer = self._trainer() if self._trainer is not None else None
        # Some trainers pass a model class of their own to callbacks. A known trainer holds the module itself.
        model = kwargs.get("model") if trainer is None else trainer.model
        optimizer = kwargs.get("optimizer")
        if problem := unmeasurable(model, optimizer):
            held = trainer is None and not isinstance(model, nn.Module)  # the trainer may hold a module
            raise MeasurementError(f"{problem}. If the trainer holds one: {_SET_TRAINER}" if held else problem)
        assert isinstance(model, nn.Module)
        step, other = _measured.get(model, (0, None))
        if other is not None and other() not in (None, self) and step == id(state):
            _warn("there is a second GFSCallback on this trainer; it does nothing")
            return
        _measured[model] = (id(state), weakref.ref(self))
        later = None if self.on_alarm is None else self._guard.alerts.append
        second = None
        if self._loader is not None:
            training = kwargs.get("train_dataloader")
            second = SecondData(self._loader, self._prepared, lambda: [] if training is None else [training])
        self.monitor = StabilityMonitor(
            model, optimizer, self.config, probe=second, on_alarm=later, trainer=self._handle
        )
        beside = (kwargs.get("lr_scheduler"), getattr(optimizer, "scaler", None))
        self.monitor.protect(*(of for of in beside if of is not None))
        if self.monitor.journal.path is None and state.is_world_process_zero:
            self.monitor.journal.path = Path(args.output_dir) / "history.jsonl"
        self._publisher = Publisher(args, trainer)
        if trainer is None:
            self._replay = ModelReplay(model, self.loss_fn)
        elif self.loss_fn is None:
            self._replay = TrainerReplay(trainer, model)
        else:
            self._replay = StepReplay(trainer, model, self.loss_fn)
        if trainer is not None:
            self._unhook = before_clipping(trainer, functools.partial(self._read_gradients, state))
        self._verified, self._failures = False, 0
        if state.global_step > 0:
            self._resume(args, state)

    @guarded
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep this step's micro-batches where a measurement is due."""
        if self.monitor is None or self._replay is None:
            return
        due = self.monitor.wants(state.global_step)
        self._replay.start(due)
        if due and not self._verified and not getattr(args, "fp16", False):
            self._reference = Reference(parameters_of(self.monitor.optimizer))

    @guarded
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure here: all micro-batches of the step are known, and the weights have not yet been stepped."""
        if self.monitor is None or self._replay is None:
            return
        monitor, replay, due = self.monitor, self._replay, self._replay.keeping
        self._handle.control = control
        monitor.read_gradients(state.global_step, clipped_at=args.max_grad_norm or None)
        try:
            replay.end()
            usable = due and (self._verified or self._verify(monitor, replay))
            if self._failures == _TRIES:
                self._close()
                return
            if self.loss_fn is None or (self._verified and not monitor.remarks):  # else `loss_fn` is another loss
                for loss, examples in replay.losses:
                    monitor.record_loss(loss, examples)
            if usable:
                measurement = monitor.step(replay.again(), replay.inputs, state.global_step, micro_batches=True)
            else:
                measurement = monitor.update_detectors(state.global_step)
        finally:
            replay.clear()
        self._publish(measurement, state, control)

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the monitor's state in the trainer's checkpoint folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.monitor is None or not state.is_world_process_zero or not folder.is_dir():
            return
        held = {
            "step": state.global_step,
            "verified": self._verified,
            "remarks": list(self.monitor.remarks),
            "monitor": self.monitor.state_dict(),
        }
        part = folder / f"{STATE_FILE}.part"
        try:
            torch.save(held, part)
            os.replace(part, folder / STATE_FILE)
        except OSError as error:
            _warn(f"its state cannot be written to {folder} ({error}); a resumed run will start cold")

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take all hooks away."""
        self._close()

    def _prepared(self, batch: Any) -> dict[str, Any]:
        assert self._replay is not None
        return self._replay.prepared(batch)

    @guarded
    def _read_gradients(self, state: Any) -> None:
        if self.monitor is not None:
            self.monitor.read_gradients(state.global_step)

    def _publish(self, measurement: Measurement | None, state: Any, control: Any) -> None:
        """Log a measurement, where there is one."""
        if measurement is not None and self._publisher is not None:
            with self._guard.tolerated("a target of `report_to` has not taken the values"):
                self._publisher.publish(measurement.as_log_dict(), state, control)

    def _verify(self, monitor: StabilityMonitor, replay: Replay) -> bool:
        """Whether the replayed loss can be measured.

        Raises:
            MeasurementError: it is not the trainer's, and no ``loss_fn`` was given; with ``strict=True``, also where it
                could not be evaluated.
        """
        ranks, problem, unchecked = monitor.ranks, "", ""
        monitor.remarks = ()
        params = parameters_of(monitor.optimizer)
        try:
            with monitor.measuring.together():
                if not replay.inputs:
                    raise MeasurementError(replay.unseen)
                try:
                    problem = disagreement(replay, monitor.model, params, self._reference, ranks)
                except GradientMissing as error:
                    if isinstance(replay, ModelReplay) and self.loss_fn is None:
                        raise  # the model's loss may not be the trainer's
                    which = "some" if any(p.grad is not None for p in params) else "all"
                    unchecked = f"{error}; the values belong to the weights after the step, which {which} have taken"
                if ranks is not None and ranks.any(bool(problem)) and not problem:
                    problem = "on another rank"
        except Exception as error:
            if self.config.strict:
                raise
            self._not_evaluated(error)
            return False
        finally:
            if self._reference is not None:
                self._reference.close()
                self._reference = None
        self._failures, self._verified = 0, not unchecked
        if unchecked:
            monitor.remarks = (unchecked,)
        elif problem and self.loss_fn is not None:
            monitor.remarks = (f"`loss_fn` is not the loss that is trained here ({problem}); the values belong to it",)
        elif problem:
            exact = isinstance(replay, TrainerReplay)
            mend = "the trainer's loss does not repeat itself and cannot be measured" if exact else _SET_TRAINER
            raise MeasurementError(f"the loss of the training step could not be evaluated again ({problem}); {mend}")
        for remark in monitor.remarks:
            self._guard.tell(remark)
        return True

    def _not_evaluated(self, error: Exception) -> None:
        """Count a failure of the loss before it was verified, and warn of the first."""
        self._failures += 1
        why = own_fault(error)
        if not why:
            problem = str(error) if isinstance(error, MeasurementError) else f"{type(error).__name__}: {error}"
            name = "the loss of the training step" if self.loss_fn is None else "`loss_fn`"
            mend = f"; {_SET_TRAINER if self._trainer is None else _GIVE_LOSS}" if self.loss_fn is None else ""
            why = f"{name} could not be evaluated again ({problem}){mend}"
        self._guard.tell(f"{why}. It is tried at {_TRIES} due steps before nothing is measured any more", kind="tried")

    def _resume(self, args: Any, state: Any) -> None:
        given = getattr(args, "resume_from_checkpoint", None)
        folders = [Path(given)] if isinstance(given, str) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        path = next((f / STATE_FILE for f in folders if (f / STATE_FILE).is_file()), None)
        assert self.monitor is not None
        if path is None:
            _warn(f"no {STATE_FILE} in the checkpoint of step {state.global_step}; measuring starts cold")
            return
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            if held["step"] != state.global_step:
                raise ValueError(f"it belongs to step {held['step']}")
            self.monitor.load_state_dict(held["monitor"])
            self._verified = bool(held["verified"])
            self.monitor.remarks = tuple(map(str, held.get("remarks", ())))
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else ""
            _warn(f"{path} cannot be used ({type(error).__name__}: {why}); measuring starts cold")

    def _budgets(self) -> list[OverheadBudget]:
        return [] if self.monitor is None else [self.monitor.schedule.budget]

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            if _measured.get(self.monitor.model, (0, None))[1] in (None, weakref.ref(self)):
                _measured.pop(self.monitor.model, None)
        if self._replay is not None:
            self._replay.close()
        if self._reference is not None:
            self._reference.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._unhook is not None:
            self._unhook()
            self._unhook = None
        self.monitor = self._replay = self._reference = self._publisher = None


def _warn(text: str) -> None:
    warnings.warn(f"gfs: {text}", GFSWarning, stacklevel=3)


GFSCallback.__doc__ = filled_in(GFSCallback.__doc__)
