"""Curvature from a few products: along the last step, along a batch's own gradient, and the running estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.linalg.power import Sample
from gfs_core.linalg.vectors import Vector, axpy, fitted, is_half
from gfs_core.loss.batches import batch_size, fraction_of, rotating_part
from gfs_core.loss.parts import normalises_over_batch
from gfs_core.signals.base import Cost, Key, Reading, Stateless
from gfs_core.signals.context import StepContext
from gfs_core.signals.directional import Directional, along_by_product, along_the_gradient
from gfs_core.signals.keys import PRECISION_ERROR, RATIO_CHART, SHARPNESS_CHART, STABILITY_RATIO
from gfs_core.signals.lab import Lab

DIRECTIONAL_SHARPNESS = Key("directional_sharpness", "curvature uᵀHu/‖u‖² along the last step u really taken")
CRITICAL_LR = Key("critical_lr", "learning rate at which a step in that direction would stop lowering the loss")
BATCH_SHARPNESS = Key(
    "batch_sharpness",
    "mean over batches of the curvature of a batch's own loss along its own (preconditioned) gradient",
)
RUNNING_SHARPNESS = Key(
    "running_sharpness",
    "running estimate of the (preconditioned) sharpness of the training loss, by single products on parts of "
    "batches: noisy, and mostly somewhat low",
    chart=SHARPNESS_CHART,
)
RUNNING_STABILITY_RATIO = Key(
    "running_stability_ratio",
    "running_sharpness / threshold: often and cheap",
    scales_with_rate=1,
    chart=RATIO_CHART,
)
MEAN_SQUARE_STABILITY_RATIO = Key(
    "mean_square_stability_ratio",
    "stability ratio over the latest parts, with the spread of the curvature from batch to batch: 1 is the edge at "
    "which noisy steps, momentum included, stop being stable in the mean square",
    scales_with_rate=1,
    chart=RATIO_CHART,
)
MEAN_SQUARE_BOUND = Key(
    "mean_square_bound",
    "the same from single products, so that how far the estimate's direction lags behind counts as noise: what a "
    "control goes by",
    scales_with_rate=1,
    logged=False,
)
WHOLE_EVERY = 4  # factor on the running estimate's interval where it needs whole batches, which cost more on a CPU
_MEMORY = 0.9  # weight of the past in the mean batch sharpness


class DirectionalCurvature(Stateless):
    """Curvature along the last step that was really taken: the cheapest signal, available for every optimizer."""

    name = "directional"
    keys = (DIRECTIONAL_SHARPNESS, CRITICAL_LR, STABILITY_RATIO)
    cost = Cost.GRADIENT
    copies = (4, 4)
    needs = ()
    past = 1
    every = None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one product and one gradient; no readings if the weights before the step were not kept."""
        if not step.past:
            return []
        lab.loss_on_probe()
        along = _along_the_step(lab, step.past[0])
        if along.sharpness is None:
            why = "nothing along the last step: the weights have not moved, or by less than rounding"
            return [Reading(DIRECTIONAL_SHARPNESS, step.step, None, reason=why)]
        found = [Reading(DIRECTIONAL_SHARPNESS, step.step, along.sharpness)]
        if along.critical is not None:
            if step.stability.learning_rate is not None:
                found.append(Reading(CRITICAL_LR, step.step, step.stability.learning_rate * along.critical))
            if step.stability.empirical:
                found.append(Reading(STABILITY_RATIO, step.step, 1 / along.critical))
        return found


def _along_the_step(lab: Lab, before: Vector) -> Directional:
    """Curvature along the step from ``before`` to the present weights."""
    taken = [w.float() if is_half(w) else w.clone() for w in lab.objective.weights]
    axpy(-1.0, before, taken)
    if lab.objective.inner.norm(taken) == 0.0:  # the optimizer did not move: a skipped step, a rate of 0
        return Directional(None, None)
    return along_by_product(lab.hessian, taken)


class BatchSharpness:
    """Curvature of a batch's own loss along its own step, averaged over batches."""

    name = "batch_sharpness"
    keys = (BATCH_SHARPNESS,)
    cost = Cost.GRADIENT
    copies = (4, 5)
    needs = ()
    past = 0
    every = None

    def __init__(self) -> None:
        self.mean: float | None = None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one product and one gradient of the current batch.

        There are no readings before the optimizer's operator is known.
        """
        if not step.stability.known:
            return []
        with lab.on(step.current):
            inverse = None if step.stability.scale is None else step.stability.scale.squared()
            new = along_the_gradient(lab.hessian, inverse)
        if new is not None:
            self.mean = new if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * new
        return [Reading(BATCH_SHARPNESS, step.step, None if new is None else self.mean)]

    def forget(self) -> None:
        """Start the mean again."""
        self.mean = None

    def broke_off(self) -> None:
        """Keep the mean: a failed measurement has not changed it."""

    def state_dict(self) -> dict[str, Any]:
        """The mean so far."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore the mean."""
        self.mean = None if state["mean"] is None else float(state["mean"])


