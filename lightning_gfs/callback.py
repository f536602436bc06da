"""The Lightning callback: finds the batch and the loss, and logs what the monitor measures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from gfs_core import Alert, ConfigError, GFSConfig, Measurement, MeasurementError, StabilityMonitor
from gfs_core.charts import WandbPanel, add_to_tensorboard
from gfs_core.config import Off, may_be_off
from gfs_core.help import filled_in
from gfs_core.loss.batches import batch_size
from gfs_core.run.budget import OverheadBudget
from gfs_core.run.guard import Guard, guarded
from gfs_core.run.measurable import unmeasurable
from gfs_core.run.micro_batches import opened
from gfs_core.run.second_data import SecondData, split_off
from lightning_gfs import _compat
from lightning_gfs.handle import LightningHandle
from lightning_gfs.steps import StepsSeen
from lightning_gfs.window import Window

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    _Base = Callback
else:
    _Base = type("_Base", _compat.callback_bases(), {})

LossFn = Callable[[Any, Any, int], Any]  # returns a Tensor; Any keeps the command-line help short
OnAlarm = Callable[[Alert], Any]

_MANUAL = (
    "this module uses manual optimization, whose `training_step` takes optimizer steps itself and cannot be run again; "
    "pass `GFSCallback(loss_fn=...)` with `loss_fn(module, batch, batch_idx)` returning the loss"
)
_STEPS_ITSELF = "under manual optimization `training_step` takes the steps, and their losses are known after them"
_RARE = (
    "the optimizer takes no step with some of the batches: what is measured is the loss of one batch, and where "
    "gradients of several are added up, the noise of a step, and with it the running and the mean-square ratio, is less"
)

_ON_BAR = ("/stability_ratio", "/running_stability_ratio")


class GFSCallback(_Base):
    """Logs how close each optimizer is to instability.

    Just before an optimizer step that is due, the module's own ``training_step`` is run again on the batches of the
    step, with the same dropout masks. Its effects are undone: nothing is logged twice, and no metric, buffer, random
    state or attribute of the module changes. Files, printed output and objects outside the module cannot be put back;
    give ``loss_fn`` where ``training_step`` touches those. With ``accumulate_grad_batches``, the loss measured is the
    mean over all batches of the step. Under manual optimization the measurement comes earlier: at the start of the
    batch, before ``training_step``.

    Args:
        loss_fn: ``loss_fn(module, batch, batch_idx)``, the loss to measure instead of ``training_step``'s. With
            several optimizers, a dictionary of such functions: one under a name of your choice for each optimizer, in
            the order of ``trainer.optimizers``.
        progress_bar: show the stability ratio in the progress bar.
        on_alarm: called with each :class:`~gfs_core.Alert` of the early warning.
        {options}

    Logs, under the step of Lightning's own values (with several optimizers as ``gfs/<name>/…``):
        {keys}

    One warning tells of a module that cannot be measured, or of a measurement that fails; training goes on.

    Raises:
        ConfigError: an option is unknown or out of its range; at the start of ``fit``, where one does not fit the
            optimizers.
        MeasurementError: with ``strict=True``, in ``fit``, where a measurement fails or nothing can be measured.

    Example:
        >>> from lightning_gfs import GFSCallback
        >>> GFSCallback(every=50, tier="sharpness").config.every
        50
    """

    def __init__(
        self,
        loss_fn: LossFn | Mapping[str, LossFn] | None = None,
        progress_bar: bool = False,
        on_alarm: OnAlarm | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._loader = split_off(options)
        self.config = GFSConfig.from_options(**options)
        self.loss_fn, self.progress_bar, self.on_alarm = loss_fn, progress_bar, on_alarm
        self.monitors: dict[str, StabilityMonitor] = {}
        self._guard = Guard(self.config.strict, self._give_up, on_alarm, self._budgets)
        self._losses: dict[str, LossFn | None] = {}
        self._resumed: dict[str, Any] = {}
        self._panels: list[WandbPanel] | None = None  # not yet set up
        self._window = Window()
        self._steps: dict[str, StepsSeen] = {}  # of each optimizer, under manual optimization only
        self._handle: LightningHandle | None = None
        self._unhook: Callable[[], None] | None = None
        self._step = 0  # the logger's, at the first micro-batch of the optimizer step

    @guarded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out what can be measured, and make the monitors, before training starts."""
        self._close()
        self.monitors, self._window = {}, Window()
        self._losses = self._losses_of(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if problem := unmeasurable(pl_module, optimizer):
                raise MeasurementError(problem)
        on_alarm = None if self.on_alarm is None else self._guard.alerts.append
        handle = self._handle = LightningHandle(trainer, self._guard)
        for name, optimizer in zip(self._losses, trainer.optimizers, strict=True):
            self.monitors[name] = StabilityMonitor(
                pl_module,
                optimizer,
                self.config,
                probe=self._second_data(trainer),
                name=name,
                on_alarm=on_alarm,
                trainer=handle,
            )
        for name, monitor in self.monitors.items():
            monitor.journal.path = self._history(trainer, name)
            if name in self._resumed:
                monitor.load_state_dict(self._resumed[name])
            monitor.protect(*_compat.stateful(trainer))
        self._resumed = {}  # a second `fit` starts anew
        self._unhook = _compat.after_batch_start(
            trainer, functools.partial(self.before_training_step, trainer, pl_module)
        )
        if not pl_module.automatic_optimization:
            self._steps = {name: StepsSeen(monitor.optimizer) for name, monitor in self.monitors.items()}
            for monitor in self.monitors.values():
                monitor.free.only_in_step = True
                if monitor.rescuing is not None:
                    monitor.rescuing.leave_out(_STEPS_ITSELF)

    @guarded
    def before_training_step(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch of a step that is due. All hooks at the start of the batch have run.

        Under manual optimization the module takes its steps inside ``training_step``, while autograd graphs are alive.
        So the step is measured here, before the ``training_step`` of its last micro-batch.
        """
        if not self.monitors or _compat.takes_no_step(trainer):
            return
        last = _compat.steps_with_this_batch(trainer, batch_idx)
        if self._window.over or batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _compat.logger_step(trainer)
            wanted = [monitor.wants(self._step) for monitor in self.monitors.values()]  # each asks the other processes
            self._window = Window(any(wanted))
        window = self._window
        window.over = last
        if window.keeping:
            window.keep(batch, batch_idx, pl_module)
        window.examples = batch_size(batch)
        if last and not pl_module.automatic_optimization:
            self._measure(trainer, pl_module)

    @guarded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of a micro-batch, except under manual optimization. A closure may run several times."""
        if not self.monitors or not pl_module.automatic_optimization or _compat.takes_no_step(trainer):
            return
        if self.loss_fn is None and loss.numel() == 1 and not self._window.measured:
            self._window.losses.append((_compat.unscaled(trainer, loss), self._window.examples))

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure here, except under manual optimization: all micro-batches are known, the weights not yet stepped."""
        if not self.monitors or _compat.takes_no_step(trainer) or not pl_module.automatic_optimization:
            return
        if not self._window.measured:
            self._record_losses()
            if not self._measure(trainer, pl_module):
                self._update_detectors(trainer, pl_module)

    def _record_losses(self) -> None:
        for monitor in self.monitors.values():
            for seen in self._window.losses:
                monitor.record_loss(*seen)
        self._window.losses = []

    def _update_detectors(self, trainer: Any, pl_module: Any) -> None:
        for name, monitor in self.monitors.items():
            warning = monitor.update_detectors(self._step)
            if warning is not None:
                self._publish(trainer, pl_module, warning, name, self._step)

    def _measure(self, trainer: Any, pl_module: Any) -> bool:
        """Measure the step, if its micro-batches were kept for that; returns whether they were."""
        window = self._window
        for monitor in self.monitors.values():
            monitor.read_gradients(self._step)
        if not window.keeping:
            window.forget()
            return False
        for (name, monitor), loss in zip(self.monitors.items(), self._losses.values(), strict=True):
            again = functools.partial(self._loss, trainer, pl_module, loss, window)
            measurement = monitor.step(again, window.batches, self._step, micro_batches=True)
            if measurement is not None:
                self._publish(trainer, pl_module, measurement, name, self._step)
        window.forget()
        return True

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint that an alarm wants; under manual optimization, hand the losses to the monitors."""
        if not self.monitors or _compat.takes_no_step(trainer):
            return
        if not pl_module.automatic_optimization:
            self._after_manual_step(trainer, pl_module, outputs, batch)
        if self._handle is not None:
            self._handle.end_step()

    def _after_manual_step(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        for name, steps in self._steps.items():
            if not steps.taken():
                self.monitors[name].remarks = (_RARE,)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.loss_fn is None and isinstance(loss, Tensor) and loss.numel() == 1:
            self._window.losses.append((loss, batch_size(batch)))
        self._record_losses()
        self._update_detectors(trainer, pl_module)

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the optimizers."""
        self._close()

    @guarded
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the optimizers."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """State of every monitor, so that a resumed run continues measuring where this one stopped."""
        return self._states() or {}

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state into the monitors; those that do not exist yet get it when ``fit`` starts."""
        self._resumed = dict(state_dict)
        for name, monitor in self.monitors.items():
            if name in self._resumed:
                monitor.load_state_dict(self._resumed[name])

    @guarded
    def _states(self) -> dict[str, Any]:
        return {name: monitor.state_dict() for name, monitor in self.monitors.items()}

    def _close(self) -> None:
        self._take_hooks_away()
        for panel in self._panels or ():
            panel.draw()
        self._panels = None

    def _budgets(self) -> list[OverheadBudget]:
        return [monitor.schedule.budget for monitor in self.monitors.values()]

    def _give_up(self) -> None:
        self._take_hooks_away()
        self.monitors = {}

    def _take_hooks_away(self) -> None:
        for monitor in self.monitors.values():
            monitor.close()
        for steps in self._steps.values():
            steps.close()
        self._steps = {}
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    def _losses_of(self, trainer: Any, module: Any) -> dict[str, LossFn | None]:
        """The loss of each optimizer by name; ``None``: that of the module's own ``training_step``.

        Raises:
            ConfigError: ``loss_fn`` names another number of losses than there are optimizers.
            MeasurementError: the loss of an optimizer is not known.
        """
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise MeasurementError(
                "`training_step(dataloader_iter)` takes its batches from the loader itself, so that none is known "
                "before it runs; take `batch` in place of `dataloader_iter`"
            )
        count = len(trainer.optimizers)
        if isinstance(self.loss_fn, Mapping):
            if len(self.loss_fn) != count:
                raise ConfigError(
                    f"`loss_fn` names {len(self.loss_fn)} losses ({', '.join(self.loss_fn)}) for {count} optimizers; "
                    "give one per optimizer, in the order of `trainer.optimizers`"
                )
            return dict(self.loss_fn)
        if count == 0 or type(trainer.optimizers[0]).__name__ == "_MockOptimizer":  # Lightning's stand-in for none
            raise MeasurementError("`configure_optimizers` returned no optimizer: nothing to measure")
        if count > 1:
            names = ", ".join(type(o).__name__ for o in trainer.optimizers)
            raise MeasurementError(
                f"there are {count} optimizers ({names}); pass `GFSCallback(loss_fn={{name: loss_fn, ...}})`, "
                "one `loss_fn(module, batch, batch_idx)` for each in this order"
            )
        if self.loss_fn is None and not module.automatic_optimization:
            raise MeasurementError(_MANUAL)
        return {"": self.loss_fn}

    def _second_data(self, trainer: Any) -> SecondData | None:
        if self._loader is None:
            return None
        prepared = functools.partial(_compat.prepared, trainer)
        return SecondData(self._loader, prepared, functools.partial(_compat.training_loaders, trainer))

    def _loss(self, trainer: Any, module: Any, loss_fn: LossFn | None, window: Window, batch: Any) -> Tensor:
        batch, beside, _ = opened(batch)
        batch_idx = beside.get("index", window.index)
        with _compat.quiet(trainer, module):
            if loss_fn is not None:
                return loss_fn(module, batch, batch_idx)  # type: ignore[no-any-return]
            out = module.training_step(batch, batch_idx) if takes_index(module) else module.training_step(batch)
        return out["loss"] if isinstance(out, Mapping) else out  # type: ignore[no-any-return]  # None: skipped

    def _history(self, trainer: Any, name: str) -> Path | None:
        path = Path(self.config.history) if self.config.history else None
        if path is None and trainer.loggers:
            folder = trainer.log_dir  # collective: every rank has to read it
            path = Path(folder) / "history.jsonl" if folder else None
        if path is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return None
        return path.with_stem(f"{path.stem}-{name}") if name else path

    def _publish(self, trainer: Any, module: Any, measurement: Measurement, name: str, step: int) -> None:
        values = measurement.as_log_dict()
        if name:
            values = {key.replace("gfs/", f"gfs/{name}/", 1): value for key, value in values.items()}
        if self._panels is None:
            self._panels = self._set_up_charts(trainer)
        for logger in trainer.loggers:
            with self._guard.tolerated(f"{type(logger).__name__} has not taken the values"):
                logger.log_metrics(values, step=step)
        for panel in self._panels:
            panel.add(values, step)
        if not trainer.barebones:
            # For callbacks that monitor a value, and the bar. `log` would take a millisecond for a few of them.
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
            shown = {key: value for key, value in values.items() if key.endswith(_ON_BAR)}
            trainer.progress_bar_metrics.update(shown if self.progress_bar else {})

    def _set_up_charts(self, trainer: Any) -> list[WandbPanel]:
        """Set up the charts of the loggers, before the first value: the user's hooks at the start have run by then."""
        panels = []
        for logger in trainer.loggers if trainer.is_global_zero else ():
            kinds = {kind.__name__ for kind in type(logger).__mro__}  # in both flavours of Lightning
            with self._guard.tolerated(f"{type(logger).__name__} has not taken the charts"):
                if "TensorBoardLogger" in kinds:
                    add_to_tensorboard(logger.experiment, self.monitors)
                elif "WandbLogger" in kinds:
                    run = logger.experiment
                    synced = getattr(getattr(run, "settings", None), "sync_tensorboard", False)
                    panels.append(WandbPanel(run, "global_step" if synced else "trainer/global_step"))
        return panels


def takes_index(module: Any) -> bool:
    """Whether ``training_step`` takes ``batch_idx``, as Lightning sees it."""
    parameters = inspect.signature(module.training_step).parameters
    return len(parameters) > 1 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())


def _declare_options() -> None:
    """Give ``__init__`` the options of :class:`~gfs_core.GFSConfig` as keywords with type, default and help."""
    init = GFSCallback.__init__
    hints = {name: hint | Off if may_be_off(hint) else hint for name, hint in get_type_hints(GFSConfig).items()}
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(GFSConfig)
    ]
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(annotation=_OWN.get(p.name, p.annotation)) for p in own]
    init.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    init.__annotations__ = {p.name: p.annotation for p in [*own[1:], *options]} | {"return": None}
    GFSCallback.__doc__ = filled_in(GFSCallback.__doc__)


_OWN: dict[str, Any] = {
    "loss_fn": LossFn | Mapping[str, LossFn] | None,
    "progress_bar": bool,
    "on_alarm": OnAlarm | None,
}
_declare_options()
