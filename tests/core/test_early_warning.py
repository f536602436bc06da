"""How levels go up and down, and how they survive a resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfs_core import Alert, AlertLevel, EarlyWarning, Key, Profile, Reading
from gfs_core.detectors.base import Finding, Track
from gfs_core.detectors.context import Context
from gfs_core.detectors.early_warning import DETECTORS
from gfs_core.signals.gradients import GRAD_NORM, WEIGHT_NORM
from gfs_core.signals.training import EXAMPLES, LOSS, STEP_RATE
from tests.core.observed import (
    RUNNING_RATIO,
    SOLVED_RATIO,
    alarms,
    gradient_readings,
    half_raised,
    observe_gradient,
    observe_loss,
    observe_rate,
    observe_ratio,
    play,
    settled,
    told,
)

# --- hysteresis -----------------------------------------------------------------------------------------------------


def test_the_way_down_takes_quiet_observations() -> None:
    alarm = half_raised()
    observe_ratio(alarm, 300, 0.6, solved=False)
    reason = "the last 5 running stability ratios were nearer to their usual values"
    assert play([(step, 1.0, None if step % 5 else 0.2) for step in range(301, 400)], alarm) == [
        Alert(325, AlertLevel.WATCH, reason, "calm"),
        Alert(350, AlertLevel.QUIET, reason, "calm"),
    ]


def test_a_ratio_between_the_thresholds_does_not_make_it_flutter() -> None:
    alarm = half_raised()
    observe_ratio(alarm, 300, 0.6, solved=False)
    events = [observe_ratio(alarm, 305 + 5 * k, 0.2 if k % 4 else 0.5, solved=False) for k in range(12)]
    assert events == [None] * 12
    assert alarm.level == AlertLevel.ALARM


def test_quiet_losses_do_not_end_an_alarm_of_the_ratio() -> None:
    alarm = half_raised()
    observe_ratio(alarm, 300, 0.6, solved=False)
    assert [observe_loss(alarm, 301 + k, 1.0) for k in range(100)] == [None] * 100
    assert alarm.level == AlertLevel.ALARM


def test_a_loss_spike_passes() -> None:
    alarm = settled()
    assert observe_loss(alarm, 300, 2.0) is not None
    assert alarm.level == AlertLevel.ALARM
    events = [e for k in range(100) if (e := observe_loss(alarm, 301 + k, 1.0)) is not None]
    assert [e.level for e in events] == [AlertLevel.WATCH, AlertLevel.QUIET]
    assert events[0].reason == "the last 20 losses were nearer to their usual values"


def test_a_higher_level_that_lasts_becomes_the_usual_one() -> None:
    alarm = half_raised()
    assert observe_ratio(alarm, 300, 0.6, solved=False).level is AlertLevel.ALARM
    events = play(((step, 1.0, 0.6 if step % 5 == 0 else None) for step in range(301, 600)), alarm)
    assert [(e.step, e.level) for e in events] == [(425, AlertLevel.WATCH), (450, AlertLevel.QUIET)]


# --- until the run is back ------------------------------------------------------------------------------------------


def losses(alarm: EarlyWarning, values: Iterable[float], start: int) -> list[tuple[int, AlertLevel]]:
    events = [observe_loss(alarm, start + k, value) for k, value in enumerate(values)]
    return [(e.step, e.level) for e in events if e is not None]


@pytest.mark.parametrize(
    ("broken", "rise"), [(3.0, [(0, AlertLevel.ALARM)]), (1.2, [(1, AlertLevel.WATCH), (2, AlertLevel.ALARM)])]
)
def test_a_loss_that_does_not_come_back_is_an_alarm_for_good(broken: float, rise: list[tuple[int, AlertLevel]]) -> None:
    alarm = settled()
    assert losses(alarm, [broken] * 2000, 300) == [(300 + k, level) for k, level in rise]
    back = losses(alarm, [1.0] * 200, 2300)
    assert [state for _, state in back] == [AlertLevel.WATCH, AlertLevel.QUIET]
    assert back[1][0] < 2300 + 20 + 20 + 100  # the mean needs its time
    assert losses(alarm, [broken] * 3, 2500) == [(2500 + k, level) for k, level in rise]  # and it is as it was


def test_nearly_back_is_not_back() -> None:
    alarm = EarlyWarning()
    noisy = [1.0 + 0.1 * (k % 10) for k in range(100)]  # median 1.5, the upper twentieth 1.9
    assert losses(alarm, noisy, 0) == []
    assert losses(alarm, [v + 3.0 for v in noisy], 100) == [(100, AlertLevel.ALARM)]
    assert losses(alarm, [v + 0.3 for v in noisy * 10], 200) == []  # their mean is 1.75: 0.25 above …
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
    events = rates(alarm, 1.0, range(100, 400))
    assert events == [(100, AlertLevel.ALARM, "rate"), (219, AlertLevel.WATCH, "calm"), (239, AlertLevel.QUIET, "calm")]
    broken = EarlyWarning()
    rates(broken, 0.1, range(100))
    assert rates(broken, 1.0, range(100, 600), loss=2.0) == [(100, AlertLevel.ALARM, "rate")]
    assert rates(broken, 0.1, range(600, 900), loss=2.0) == []  # the rate is back, the losses are not


@pytest.mark.parametrize(
    ("rate", "level"), [(1.0, AlertLevel.WATCH), (1.09, AlertLevel.WATCH), (1.2, AlertLevel.ALARM)]
)
def test_a_rate_that_the_run_has_stood_before_is_only_watched_and_ends_as_restarts_do(
    rate: float, level: AlertLevel
) -> None:
    alarm = EarlyWarning()
    assert rates(alarm, 1.0, range(100)) == []
    assert rates(alarm, 0.1, range(100, 200)) == []
    events = rates(alarm, rate, range(200, 300))
    assert events[0] == (200, level, "rate")
    if rate == 1.0:
        assert [state for _, state, _ in events] == [AlertLevel.WATCH, AlertLevel.QUIET]
        assert events[1][0] < 200 + 25 + 20 + 2  # the usual rate is up again after 25 steps


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
    assert [e.level for e in held if e is not None] == [AlertLevel.WATCH]
    back = [observe_ratio(alarm, step, 0.3, solved=False) for step in range(2000, 2100, 5)]
    assert [k for k, e in enumerate(back) if e is not None] == [4]


def test_an_alarm_of_the_ratio_outlasts_the_gradient_that_was_raised_with_it() -> None:
    alarm = EarlyWarning()
    for step in range(300):
        assert observe_gradient(alarm, step, 1.0) is None
        assert step % 5 or observe_ratio(alarm, step, 0.2, solved=False) is None
    assert observe_gradient(alarm, 300, math.exp(0.2 * 10)).level is AlertLevel.WATCH  # ten least spreads
    assert observe_ratio(alarm, 300, 0.6, solved=False).rule == "rise"
    assert alarm.level is AlertLevel.ALARM
    for step in range(301, 1000):
        assert observe_gradient(alarm, step, 1.0) is None
        assert step % 5 or observe_ratio(alarm, step, 0.6, solved=False) is None
    back = [observe_ratio(alarm, step, 0.3, solved=False) for step in range(1000, 1100, 5)]
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
    alarm = half_raised()
    observe_ratio(alarm, 300, 0.6, solved=False)
    assert losses(alarm, [1.0] * 40, 301) == []
    event = alarm.forget(341)
    assert event is not None
    assert (event.step, event.level, event.rule) == (341, AlertLevel.QUIET, "calm")
    assert [observe_ratio(alarm, 345 + 5 * k, 5.0, solved=False) for k in range(40)] == [None] * 40
    losses(alarm, [9.0], 600)
    assert alarm.forget(601) is None  # what the losses say stays
    assert alarm.level is AlertLevel.ALARM


# --- resume ---------------------------------------------------------------------------------------------------------


def eventful(seed: int, missing: bool = False) -> list[Reading]:
    """All that the detectors read, of a run in which each of them has something to say."""
    rng, readings = random.Random(seed), []

    def noisy(value: float, noise: float = 0.1) -> float:
        return value * math.exp(rng.gauss(0, noise))

    for step in range(450):
        readings.append(Reading(STEP_RATE, step, 0.4 if 100 <= step < 110 else 0.1))
        readings.append(Reading(EXAMPLES, step, 9 if step % 30 == 29 else 64))
        loss = {158: 1.02, 159: 1.02, 160: 1.36, 210: 9.0, 211: 9.0, 330: math.nan}.get(step, 1.0)
        readings.append(Reading(LOSS, step, noisy(loss, 0.01)))
        if step % 5 == 0:
            readings.append(Reading(RUNNING_RATIO, step, noisy({160: 0.9, 210: 0.9, 240: 0.9}.get(step, 0.2))))
            readings.append(Reading(SOLVED_RATIO, step, noisy(0.3)))
        layers = {"stem": noisy(1.0), "head": noisy(8.0 if 280 <= step < 290 else 0.1)}
        if missing and step % 7 == 3:
            del layers["stem"]
        weights = 1.1 ** (max(0, min(step - 390, 15)))
        readings += gradient_readings(step, layers, weights=weights, normalised=noisy(3.0 if step > 395 else 1.0))
        if step == 360:
            readings[-1] = Reading(GRAD_NORM, step, math.inf)
    return readings


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 10_000))
def test_a_resumed_run_has_the_events_of_the_uninterrupted_one(cut: float, seed: int) -> None:
    resumed_run_has_the_same_events(eventful(seed), cut)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_so_it_has_where_a_layer_has_no_gradient_now_and_then(cut: float) -> None:
    resumed_run_has_the_same_events(eventful(0, missing=True), cut)


def resumed_run_has_the_same_events(readings: list[Reading], cut: float) -> None:
    """Cut at any reading, even between those of a step."""
    place = int(cut * len(readings))
    whole, first, second = EarlyWarning(), EarlyWarning(), settled(0.3)  # what it has seen of its own is forgotten
    expected = told(whole, readings)
    assert {e.rule for e in alarms(expected)} >= {"rate", "spike", "rise", "gradient", "second moment", "not finite"}
    events = told(first, readings[:place])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    assert (second.level, second.reason) == (first.level, first.reason)
    assert events + told(second, readings[place:]) == expected
    assert second.state_dict() == whole.state_dict()


NUMBERS = st.tuples(st.floats(), st.floats(), st.booleans(), st.floats(), st.floats(), st.floats(), st.floats())


@given(st.lists(NUMBERS, max_size=120))
def test_any_numbers_are_taken(values: list[tuple[float, float, bool, float, float, float, float]]) -> None:
    alarm = EarlyWarning()
    for step, (loss, ratio, solved, layer, norm, weights, normalised) in enumerate(values):
        observe_loss(alarm, step, loss)
        observe_ratio(alarm, step, ratio, solved)
        alarm.observe(Reading(GRAD_NORM, step, layer, "head"))
        observe_gradient(alarm, step, norm, weights, normalised)
        assert alarm.level in AlertLevel
    json.dumps(alarm.state_dict(), allow_nan=False)


EXTREME = st.floats(5e-324, 1.7e308)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1.7e308, 1.7e308), min_size=60, max_size=60),
    st.lists(st.tuples(EXTREME, EXTREME, EXTREME), min_size=60),
)
def test_extreme_numbers_are_taken(losses: list[float], numbers: list[tuple[float, float, float]]) -> None:
    alarm = EarlyWarning()
    for step, (loss, (ratio, norm, weights)) in enumerate(zip(losses, numbers, strict=False)):
        observe_loss(alarm, step, loss)
        observe_ratio(alarm, step // 2, ratio, False)  # the same step twice, as after a resume
        observe_gradient(alarm, step // 2, norm, weights, normalised=norm)
    json.dumps(alarm.state_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (-1.7e308, 1.7e308),
        (5e-324, 1.7e308),
        (1.7e308, 5e-324),
        (1e-100, 1e100),
    ],
)
def test_jumps_from_one_end_of_the_numbers_to_the_other_are_taken(before: float, after: float) -> None:
    alarm = EarlyWarning()
    for step in range(120):
        value = before if step < 60 else after
        observe_loss(alarm, step, value)
        observe_ratio(alarm, step, value, False)
        observe_gradient(alarm, step, abs(value), abs(value), abs(value))
    json.dumps(alarm.state_dict(), allow_nan=False)
    assert after < before or alarm.level is AlertLevel.ALARM


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


def test_readings_of_several_steps_are_put_in_order_step_after_step_and_the_layers_before_the_whole_model() -> None:
    given = [Reading(GRAD_NORM, step, 1.0, layer) for step in (7, 6) for layer in ("", "stem", "head")]
    given += [Reading(LOSS, 7, 1.0), Reading(WEIGHT_NORM, 6, 1.0)]
    ordered = [(r.step, r.key.name, r.layer) for r in EarlyWarning().in_order(given)]
    layers = [("grad_norm", "stem"), ("grad_norm", "head"), ("grad_norm", "")]
    assert ordered == [(6, "weight_norm", ""), *((6, *r) for r in layers), (7, "loss", ""), *((7, *r) for r in layers)]


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
    warning = half_raised()
    observe_ratio(warning, 300, 0.6, solved=False)
    play([(step, 1.0, None if step % 5 else 0.2) for step in range(301, 400)], warning)
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
        (("context", "first"), ("x", [1.0])),
        (("context", "best"), ("x", [1.0])),
        (("context", "before"), ([1.0, -1.0, 1.0], [1.0, 1.0, math.nan], [1.0, 1.0], ["x", 1.0, 1.0])),
        (("context", "usual"), ([1.0, 1.0, -1.0, 1.0], [1.0], 7)),
        (("context", "new"), ("x", None)),
        (("context", "ratio"), NUMBER),
        (("context", "raised"), NAME),
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
        (("detectors", "loss", "means"), ([1.0, 1.0], ["x", 0.0, 0.0], None)),
        (("detectors", "gradient", "gradients"), NAME),
        (("detectors", "gradient", "gradients", "rows"), ([[1.0] * 9], [["x"]], [1.0])),
        (("detectors", "gradient", "weights", "held"), ([[1.0]], [["x", 1.0]], 7)),
        (("detectors", "second moment", "past", "since"), ("x", None)),
        (("detectors", "gradient", "layers"), ({"head": "x"}, 7)),
        (("detectors", "gradient", "growth"), ("x", None)),
        (("detectors", "gradient", "scores"), ({"": "x"}, None, 7)),
    ],
    ids=lambda part: ".".join(part) if isinstance(part, tuple) and all(isinstance(p, str) for p in part) else "",
)
def test_a_damaged_state_raises(path: tuple[str, ...], values: tuple[object, ...]) -> None:
    for value in values:
        warning = settled()
        told(warning, [r for step in range(9) for r in gradient_readings(step, {"stem": 1.0, "head": 2.0}, 1.0, 1.0)])
        state = warning.state_dict()
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

    name, reads, by_layer = "hot", ("temperature", LOSS.name), False

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
    readings = [Reading(temperature, step, 95.0 if step == 5 else 20.0) for step in range(10)]
    assert told(warning, readings) == [
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
