"""The monitor: when to measure, with what, and what to do when it fails."""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gfs_core.actions.rate import FIRST, PATIENCE, Control, at_scale
from gfs_core.config import GFSConfig, Tier
from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.detectors.early_warning import EarlyWarning
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError, NoLoss, own_fault
from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.linalg.vectors import Vector, clone
from gfs_core.loss.batches import (
    batch_size,
    changed,
    copied,
    examples_of,
    first_of_all,
    fraction_of,
    is_plain,
    rotating_part,
)
from gfs_core.loss.learned import Learned
from gfs_core.loss.memory import GIB, OverLimit, vector_bytes
from gfs_core.loss.parts import UNTRIED, normalises_over_batch, why_whole
from gfs_core.optimizers.learning_rate import LearningRateHook, rate_of
from gfs_core.optimizers.thresholds import parameters_of, stability_of, unwrap
from gfs_core.run import history
from gfs_core.run.losses import MeanLoss, MeansOfLosses, RecentLosses
from gfs_core.run.measurable import unmeasurable
from gfs_core.run.ranks import OtherRankFailed, Ranks, RanksLost
from gfs_core.run.record import Measurement
from gfs_core.run.schedule import Schedule
from gfs_core.run.scheduler import scheduler_of
from gfs_core.run.weights import Weights, fitted, moved, to_come
from gfs_core.signals.base import Key, Reading
from gfs_core.signals.measure import SOLVED, Running, WarmStart, measure
from gfs_core.signals.memory import peak_copies
from gfs_core.signals.training import STEP_RATE, BatchSizes, loss_readings

T = TypeVar("T")
_MIX_FIRST, _MIX_EVERY = 3, 10  # measurements that mix other directions into the warm start: 3, 13, 23 …
_MEMORY = 0.9  # weight of the past in the mean batch sharpness
# Reasons that nobody has to do anything about.
_PASSING = (
    "come with its first step",
    "the learning rate is 0",
    "the weights have not moved, or by less",
    "no eigenvalue of a curvature that is not symmetric",
)
_WAIT = 8  # measurements after which more examples are tried again; doubled by each failure for memory
_SURE = 3  # steps in a row that pass the control by before it is told
WHOLE_EVERY = 4  # times the interval of the running estimate where it needs whole batches: the price of one on a CPU


