"""What a run has stood: how far a rise that nothing followed makes a rule stricter."""

from __future__ import annotations

import pytest

from gfs_core import AlertLevel, EarlyWarning, Profile
from gfs_core.detectors.context import Context
from gfs_core.detectors.stood import Stood
from tests.core.observed import observe_gradient, observe_loss, observe_rate

QUIET, WATCH, ALARM = AlertLevel


def stood(scores: list[float], losses: list[float]) -> Stood:
    """After so many steps; the loss fell from 1 to 0 before them."""
    context = Context(Profile())
    for loss in [1.0] * 5 + [0.0] * 10:
        context.add_loss(loss)
    found = Stood(2.6, Profile(), context)
    for step, (score, loss) in enumerate(zip(scores, losses, strict=True)):
        context.add_loss(loss)
        found.add(step, score)
    return found


def test_a_rise_counts_once_a_hundred_steps_have_passed() -> None:
    assert [stood([0.0, 4.0, *[0.0] * n], [0.0] * (n + 2)).highest for n in (0, 98, 99, 100, 300)] == [0, 0, 0, 4, 4]


@pytest.mark.parametrize(("loss", "highest"), [(0.19, 4.0), (0.21, 0.0)])
def test_a_rise_that_harm_followed_does_not(loss: float, highest: float) -> None:
    """A fifth of what the loss has fallen, in the median of ten losses."""
    assert stood([4.0, *[0.0] * 200], [*[0.0] * 80, *[loss] * 20, *[0.0] * 101]).highest == highest


@pytest.mark.parametrize(("score", "strictness"), [(0.0, 1.0), (2.0, 1.0), (2.6, 1.25), (5.2, 2.5), (15.0, 4.0)])
def test_a_rise_has_to_pass_the_highest_one_by_a_quarter(score: float, strictness: float) -> None:
    assert stood([score, *[0.0] * 200], [0.0] * 201).strictness == pytest.approx(strictness)


def test_a_rise_that_comes_again_is_no_alarm_and_a_larger_one_is() -> None:
    """Scores of 2.6, of 2.7, and of 2.7 and 4.9 in two steps."""
    alarm, events = EarlyWarning(), []
    for step in range(1000):
        factor = {200: 13.5, 400: 15.0, 600: 15.0, 601: 15.0}.get(step, 1.0)
        observe_loss(alarm, step, max(1.0 - 0.01 * step, 0.2))
        events.append(observe_gradient(alarm, step, factor))
    assert [(e.step, e.level) for e in events if e is not None and e.level is ALARM] == [(200, ALARM), (601, ALARM)]


def test_a_gradient_has_to_rise_half_as_far_again_where_there_is_little_to_lose() -> None:
    """A twentieth of what the loss has fallen; a loss that is far below zero is not small."""

    def level(loss: float) -> AlertLevel:
        alarm = EarlyWarning()
        for step in range(300):
            observe_loss(alarm, step, loss + max(1.0 - 0.01 * step, 0.0))
            observe_gradient(alarm, step, 20.0 if step == 299 else 1.0)
        return alarm.level

    assert (level(0.06), level(0.04), level(-0.04), level(-0.06)) == (ALARM, WATCH, WATCH, ALARM)


def test_so_it_has_where_the_rate_comes_back_to_what_the_run_has_stood() -> None:
    def alarms(rate: float) -> list[int]:
        """The rate is lowered for a while; the gradient rises once it is back."""
        alarm, found = EarlyWarning(), []
        for step in range(420):
            observe_rate(alarm, step, 0.1 if step < 200 else 0.01 if step < 400 else rate)
            observe_loss(alarm, step, 0.5 + max(1.0 - 0.01 * step, 0.0))
            event = observe_gradient(alarm, step, 20.0 if step == 410 else 1.0)
            found += [step] if event is not None and event.level is ALARM else []
        return found

    assert (alarms(0.01), alarms(0.1)) == ([410], [])
