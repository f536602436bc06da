"""When a training breaks, and who warned of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.lib.store import Row
from benchmarks.zoo.rules import Alarm
from benchmarks.zoo.training import Array, Stream

AHEAD, BEHIND = 200, 3  # steps before a break from which on an alarm is a warning of it; after it, that it is told of
UNTOLD = -(BEHIND + 1)  # steps, for a break that no alarm told of


def breaks(stream: Stream, full_batch: bool = False) -> list[int]:
    """The steps at which a training breaks.

    That is where the median of the next ten losses is above the best so far by a fifth of the progress, or by a tenth
    of the first loss where there was less progress; or where a loss is not finite. The next break comes 50 steps after
    the losses are back at the earliest. With full batches, where losses do not scatter, a loss that is five times the
    median of the last hundred is a spike, and counts too.
    """
    loss = stream.loss
    if full_batch:
        return _spikes(loss)
    found: list[int] = []
    first = best = float(np.median(loss[:5]))
    step = 10
    while step < len(loss):
        ahead = loss[step : step + 10]
        if not np.isfinite(ahead).all():
            return [*found, step + int(np.argmin(np.isfinite(ahead)))]
        best = min(best, float(np.median(loss[step - 10 : step])))
        limit = best + 0.2 * max(first - best, first / 2)
        if len(ahead) == 10 and float(np.median(ahead)) > limit:
            found.append(step)
            step += 10
            while step < len(loss) and not float(np.median(loss[step : step + 10])) <= limit:
                if not np.isfinite(loss[step : step + 10]).all():
                    return found
                step += 1
            step += 50
        step += 1
    return found


def _spikes(loss: Array) -> list[int]:
    found: list[int] = []
    for step in range(100, len(loss)):
        if loss[step] > 5 * np.median(loss[step - 100 : step]) and (not found or step - found[-1] > 100):
            found.append(step)
    return found


def told_of(stream: Stream, broken: Sequence[int], alarms: Sequence[Alarm]) -> list[int | None]:
    """For each break the steps by which it was warned of, negative if told of after it; ``None``: neither."""
    found: list[int | None] = []
    since = 0 if stream.fault is None else stream.fault
    for seen in broken:
        at = max(seen, since)  # ten losses from there on are high, perhaps because of the last of them
        begin = max(at - AHEAD, since)
        heard = [max(a.start, begin) for a in alarms if a.start <= at + BEHIND and a.end > begin]
        found.append(at - min(heard) if heard else None)
        since = at + 10
    return found


def ends_well(row: Row, alone: Row) -> bool:
    """Whether a run ends at most a fifth of the progress above the best of the one that was left alone."""
    limit = alone["best"] + 0.2 * (alone["first"] - alone["best"])
    return row["end"] is not None and bool(row["end"] <= limit)


def mean_lead(told: Sequence[int | None]) -> float:
    """The mean, over the breaks of :func:`told_of`, of the steps by which a rule was ahead; negative: it was behind."""
    found = [UNTOLD if steps is None else min(steps, AHEAD) for steps in told]
    return sum(found) / len(found) if found else UNTOLD
