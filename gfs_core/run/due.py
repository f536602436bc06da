"""What is due at a step, measured within its budget and passed to the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gfs_core.optimizers.thresholds import parameters_of, stability_of
from gfs_core.run.measuring import LossOfBatch, Measuring
from gfs_core.run.rates import Rates
from gfs_core.run.record import Measurement
from gfs_core.run.schedule import Schedule


class DueMeasurements:
    """The measurements of a run, each at its time.

    Args:
        schedule: which signals are due, and what measuring has cost.
        measuring: what measures them.
        rates: the learning rates, and the control that goes by the measurements.
        label: names the optimizer in a measurement.
    """

    def __init__(self, schedule: Schedule, measuring: Measuring, rates: Rates, label: Callable[[], str]) -> None:
        self.schedule, self.measuring, self.rates, self.label = schedule, measuring, rates, label

    def names(self, step: int) -> list[str]:
        """The signals that are due at ``step``, cheapest first."""
        self.schedule.whole = self.measuring.learned.splits is False
        return self.measuring.answered(lambda: self.schedule.due(step, self.measuring.iterates.back_from(step)), [])

    def wants(self, step: int) -> bool:
        """Whether a batch is of use at ``step``: to be measured, to fill a fixed probe, or to keep the weights."""
        return self.measuring.filling() or bool(self.names(step)) or self.schedule.keeps(step)

    def keep_weights(self, step: int) -> None:
        """Copy the weights before the step that is about to be taken at ``step``, if a signal will need them."""
        if self.schedule.keeps(step):
            self.measuring.keep_weights(step, self.schedule.back)
        else:
            self.measuring.iterates.drop()

    def measure(self, loss_fn: LossOfBatch, batches: list[Any], step: int) -> Measurement | None:
        """Measure what is due, charge it to the budget, and pass it to the control.

        Returns:
            The measurement at the rate that the coming step uses; ``None`` where none was due, or it failed.

        Raises:
            Exception: with ``strict=True``, whatever made the measurement fail.
        """
        measuring, probe, budget = self.measuring, self.measuring.probe, self.schedule.budget
        if measuring.agreed(probe.short(batches), True):
            return None
        names, filling = self.names(step), measuring.filling()
        if not names and not filling:
            return None
        began = budget.clock()
        data = measuring.batches_of(batches)
        if data is None or not measuring.knows_parts(loss_fn, data, names):
            if names:
                budget.measured(began, budget.clock(), names, {})
            return None
        if (filling and not measuring.fill_probe(data)) or not names:
            return None
        free, scale = self.schedule.free(names), self.rates.scale()
        early = measuring.count == 0 and self._before_second_moments()
        with self.rates.scaled(scale):
            measurement, seconds = measuring.measure(
                names, step, loss_fn, data, self.label(), self.rates.control.only_lowers
            )
        budget.measured(began, budget.clock(), names, seconds, early=early, free=free)
        if measurement is None:
            return None
        measuring.notices.reasons(measurement.reasons)
        measurement = measurement.because(self.schedule.left_out(step, names))
        measurement = measurement.having(seconds=budget.last, overhead=budget.overhead())
        return self.rates.take_in(measurement, scale, along_the_step=self.schedule.leading == "directional")

    def _before_second_moments(self) -> bool:
        optimizer = self.measuring.optimizer
        stability = stability_of(optimizer, parameters_of(optimizer))
        return stability.adaptive and stability.threshold is None
