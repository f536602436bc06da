"""What the early warning says of one value, and of made-up streams."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from gfs_core import Alert, AlertLevel, EarlyWarning, Key, Reading
from gfs_core.signals.gradients import GRAD_NORM, RMS_RATIO, WEIGHT_NORM
from gfs_core.signals.training import STEP_RATE, loss_readings

RUNNING_RATIO = Key("running_stability_ratio", "")
SOLVED_RATIO = Key("stability_ratio", "")
MEAN_SQUARE_RATIO = Key("mean_square_stability_ratio", "")

Seen = tuple[int, float, float | None]  # step, loss, ratio


def observe_loss(warning: EarlyWarning, step: int, loss: float, examples: int | None = None) -> Alert | None:
    alerts = [a for r in loss_readings(step, loss, examples) if (a := warning.observe(r)) is not None]
    assert len(alerts) <= 1
    return alerts[0] if alerts else None


def observe_rate(warning: EarlyWarning, step: int, rate: float) -> Alert | None:
    return warning.observe(Reading(STEP_RATE, step, rate))


def observe_ratio(warning: EarlyWarning, step: int, ratio: float, solved: bool) -> Alert | None:
    return warning.observe(Reading(SOLVED_RATIO if solved else RUNNING_RATIO, step, ratio))


def observe_mean_square(warning: EarlyWarning, step: int, ratio: float) -> Alert | None:
    return warning.observe(Reading(MEAN_SQUARE_RATIO, step, ratio))


def gradient_readings(
    step: int, gradient: float | Mapping[str, float], weights: float | None = None, normalised: float | None = None
) -> list[Reading]:
    """Readings of the free signals of a step, in the order in which they are given.

    Args:
        gradient: its norm; or that of each layer, and of the whole model what follows.
        weights: norm of the weights.
        normalised: the gradient over the root of its second moment.
    """
    layers = gradient if isinstance(gradient, Mapping) else {}
    norm = math.sqrt(sum(g * g for g in layers.values())) if isinstance(gradient, Mapping) else gradient
    whole = [Reading(key, step, v) for key, v in ((RMS_RATIO, normalised), (WEIGHT_NORM, weights)) if v is not None]
    return [
        *whole,
        *(Reading(GRAD_NORM, step, g, layer) for layer, g in layers.items()),
        Reading(GRAD_NORM, step, norm),
    ]


def told(alarm: EarlyWarning, readings: Iterable[Reading]) -> list[Alert]:
    return [alert for reading in readings if (alert := alarm.observe(reading)) is not None]


def observe_gradient(
    warning: EarlyWarning,
    step: int,
    gradient: float | Mapping[str, float],
    weights: float | None = None,
    normalised: float | None = None,
) -> Alert | None:
    alerts = told(warning, gradient_readings(step, gradient, weights, normalised))
    assert len(alerts) <= 1
    return alerts[0] if alerts else None


def play(stream: Iterator[Seen] | list[Seen], alarm: EarlyWarning | None = None, solved: bool = False) -> list[Alert]:
    alarm = EarlyWarning() if alarm is None else alarm
    events = []
    for step, loss, ratio in stream:
        events.append(observe_loss(alarm, step, loss))
        if ratio is not None:
            events.append(observe_ratio(alarm, step, ratio, solved))
    return [e for e in events if e is not None]


def stream(
    steps: int,
    ratio: Callable[[int], float],
    loss: Callable[[int], float] = lambda step: 1.0,
    noise: float = 0.0,
    seed: int = 0,
    every: int = 5,
) -> Iterator[Seen]:
    """Losses and ratios with noise: the running estimate's is an average, as the product's."""
    rng, held = random.Random(seed), 0.0
    for step in range(steps):
        seen = None
        if step % every == 0:
            held = 0.85 * held + 0.15 * rng.gauss(0, 3 * noise)
            seen = ratio(step) * math.exp(held)
        yield step, loss(step) * math.exp(rng.gauss(0, noise)), seen


def settled(ratio: float = 0.2, loss: float = 1.0) -> EarlyWarning:
    alarm = EarlyWarning()
    assert play(stream(300, lambda step: ratio, lambda step: loss), alarm) == []
    return alarm


def half_raised(ratio: float = 0.2) -> EarlyWarning:
    """A settled run whose loss is watched since step 300: the second stage, in which a ratio may be an alarm."""
    alarm = settled(ratio)
    alert = observe_loss(alarm, 300, 1.4)
    assert alert is not None
    assert (alert.level, alert.rule) == (AlertLevel.WATCH, "spike")
    return alarm


def alarms(events: list[Alert]) -> list[Alert]:
    return [e for e in events if e.level == AlertLevel.ALARM]
