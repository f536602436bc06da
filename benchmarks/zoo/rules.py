"""Rules over recorded streams: the early warning as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.zoo.training import Stream
from gfs_core import Alert, AlertLevel, EarlyWarning, Profile, Reading
from gfs_core.signals.curvature import RUNNING_STABILITY_RATIO
from gfs_core.signals.gradients import KEYS
from gfs_core.signals.training import LOSS, STEP_RATE


class Alarm(NamedTuple):
    """A stretch at the level of an alarm.

    Attributes:
        start: the step at which it begins.
        end: the step after its last one.
        rule: which rule said so first.
    """

    start: int
    end: int
    rule: str


def alerts(
    stream: Stream,
    profile: Profile | None = None,
    every: int = 1,
    curvature: bool = True,
    make: Callable[[Profile | None], EarlyWarning] = EarlyWarning,
) -> Iterator[Alert]:
    """What the early warning says of a stream.

    Args:
        stream: what it reads.
        profile: the thresholds; ``None``: those of the package.
        every: steps between readings of gradients.
        curvature: whether it reads the stability ratios too.
        make: makes it from its thresholds.
    """
    warning = make(profile)
    for step in range(len(stream.loss)):
        readings = [Reading(STEP_RATE, step, float(stream.rate[step])), Reading(LOSS, step, float(stream.loss[step]))]
        if curvature:
            readings.append(Reading(RUNNING_STABILITY_RATIO, step, _value(stream.ratio[step])))
        if step % every == 0:
            for key in KEYS:
                readings.append(Reading(key, step, _value(stream.whole[key.name][step])))
                rows = stream.by_layer[key.name][step]
                readings += [Reading(key, step, _value(v), layer) for v, layer in zip(rows, stream.layers, strict=True)]
        for reading in warning.in_order(readings):
            if (alert := warning.observe(reading)) is not None:
                yield alert


def early_warning(stream: Stream, profile: Profile | None = None, **how: Any) -> list[Alarm]:
    """The alarms of the early warning; the arguments are those of :func:`alerts`."""
    found, rule = list[Alarm](), ""
    began: int | None = None
    for alert in alerts(stream, profile, **how):
        if alert.level is AlertLevel.ALARM and began is None:
            began, rule = alert.step, alert.rule
        if alert.level is not AlertLevel.ALARM and began is not None:
            found.append(Alarm(began, alert.step, rule))
            began = None
    return found if began is None else [*found, Alarm(began, len(stream.loss), rule)]


def _value(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
