"""One measurement: the signals that are due, one after the other, isolated from training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gfs_core.loss.learned import HvpMethod, Learned, PrecisionChoice
from gfs_core.loss.memory import GIB, Limits, vector_bytes
from gfs_core.loss.objective import Objective
from gfs_core.loss.precision import Precision
from gfs_core.loss.processes import Processes, alone
from gfs_core.loss.snapshot import StateSnapshot
from gfs_core.signals.base import Reading, Signal
from gfs_core.signals.context import StepContext
from gfs_core.signals.keys import GRAD_EVALS, HVPS, LEARNING_RATE, LOSS_PROBE, THRESHOLD
from gfs_core.signals.lab import Accuracy, Lab


@dataclass(frozen=True)
class Measured:
    """The result of a measurement.

    Attributes:
        readings: the readings of all signals, and those that every measurement has.
        notes: remarks about the values, in words.
        learned: the known facts about the model and its loss, with those that this measurement has found.
        seconds: the seconds that each signal took, of the signals with readings.
    """

    readings: list[Reading]
    notes: list[str]
    learned: Learned
    seconds: dict[str, float]


@dataclass(frozen=True)
class Conditions:
    """Conditions under which a measurement is made.

    Attributes:
        hvp: how Hessian-vector products are computed.
        precision: the precision of measuring.
        accuracy: tolerances and limits of the solvers.
        seed: of the random directions.
        max_memory: GiB that it may take beside the weights; ``None``: no limit.
        processes: the processes over which the mean loss is taken, each with its own data; ``None``: only this one.
    """

    hvp: HvpMethod = "auto"
    precision: PrecisionChoice = "auto"
    accuracy: Accuracy = field(default_factory=Accuracy)
    seed: int = 0
    max_memory: float | None = None
    processes: Processes | None = None


def copies_of(signals: Sequence[Signal], preconditioned: bool) -> int:
    """Copies of the weights at the peak of a measurement.

    The direction that the running estimate keeps, and the weights before the last steps, are there all the time.

    Args:
        signals: the signals that are measured.
        preconditioned: whether the optimizer's operator differs from the Hessian.
    """
    beside = any(s.name == "running" for s in signals) and len(signals) > 1
    return max(s.copies[preconditioned] for s in signals) + beside + max(s.past for s in signals)


def measure(signals: Sequence[Signal], step: StepContext, learned: Learned, given: Conditions) -> Measured:
    """Take the readings of ``signals``, in the order given. The training is left exactly as it was.

    Args:
        signals: what to measure; each after the signals that it needs.
        step: the optimizer step.
        learned: known facts about the model and its loss; not changed.
        given: the conditions.

    Raises:
        MeasurementError: nothing could be measured.
    """
    stability = step.stability
    readings = [
        Reading(THRESHOLD, step.step, stability.threshold, reason=stability.reason),
        Reading(LEARNING_RATE, step.step, stability.learning_rate),
    ]
    seconds: dict[str, float] = {}
    with _lab(signals, step, learned, given) as lab:
        for signal in signals:
            began = time.perf_counter()
            if taken := signal.measure(step, lab):
                readings += taken
                seconds[signal.name] = time.perf_counter() - began
        readings += [
            Reading(LOSS_PROBE, step.step, lab.loss),
            Reading(HVPS, step.step, lab.hessian.hvps),
            Reading(GRAD_EVALS, step.step, lab.objective.grad_evals),
        ]
        return Measured(readings, lab.notes(), lab.learned, seconds)


@contextlib.contextmanager
def _lab(signals: Sequence[Signal], step: StepContext, learned: Learned, given: Conditions) -> Iterator[Lab]:
    params, choice = step.params, learned.precision_for(given.precision)
    computed = Precision(choice, step.model, params, proven=learned.double_backward_verified)
    room = None
    if given.max_memory is not None:
        room = int(given.max_memory * GIB) - vector_bytes(params, copies_of(signals, not step.stability.plain))
    with (
        StateSnapshot(step.model, params, step.loss_fn) as snapshot,
        alone(step.model),
        computed.governing(),
        contextlib.ExitStack() as stack,
    ):
        objective = Objective(
            step.model, step.loss_fn, step.probe, params, snapshot, given.processes, computed, Limits(graph=room)
        )
        if computed.full_for_products:
            stack.enter_context(objective.in_float32())
        lab = Lab(objective, given.hvp, learned, given.accuracy, given.seed)
        yield lab
        lab.hessian.release()
