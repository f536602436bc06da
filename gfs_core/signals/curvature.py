"""Curvature from a few products: along the last step, along a batch's own gradient, and the running estimate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.linalg.inner import InnerProduct
from gfs_core.linalg.power import Sample
from gfs_core.linalg.vectors import Vector, axpy, fitted, is_half
from gfs_core.loss.batches import batch_size, fraction_of, is_cut, rotating_part
from gfs_core.loss.one_gradient import StepLength
from gfs_core.loss.parts import normalises_over_batch
from gfs_core.signals.base import Cost, Key, Reading
from gfs_core.signals.context import StepContext
from gfs_core.signals.directional import along_by_product, along_the_gradient
from gfs_core.signals.keys import PRECISION_ERROR, RATIO_CHART, SHARPNESS_CHART, STABILITY_RATIO
from gfs_core.signals.lab import Lab
from gfs_core.signals.shares import RUNNING_CURVATURE_SHARE, LayerShares
from gfs_core.signals.training_gradient import of_the_step, one_gradient

DIRECTIONAL_SHARPNESS = Key("directional_sharpness", "curvature uᵀHu/‖u‖² along the last step u really taken")
CRITICAL_LR = Key("critical_lr", "learning rate at which a step in that direction would stop lowering the loss")
BATCH_SHARPNESS = Key(
    "batch_sharpness",
    "mean over batches of the curvature of a batch's own loss along its own (preconditioned) gradient",
)
RUNNING_SHARPNESS = Key(
    "running_sharpness",
    "running estimate of the (preconditioned) sharpness of the training loss, by single products: noisy, and mostly "
    "somewhat low",
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
    "stability ratio over the latest batches, with the spread of the curvature from batch to batch: 1 is the edge at "
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
NOT_POSITIVE = "running sharpness left out: the running estimate of the curvature is not positive"
# Parts are measured only where a gradient of the whole step takes so many times as long as one of a part. That leaves
# room for all that a product on a part costs beside its gradient; how much room it needs was not measured.
_PART_IN_GRADIENTS = 50.0
_TURN_BY_WHOLE = 0.75  # weight of a product of the whole step in the direction: it is less noisy, and rarer
_SETTLE_EVERY, _GROWTH, _EARLY = 2, 1.2, 150  # steps between the first measurements, their growth, and until when
_UNCHECKED = 2  # measurements before kinks are looked for: the first two find out enough else
_USUAL_INTERVAL = 5  # steps; where measurements are farther apart, the past weighs less
_LONGEST_INTERVAL = 8.0  # times that: more is treated alike, as single quotients are noisy
_LAGGING = 3.0  # factor between the loss of a part and the mean loss, from which on they are not compared
_MEMORY = 0.9  # weight of the past in the mean batch sharpness


class _Quotients(NamedTuple):
    """What a measurement adds to the running estimate.

    Attributes:
        values: a Rayleigh quotient for each block.
        loss: on what was measured.
        noise: weight of the variance of the curvature over this data, for a whole step.
        precision_error: relative error of a quotient in half precision, where that was looked at.
    """

    values: list[float]
    loss: float
    noise: float
    precision_error: float | None = None


class DirectionalCurvature:
    """Curvature along the last step that was really taken: the cheapest signal, available for every optimizer."""

    name = "directional"
    keys = (DIRECTIONAL_SHARPNESS, CRITICAL_LR, STABILITY_RATIO)
    cost = Cost.GRADIENT
    copies = (4, 4)
    needs = ()
    past = 1
    every = None

    def __init__(self) -> None:
        self.length = StepLength()

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one gradient, or one product; no readings if the weights before the step were not kept."""
        if not step.past:
            return []
        taken = [w.float() if is_half(w) else w.clone() for w in lab.objective.weights]
        axpy(-1.0, step.past[0], taken)
        if lab.objective.inner.norm(taken) == 0.0:  # a skipped step, a rate of 0
            why = "nothing along the last step: the weights have not moved, or by less than rounding"
            return [Reading(DIRECTIONAL_SHARPNESS, step.step, None, reason=why)]
        products = of_the_step(step, lab, step.probe, self.length)
        if products is None:
            lab.loss_on_probe()
        along = along_by_product(products or lab.hessian, taken)
        found = [Reading(DIRECTIONAL_SHARPNESS, step.step, along.sharpness)]
        if along.critical is not None:
            if step.stability.learning_rate is not None:
                found.append(Reading(CRITICAL_LR, step.step, step.stability.learning_rate * along.critical))
            if step.stability.empirical:
                found.append(Reading(STABILITY_RATIO, step.step, 1 / along.critical))
        return found

    def forget(self) -> None:
        """Find the length of the next step anew."""
        self.length = StepLength()

    def broke_off(self) -> None:
        """Find the length of the next step anew."""
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """What is known about the length of a step."""
        return self.length.state_dict()

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore it."""
        self.length = StepLength.from_state(state)


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
        self.length = StepLength()

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one gradient of the current batch, or one product.

        There are no readings before the optimizer's operator is known.
        """
        if not step.stability.known:
            return []
        inverse = None if step.stability.scale is None else step.stability.scale.squared()
        with lab.on(step.current):
            new = along_the_gradient(of_the_step(step, lab, step.current, self.length) or lab.hessian, inverse)
        if new is not None:
            self.mean = new if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * new
        return [Reading(BATCH_SHARPNESS, step.step, None if new is None else self.mean)]

    def forget(self) -> None:
        """Start the mean again."""
        self.mean, self.length = None, StepLength()

    def broke_off(self) -> None:
        """Keep the mean: a failed measurement has not changed it. Find the length of the next step anew."""
        self.length = StepLength()

    def state_dict(self) -> dict[str, Any]:
        """The mean so far, and what is known about the length of a step."""
        return {"mean": self.mean, "length": self.length.state_dict()}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore both."""
        self.mean = None if state["mean"] is None else float(state["mean"])
        self.length = StepLength.from_state(state["length"])


class RunningCurvature:
    """The running estimate of :mod:`gfs_core.linalg.power`: each measurement adds one product.

    A product comes from one gradient of the whole step, by the difference against the gradient that training has
    computed (:mod:`gfs_core.loss.one_gradient`). Where differences tell nothing it is one of a part of a batch; so it
    is on a CPU where a part takes far less time.
    """

    name = "running"
    keys = (
        RUNNING_SHARPNESS,
        RUNNING_STABILITY_RATIO,
        MEAN_SQUARE_STABILITY_RATIO,
        MEAN_SQUARE_BOUND,
        PRECISION_ERROR,
        RUNNING_CURVATURE_SHARE,
    )
    cost = Cost.GRADIENT
    copies = (7, 8)
    needs = ()
    past = 0
    every = None

    def __init__(self) -> None:
        self.estimate = RunningBlocks()
        self.length = StepLength()
        self.shares = LayerShares(RUNNING_CURVATURE_SHARE)
        self.turn = 0  # measurements so far; selects the part
        self.last = self.began = -1  # the steps of the last measurement and the first
        self._alone = True  # whether no other process holds the same estimate

    @property
    def settling(self) -> bool:
        """Whether the direction has not been turned often enough for a value."""
        return not self.estimate.settled

    def next_eager(self, step: int) -> int | None:
        """The first step after ``step`` at which a measurement is wanted whatever the interval; ``None``: no more.

        While the direction settles, it is every second step; then at distances that grow with the steps since the
        first, as the curvature changes fast at first.
        """
        if self.settling:
            return step + _SETTLE_EVERY - step % _SETTLE_EVERY
        wanted = max(step + 1, self.began + math.ceil(_GROWTH * (self.last - self.began)))
        return wanted if wanted - self.began < _EARLY else None

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Measure with one gradient of the step, or with products on parts.

        There are no readings before the optimizer's operator is known, and while the direction settles.
        """
        if not step.stability.known:
            return []
        turn, self.turn, self._alone = self.turn, self.turn + 1, lab.objective.ranks is None
        quotients = self._by_one_gradient(step, lab)
        if quotients is None:
            if lab.facts.splits is None and not lab.objective.on_all(not _would_cut(step, lab)):
                return []  # whether a batch may be cut is found out before the next measurement
            quotients = self._by_parts(step, lab, turn)
        return self._taken_in(step, quotients, lab.objective.inner)

    def _by_one_gradient(self, step: StepContext, lab: Lab) -> _Quotients | None:
        """Quotients of the whole step; ``None``: parts are to be measured."""
        if lab.facts.whole_cheaper is False:
            return None
        with lab.on(step.batches):
            products = one_gradient(step, lab, self.length, kinks=self.turn > _UNCHECKED)
            if products is None:
                return None
            operator, objective = lab.operator(step.stability, products), lab.objective
            shared = (operator, objective.weights, None, operator.gradient, objective.inner)
            quotients = self.estimate.update(Sample(*shared, _TURN_BY_WHOLE, operator.along))
        if lab.facts.whole_cheaper is None:
            lab.facts.whole_cheaper = whole_is_cheaper(step, lab, products.seconds)
        return _Quotients(quotients, products.loss, _weight_of_noise(step, 1.0))

    def _by_parts(self, step: StepContext, lab: Lab, turn: int) -> _Quotients:
        """Quotients of a part, or of a pair of parts; of a whole batch that cannot be cut."""
        batches, others, learned = step.batches, list[Any](), lab.hessian.learned
        fraction = 1.0
        if learned.splits:
            place = turn // learned.parts % len(batches)
            part = rotating_part(batches[place], learned.parts, turn)
            if batch_size(part) != batch_size(batches[place]):
                others = [rotating_part(batches[place], learned.parts, turn + 1)]
            else:
                others = [batches[(place + 1) % len(batches)]] if len(batches) > 1 else []
            batches, fraction = [part], fraction_of(part, batches)
        with lab.on(batches):
            operator, losses = lab.operator(step.stability), list[float]()

            def other(vector: Vector) -> Vector:
                losses.append(lab.hessian.loss)
                with lab.on(others):
                    return operator(vector)

            estimate, objective = self.estimate, lab.objective
            pairs = estimate.wants_pair and objective.on_all(len(others) > 0)
            sample = Sample(operator, objective.weights, other if pairs else None, operator.gradient, objective.inner)
            settling = self.settling
            quotients = estimate.update(sample)
            losses.append(lab.hessian.loss)
            error = None
            if settling and estimate.settled and lab.in_half_precision():
                error = self._precision_error(step, lab)
        return _Quotients(quotients, sum(losses) / len(losses), _weight_of_noise(step, fraction), error)

    def _precision_error(self, step: StepContext, lab: Lab) -> float:
        """Relative error of a quotient in half precision; where it is too large, the estimate starts again."""
        vector = self.estimate.vector
        assert vector is not None
        value = lab.objective.inner.dot(vector, lab.operator(step.stability)(vector))
        error = lab.precision_error(step.stability, vector, value)
        if not lab.in_half_precision():
            self.estimate.restart()
        return error

    def _taken_in(self, step: StepContext, new: _Quotients, inner: InnerProduct) -> list[Reading]:
        mean, stability = step.mean_loss, step.stability
        relative = None
        if mean is not None and mean > 0 and new.loss > 0:
            relative = new.loss / mean
            if not 1 / _LAGGING < relative < _LAGGING:
                relative = None  # the mean lags behind a loss that falls fast
        apart = _USUAL_INTERVAL if self.last < 0 else step.step - self.last
        self.last, self.began = step.step, step.step if self.began < 0 else self.began
        value = self.estimate.average(new.values, relative, min(max(apart / _USUAL_INTERVAL, 1.0), _LONGEST_INTERVAL))
        found: dict[Key, float | None] = {PRECISION_ERROR: new.precision_error, RUNNING_SHARPNESS: value}
        if value is not None and stability.threshold is not None:
            found[RUNNING_STABILITY_RATIO] = value / stability.threshold
        if value is not None and stability.threshold is not None and step.trained:  # the noise of its steps
            found |= {
                MEAN_SQUARE_STABILITY_RATIO: _ratio(self.estimate.noisy(new.noise), stability.threshold),
                MEAN_SQUARE_BOUND: _ratio(self.estimate.bound(new.noise), stability.threshold),
            }
        readings = [Reading(key, step.step, value) for key, value in found.items()]  # settling takes its time too
        if value is None and (present := self.estimate.value) is not None and self.estimate.settled and present <= 0:
            readings.append(Reading(RUNNING_SHARPNESS, step.step, None, reason=NOT_POSITIVE))
        vector = self.estimate.vector
        if value is not None and vector is not None:
            readings += self.shares.readings(step.step, vector, step.layers, inner)
        return readings

    def forget(self) -> None:
        """Start the estimate again."""
        self.estimate, self.length = RunningBlocks(), StepLength()
        self.last = self.began = -1

    def broke_off(self) -> None:
        """Start the estimate again, if it was half changed, or other processes may hold another one."""
        if not (self._alone and self.estimate.complete):
            self.forget()

    def state_dict(self) -> dict[str, Any]:
        """The estimate, and the number of measurements, which selects the next part."""
        return {
            "estimate": self.estimate.state_dict(),
            "length": self.length.state_dict(),
            "turn": self.turn,
            "last": [self.began, self.last],
            "shares": self.shares.state(),
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore the estimate, if its direction fits ``params``."""
        self.turn, held = int(state["turn"]), state["estimate"]
        self.began, self.last = (int(step) for step in state["last"])
        self.length = StepLength.from_state(state["length"])
        self.shares.load(state["shares"])
        if (vector := fitted(held["vector"], params)) is not None:
            self.estimate.load_state_dict({**held, "vector": vector})


def _ratio(value: float | None, threshold: float) -> float | None:
    return None if value is None else value / threshold


def _weight_of_noise(step: StepContext, fraction: float) -> float:
    """Weight of the variance of the curvature over parts with this fraction of the step's examples."""
    # The scale of weights in front of BatchNorm does not change the loss: noise makes these weights grow, and their
    # curvature falls. A control that counts this noise holds down runs that are stable at thirty times the rate. Only a
    # control that raises the rate needs it.
    uncounted = fraction == 1.0 and step.rate_only_lowered and normalises_over_batch(step.model)
    return 0.0 if uncounted else step.stability.noise_factor * fraction


def _would_cut(step: StepContext, lab: Lab) -> bool:
    return any(is_cut(batch, lab.facts.parts) for batch in step.batches)


def whole_is_cheaper(step: StepContext, lab: Lab, seconds: float) -> bool:
    """Whether to measure by one gradient of the whole step, of that many seconds, and not by products on parts.

    On an accelerator it is so: a part leaves it idle. Elsewhere two gradients of a part are computed, and the second is
    timed.
    """
    learned, objective = lab.facts, lab.objective
    batch = step.batches[0]
    uncut = learned.splits is False or not is_cut(batch, learned.parts)
    if uncut or objective.ranks is not None or objective.weights[0].device.type != "cpu":
        return True
    with lab.on([rotating_part(batch, learned.parts, 0)]):
        try:
            objective.gradient()
            began = time.perf_counter()
            objective.gradient()
        except Exception:  # a loss that fails on a part is measured on whole batches
            return True
    return (time.perf_counter() - began) * _PART_IN_GRADIENTS > seconds
