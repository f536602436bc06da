"""How levels go up and down, and how they survive a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfs_core import Alert, AlertLevel, EarlyWarning, Key, Profile, Reading
from gfs_core.detectors.base import Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.early_warning import DETECTORS
from gfs_core.signals.training import EXAMPLES, LOSS, STEP_RATE
from tests.core.observed import (
    RUNNING_RATIO,
    Seen,
    alarms,
    observe_loss,
    observe_mean_square,
    observe_rate,
    observe_ratio,
    play,
    settled,
    stream,
)

# --- hysteresis -----------------------------------------------------------------------------------------------------


def test_the_way_down_takes_quiet_observations() -> None:
    alarm = settled()
    observe_ratio(alarm, 300, 0.6, solved=False)
    events = [observe_ratio(alarm, 305 + 5 * k, 0.2, solved=False) for k in range(10)]
    assert [k for k, e in enumerate(events) if e is not None] == [4, 9]
    assert events[4] == Alert(
        325, AlertLevel.WATCH, "the last 5 running stability ratios were nearer to their usual values", "calm"
    )
    assert events[9] is not None
    assert events[9].level == AlertLevel.QUIET


def test_a_ratio_between_the_thresholds_does_not_make_it_flutter() -> None:
    alarm = settled()
    observe_ratio(alarm, 300, 0.6, solved=False)
    events = [observe_ratio(alarm, 305 + 5 * k, 0.2 if k % 4 else 0.5, solved=False) for k in range(12)]
    assert events == [None] * 12
    assert alarm.level == AlertLevel.ALARM


def test_quiet_losses_do_not_end_an_alarm_of_the_ratio() -> None:
    alarm = settled()
    observe_ratio(alarm, 300, 0.6, solved=False)
    assert [observe_loss(alarm, 301 + k, 1.0) for k in range(100)] == [None] * 100
    assert alarm.level == AlertLevel.ALARM


def test_a_loss_spike_passes() -> None:
    alarm = settled()
    assert observe_loss(alarm, 300, 1.05) is not None
    assert alarm.level == AlertLevel.ALARM
    events = [e for k in range(100) if (e := observe_loss(alarm, 301 + k, 1.0)) is not None]
    assert [e.level for e in events] == [AlertLevel.WATCH, AlertLevel.QUIET]
    assert events[0].reason == "the last 20 losses were nearer to their usual values"


def test_a_higher_level_that_lasts_becomes_the_usual_one() -> None:
    alarm = settled()
    events = play(((step, 1.0, 0.6 if step % 5 == 0 else None) for step in range(300, 600)), alarm)
    assert [e.level for e in events] == [AlertLevel.ALARM, AlertLevel.WATCH, AlertLevel.QUIET]


# --- until the run is back ------------------------------------------------------------------------------------------


def losses(alarm: EarlyWarning, values: Iterable[float], start: int) -> list[tuple[int, AlertLevel]]:
    events = [observe_loss(alarm, start + k, value) for k, value in enumerate(values)]
    return [(e.step, e.level) for e in events if e is not None]


@pytest.mark.parametrize("broken", [3.0, 1.2])
def test_a_loss_that_does_not_come_back_is_an_alarm_for_good(broken: float) -> None:
    alarm = settled()
    assert losses(alarm, [broken] * 2000, 300) == [(300, AlertLevel.ALARM)]
    back = losses(alarm, [1.0] * 200, 2300)
    assert [state for _, state in back] == [AlertLevel.WATCH, AlertLevel.QUIET]
    assert back[1][0] < 2300 + 20 + 20 + 100  # the mean needs its time
    assert losses(alarm, [broken], 2500) == [(2500, AlertLevel.ALARM)]  # and it is as it was


def test_nearly_back_is_not_back() -> None:
    alarm = EarlyWarning()
    noisy = [1.0 + 0.1 * (k % 10) for k in range(100)]  # median 1.5, nine in ten below 1.9
    assert losses(alarm, noisy, 0) == []
    assert losses(alarm, [v + 3.0 for v in noisy], 100) == [(100, AlertLevel.ALARM)]
    assert losses(alarm, [v + 0.3 for v in noisy * 10], 200) == []  # their mean is 1.75: more than half a spread above
    assert [state for _, state in losses(alarm, [v + 0.1 for v in noisy * 2], 1200)] == [
        AlertLevel.WATCH,
        AlertLevel.QUIET,
    ]


def test_after_losses_that_were_no_numbers_they_have_to_be_back_too() -> None:
    alarm = settled()
    assert losses(alarm, [math.nan] * 5 + [5.0] * 500, 300) == [(300, AlertLevel.ALARM)]
    assert [state for _, state in losses(alarm, [1.0] * 200, 805)] == [AlertLevel.WATCH, AlertLevel.QUIET]


def rates(alarm: EarlyWarning, value: float, steps: range, loss: float = 1.0) -> list[tuple[int, AlertLevel, str]]:
    events = [
        e
        for step in steps
        for e in (observe_rate(alarm, step, value), observe_loss(alarm, step, loss))
        if e is not None
    ]
    return [(e.step, e.level, e.rule) for e in events]


def test_a_rate_that_stays_high_is_an_alarm_until_the_losses_have_long_been_well() -> None:
    alarm = EarlyWarning()
    assert rates(alarm, 0.1, range(100)) == []
    told = rates(alarm, 1.0, range(100, 400))
    assert told == [(100, AlertLevel.ALARM, "rate"), (219, AlertLevel.WATCH, "calm"), (239, AlertLevel.QUIET, "calm")]
    broken = EarlyWarning()
    rates(broken, 0.1, range(100))
    assert rates(broken, 1.0, range(100, 600), loss=2.0) == [(100, AlertLevel.ALARM, "rate")]
    assert rates(broken, 0.1, range(600, 900), loss=2.0) == []  # the rate is back, the losses are not


def test_a_rate_that_the_run_has_stood_before_ends_as_restarts_do() -> None:
    alarm = EarlyWarning()
    assert rates(alarm, 1.0, range(100)) == []
    assert rates(alarm, 0.1, range(100, 200)) == []
    told = rates(alarm, 1.0, range(200, 300))
    assert [state for _, state, _ in told] == [AlertLevel.ALARM, AlertLevel.WATCH, AlertLevel.QUIET]
    assert told[2][0] < 200 + 25 + 20 + 20 + 2  # the usual rate is up again after 25 steps


def test_a_rate_of_a_few_steps_is_none_that_the_run_has_stood() -> None:
    alarm = EarlyWarning()
    rates(alarm, 1.0, range(10))
    rates(alarm, 0.1, range(10, 200))
    assert [state for _, state, _ in rates(alarm, 1.0, range(200, 300))] == [AlertLevel.ALARM]


def test_a_ratio_without_losses_has_to_come_back_itself() -> None:
    alarm = EarlyWarning()
    for step in range(0, 300, 5):
        assert observe_ratio(alarm, step, 0.2, solved=False) is None
    held = [observe_ratio(alarm, step, 0.6, solved=False) for step in range(300, 2000, 5)]
    assert [e.level for e in held if e is not None] == [AlertLevel.ALARM]
    back = [observe_ratio(alarm, step, 0.3, solved=False) for step in range(2000, 2100, 5)]
    assert [k for k, e in enumerate(back) if e is not None] == [4, 9]


def test_a_second_rise_is_told_of_while_the_first_lasts() -> None:
    alarm = settled()
    assert losses(alarm, [2.0] * 300, 300) == [(300, AlertLevel.ALARM)]
    assert losses(alarm, [8.0] * 300, 600) == [(600, AlertLevel.ALARM)]
    assert losses(alarm, [2.0] * 300, 900) == []  # where it was between the two is not back
    assert [state for _, state in losses(alarm, [1.0] * 200, 1200)] == [AlertLevel.WATCH, AlertLevel.QUIET]


def test_after_a_rise_that_is_over_a_later_one_has_to_come_back_to_its_own_level() -> None:
    alarm = EarlyWarning()
    noisy = [0.1 * (k % 10) for k in range(2000)]
    assert losses(alarm, [1.0 + v for v in noisy[:300]], 0) == []
    first = losses(alarm, [9.0] + [1.0 + v for v in noisy[:200]], 300)
    assert [level for _, level in first] == [AlertLevel.ALARM, AlertLevel.WATCH, AlertLevel.QUIET]
    assert losses(alarm, [1.0 + 0.001 * k + v for k, v in enumerate(noisy)], 501) == []  # drifts to 3
    second = losses(alarm, [19.0] + [3.0 + v for v in noisy[:200]], 2501)
    assert [level for _, level in second] == [AlertLevel.ALARM, AlertLevel.WATCH, AlertLevel.QUIET]


def test_ratios_of_other_weights_begin_anew() -> None:
    alarm = settled()
    observe_ratio(alarm, 300, 0.6, solved=False)
    event = alarm.forget(301)
    assert event is not None
    assert (event.step, event.level, event.rule) == (301, AlertLevel.QUIET, "calm")
    assert [observe_ratio(alarm, 305 + 5 * k, 5.0, solved=False) for k in range(40)] == [None] * 40
    losses(alarm, [9.0], 600)
    assert alarm.forget(601) is None  # what the losses say stays
    assert alarm.level is AlertLevel.ALARM


# --- resume ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 449), st.integers(0, 10_000))
def test_a_resumed_run_has_the_events_of_the_uninterrupted_one(cut: int, seed: int) -> None:
    def ratio(step: int) -> float:
        return 0.2 * (4.0 if 250 <= step < 300 else 1.02 ** max(step - 380, 0))

    def loss(step: int) -> float:
        return math.nan if step == 330 else 3.0 if step in (200, 201) else 1.0

    whole = list(stream(450, ratio, loss, 0.1, seed))
    expected = play(whole)
    assert len(alarms(expected)) >= 3
    first, second = EarlyWarning(), EarlyWarning()
    events = play(whole[:cut], first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert (second.level, second.reason) == (first.level, first.reason)
    assert events + play(whole[cut:], second) == expected
    assert second.state_dict() == play_state(whole)


def play_state(whole: list[Seen]) -> dict[str, object]:
    alarm = EarlyWarning()
    play(whole, alarm)
    return alarm.state_dict()


@given(st.lists(st.tuples(st.floats(), st.floats(), st.booleans()), max_size=120))
def test_any_numbers_are_taken(values: list[tuple[float, float, bool]]) -> None:
    alarm = EarlyWarning()
    for step, (loss, ratio, solved) in enumerate(values):
        observe_loss(alarm, step, loss)
        observe_ratio(alarm, step, ratio, solved)
        assert alarm.level in AlertLevel
    json.dumps(alarm.state_dict(), allow_nan=False)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1.7e308, 1.7e308), min_size=60, max_size=60), st.lists(st.floats(5e-324, 1.7e308), min_size=60)
)
def test_extreme_numbers_are_taken(losses: list[float], ratios: list[float]) -> None:
    alarm = EarlyWarning()
    for step, (loss, ratio) in enumerate(zip(losses, ratios, strict=False)):
        observe_loss(alarm, step, loss)
        observe_ratio(alarm, step // 2, ratio, False)  # the same step twice, as after a resume
    json.dumps(alarm.state_dict(), allow_nan=False)


@pytest.mark.parametrize("cut", [66, 75, 88, 100])  # before anything, past the rate's rise, past the edge
def test_rates_and_mean_squares_survive_a_resume(cut: int) -> None:
    def told(alarm: EarlyWarning, steps: range) -> list[Alert | None]:
        out: list[Alert | None] = []
        for step in steps:
            out.append(observe_rate(alarm, step, 0.1 if step < 70 else 0.4))
            out.append(observe_mean_square(alarm, step, 0.5 if step < 80 else 2.0))
        return out

    whole, first, second = EarlyWarning(), EarlyWarning(), settled(0.3)  # what it has seen of its own is forgotten
    before = told(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert before + told(second, range(cut, 120)) == told(whole, range(120))
    assert whole.state_dict() == second.state_dict()
    assert whole.level is AlertLevel.ALARM


# --- readings and states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reading",
    [
        Reading(Key("sharpness", ""), 300, 9.0),
        Reading(RUNNING_RATIO, 300, None, reason="it could not be had"),
        Reading(RUNNING_RATIO, 300, 9.0, layer="head"),
        Reading(LOSS, 300, math.nan, layer="head"),
    ],
)
def test_what_no_detector_reads_is_passed_over(reading: Reading) -> None:
    warning = settled()
    before = warning.state_dict()
    assert warning.observe(reading) is None
    assert warning.state_dict() == before


def test_readings_are_put_in_the_order_of_the_detectors_and_those_that_none_reads_left_out() -> None:
    keys = [Key(name, "") for name in ("stability_ratio", "sharpness", LOSS.name, "learning_rate", STEP_RATE.name)]
    ordered = EarlyWarning().in_order(Reading(key, 5, 1.0) for key in keys)
    assert [r.key.name for r in ordered] == [STEP_RATE.name, "stability_ratio", LOSS.name]


def test_the_examples_of_a_batch_belong_to_the_loss_of_its_step() -> None:
    def observed() -> EarlyWarning:
        warning = EarlyWarning()
        for step in range(100):
            observe_loss(warning, step, 1.0, 64)
        assert warning.observe(Reading(EXAMPLES, 100, 3)) is None
        return warning

    assert observe_loss(observed(), 101, 9.0) is not None  # another step
    assert observed().observe(Reading(LOSS, 100, 9.0)) is None
    resumed = EarlyWarning()
    resumed.load_state_dict(json.loads(json.dumps(observed().state_dict())))  # between the two
    assert resumed.observe(Reading(LOSS, 100, 9.0)) is None
    assert resumed.observe(Reading(LOSS, 100, 9.0)) is not None  # the same step again, whose size is not known


def test_the_reason_of_a_level_that_comes_down_is_kept() -> None:
    warning = settled()
    observe_ratio(warning, 300, 0.6, solved=False)
    for k in range(10):
        observe_ratio(warning, 305 + 5 * k, 0.2, solved=False)
    assert (warning.level, warning.reason) == (
        AlertLevel.QUIET,
        "the last 5 running stability ratios were nearer to their usual values",
    )


NUMBER, NAME = ("x", -1.0, math.nan, math.inf, 0.0), ("x", None, 7)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("level",), NAME),
        (("context",), NAME),
        (("detectors",), NAME),
        (("detectors", "running_stability_ratio"), NAME),
        (("context", "losses"), ([None], ["x"], 3)),
        (("context", "mean_loss"), ("x", [1.0])),
        (("context", "before"), ([1.0, 0.0, 1.0], [1.0, 1.0], ["x", 1.0, 1.0])),
        (("context", "back_for"), ("x", None)),
        (("detectors", "running_stability_ratio", "held"), ([[1, -1.0]], [[1]], ["x"], [[1, math.nan]])),
        (("detectors", "stability_ratio", "held"), ([[1, math.inf]], [["x", 1.0]])),
        (("detectors", "loss", "sizes"), (["x"], None)),
        (("detectors", "loss", "track", "shown"), ([7, 0], [0], ["x", 0], [0, "x"])),
        (("detectors", "loss", "track", "usual"), NUMBER),
        (("detectors", "loss", "track", "stood"), ("x", None)),
        (("detectors", "rate", "rates"), ([0.0], [math.nan], ["x"])),
        (("detectors", "rate", "last_step"), ("x", None)),
        (("detectors", "rate", "ratios"), ({"stability_ratio": 0.0}, [1.0])),
        (("detectors", "edge", "ratios"), ([0.0], [-1.0], ["x"])),
        (("detectors", "edge", "count"), ("x", None)),
    ],
    ids=lambda part: ".".join(part) if isinstance(part, tuple) and all(isinstance(p, str) for p in part) else "",
)
def test_a_damaged_state_raises(path: tuple[str, ...], values: tuple[object, ...]) -> None:
    for value in values:
        state = settled().state_dict()
        place = state
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            EarlyWarning().load_state_dict(state)
    if path[:-1] == ("detectors",):  # a detector may be new since: test_watch.py
        return
    del place[path[-1]]
    with pytest.raises(KeyError):
        EarlyWarning().load_state_dict(state)


# --- a detector more -------------------------------------------------------------------------------------------------


class Hot:
    """Speaks where a temperature is above 90, or a loss above 5."""

    name, reads = "hot", ("temperature", LOSS.name)

    def __init__(self, profile: Profile, context: Context) -> None:
        self.track = Track("temperatures", 3, context.rise_began)

    def observe(self, reading: Reading) -> Finding | None:
        above = (reading.value or 0.0) > (5 if reading.key.name == LOSS.name else 90)
        return self.track.take(Finding(AlertLevel(above), f"it is {reading.value:g}", "hot"))

    def forget(self) -> None:
        self.track.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"track": self.track.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.track.load_state_dict(state["track"])


def test_a_detector_more_is_one_class_and_its_place_in_the_list() -> None:
    temperature = Key("temperature", "degrees")
    warning = EarlyWarning(detectors=(*DETECTORS, Hot))
    told = [warning.observe(Reading(temperature, step, 95.0 if step == 5 else 20.0)) for step in range(10)]
    assert [a for a in told if a is not None] == [
        Alert(5, AlertLevel.WATCH, "it is 95", "hot"),
        Alert(8, AlertLevel.QUIET, "the last 3 temperatures were nearer to their usual values", "calm"),
    ]


def test_of_two_detectors_that_read_the_same_the_graver_is_told() -> None:
    warning = EarlyWarning(detectors=(Hot, *DETECTORS))
    assert [observe_loss(warning, step, 1.0) for step in range(100)] == [None] * 100
    alert = observe_loss(warning, 100, 9.0)
    assert alert is not None
    assert (alert.level, alert.rule) == (AlertLevel.ALARM, "spike")  # beside a watch for what is hot
    alert = EarlyWarning(detectors=(Hot, *DETECTORS)).observe(Reading(LOSS, 0, 9.0))
    assert alert == Alert(0, AlertLevel.WATCH, "it is 9", "hot")
    resumed = EarlyWarning(detectors=(*DETECTORS, Hot))
    resumed.load_state_dict(json.loads(json.dumps(warning.state_dict())))
    assert resumed.state_dict() == warning.state_dict()
    assert resumed.forget(101) is None  # what the losses say stays
    assert resumed.level is AlertLevel.ALARM
