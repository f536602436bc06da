"""Gradients beside the second moments of an adaptive optimizer."""

from __future__ import annotations

import json
import math
import random

import pytest

from gfs_core import Alert, AlertLevel, EarlyWarning, Reading
from gfs_core.signals.gradients import RMS_RATIO
from tests.core.observed import observe_loss, told

QUIET, WATCH, ALARM = AlertLevel


def readings(step: int, value: float, layers: dict[str, float] | None = None) -> list[Reading]:
    by_layer = [Reading(RMS_RATIO, step, v, layer) for layer, v in (layers or {}).items()]
    return [*by_layer, Reading(RMS_RATIO, step, value)]


def steady(value: float = 0.5, layers: dict[str, float] | None = None, steps: int = 100) -> EarlyWarning:
    alarm = EarlyWarning()
    for step in range(steps):
        assert told(alarm, readings(step, value, layers)) == []
    return alarm


@pytest.mark.parametrize(
    ("times", "level"), [(1.55, QUIET), (1.6, WATCH), (2.0, WATCH), (2.03, ALARM), (1e300, ALARM), (1e-300, QUIET)]
)
def test_the_median_of_three_is_compared_with_the_usual_one(times: float, level: AlertLevel) -> None:
    """From exp(.45) = 1.57 on it is watched, from exp(.7) = 2.01 on an alarm. One batch alone is nothing."""
    alarm = steady()
    assert told(alarm, readings(100, 0.5 * times)) == []
    told(alarm, readings(101, 0.5 * times))
    assert alarm.level is level


def test_the_layers_that_rose_most_are_named() -> None:
    usual = {"a": 0.5, "b": 0.1, "c": 2.0, "d": 0.5, "e": 0.5}
    alarm = steady(0.5, usual)
    risen = {"a": 0.5 * 1.2, "b": 0.1 * 3, "c": 2.0 * 2, "d": 0.5 * 4, "e": 0.5 * 1.4}
    events = [e for k in range(2) for e in told(alarm, readings(100 + k, 1.5, risen))]
    reason = "gradients are 3 times as large as usual beside the optimizer's second moments"
    assert events == [Alert(101, ALARM, reason, "second moment", ("d", "b", "c"))]


def test_it_is_silent_until_twenty_are_known() -> None:
    for known, level in ((19, QUIET), (20, ALARM)):
        alarm = steady(steps=known)
        for step in range(known, known + 3 if known == 20 else known + 1):
            told(alarm, readings(step, 5.0))
        assert alarm.level is level


def test_it_speaks_while_the_loss_falls() -> None:
    """A spike of Adam comes from a loss that falls until then."""
    alarm, events = EarlyWarning(), []
    for step in range(300):
        observe_loss(alarm, step, 1.0 + 2 * 0.99**step)
        events += told(alarm, readings(step, 3.0 if step > 280 else 1.0))
    assert [(e.step, e.rule) for e in events if e.level is ALARM] == [(282, "second moment")]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_is_no_measurement_is_passed_over(value: float) -> None:
    alarm = steady()
    before = alarm.state_dict()
    assert told(alarm, readings(100, value)) == []
    assert alarm.state_dict() == before


def test_short_batches_are_passed_over() -> None:
    """Each eighth, whose gradient is three times as large beside its second moments."""

    def levels(short: int) -> set[AlertLevel]:
        alarm, found = EarlyWarning(), set()
        for step in range(400):
            last = step % 8 == 7
            observe_loss(alarm, step, 1.0, short if last else 64)
            told(alarm, readings(step, 3.0 if last and step > 200 else 1.0))
            told(alarm, readings(step, 3.0 if last and step > 200 else 1.0))  # twice, so that the median of three is 3
            found.add(alarm.level)
        return found

    assert levels(64) > {QUIET}
    assert levels(5) == {QUIET}


def test_what_is_known_of_other_weights_is_forgotten() -> None:
    alarm = steady()
    for step in range(100, 103):
        told(alarm, readings(step, 5.0))
    assert alarm.level is ALARM
    alarm.forget(103)
    fresh = EarlyWarning().state_dict()
    assert alarm.level is QUIET
    assert alarm.state_dict()["detectors"]["second moment"] == fresh["detectors"]["second moment"]


@pytest.mark.parametrize("cut", [0, 5, 50, 101, 102, 130])
def test_a_state_is_gone_on_with_exactly(cut: int) -> None:
    rng, given = random.Random(0), []
    for step in range(150):
        values = [math.exp(rng.gauss(0, 0.2)) * (4.0 if step >= 100 else 1.0) for _ in range(3)]
        given += readings(step, values[0], {"a": values[1], "b": values[2]})
    for place in range(3 * cut, 3 * cut + 3):
        first, second = EarlyWarning(), EarlyWarning()
        expected, before = told(EarlyWarning(), given), told(first, given[:place])
        assert any(e.level is ALARM for e in expected)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert before + told(second, given[place:]) == expected