class StabilityMonitor:
    """Measures how close a run is to instability, now and then, without a trace in the training.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        config: the options; ``None``: the defaults.
        name: name of the optimizer in the log, where there are several.
        on_alarm: called with each change of the early warning's state; with several processes on each of them.
        alone: measure on this process only, whatever others do.
        short_batches: measure batches of less than half the usual examples too, such as the rest that ends an epoch.

    Attributes:
        control: what decides the learning rate's scale.
        alarm: the early warning; ``None`` where it is off.
        should_stop: whether the early warning asks for the end of the training (``alarm="stop"``).
        remarks: said with every measurement, beside its own reasons.
        wants_checkpoint: whether it asks for a checkpoint (``alarm_checkpoint=True``); whoever saves one takes it back.

    With several processes (an initialised default process group) every one of them makes a monitor at the same place
    and calls :meth:`step` for every optimizer step; the values are the same on all, and rank 0 alone writes.

    Raises:
        ConfigError: there is nothing to measure, or the rate of this optimizer cannot be controlled.

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
        name: str = "",
        on_alarm: Callable[[Alert], None] | None = None,
        alone: bool = False,
        short_batches: bool = False,
    ) -> None:
        self.model, self.optimizer, self.name = model, optimizer, name
        self.config = GFSConfig() if config is None else config
        self.ranks = None if alone else Ranks.here()
        self.writes = self.ranks is None or self.ranks.rank == 0
        self.history: Path | None = Path(self.config.history) if self.config.history and self.writes else None
        if problem := unmeasurable(model, optimizer):
            raise ConfigError(problem)
        params = parameters_of(optimizer)
        self._run = history.new_run()
        self._history_begun = self._resumed = False
        self._resumed_at: int | None = None
        self.count = 0  # optimizer steps seen, in a plain loop
        self.measured = self._solved = 0
        self._warm = WarmStart()
        self._learned = Learned()
        self._probe: list[Any] = []
        self._sizes = None if short_batches else BatchSizes()  # of the batches handed over to be measured
        self._told: set[str] = set()
        self._running = RunningBlocks()
        self._turn = 0  # running measurements so far: whose turn it is among the parts
        self._parts = self.config.running_parts
        self._splits: bool | None = None  # whether the loss of a batch is the mean over its parts; not known: None
        self._whole = ""  # why not
        self._fits: int | None = None  # examples of a probe that memory has room for, where it once had none; …
        self._narrow, self._wait = 0, _WAIT  # … measurements on so few since then, and before more are tried
        self._mean_loss = MeanLoss()
        self._batch_sharpness: float | None = None
        self._before: Vector | None = None  # the weights before the last step, …
        self._before_step = -1  # … for a measurement at this one
        self._weights = Weights()
        self._weights.changed(params)
        self._looked = -1  # step at which it was last looked whether the control acts
        self._why = "no measurement was made"  # the control has no ratio
        if self.config.probe == "fixed" and (self.config.probe_size or 256) < 256:
            self._warn_once(
                f"a fixed probe of {self.config.probe_size} examples is misleading: training fits its noise, and the "
                "trend of its sharpness has come out reversed; use probe='batch', or a larger fixed probe"
            )
        stability = stability_of(optimizer, params)
        if self.config.max_memory is not None:
            self._check_memory(params, self.config.max_memory, stability.adaptive or not stability.plain)
        self.alarm = None if self.config.alarm == "off" else EarlyWarning()
        self.on_alarm = on_alarm
        self._events: list[Alert] = []  # that it is still to be called with
        self.should_stop = self.wants_checkpoint = False
        self.remarks: tuple[str, ...] = ()
        self._losses = RecentLosses(None if self.alarm is None else self.ranks)
        self._means = MeansOfLosses()
        self._step_seen = 0
        self._scheduler = scheduler_of(optimizer)
        self.control = Control(self.config.control, self.config.margin, stability.adaptive)
        if self._scheduler is not None:
            self.control = self._scheduler.control
        if self._scheduler is not None and self.config.control != "observe":
            raise ConfigError(
                f"control={self.config.control!r} beside an EdgeOfStabilityLR, which controls the rate already: use one"
            )
        self._overlay: LearningRateHook | None = None
        if self._scheduler is None and self.config.control != "observe":
            self._overlay = LearningRateHook(optimizer, self.control)
        self._schedule = Schedule(self.config, self.control, stability.empirical, self.ranks)
        if stability.reason and not stability.adaptive:
            self._warn_once(stability.reason)

    def step(
        self,
        loss_fn: Callable[[Any], Tensor],
        batch: Any,
        step: int | None = None,
        *,
        micro_batches: bool = False,
        loss: Tensor | float | None = None,
    ) -> Measurement | None:
        """Measure, if a measurement is due at this step.

        Args:
            loss_fn: ``loss_fn(batch)``, a 0-dim tensor, the mean over the batch; called several times.
            batch: the current batch; read only.
            step: optimizer steps taken so far; ``None``: counted by the calls.
            micro_batches: ``batch`` is a list of micro-batches; what is measured is the mean of their losses.
            loss: the loss of this batch, where training has computed it: makes the running estimate less noisy.

        Returns:
            The measurement, or ``None`` where none was due or it failed. Where the early warning changes its state at
            a step without a measurement, one that holds nothing but that.

        Raises:
            Exception: with ``strict=True``, whatever made the measurement fail; what ``on_alarm`` raises, always.
        """
        if step is None:
            step = self.count
            self.count += 1
        batches = batch if micro_batches else [batch]
        if loss is not None:
            self.record_loss(loss, examples_of(batches))
        measurement = None
        with self._harmless("it was not looked whether the control acts"):
            self._look(step)
        wanted = False
        with self._harmless("a measurement is left out"):
            wanted = self.wants(step) and self._measurable(step)
            if wanted:
                measurement = self._step(loss_fn, batches, step)
        with self._harmless("nothing is measured along a step", alone=True):
            if wanted and self._schedule.needs_step(step + 1):
                self._keep_weights(step + 1)
        if measurement is not None and self.remarks:
            measurement = replace(measurement, reasons=(*measurement.reasons, *self.remarks))
        return self.watch(step, measurement)

    @contextlib.contextmanager
    def _harmless(self, without: str, alone: bool = False) -> Iterator[None]:
        """Around all that training calls: where it fails, that is told, and training goes on without it.

        A process that fails where it may owe the others an answer (not ``alone``) leaves them: they wait no longer than
        for one that has ended.
        """
        try:
            yield
        except Exception as error:
            if self.config.strict:
                raise
            why = f"{error}" if isinstance(error, MeasurementError) else f"{type(error).__name__}: {error}"
            why = own_fault(error) or why
            if self.ranks is not None and not alone and not isinstance(error, OtherRankFailed):
                self.ranks.lost = True
                without = "nothing is measured any more in this run"
            self._warn_once(f"{without}: {why}", own=True)

    def record_loss(self, loss: Tensor | float, examples: int | None = None) -> None:
        """Take in the loss of a training batch, for the running estimate and the early warning.

        Args:
            loss: the mean over the batch, 0-dim if a tensor.
            examples: those of the batch, if known: the early warning passes over the loss of a short one.
        """
        with self._harmless("the loss of a step is not taken in", alone=True):
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise MeasurementError(f"it has the shape {tuple(loss.shape)}, and is no number")
            if "running" in self._schedule.every:
                self._mean_loss.add(loss)
            self._losses.add(loss, examples)

    def watch(self, step: int, measurement: Measurement | None = None) -> Measurement | None:
        """Let the early warning look at the losses seen and at ``measurement``; :meth:`step` does it by itself.

        Returns:
            What is to be logged: the measurement, with the warning's state; or the state alone, where it changed.
        """
        self._step_seen = step
        if self._resumed:
            self._resumed, self._resumed_at, self._history_begun = False, step, False
        with self._harmless("it was not looked whether the control acts"):
            self._look(step)
        events: list[Alert] = []
        with self._harmless("the early warning has not seen a step"):
            self._mean_loss.end_step()
            now = measurement is not None
            losses: list[tuple[int, float, int]] = self._agreed(lambda: self._losses.up_to(step, now), [])
            events = self._warned(step, losses, measurement)
            self._keep_losses(losses)
        if events and measurement is None:
            measurement = Measurement(step, self._label())
        if measurement is not None:
            reasons = (*measurement.reasons, *(e.reason for e in events))
            state = None if self.alarm is None else int(self.alarm.level)
            # Of a run that has diverged, or at a rate that is no number: a value that is not finite is none.
            values = measurement.values()
            lost: dict[str, Any] = {name: None for name, value in values.items() if not math.isfinite(value)}
            measurement = replace(measurement, **lost, alarm=state, reasons=reasons)
            with self._harmless("a measurement is not in the history", alone=True):
                known = self._means.step == step  # else it was measured before the loss of its step was known
                self._write(measurement, self._means.take() if known else None)
        elif self._means.due:
            self._write_losses()
        while self._events and self.on_alarm is not None:  # it may end the training by an exception of its own
            self.on_alarm(self._events.pop(0))
        return measurement

    def _keep_losses(self, losses: list[tuple[int, float, int]]) -> None:
        """Take in losses for the history; an accelerator hands over several steps together."""
        for step, loss, _ in losses if self.history is not None else ():
            if self._means.due:
                self._write_losses()
            self._means.add(step, loss)

    def _write_losses(self) -> None:
        """Write a line for the losses alone."""
        with self._harmless("a loss is not in the history", alone=True):
            if (loss := self._means.take()) is not None:
                self._write(None, loss)

    def _warned(self, step: int, losses: list[tuple[int, float, int]], measurement: Measurement | None) -> list[Alert]:
        """The changes of the early warning's state at this step."""
        if self.alarm is None:
            return []
        readings: list[Reading] = []
        if not self.control.holding and self._rates_on_host():
            rate = self._rate()
            readings.append(Reading(STEP_RATE, step, rate * self._scale(rate)))
        for seen in losses:
            readings += loss_readings(*seen)
        if measurement is not None:
            for name in ("running_stability_ratio", "stability_ratio", "mean_square_stability_ratio"):
                readings.append(Reading(Key(name, ""), step, getattr(measurement, name)))
        events = [e for r in readings if (e := self.alarm.observe(r)) is not None]
        for event in events:
            self._act_on(event)
        return events

    def _write(self, measurement: Measurement | None, loss: tuple[float, float | None] | None) -> None:
        """Write a measurement, or the loss alone."""
        if self.history is None:
            return
        try:
            if not self._history_begun:
                history.begin(self.history, self._settings(), self._run, self.name, self._resumed_at)
                self._history_begun = True
            if measurement is not None:
                history.append(self.history, measurement, self._run, loss)
            elif loss is not None:
                mean = history.MeanOfLosses(self._means.step, *loss, self._label())
                history.append_losses(self.history, mean, self._run)
        except (OSError, ValueError) as error:  # a path may be no path at all
            self._warn_once(f"the history cannot be written ({error}); training goes on without it")
            self.history = None

    def _agreed(self, ask: Callable[[], T], otherwise: T) -> T:
        """What ``ask`` returns, which may ask the other processes; ``otherwise`` once one of them does not answer."""
        if self.ranks is not None and self.ranks.lost:
            return otherwise
        try:
            return ask()
        except RanksLost as error:
            self._failed(error)
            return otherwise

    def close(self) -> None:
        """Take the control's hooks off the optimizer, write the last losses, and leave the other processes."""
        if self._losses.ranks is None:  # others may have ended already, and would not answer
            self._keep_losses(self._losses.up_to(self._step_seen, now=True))
        self._write_losses()
        if self.ranks is not None:
            self.ranks.close()
        if self._overlay is not None:
            self._overlay.close()
            self._overlay = None

    def _act_on(self, event: Alert) -> None:
        if self.config.alarm in ("warn", "stop") and event.level > AlertLevel.QUIET:
            self._warn_once(f"{event.level.name.lower()} at step {event.step}: {event.reason}", always=True)
        if event.level is AlertLevel.ALARM:
            self.control.alarmed()
            self.should_stop = self.should_stop or self.config.alarm == "stop"
            self.wants_checkpoint = self.wants_checkpoint or self.config.alarm_checkpoint
        if self.on_alarm is not None:
            self._events.append(event)

    def _look(self, step: int) -> None:
        """Notice, once a step, where the control does not act, and where the weights are others than they were."""
        if step == self._looked or self.control.policy == "observe":
            return
        self._looked = step
        self._measurable(step)
        policy, ranks = self.control.policy, self.ranks
        if self.control.lost:
            self._complain(
                f"control={policy!r} starts from {FIRST} stability ratios, and had {self.control.seen} in {PATIENCE} "
                f"steps ({self._why}). It leaves the rate alone until it has them: lr_scale is 1. Mend what is in "
                "brackets, or use control='observe'"
            )
        if self._overlay is not None:
            alone: Callable[[bool], bool] = bool
            self._overlay.look(alone if ranks is None else lambda so: self._agreed(lambda: ranks.any(so), so))
            if self._overlay.passed_by >= _SURE:
                self._complain(
                    f"control={policy!r} does not act: the weights move without `optimizer.step()`, by other methods "
                    f"of {self._label()} or inside the backward pass, and it holds the rate of such steps alone. "
                    "lr_scale is 1. Step with `optimizer.step()` (sharpness-aware optimizers: with a closure), or use "
                    "control='observe'"
                )

    def _complain(self, reason: str) -> None:
        if self.config.strict:
            raise MeasurementError(reason)
        self._warn_once(reason)

    def _scale(self, rate: float) -> float:
        """The scale of the coming step; 1 where the control does not act."""
        passed_by = self._overlay is not None and self._overlay.passed_by > 0
        return 1.0 if passed_by else self.control.scale(rate)

    def _measurable(self, step: int) -> bool:
        """Whether there are weights to measure now; what was measured on others is dropped."""
        params = parameters_of(self.optimizer)
        if not params:
            self._warn_once("every weight that the optimizer holds is frozen: nothing is measured until one is trained")
            return False
        if to_come(self.model, params):
            return False
        device = self._weights.device
        if self._weights.changed(params):
            self._warm, self._running, self._before = WarmStart(), RunningBlocks(), None
            self._learned = Learned()
            self._batch_sharpness, self._solved = None, 0
            if self._weights.device != device:
                self._probe = [moved(b, device, self._weights.device) for b in self._probe]
            event = None if self.alarm is None else self.alarm.forget(step)
            if event is not None:
                self._act_on(event)
            self.control.renew()
            if self._scheduler is not None:
                self._scheduler.refresh()
        return True

    def _step(self, loss_fn: Callable[[Any], Tensor], current: list[Any], step: int) -> Measurement | None:
        if self._is_short(current):
            self._before = None
            return None
        tiers = self._due(step)
        filling = self.config.probe == "fixed" and len(self._probe) < self.config.probe_batches
        if not tiers and not filling:
            return None
        began = time.perf_counter()
        if self._splits is None and self._cuts(tiers, current) and not self._try_parts(loss_fn, current):
            self._before = None
            if tiers:
                self._schedule.clock.measured(began, time.perf_counter(), tiers, {})
            return None
        batches = self._limited(current, self.config.probe_size)
        if filling:
            missing = self.config.probe_batches - len(self._probe)
            try:
                self._probe += [copied(b) for b in batches[:missing]]
            except MeasurementError as error:
                if self.config.strict:
                    raise
                self._failed(error)
                return None
            if len(self._probe) < self.config.probe_batches:
                return None
        if not tiers:
            return None
        whole = self._probe if self.config.probe == "fixed" else batches
        probe = self._limited(whole, self._fits)
        measurement = None
        before = self._before if self._before_step == step else None
        seconds: dict[Tier, float] = {}
        self._before = None
        running = self._next_running(current) if "running" in tiers else None
        free = self._schedule.free(tiers)
        scale_before = self._scale(self._rate())
        try:
            with self.together():
                if "directional" in tiers and self.ranks is not None and self.ranks.any(before is None):
                    before = None  # one of them had no memory for it
                if running is not None:
                    known = self._mean_loss.value()
                    running.mean_loss = known if self._global is None else self._global.mean_of_known(known)
                if self.ranks is None or self._global is not None or self.writes:
                    measurement, seconds = self._measure(
                        lambda _model, b: loss_fn(b),
                        probe,
                        step,
                        tiers,
                        before=before,
                        running=running,
                        current=self._limited(batches, self._fits),
                        scale=scale_before,
                    )
                if self.ranks is not None:
                    measurement = self.ranks.same(measurement or Measurement(step, self._label()))
        except Exception as error:
            if self.config.strict and not _skips(error):
                raise
            if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OtherRankFailed) and error.memory):
                self._make_room(tiers, probe)
            self._failed(error)
        early = self.measured == 0 and self._before_second_moments()
        self._schedule.clock.measured(began, time.perf_counter(), tiers, seconds, early=early, free=free)
        self.measured += 1
        if measurement is None:
            return None
        self._try_more(whole)
        measurement = replace(
            measurement,
            seconds=self._schedule.clock.last,
            overhead=self._schedule.clock.overhead(),
            optimizer_name=self._label(),
            batch_sharpness=self._averaged(measurement.batch_sharpness),
        )
        for reason in measurement.reasons:
            if not any(words in reason for words in _PASSING):
                self._warn_once(reason)
        return self._controlled(measurement, scale_before)

    def _cuts(self, tiers: list[Tier], batches: list[Any]) -> bool:
        """Whether anything of these batches would be cut, on any process."""
        sizes = [size for b in batches if (size := batch_size(b)) is not None]
        limits = (self.config.probe_size, self._fits)
        cuts = any(limit is not None and limit < sum(sizes) for limit in limits)
        if self.config.micro_batch is not None:
            cuts = cuts or any(size > self.config.micro_batch for size in sizes)
        if "running" in tiers and self._parts > 1:
            cuts = cuts or any(size >= 4 for size in sizes)
        ranks = self.ranks
        return cuts if ranks is None else self._agreed(lambda: ranks.any(cuts), False)

    def _try_parts(self, loss_fn: Callable[[Any], Tensor], batches: list[Any]) -> bool:
        """Find out whether the loss of a batch is the mean over its parts; returns whether that is known now."""
        try:
            with self.together():
                why = ""
                if self.ranks is None or self._global is not None or self.writes:
                    why = why_whole(
                        self.model,
                        lambda _model, b: loss_fn(b),
                        batches,
                        parameters_of(self.optimizer),
                        self._parts,
                        precision=self._learned.precision_for(self.config.precision),
                        ranks=self._global,
                        max_memory=self.config.max_memory,
                    )
                whole = bool(why) if self.ranks is None else self.ranks.any(bool(why))
        except Exception as error:
            if self.config.strict and not _skips(error):
                raise
            self._failed(error)
            return False
        self._settle(not whole, why or "so another process has found")
        return True

    def _settle(self, splits: bool | None, why: str) -> None:
        """Go by what is known of the loss: on parts of batches, or on whole ones at a longer interval."""
        self._splits, self._whole = splits, "" if splits else why
        self._schedule.stretch = WHOLE_EVERY if splits is False else 1
        if splits is False:
            asked = [name for name in ("probe_size", "micro_batch") if getattr(self.config, name) is not None]
            ignored = f", and {' and '.join(asked)} cannot be used" if asked else ""
            if UNTRIED in why:
                self._warn_once(
                    "it is not known whether the loss of a batch is the mean over its parts, so whole batches are "
                    f"measured{ignored}: {why}"
                )
                return
            self._warn_once(
                f"the loss of a batch is not the mean over its parts, so whole batches are measured{ignored}: {why}"
            )

    def _limited(self, batches: list[Any], count: int | None) -> list[Any]:
        """The first ``count`` examples of several batches together, where their loss is a mean over examples."""
        return batches if self._splits is False else first_of_all(batches, count)

    def _next_running(self, batches: list[Any]) -> Running:
        """What the running estimate is measured on now: the part of a batch whose turn it is, or all of them."""
        turn, self._turn = self._turn, self._turn + 1
        if self._splits is False:
            # Weights in front of BatchNorm have no scale: noise makes them grow, and their curvature fall. A control
            # that counts it holds down runs that bear thirty times the rate; one that raises the rate needs it.
            lowers = self.control.policy in ("cap", "warmup")
            fraction = 0.0 if lowers and normalises_over_batch(self.model) else 1.0
            return Running(self._running, batches, fraction=fraction, stands_for=WHOLE_EVERY)
        place = turn // self._parts % len(batches)
        part = rotating_part(batches[place], self._parts, turn)
        if batch_size(part) != batch_size(batches[place]):
            others = [rotating_part(batches[place], self._parts, turn + 1)]
        else:
            others = [batches[(place + 1) % len(batches)]] if len(batches) > 1 else []
        return Running(self._running, [part], others, fraction_of(part, batches))

    def _is_short(self, batches: list[Any]) -> bool:
        """Whether a batch is too short, on any process, to be compared with what others have shown."""
        if self._sizes is None:
            return False
        short, ranks = self._sizes.short(examples_of(batches)), self.ranks
        return short if ranks is None else self._agreed(lambda: ranks.any(short), True)

    def _keep_weights(self, step: int) -> None:
        """Copy the weights before the optimizer step that ends at ``step``, where memory has room for them."""
        self._before, self._before_step = None, step if self.ranks is not None else -1  # the same on all processes
        try:
            self._before, self._before_step = clone(parameters_of(self.optimizer)), step
        except torch.OutOfMemoryError:
            if self.config.strict:
                raise
            self._warn_once("there is no memory for the weights before a step; nothing is measured along it", own=True)

    def _controlled(self, measurement: Measurement, before: float) -> Measurement:
        """What was measured at the scale ``before``, at that of the coming step: the control takes it in."""
        if self.control.policy == "observe":
            return measurement
        rate = self._rate()
        along = before / self.control.last  # what lies along the last step belongs to the rate that it was taken at
        if measurement.critical_lr is not None:
            measurement = replace(measurement, critical_lr=measurement.critical_lr / along)
        if self._schedule.leading == "directional" and measurement.stability_ratio is not None:
            measurement = replace(measurement, stability_ratio=measurement.stability_ratio * along)
        self.control.measured(rate * before, measurement)
        if self.control.waiting:
            self._why = "; ".join(measurement.reasons) or "the curvature found was not positive"
        scale = self._scale(rate)
        if self._scheduler is not None:
            self._scheduler.refresh()
        return replace(at_scale(measurement, scale / before), lr_scale=scale, lr_effective=rate * scale)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around a measurement: with several processes it is made by all of them or none."""
        if self.ranks is None:
            yield
            return
        with self.ranks.together():
            yield

    def wants(self, step: int) -> bool:
        """Whether :meth:`step` would do anything with a batch at this step."""
        filling = self.config.probe == "fixed" and len(self._probe) < self.config.probe_batches
        return filling or self.due(step) or self._schedule.needs_step(step + 1)

    def due(self, step: int) -> bool:
        """Whether a measurement is due: at the cadence of a tier, and only while the budget allows one."""
        return bool(self._due(step))

    def _due(self, step: int) -> list[Tier]:
        return self._agreed(lambda: self._schedule.due(step, stepped=self._before_step == step), [])

    @property
    def _global(self) -> Ranks | None:
        """The processes over whose losses the mean is measured."""
        return self.ranks if self.config.sync == "global" else None

    def _check_memory(self, params: list[Tensor], most: float, preconditioned: bool) -> None:
        needed = vector_bytes(params, peak_copies(self.config.cadence(), preconditioned)) / GIB
        if needed >= most:
            raise ConfigError(
                f"`max_memory` is {most} GiB, and the vectors of tier={self.config.tier!r} alone take {needed:.3g}; "
                "allow more, or use a cheaper tier ('running', 'directional')"
            )

    def _rates_on_host(self) -> bool:
        """Whether reading the rates waits for no accelerator."""
        rates = [g.get("lr") for g in unwrap(self.optimizer).param_groups]
        return all(not isinstance(rate, Tensor) or rate.device.type == "cpu" for rate in rates)

    def _rate(self) -> float:
        """The rate that the user's scheduler sets."""
        return rate_of(self.optimizer) if self._scheduler is None else self._scheduler.base_lr

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next measurement depends on; loadable with ``weights_only=True``."""
        return {
            "run": self._run,
            "count": self.count,
            "measured": self.measured,
            "solved": self._solved,
            "fits": self._fits,
            "room": [self._narrow, self._wait],
            "splits": [self._splits, self._whole],
            "sizes": [] if self._sizes is None else list(self._sizes.seen),
            "learned": self._learned.state_dict(),
            "warm": [self._warm.raw, self._warm.preconditioned],
            "probe": self._probe if is_plain(self._probe) else None,
            "before": [self._before_step, self._before],
            "running": [self._running.state_dict(), self._turn, self._parts, self._mean_loss.value()],
            "batch_sharpness": self._batch_sharpness,
            "clock": self._schedule.clock.state(),
            "control": self.control.state_dict(),
            "alarm": None if self.alarm is None else [self.alarm.state_dict(), self._losses.state()],
            "loss_seen": self._means.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off. A warm start that does not fit the model is dropped.

        A damaged state is left alone, with a warning: measuring goes on as it would have without it.

        Raises:
            ConfigError: with ``strict=True``, the state is damaged.
        """
        held = self.state_dict()
        try:
            self._load(state)
        except Exception as error:  # a checkpoint may hold anything
            self._running = RunningBlocks()
            self._load(held)
            text = f"the saved state is damaged ({type(error).__name__}: {error}); measuring starts without it"
            if self.config.strict:
                raise ConfigError(text) from None
            self._warn_once(text, own=True)
        else:
            self._resumed = True  # at the step that is seen next

    def _load(self, state: dict[str, Any]) -> None:
        run = state.get("run", self._run)
        if not isinstance(run, str) or not run:
            raise ValueError(f"`run` is {run!r}")
        self._run = run
        self.count, self.measured = int(state.get("count", 0)), int(state.get("measured", 0))
        self._solved, fits = int(state.get("solved", 0)), state.get("fits")
        self._fits = None if fits is None else max(int(fits), 1)
        self._narrow, self._wait = map(int, state.get("room", [0, _WAIT]))
        splits, why = state.get("splits", [None, ""])
        self._settle(None if splits is None else bool(splits), str(why))
        if self._sizes is not None:
            self._sizes = BatchSizes(state.get("sizes", ()))
        self._learned = Learned.from_state(state.get("learned", {}))
        params = parameters_of(self.optimizer)
        self._weights.changed(params)

        if self.ranks is not None and not self.ranks.inner_product(params).whole:
            state = {k: v for k, v in state.items() if k not in ("warm", "before", "running")}  # another rank's shards

        raw, preconditioned = (fitted(v, params) for v in state.get("warm", [None, None]))
        self._warm = WarmStart(raw, preconditioned)
        device = params[0].device if params else None
        kept = self.config.probe == "fixed" and self.ranks is None  # of several processes it is rank 0's alone
        probe = state.get("probe", [])
        if kept and probe is None:
            self._warn_once(
                "the fixed probe was not saved, its batches are of a class of their own; it is collected anew"
            )
        self._probe = [changed(b, lambda t: t.to(device)) for b in probe or []] if kept else []
        before_step, before = state.get("before", [-1, None])
        self._before_step, self._before = int(before_step), fitted(before, params)
        if "running" in state:
            running, turn, parts, mean_loss = state["running"]
            self._turn, self._parts = int(turn), max(int(parts), 1)
            if (vector := fitted(running["vector"], params)) is not None:
                self._running.load_state_dict({**running, "vector": vector})
            self._mean_loss.load(mean_loss)
        batch_sharpness = state.get("batch_sharpness")
        self._batch_sharpness = None if batch_sharpness is None else float(batch_sharpness)
        self._schedule.clock.load(state.get("clock", {}))
        self.control.load_state_dict(state.get("control", {}))
        if self.alarm is not None and state.get("alarm") is not None:
            alarm, losses = state["alarm"]
            self.alarm.load_state_dict(alarm)
            self._losses.load(losses)
        seen = state.get("loss_seen")  # as in a state of the first release
        self._means.resume(None if seen is None else int(seen))

    def _measure(
        self,
        loss_fn: Any,
        batches: list[Any],
        step: int,
        tiers: list[Tier],
        *,
        before: Vector | None,
        running: Running | None,
        current: list[Any],
        scale: float,
    ) -> tuple[Measurement, dict[Tier, float]]:
        config = self.config
        seed = config.seed + self.measured  # the same at a resumed step as in the uninterrupted run
        if tiers[-1] in SOLVED:
            self._solved += 1
        scaled = contextlib.nullcontext() if self._overlay is None else self._overlay.scaled(scale)
        with scaled:
            measurement, self._learned, seconds = measure(
                self.model,
                loss_fn,
                batches,
                self.optimizer,
                tiers=tiers,
                before=before,
                running=running,
                current=current,
                directional=config.directional,
                horizon=config.horizon,
                hvp=config.hvp,
                learned=self._learned,
                micro_batch=None if self._splits is False else config.micro_batch,
                max_memory=config.max_memory,
                precision=config.precision,
                check_precision=self._solved % _MIX_EVERY == 1,
                tol=config.tol,
                rtol=config.rtol,
                max_hvps=config.max_hvps,
                max_grads=config.max_grads,
                seed=seed,
                step=step,
                warm=self._warm,
                mix=self._solved % _MIX_EVERY == _MIX_FIRST,
                ranks=self._global,
            )
        return measurement, seconds

    def _before_second_moments(self) -> bool:
        stability = stability_of(self.optimizer, parameters_of(self.optimizer))
        return stability.adaptive and stability.threshold is None

    def _averaged(self, batch_sharpness: float | None) -> float | None:
        """The mean over batches so far, with the latest one; exponential in time."""
        if batch_sharpness is None:
            return None
        held = self._batch_sharpness
        self._batch_sharpness = batch_sharpness if held is None else _MEMORY * held + (1 - _MEMORY) * batch_sharpness
        return self._batch_sharpness

    def _failed(self, error: Exception) -> None:
        self._why = str(error)
        if not isinstance(error, NoLoss) or self.ranks is not None:  # of several processes each drops the same
            self._warm, self._running = WarmStart(), RunningBlocks()  # may have been in use when it broke off
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            why = str(error) if isinstance(error, OverLimit) else "a measurement ran out of memory"
            then = "the next one is on half as many examples"
            if self._splits is False:
                then = f"the batch cannot be cut: {self._whole}"
            self._warn_once(f"{why}; {then}", own=True)
        elif isinstance(error, RanksLost):
            self._warn_once(f"{error}; nothing is measured any more in this run", own=True)
        elif isinstance(error, OtherRankFailed):
            if not error.memory:
                self._settle(None, "")
            self._warn_once(str(error))
        elif isinstance(error, NoLoss):
            self._warn_once(str(error), own=True)
        elif fault := own_fault(error):
            self._warn_once(fault, own=True)
        else:
            self._settle(None, "")  # it may be that the batches have become others, which cannot be cut
            if isinstance(error, MeasurementError):
                self._warn_once(str(error), own=True)
                return
            self._warn_once(f"the loss failed when it was evaluated again: {type(error).__name__}: {error}", own=True)

    def _make_room(self, tiers: list[Tier], probe: list[Any]) -> None:
        """Halve what did not fit into memory: the part of the running estimate, or the probe, where they can be cut."""
        if tiers == ["running"]:
            self._parts *= 2
        elif count := examples_of(probe):
            self._fits = max(1, count // 2)
        self._narrow, self._wait = 0, 2 * self._wait

    def _try_more(self, whole: list[Any]) -> None:
        """After a while without a failure, twice as much as there was room for: memory may have become free."""
        if self._fits is None and self._parts <= self.config.running_parts:
            return
        self._narrow += 1
        if self._narrow < self._wait:
            return
        self._narrow = 0
        self._parts = max(self._parts // 2, self.config.running_parts)
        if self._fits is not None:
            self._fits = 2 * self._fits if 2 * self._fits < (examples_of(whole) or 0) else None

    def _warn_once(self, reason: str, always: bool = False, own: bool = False) -> None:
        if not (own or self.writes):  # what all of them know, one says
            return
        kind = re.sub(r"[0-9.e+-]+|\b(nan|inf)\b", "", reason)  # the same with other numbers is not told again
        if always or kind not in self._told:
            self._told.add(kind)
            where = f" of {self.name}" if self.name else ""
            warnings.warn(f"gfs: stability measurement{where}: {reason}", GFSWarning, stacklevel=3)

    def _settings(self) -> dict[str, Any]:
        """What the history begins with."""
        facts = {
            "version": version("gfs-sharpness"),
            "optimizer": type(unwrap(self.optimizer)).__name__,
            "parameters": sum(p.numel() for p in parameters_of(self.optimizer) if not is_lazy(p)),
            "processes": 1 if self.ranks is None else self.ranks.size,
        }
        return facts | asdict(self.config)

    def _label(self) -> str:
        return self.name or type(unwrap(self.optimizer)).__name__


def _skips(error: Exception) -> bool:
    """Whether the batch is one that training skips, which is no failure."""
    return isinstance(error, NoLoss) or (isinstance(error, OtherRankFailed) and error.skipped)
