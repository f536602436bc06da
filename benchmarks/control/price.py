"""The time that a method takes beside the training itself, and the steps that leaves it at equal time."""

from __future__ import annotations

import itertools
import time

from benchmarks.control.methods import METHODS, REFERENCE
from benchmarks.control.training import Training
from benchmarks.lib.store import Row
from benchmarks.rate import Workload

FIRST, MEASURED, PLAIN = 100, 300, 75  # steps: in which a method begins; that are measured; of the training alone


def _times(workload: Workload, name: str, rate: float, steps: int) -> list[float]:
    """Processor time of this thread for each step, so that others on the machine do not count."""
    training, found = Training(workload, METHODS[name], rate, 0, workload.steps).run(), []
    for _ in range(steps):
        began = time.thread_time()
        next(training, None)
        found.append(time.thread_time() - began)
    return found


def priced(workload: Workload, name: str, rate: float) -> Row:
    """What a method adds to a training, of which some steps are taken before and after.

    What it takes at its start is counted once. What it takes in a step from step 100 on is taken for that of all later
    ones.
    """
    around = _times(workload, REFERENCE, rate, PLAIN + 5)[5:]
    own = _times(workload, name, rate, MEASURED)
    around += _times(workload, REFERENCE, rate, PLAIN)
    plain, begun, later = sum(around) / len(around), sum(own[:FIRST]), sum(own[FIRST:]) / (MEASURED - FIRST)
    whole = begun + (workload.steps - FIRST) * later
    allowed = workload.steps * plain
    left = round((allowed - begun) / later) + FIRST
    if begun > allowed:  # all the time is gone before the start is over
        left = next(i for i, spent in enumerate(itertools.accumulate(own)) if spent > allowed)
    return {
        "step_ms": round(1e3 * plain, 3),
        "added": round(whole / allowed - 1, 4),
        "steps": min(workload.steps, left),
    }
