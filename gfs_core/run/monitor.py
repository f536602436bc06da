"""The monitor, which a training loop or an adapter of a framework calls at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gfs_core.actions.base import TrainerHandle
from gfs_core.actions.catalog import actions_for
from gfs_core.actions.rate import Control
from gfs_core.config import BY_LOSSES, GFSConfig
from gfs_core.detectors.base import Alert
from gfs_core.detectors.early_warning import EarlyWarning
from gfs_core.errors import ConfigError
from gfs_core.loss.batches import examples_of
from gfs_core.optimizers.learning_rate import first_rate
from gfs_core.optimizers.thresholds import parameters_of, stability_of, unwrap
from gfs_core.run.due import DueMeasurements
from gfs_core.run.flight_recorder import FlightRecorder
from gfs_core.run.free import FreeSignals
from gfs_core.run.journal import Journal
from gfs_core.run.losses import RecentLosses, kept
from gfs_core.run.measurable import check_memory, unmeasurable
from gfs_core.run.measuring import Measuring
from gfs_core.run.notices import Notices
from gfs_core.run.probe import Probe
from gfs_core.run.ranks import Ranks
from gfs_core.run.rates import Rates
from gfs_core.run.record import Measurement
from gfs_core.run.rescuing import Rescuing
from gfs_core.run.rollback import Stateful
from gfs_core.run.schedule import Schedule
from gfs_core.run.scheduler import scheduler_of
from gfs_core.run.second_data import REMARK, SecondData
from gfs_core.run.waiting import Uneventful, Waiting
from gfs_core.run.watch import Requests, Watch
from gfs_core.run.weights import FROZEN, Weights, to_come
from gfs_core.signals.base import Reading
from gfs_core.signals.catalog import Signals


class StabilityMonitor:
    """Measures at intervals how close a run is to instability. Measuring leaves the training unchanged.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        config: the options; ``None``: the defaults.
        probe: a second data set: a loader whose first batches are measured in place of those that training uses, by the
            same loss. One batch is taken, or as many as hold ``probe_size`` examples; they are kept for the whole run.
            The early warning then goes by the losses alone. ``None``: ``config.probe`` says what is measured.
        name: name of the optimizer in measurements and warnings, where there are several.
        on_alarm: called with each alert of the early warning; with several processes, on each of them.
        trainer: receives an alarm's request to save or stop; ``None``: ``requests`` receives it.
        alone: measure on this process only, whatever other processes do.
        short_batches: also measure batches of less than half the usual size, such as the last one of an epoch.

    Attributes:
        rates: the learning rates, and the control that scales them.
        schedule: when each signal is due, and the budget.
        measuring: the signals with their state.
        watch: the early warning.
        rescuing: skips steps, lowers the rate and goes back, with ``control="guard"``, ``"start"``
            or ``"plateau"``, ``alarm="skip"`` or ``"rescue"``; ``None``: nothing does.
        recorder: holds the latest readings, for the record of an alarm.
        requests: an alarm's requests to a plain loop; see :attr:`should_stop` and :attr:`wants_checkpoint`.
        remarks: texts that are added to the reasons of every measurement.
        count: calls of :meth:`step` without a step number.

    With several processes (an initialised default process group), each process makes a monitor at the same place and
    calls :meth:`step` for every optimizer step. The values are the same on all processes. Only rank 0 writes.

    Raises:
        ConfigError: there is nothing to measure, ``max_memory`` is too small for the vectors, ``probe`` is no loader,
            or the learning rate of this optimizer cannot be controlled as asked.
        MeasurementError: another process does not make a monitor in time, or torch has no gloo backend.

    Example:
        In a plain loop, before ``optimizer.step()``::

            monitor = StabilityMonitor(model, optimizer)
            for batch in loader:
                loss = loss_of(batch)
                loss.backward()
                measurement = monitor.step(loss_of, batch)  # None on most steps
                optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: GFSConfig | None = None,
        *,
        probe: Iterable[Any] | SecondData | None = None,
        name: str = "",
        on_alarm: Callable[[Alert], object] | None = None,
        trainer: TrainerHandle | None = None,
        alone: bool = False,
        short_batches: bool = False,
    ) -> None:
        self.model, self.optimizer, self.name = model, optimizer, name
        self.config = GFSConfig() if config is None else config
        self.ranks = None if alone else Ranks.here()
        if problem := unmeasurable(model, optimizer):
            raise ConfigError(problem)
        second = None if probe is None else _second_data(probe, optimizer, self.config)
        params = parameters_of(optimizer)
        stability = stability_of(optimizer, params)
        self.notices = Notices(self.config.strict, self.ranks, name)
        signals = Signals()
        used = signals.named(self.config.intervals())
        check_memory(params, self.config, used, stability.adaptive or not stability.plain)
        # Before the control's hooks: those put the rates of a step back after it.
        self.free = FreeSignals(model, optimizer, self.config.max_overhead is not None, self.ranks, self.notices)
        self.rates = Rates(optimizer, self.config, stability.adaptive, self.notices)
        self.schedule = Schedule(self.config, self.control, stability.empirical, signals.all, self.ranks)
        self.free.counting = self.schedule.budget.counting
        data = Probe(self.config.probe, self.config.probe_size, short_batches, second)
        self.measuring = Measuring(model, optimizer, self.config, self.notices, self.ranks, signals, data)
        self._due = DueMeasurements(self.schedule, self.measuring, self.rates, self._label)
        self.requests = Requests()
        warning = None if self.config.alarm == "off" else EarlyWarning()
        actions = actions_for(self.config.alarm, self.notices.warn_always)
        self.watch = Watch(warning, actions, trainer or self.requests, self.notices, on_alarm)
        self._losses = RecentLosses(None if warning is None else self.ranks)
        self.rescuing: Rescuing | None = None
        if self.config.guarded or self.config.alarm == "skip" or self.rates.start is not None:
            shares, notices = (self.rates.lowered, self.rates.start, self.rates.plateau), self.notices
            self.rescuing = Rescuing(model, optimizer, self.watch, *shares, self.ranks, notices, self._changed)
        self.journal = Journal(self._settings, self._label, self.notices)
        if self.config.history and (self.ranks is None or self.ranks.rank == 0):
            self.journal.path = Path(self.config.history)
        self.recorder = FlightRecorder(self.journal, self._label, self.notices)
        self.remarks: tuple[str, ...] = ()
        self.count = 0
        self._weights = Weights()
        self._weights.changed(params)
        self._arrived: list[tuple[Tensor | float, int | None]] = []  # losses of the step that has not ended yet
        self._waiting = Waiting()
        self._alerts: list[Alert] = []  # of steps that were passed on before a measurement
        self._written: Measurement | None = None  # the latest line of the history
        self._quiet_from = self._quiet_until = -1
        self._looked = self._seen = -1  # the last steps of `_look` and of `update_detectors`
        self._resumed = False
        for doubt in (data.doubt, "" if stability.adaptive else stability.reason):
            if doubt:
                self.notices.warn_once(doubt)

    @property
    def control(self) -> Control:
        """The control of the learning rate."""
        return self.rates.control

    @property
    def should_stop(self) -> bool:
        """Whether an alarm has asked to end the training (``alarm="stop"``)."""
        return self.requests.should_stop

    @property
    def wants_checkpoint(self) -> bool:
        """Whether an alarm has asked for a checkpoint (``alarm="checkpoint"`` or ``"stop"``).

        The loop sets it to ``False`` after saving one.
        """
        return self.requests.wants_checkpoint

    @wants_checkpoint.setter
    def wants_checkpoint(self, wants: bool) -> None:
        self.requests.wants_checkpoint = wants

    def protect(self, *stateful: Stateful) -> None:
        """Let a rollback put these back too: learning-rate schedulers, a gradient scaler, an average of the weights.

        Call it before the first step. It does nothing unless the config says ``control="guard"``, ``"start"`` or
        ``alarm="rescue"``. The model and its optimizer need not be given. Without its scheduler, an optimizer that has
        one keeps its present rates.

        Args:
            stateful: have ``state_dict()`` and ``load_state_dict(state)``.
        """
        if self.rescuing is not None:
            self.rescuing.protect(*stateful)

    def step(
        self,
        loss_fn: Callable[[Any], Tensor],
        batch: Any,
        step: int | None = None,
        *,
        micro_batches: bool = False,
        loss: Tensor | float | None = None,
    ) -> Measurement | None:
        """Measure, if a measurement is due at this step. Call it once per optimizer step, before the step.

        Args:
            loss_fn: ``loss_fn(batch)`` returns a 0-dim tensor, the mean over the batch; called several times.
            batch: the current batch; it is not changed.
            step: optimizer steps taken so far; ``None``: the number of earlier calls without one.
            micro_batches: ``batch`` is a list of micro-batches; the mean of their losses is measured.
            loss: the loss of this batch, if training has computed it. It makes the running estimate less noisy, and
                the early warning needs it.

        Returns:
            The measurement; ``None`` if none was due or it failed. If the early warning raises an alert at a step
            without a measurement, and once in 50 steps without one: a measurement that holds the free signals and the
            warning's level only.

        Raises:
            Exception: with ``strict=True``, whatever made the measurement fail; what ``on_alarm`` raises, always.
        """
        with self.schedule.budget.counting():
            if step is None:
                step = self.count
                self.count += 1
            batches = batch if micro_batches else [batch]
            if loss is not None:
                self.record_loss(loss, examples_of(batches))
            self.read_gradients(step)
            self._look(step)
            measurement, wanted = None, False
            with self.notices.harmless("a measurement is left out"):
                wanted = self.wants(step) and self._trained(step)
                if wanted:
                    self._pass_on()
                    self.measuring.failure = ""
                    measurement = self._due.measure(loss_fn, batches, step)
                    self.rates.why = self.measuring.failure or self.rates.why
            if wanted:
                with self.notices.harmless("nothing is measured along a step", alone=True):
                    self._due.keep_weights(step)
            remarks = self.remarks if self.measuring.probe.second is None else (*self.remarks, REMARK)
            return self.update_detectors(step, None if measurement is None else measurement.because(remarks))

    def record_loss(self, loss: Tensor | float, examples: int | None = None) -> None:
        """Record the loss of a training batch, for the running estimate, the early warning and the history.

        Args:
            loss: the mean over the batch; a number, or a tensor with one element.
            examples: number of examples in the batch, if known; the early warning ignores the loss of a short batch.

        Raises:
            MeasurementError: with ``strict=True``, the tensor does not hold exactly one number.
        """
        with self.notices.harmless("the loss of a step is not taken in", alone=True):
            self._arrived.append((kept(loss), examples))

    def read_gradients(self, step: int, clipped_at: float | None = None) -> None:
        """Read the gradients of ``step`` for the free signals, before they are clipped; nothing waits for them.

        :meth:`step` calls it. Where nobody does before a step of the optimizer, they are read as it gets them. The
        first call at a step counts.

        Args:
            step: optimizer steps taken so far.
            clipped_at: the norm to which they have been clipped already, if theirs was larger; ``None``: not clipped.

        Raises:
            Exception: with ``strict=True``, whatever failed.
        """
        with self.notices.harmless("the gradients of a step were not read", alone=True):
            self.free.before_step(step, clipped_at)

    def update_detectors(self, step: int, measurement: Measurement | None = None) -> Measurement | None:
        """Give the recorded losses and ``measurement`` to the early warning, and write the history.

        :meth:`step` calls it; an adapter that measures by other means calls it once per step.

        Returns:
            What is to be logged: the measurement with the free signals and the warning's level. Without a measurement,
            these alone if there was an alert, or if nothing was logged for 50 steps; otherwise ``None``.

        Raises:
            Exception: with ``strict=True``, whatever failed; what ``on_alarm`` raises, always.
        """
        self._seen = self.free.step = step
        if measurement is None and self._may_wait(step):
            return None
        if self._resumed:
            self._resumed = False
            self.journal.resume(step)
        with self.schedule.budget.counting():
            self._look(step)
            self._pass_on(step, measurement)
            alerts, self._alerts = self._alerts, []
            level = self.watch.level
            done = self._rescue(step, alerts)
            if measurement is None and (alerts or done or self.free.unpublished(step)):
                again = self._written is not None and self._written.step == step  # a line more would hide that one
                measurement = self._written if again else Measurement(step, self._label())
            if measurement is None:
                self.journal.write_due_losses()
            else:
                reasons = [*done, *(a.text for a in alerts)]  # the last one of a rise is what the report says of it
                measurement = (
                    measurement.also(*self.free.publish(step))
                    .finite()
                    .with_ratio()
                    .having(alarm=level)
                    .because(reasons)
                )
                self.journal.write(measurement)
                self._written = measurement
            self.recorder.look(step, alerts, self.watch.level)
            self._expect(step)
        self.watch.call()
        return measurement

    def _may_wait(self, step: int) -> bool:
        """Let a step without news wait, where nothing may be due at it and the next; returns whether it waits.

        Most steps end here, so this is short.
        """
        if (
            not self._quiet_from < step < self._quiet_until - 1
            or self._resumed
            or self._alerts
            or self.free.unpublished(step)
        ):
            return False
        if self.rescuing is not None:  # a step that is to be skipped must be seen before it is taken
            return False
        if self.ranks is not None or self.control.policy != "observe" or self.rates.scheduled:
            return False
        if not self._waiting.takes(step, self._arrived, first_rate(self.optimizer)):
            return False
        self._arrived = []
        return True

    def _pass_on(self, step: int | None = None, measurement: Measurement | None = None) -> None:
        """Pass the steps that wait to the early warning and the journal, and then ``step`` with its measurement."""
        first = first_rate(self.optimizer)
        held = self._waiting.taken()
        if step is not None:
            held.append(Uneventful(step, self._arrived, first))
            self._arrived = []
        free = self._new_readings() if held else []
        with self.notices.harmless("the early warning has not seen a step"):
            rate = self.rates.effective() if held else None
            for seen in held:
                own = measurement if seen.step == step else None
                for loss, examples in seen.losses:
                    if "running" in self.schedule.every:
                        self.measuring.mean_loss.add(loss)
                    self._losses.add(loss, examples)
                self.measuring.mean_loss.end_step()
                losses = self._new_losses(seen.step, now=own is not None or self.rescuing is not None)
                if self.rescuing is not None:
                    self.rescuing.saw(loss for _, loss, _ in losses)
                judged = own if self.measuring.probe.second is None else None  # training's own curvature alone
                own_free = free if seen is held[-1] else [r for r in free if r.step <= seen.step]
                free = free[len(own_free) :]
                known = rate
                if rate is not None and seen.rate != first:  # a schedule moves all groups alike
                    known = rate * seen.rate / first if seen.rate is not None and first else None
                if self.watch.warning is not None:
                    self.recorder.take(seen.step, losses, known, own, own_free)
                self._alerts += self.watch.observe(seen.step, losses, known, judged, own_free)
                self.journal.add_losses(losses)
                self._waiting.passed_on(seen.losses, seen.rate)

    def _rescue(self, step: int, alerts: list[Alert]) -> list[str]:
        """Let the coming step be taken, skipped, or replaced by a way back; returns what was done, in words."""
        done: list[str] = []
        if self.rescuing is not None:
            with self.notices.harmless("a step was neither skipped nor gone back from"):
                done = self.rescuing.before_step(step, alerts)
        return done

    def _changed(self) -> None:
        """Other weights, or another rate, are used now: drop what was measured on those that are gone."""
        self.measuring.went_back()
        self.rates.refresh()

    def _expect(self, step: int) -> None:
        if not self._is_quiet(step + 1):
            with self.notices.harmless("the gradients of the coming step are not looked at", alone=True):
                self._due.expect(step)

    def wants(self, step: int) -> bool:
        """Whether :meth:`step` needs a batch at this step: to measure, to fill a fixed probe, or to keep weights."""
        return not self._is_quiet(step) and self._due.wants(step)

    def _is_quiet(self, step: int) -> bool:
        """Whether nothing may be due at ``step``; found out once for the steps up to the next one that may need it."""
        if step == self._quiet_until:
            return False
        if not self._quiet_from < step < self._quiet_until:
            self._quiet_from, self._quiet_until = step - 1, self._due.quiet_until(step - 1)
        return step < self._quiet_until

    def due(self, step: int) -> bool:
        """Whether a measurement is due at this step, by the signals' intervals, the budget and the control."""
        return bool(self._due.names(step))

    def close(self) -> None:
        """Write what is not written yet, leave the process group, and take the control's hooks off the optimizer."""
        if self.ranks is None:
            self._pass_on()
        if self._losses.ranks is None:  # other processes may have ended already, and would not answer
            losses = self._losses.up_to(self._seen, now=True)
            self.journal.add_losses(losses)
            if losses:
                self.recorder.take(self._seen, losses, None, None, ())
        self.journal.write_losses()
        self.recorder.finish()
        if self.ranks is not None:
            self.ranks.close()
        self.measuring.clipping.close()
        self.free.close()
        self.rates.close()
        if self.rescuing is not None:
            self.rescuing.close()

    def state_dict(self) -> dict[str, Any]:
        """All state that the next measurement depends on; loadable with ``weights_only=True``."""
        if self.ranks is None:
            self._pass_on()
        return {
            "count": self.count,
            "journal": self.journal.state_dict(),
            "measuring": self.measuring.state_dict(),
            "budget": self.schedule.budget.state_dict(),
            "control": self.control.state_dict(),
            "free": self.free.state_dict(),
            "watch": self.watch.state_dict(),
            "losses": self._losses.state(),
            "rescuing": None if self.rescuing is None else self.rescuing.state_dict(),
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Vectors that do not fit the model are dropped.

        A damaged state is ignored with a warning, and measuring goes on without it.

        Raises:
            ConfigError: with ``strict=True``, the state is damaged.
        """
        held = self.state_dict()
        try:
            self._load(state)
        except Exception as error:  # a damaged checkpoint may hold anything
            self.measuring.signals.forget()
            self._load(held)
            self.notices.damaged(error)
        else:
            self._resumed = True  # the next step is where training was resumed

    def _load(self, state: dict[str, Any]) -> None:
        self.recorder.finish()
        self.journal.load_state_dict(state["journal"])
        self.count = int(state["count"])
        self._weights.changed(parameters_of(self.optimizer))
        self.measuring.load_state_dict(state["measuring"])
        self.schedule.budget.load_state_dict(state["budget"])
        self.control.load_state_dict(state["control"])
        self.free.load_state_dict(state["free"])
        self.watch.load_state_dict(state["watch"])
        self.recorder.forget(self.watch.level)
        self._losses.load(state["losses"])
        if self.rescuing is not None and state.get("rescuing") is not None:
            self.rescuing.load_state_dict(state["rescuing"])
        self._waiting, self._arrived = Waiting(), []
        self._seen, self._quiet_from, self._quiet_until = int(state["seen"]), -1, -1
        self._expect(self._seen)

    def _look(self, step: int) -> None:
        """Under a control, check once a step whether other weights are trained now, and whether the control acts."""
        if step == self._looked or not self.rates.acting:
            return
        self._looked = step
        with self.notices.harmless("it was not looked whether the control acts"):
            self._trained(step)
            self.rates.look(self._label(), lambda so: self.measuring.agreed(so, so))

    def _trained(self, step: int) -> bool:
        """Whether there are weights to measure now; state that belongs to other weights is dropped."""
        params = parameters_of(self.optimizer)
        if not params:
            self.notices.warn_once(FROZEN)
            return False
        if to_come(self.model, params):
            return False
        device = self._weights.device
        if self._weights.changed(params):
            self.measuring.forget()
            if self._weights.device != device:
                self.measuring.probe.move(device, self._weights.device)
            self.watch.forget(step)
            self.rates.renew()
        return True

    def _new_losses(self, step: int, now: bool) -> list[tuple[int, float, int]]:
        return self.measuring.answered(lambda: self._losses.up_to(step, now), [])

    def _new_readings(self) -> list[Reading]:
        return self.measuring.answered(self.free.arrived, [])

    def _settings(self) -> dict[str, Any]:
        """The settings that the history begins with: facts about the training, and the options."""
        facts = {
            "version": version("gfs-sharpness"),
            "optimizer": type(unwrap(self.optimizer)).__name__,
            "parameters": sum(p.numel() for p in parameters_of(self.optimizer) if not is_lazy(p)),
            "processes": 1 if self.ranks is None else self.ranks.size,
        }
        probe = {} if self.measuring.probe.second is None else {"probe": "loader"}
        return facts | asdict(self.config) | probe

    def _label(self) -> str:
        return self.name or type(unwrap(self.optimizer)).__name__


def _second_data(probe: Iterable[Any] | SecondData, optimizer: Any, config: GFSConfig) -> SecondData:
    """The second data set that a monitor was given.

    Raises:
        ConfigError: ``probe`` is no loader, or contradicts the options.
    """
    second = probe if isinstance(probe, SecondData) else SecondData(probe)
    if config.probe != "batch":
        raise ConfigError(f"there is a loader for `probe=`, and the config says probe={config.probe!r}; leave one out")
    scheduler = scheduler_of(optimizer)
    policy = config.control if scheduler is None else scheduler.control.policy
    if policy not in ("observe", *BY_LOSSES):
        raise ConfigError(
            f"control={policy!r} goes by the curvature of the loss that is trained, and `probe=` is a loader of other "
            "data; use control='observe', 'guard', 'start' or 'plateau', or probe='batch'"
        )
    return second