class RunningCurvature:
    """The running estimate of :mod:`gfs_core.linalg.power`: each measurement adds one product on another part."""

    name = "running"
    keys = (
        RUNNING_SHARPNESS,
        RUNNING_STABILITY_RATIO,
        MEAN_SQUARE_STABILITY_RATIO,
        MEAN_SQUARE_BOUND,
        PRECISION_ERROR,
    )
    cost = Cost.GRADIENT
    copies = (7, 8)
    needs = ()
    past = 0
    every = None

    def __init__(self) -> None:
        self.estimate = RunningBlocks()
        self.turn = 0  # measurements so far; selects the part

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one product on one part, or a pair of products on two parts.

        The first measurement solves for the eigenvalue, with more products. There are no readings before the
        optimizer's operator is known.
        """
        batches, others, fraction, stands_for = self._next(step, lab)
        if not step.stability.known:
            return []
        with lab.on(batches):
            return self._measure(step, lab, others, fraction, stands_for)

    def _next(self, step: StepContext, lab: Lab) -> tuple[list[Any], list[Any], float, int]:
        """Select the data of this measurement.

        Returns:
            Four values: the part to measure; another part for a pair, or an empty list; the fraction of the step's
            examples that is in the part, or 0 if noise should not be counted; and the number of usual measurements
            that this one replaces.
        """
        batches, learned = step.batches, lab.hessian.learned
        turn, self.turn = self.turn, self.turn + 1
        if learned.splits is False:
            # The scale of weights in front of BatchNorm does not change the loss: noise makes these weights grow, and
            # their curvature falls. A control that counts this noise holds down runs that are stable at thirty times
            # the rate. Only a control that raises the rate needs it.
            uncounted = step.rate_only_lowered and normalises_over_batch(step.model)
            return batches, [], 0.0 if uncounted else 1.0, WHOLE_EVERY
        place = turn // learned.parts % len(batches)
        part = rotating_part(batches[place], learned.parts, turn)
        if batch_size(part) != batch_size(batches[place]):
            others = [rotating_part(batches[place], learned.parts, turn + 1)]
        else:
            others = [batches[(place + 1) % len(batches)]] if len(batches) > 1 else []
        return [part], others, fraction_of(part, batches), 1

    def _measure(
        self, step: StepContext, lab: Lab, others: list[Any], fraction: float, stands_for: int
    ) -> list[Reading]:
        estimate, stability, error = self.estimate, step.stability, None
        first = estimate.vector is None
        operator, losses = lab.operator(stability), list[float]()

        def other(vector: Vector) -> Vector:
            losses.append(lab.hessian.loss)
            with lab.on(others):
                return operator(vector)

        pairs = estimate.wants_pair and len(others) > 0
        objective = lab.objective
        sample = Sample(operator, objective.weights, other if pairs else None, operator.gradient, objective.inner)
        quotients = estimate.update(sample)
        if first and estimate.vector is not None and lab.in_half_precision():
            error = lab.precision_error(stability, estimate.vector, quotients[0])
            if not lab.in_half_precision():
                estimate.restart()
                quotients = estimate.update(sample.alone())
        losses.append(lab.hessian.loss)
        loss, mean = sum(losses) / len(losses), step.mean_loss
        relative = loss / mean if mean is not None and mean > 0 and loss > 0 else None
        value = estimate.average(quotients, relative, stands_for)
        found = {PRECISION_ERROR: error, RUNNING_SHARPNESS: value}
        if value is not None and stability.threshold is not None:
            weight = stability.noise_factor * fraction
            found[RUNNING_STABILITY_RATIO] = value / stability.threshold
        if value is not None and stability.threshold is not None and step.trained:  # the noise of its steps
            found |= {
                MEAN_SQUARE_STABILITY_RATIO: _ratio(estimate.noisy(weight), stability.threshold),
                MEAN_SQUARE_BOUND: _ratio(estimate.bound(weight), stability.threshold),
            }
        return [Reading(key, step.step, value) for key, value in found.items() if value is not None]

    def forget(self) -> None:
        """Start the estimate again; the next measurement solves for the eigenvalue."""
        self.estimate = RunningBlocks()

    def broke_off(self) -> None:
        """Start the estimate again, as its direction may have been half changed."""
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """The estimate, and the number of measurements, which selects the next part."""
        return {"estimate": self.estimate.state_dict(), "turn": self.turn}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore the estimate, if its direction fits ``params``."""
        self.turn, held = int(state["turn"]), state["estimate"]
        if (vector := fitted(held["vector"], params)) is not None:
            self.estimate.load_state_dict({**held, "vector": vector})


def _ratio(value: float | None, threshold: float) -> float | None:
    return None if value is None else value / threshold
