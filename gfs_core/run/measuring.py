"""The measurements of a run: the state that lasts from one to the next, and the handling of failures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gfs_core.config import GFSConfig
from gfs_core.errors import MeasurementError, NoLoss, own_fault
from gfs_core.loss.learned import Learned
from gfs_core.loss.memory import OverLimit
from gfs_core.loss.parts import UNTRIED, why_whole
from gfs_core.optimizers.thresholds import parameters_of
from gfs_core.run.clipping import ClippingFactor
from gfs_core.run.iterates import Iterates
from gfs_core.run.losses import MeanLoss
from gfs_core.run.notices import Notices
from gfs_core.run.probe import Probe
from gfs_core.run.ranks import OtherRankFailed, Ranks, RanksLost
from gfs_core.run.record import Measurement
from gfs_core.signals.catalog import Signals
from gfs_core.signals.context import StepContext
from gfs_core.signals.lab import Accuracy
from gfs_core.signals.measuring import Conditions, Measured, measure

LossOfBatch = Callable[[Any], Tensor]
T = TypeVar("T")


class Measuring:
    """The signals of a run with their state, and the data that they are measured on.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        config: the options.
        notices: reports failures.
        ranks: the processes that measure together; ``None``: this process only.
        signals: all signals.
        probe: selects the data.

    Attributes:
        learned: facts about the model and its loss that the run has found out.
        accuracy: tolerances and limits of the solvers.
        count: measurements so far, failed ones included.
        mean_loss: the mean training loss over the steps that have ended.
        iterates: the weights before the last steps, for signals that look back.
        failure: the latest failure, in words; empty: none since the caller last emptied it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: GFSConfig,
        notices: Notices,
        ranks: Ranks | None,
        signals: Signals,
        probe: Probe,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.notices, self.ranks, self.signals, self.probe = notices, ranks, signals, probe
        self.learned = Learned()
        self.accuracy = Accuracy()
        self.count = 0
        self.mean_loss = MeanLoss()
        self.failure = ""
        self.iterates = Iterates()
        self._filled = False  # whether the fixed probe is complete on every process
        self.clipping = ClippingFactor()

    def together(self) -> AbstractContextManager[None]:
        """Measure in this context: with several processes, a failure on one ends the measurement on all."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.together()

    def answered(self, ask: Callable[[], T], otherwise: T) -> T:
        """The result of ``ask``, which may exchange with other processes; ``otherwise`` once one does not answer."""
        if self.ranks is not None and self.ranks.lost:
            return otherwise
        try:
            return ask()
        except RanksLost as error:
            self.failed(error)
            return otherwise

    def agreed(self, own: bool, otherwise: bool) -> bool:
        """Whether ``own`` is true on any process; ``otherwise`` once one of them does not answer."""
        ranks = self.ranks
        return own if ranks is None else self.answered(lambda: ranks.any(own), otherwise)

    def keep_weights(self, step: int, back: int) -> None:
        """Copy the weights before the optimizer step taken at ``step``, if memory has room for them.

        Args:
            step: optimizer steps taken so far.
            back: how many steps the signals look back; older weights are dropped.

        Raises:
            torch.OutOfMemoryError: with ``strict=True``, it has not.
        """
        self.iterates.drop_older_than(step + 1 - back)
        try:
            self.iterates.keep(step, parameters_of(self.optimizer))
        except torch.OutOfMemoryError:
            if self.config.strict:
                raise
            if self.ranks is not None:
                self.iterates.note(step)
            self.notices.warn_once(
                "there is no memory for the weights before a step; nothing is measured along it", own=True
            )

    def forget(self) -> None:
        """Drop everything that was found out about the weights: other weights are trained from now on."""
        self.signals.forget()
        self.iterates.drop()
        self.learned = self.learned.of_other_weights()

    def went_back(self) -> None:
        """Drop what was measured on weights that are gone; what was found out about the model and its loss stays."""
        self.signals.forget()
        self.iterates.drop()
        self.mean_loss.load(None)

    def knows_parts(self, loss_fn: LossOfBatch, batches: list[Any], names: Collection[str]) -> bool:
        """Find out whether the loss of a batch is the mean over its parts, if this measurement needs to know.

        Only a measurement that would cut a batch needs to know.

        Returns:
            Whether the measurement can go on. ``False``: the trial failed, and a warning says why.

        Raises:
            Exception: with ``strict=True``, whatever made the trial fail.
        """
        if self.learned.splits is not None:
            return True
        learned = self.learned
        by_parts = learned.smooth is False or learned.whole_cheaper is False or self.config.hvp == "exact"
        cuts = self.probe.cuts(batches, learned, running="running" in names and by_parts)
        if not self.agreed(cuts, False):
            return True
        try:
            with self.together():
                why = why_whole(
                    self.model,
                    lambda _model, b: loss_fn(b),
                    batches,
                    parameters_of(self.optimizer),
                    self.learned.parts,
                    precision=self.learned.precision_for(self.config.precision),
                    ranks=self.ranks,
                    max_memory=self.config.max_memory,
                )
                whole = bool(why) if self.ranks is None else self.ranks.any(bool(why))
        except Exception as error:
            if self.config.strict and not _skips(error):
                raise
            self.failed(error)
            return False
        self.learned.splits, self.learned.whole = not whole, why or ("so another process has found" if whole else "")
        if whole:
            self._tell_whole()
        return True

    def batches_of(self, step: list[Any]) -> list[Any] | None:
        """The batches to measure: those of the step, or of the second data set, all of as many on every process.

        Returns:
            The batches; ``None``: the second data set could not be read, and a warning says why.

        Raises:
            Exception: with ``strict=True``, whatever failed.
        """
        second = self.probe.second
        if second is None:
            return step
        if not second.batches:
            try:
                with self.together():
                    second.take(self.probe.size, self.model, parameters_of(self.optimizer))
                    if self.ranks is not None:
                        second.batches = second.batches[: self.ranks.least(len(second.batches))]
            except Exception as error:
                second.batches = []  # all processes take them at the same measurement
                if self.config.strict:
                    raise
                self.failed(error)
                return None
        return second.batches

    def filling(self) -> bool:
        """Whether a fixed probe needs batches on any process: their batches may differ in size."""
        if self.probe.kind != "fixed" or self._filled:
            return False
        filling = self.agreed(self.probe.filling, False)
        self._filled = not filling
        return filling

    def fill_probe(self, batches: list[Any]) -> bool:
        """Copy missing examples into a fixed probe; returns whether it is complete on every process now.

        Raises:
            MeasurementError: with ``strict=True``, a batch cannot be copied.
        """
        try:
            self.probe.fill(batches, self.learned)
        except MeasurementError as error:
            if self.config.strict:
                raise
            self.failed(error)
        return not self.filling()

    def _tell_whole(self) -> None:
        why = self.learned.whole
        ignored = ", and probe_size cannot be used" if self.config.probe_size is not None else ""
        if UNTRIED in why:
            self.notices.warn_once(
                "it is not known whether the loss of a batch is the mean over its parts, so whole batches are "
                f"measured{ignored}: {why}"
            )
        else:
            self.notices.warn_once(
                f"the loss of a batch is not the mean over its parts, so whole batches are measured{ignored}: {why}"
            )

    def measure(
        self,
        names: Collection[str],
        step: int,
        loss_fn: LossOfBatch,
        batches: list[Any],
        label: str,
        rate_only_lowered: bool,
    ) -> tuple[Measurement | None, dict[str, float]]:
        """Measure the signals of these names.

        Args:
            names: the signals.
            step: optimizer steps taken so far.
            loss_fn: the loss of one micro-batch.
            batches: the micro-batches of the step, or the batches of the second data set.
            label: the optimizer's name in the measurement.
            rate_only_lowered: whether the learning rate is controlled by a policy that only lowers it.

        Returns:
            The measurement, ``None`` if it failed (a warning says why); and the seconds that each signal took.

        Raises:
            Exception: with ``strict=True``, whatever made the measurement fail.
        """
        current = self.probe.current(batches, self.learned)
        whole = self.probe.data(current)
        probe = self.probe.fitting(whole, self.learned)
        past, back = self.iterates.before(step), max(s.past for s in self.signals.named(names))
        clipped = self.clipping.taken()
        measured: Measured | None = None
        measurement: Measurement | None = None
        try:
            with self.together():
                if back and self.ranks is not None and self.ranks.any(len(past) < back):
                    past = []  # a process had no memory for a copy
                known = "running" in names and self.probe.second is None
                mean = self.mean_loss.value() if known else None
                if known and self.ranks is not None:
                    mean = self.ranks.mean_of_known(mean)
                context = StepContext(
                    step,
                    self.model,
                    self.optimizer,
                    lambda _model, b: loss_fn(b),
                    batches,
                    probe,
                    self.probe.fitting(current, self.learned),
                    past,
                    mean,
                    rate_only_lowered,
                    self.probe.second is None,
                    [p.grad for p in parameters_of(self.optimizer)] if self.probe.second is None else None,
                    clipped,
                )
                measured = measure(self.signals.named(names), context, self.learned, self._conditions())
                measurement = Measurement.from_readings(step, label, measured.readings, measured.notes)
                if self.ranks is not None:
                    measurement = self.ranks.same(measurement)
                self.learned = measured.learned  # on all processes, or on none
        except Exception as error:
            measurement = None
            if self.config.strict and not _skips(error):
                raise
            if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OtherRankFailed) and error.memory):
                self.probe.make_room(self.learned, probe, only_running=list(names) == ["running"])
            self.failed(error)
        self.count += 1
        if measurement is not None:
            self.probe.try_more(self.learned, whole)
        return measurement, {} if measured is None else measured.seconds

    def _conditions(self) -> Conditions:
        seed = self.config.seed + self.count  # the same at a resumed step as in the uninterrupted run
        config = self.config
        return Conditions(config.hvp, config.precision, self.accuracy, seed, config.max_memory, self.ranks)

    def failed(self, error: Exception) -> None:
        """Report why a measurement failed, and drop state that may have been half changed when it broke off."""
        self.failure = str(error)
        if not isinstance(error, NoLoss) or self.ranks is not None:  # all processes must drop the same state
            self.signals.broke_off()
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            why = str(error) if isinstance(error, OverLimit) else "a measurement ran out of memory"
            then = "the next one is on half as many examples"
            if self.learned.splits is False:
                then = f"the batch cannot be cut: {self.learned.whole}"
            self.notices.warn_once(f"{why}; {then}", own=True)
        elif isinstance(error, RanksLost):
            self.notices.warn_once(f"{error}; nothing is measured any more in this run", own=True)
        elif isinstance(error, OtherRankFailed):
            if not error.memory:
                self._try_parts_again()
            self.notices.warn_once(str(error))
        elif isinstance(error, NoLoss):
            self.notices.warn_once(str(error), own=True)
        elif fault := own_fault(error):
            self.notices.warn_once(fault, own=True)
        else:
            self._try_parts_again()
            text = f"the loss failed when it was evaluated again: {type(error).__name__}: {error}"
            if self.probe.second is not None:
                text = f"the loss failed on a batch from the loader of `probe=`: {type(error).__name__}: {error}"
            self.notices.warn_once(str(error) if isinstance(error, MeasurementError) else text, own=True)

    def _try_parts_again(self) -> None:
        """Find out again whether a batch can be cut: batches of another kind may have caused the failure."""
        self.learned.splits, self.learned.whole = None, ""

    def state_dict(self) -> dict[str, Any]:
        """All state that the next measurement depends on."""
        return {
            "count": self.count,
            "signals": self.signals.state_dict(),
            "learned": self.learned.state_dict(),
            "probe": self.probe.state_dict(),
            "iterates": self.iterates.state_dict(),
            "mean_loss": self.mean_loss.value(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Vectors that do not fit the weights are dropped."""
        params = parameters_of(self.optimizer)
        self.count, self._filled = int(state["count"]), False
        self.learned = Learned.from_state(state["learned"])
        if self.learned.splits is False:
            self._tell_whole()
        if self.probe.load_state_dict(state["probe"], params[0].device if params else None, self.ranks is None):
            self.notices.warn_once(
                "the fixed probe was not saved, its batches are of a class of their own; it is collected anew"
                if self.probe.second is None
                else "the second data set was not saved, its batches are of a class of their own; it is collected anew"
            )
        self.mean_loss.load(state["mean_loss"])
        if self.ranks is not None and not self.ranks.inner_product(params).whole:
            return  # the saved vectors may be shards of another rank
        self.signals.load_state_dict(state["signals"], params)
        self.iterates.load_state_dict(state["iterates"], params)


def _skips(error: Exception) -> bool:
    """Whether training skips the batch; that is not a failure."""
    return isinstance(error, NoLoss) or (isinstance(error, OtherRankFailed) and error.skipped)
