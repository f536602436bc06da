"""What is due at a step, measured within its budget and passed to the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gfs_core.optimizers.thresholds import parameters_of, stability_of
from gfs_core.run.budget import LEAST
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
        self._may_be_known = self._told = False

    def names(self, step: int) -> list[str]:
        """The signals that are due at ``step``, cheapest first; under a budget none before there can be a ratio."""
        if self._waits_for_ratio():
            return []
        return self.measuring.answered(lambda: self.schedule.due(step, self.measuring.iterates.back_from(step)), [])

    def wants(self, step: int) -> bool:
        """Whether a batch is of use at ``step``: to be measured, to fill a fixed probe, or to keep the weights."""
        return self.measuring.filling() or bool(self.names(step)) or self.schedule.keeps(step)

    def quiet_until(self, step: int) -> int:
        """The first step after ``step`` at which a batch may be of use."""
        return step + 1 if self.measuring.probe.filling else self.schedule.next_possible(step)

    def keep_weights(self, step: int) -> None:
        """Copy the weights before the step that is about to be taken at ``step``, if a signal will need them."""
        if self.schedule.keeps(step):
            self.measuring.keep_weights(step, self.schedule.back)
        else:
            self.measuring.iterates.drop()

    def expect(self, step: int) -> None:
        """Look at the gradients of the coming step, where a measurement may go by them."""
        if self.schedule.nearly_due(step):
            self.measuring.clipping.expect(parameters_of(self.measuring.optimizer))
        else:
            self.measuring.clipping.close()

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
        synchronize(measuring.optimizer)  # what training has still to compute is not ours
        began = budget.clock()
        data = measuring.batches_of(batches)
        if data is None or not measuring.knows_parts(loss_fn, data, names):
            if names:
                budget.measured(began, budget.clock(), names, {})
            return None
        if (filling and not measuring.fill_probe(data)) or not names:
            return None
        free, eager, scale = self.schedule.free(names), self.schedule.eager(step), self.rates.scale()
        with self.rates.scaled(scale):
            measurement, seconds = measuring.measure(
                names, step, loss_fn, data, self.label(), self.rates.control.only_lowers
            )
        budget.measured(began, budget.clock(), names, seconds, eager=eager and names == ["running"], free=free)
        if measurement is None:
            return None
        measuring.notices.reasons(measurement.reasons)
        measurement = measurement.because(self.schedule.left_out(step, names))
        measurement = measurement.having(seconds=budget.last, overhead=budget.overhead())
        started = not (free or eager)  # until then measurements are close together, and so is what comes with them
        if started and not self._told and (over := self._over_budget(names)):
            self._told = True
            measurement = measurement.because([over])
        return self.rates.take_in(measurement, scale, along_the_step=self.schedule.leading == "directional")

    def _over_budget(self, names: list[str]) -> str:
        """That the budget cannot be held, and why, in words; empty where it can."""
        budget, most = self.schedule.budget, self.schedule.config.max_overhead
        if most is None or budget.beside() <= (1 - LEAST) * most:
            return ""
        beside, price = f"{budget.beside():.1%}", f"{budget.price(names) * 1e3:.3g} ms"
        return (
            f"more than max_overhead={most:g} may be taken: the hooks take {beside} of the wall time without the "
            f"measurements, which may take {LEAST * most:.1%} all the same; one takes {price}"
        )

    def _waits_for_ratio(self) -> bool:
        """Whether no ratio can be had yet: the rate is still 0, or an adaptive optimizer has no second moments.

        Under a budget nothing is spent before. What the threshold is not known of for good is not waited for.
        """
        if self._may_be_known or self.schedule.config.max_overhead is None:
            return False
        optimizer = self.measuring.optimizer
        stability = stability_of(optimizer, parameters_of(optimizer))
        waits = stability.adaptive or stability.learning_rate == 0
        self._may_be_known = stability.known or not waits
        return not self._may_be_known


def synchronize(optimizer: Any) -> None:
    """Wait until the accelerator has computed what was started on it."""
    params = parameters_of(optimizer)
    if params and params[0].device.type == "cuda":
        torch.cuda.synchronize(params[0].device)
