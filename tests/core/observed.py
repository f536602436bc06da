"""What the early warning says of one value, and of made-up streams."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

from gfs_core import Alert, AlertLevel, EarlyWarning, Key, Reading
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


def alarms(events: list[Alert]) -> list[Alert]:
    return [e for e in events if e.level == AlertLevel.ALARM]
