"""What the early warning says of one value."""

from __future__ import annotations

from gfs_core import Alert, EarlyWarning, Key, Reading
from gfs_core.signals.training import STEP_RATE, loss_readings

RUNNING_RATIO = Key("running_stability_ratio", "")
SOLVED_RATIO = Key("stability_ratio", "")
MEAN_SQUARE_RATIO = Key("mean_square_stability_ratio", "")


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
