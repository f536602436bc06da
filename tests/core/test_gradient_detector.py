"""The gradient of the worst layer against its own past, and the growth of the weights."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping

import pytest

from gfs_core import Alert, AlertLevel, EarlyWarning, Profile, Reading
from gfs_core.signals.gradients import GRAD_NORM
from tests.core.observed import (
    alarms,
    gradient_readings,
    observe_gradient,
    observe_loss,
    observe_rate,
    observe_ratio,
    told,
)
from tests.core.test_alarm_ends import Training

QUIET, WATCH, ALARM = AlertLevel
LAYERS = {"stem": 1.0, "trunk": 0.01, "head": 10.0}


def times(factors: Mapping[str, float]) -> dict[str, float]:
    return {layer: norm * factors.get(layer, 1.0) for layer, norm in LAYERS.items()}


def steady(steps: Iterable[int] = range(100), weights: float | None = None) -> EarlyWarning:
    alarm = EarlyWarning()
    for step in steps:
        assert observe_gradient(alarm, step, LAYERS, weights) is None
    return alarm


def levels(events: Iterable[Alert | None]) -> list[tuple[int, AlertLevel]]:
    return [(e.step, e.level) for e in events if e is not None]


# --- one layer ------------------------------------------------------------------------------------------------------


def test_a_layer_whose_gradient_grows_is_an_alarm_that_names_it() -> None:
    """Threefold is 5.5 least spreads: .2 of that at first, then .36, .49. The whole model's norm hardly changes."""
    alarm = steady()
    events = [observe_gradient(alarm, 100 + k, times({"trunk": 3.0})) for k in range(3)]
    reason = "the gradient rose above its usual size: trunk 3 times"
    assert events == [
        None,
        Alert(101, WATCH, reason, "gradient", ("trunk",)),
        Alert(102, ALARM, reason, "gradient", ("trunk",)),
    ]


@pytest.mark.parametrize(
    ("factor", "level"), [(5.4, QUIET), (5.6, WATCH), (13.4, WATCH), (13.6, ALARM), (1e30, ALARM), (1e-30, QUIET)]
)
def test_one_reading_is_judged_by_a_fifth_of_its_spreads(factor: float, level: AlertLevel) -> None:
    """.2 log(factor) / .2: a least spread is .2 of a logarithm."""
    alarm = steady()
    observe_gradient(alarm, 100, times({"stem": factor}))
    assert alarm.level is level


def test_one_reading_counts_fifteen_spreads_at_most() -> None:
    """So it scores 3, 2.4 and 1.92, which are raised; 1.54 is not."""
    alarm, raised = steady(), []
    for step in range(100, 160):
        observe_gradient(alarm, step, times({"stem": 1e30 if step == 100 else 1.0}))
        raised.append(alarm.state_dict()["context"]["raised"]["gradient"])
    assert raised == [True] * 3 + [False] * 57


def test_a_layer_is_judged_beside_its_own_scatter() -> None:
    """A layer that scatters by a factor e now and then does so by 3."""

    def seen(noise: float) -> AlertLevel:
        alarm, rng = EarlyWarning(), random.Random(0)
        for step in range(100):
            assert observe_gradient(alarm, step, times({"stem": math.exp(rng.gauss(0, noise))})) is None
        for step in range(100, 104):
            observe_gradient(alarm, step, times({"stem": 3.0}))
        return alarm.level

    assert [seen(noise) for noise in (0.1, 0.3, 1.0)] == [ALARM, WATCH, QUIET]


@pytest.mark.parametrize(
    ("factors", "named"),
    [
        ({"a": 20.0, "b": 18.0, "c": 8.0, "d": 16.0}, ("a", "b", "d")),  # three at most, the worst first
        ({"a": 15.0, "c": 20.0}, ("c", "a")),
        ({"b": 20.0, "a": 4.2, "d": 4.7}, ("b", "d")),  # half as many spreads as the worst at least: 1.4 and 1.55 of 3
    ],
)
def test_the_layers_that_rose_most_are_named(factors: dict[str, float], named: tuple[str, ...]) -> None:
    alarm = EarlyWarning()
    for step in range(100):
        observe_gradient(alarm, step, dict.fromkeys("abcde", 1.0))
    event = observe_gradient(alarm, 100, {layer: factors.get(layer, 1.0) for layer in "abcde"})
    assert event is not None
    assert (event.level, event.layers) == (ALARM, named)
    assert event.reason.endswith(", ".join(f"{layer} {factors[layer]:.2g} times" for layer in named))


def test_without_layers_the_whole_model_is_judged_and_none_named() -> None:
    alarm = EarlyWarning()
    assert [observe_gradient(alarm, step, 2.0) for step in range(100)] == [None] * 100
    assert observe_gradient(alarm, 100, 30.0) == Alert(
        100, ALARM, "the gradient rose above its usual size", "gradient", ()
    )


def test_it_is_silent_until_so_many_are_known() -> None:
    first = Profile().gradient_first
    for known, level in ((first - 1, QUIET), (first, ALARM)):
        alarm = steady(range(known))
        observe_gradient(alarm, known, times({"head": 100.0}))
        assert alarm.level is level


def test_gradients_of_zero_are_no_measure_of_what_is_usual() -> None:
    alarm = EarlyWarning()
    for step in range(100):
        assert observe_gradient(alarm, step, {**LAYERS, "frozen": 0.0}) is None
    assert observe_gradient(alarm, 100, {**LAYERS, "frozen": 9.0}) is None  # nothing is known of it
    alarm = EarlyWarning()
    assert [observe_gradient(alarm, step, 0.0) for step in range(100)] == [None] * 100
    assert observe_gradient(alarm, 100, 9.0) is None


def test_the_way_down_takes_twenty_quiet_gradients_for_each_level() -> None:
    alarm = steady()
    events = [observe_gradient(alarm, 100 + k, times({"stem": 20.0 if k == 0 else 1.0})) for k in range(60)]
    assert levels(events) == [(100, ALARM), (120, WATCH), (140, QUIET)]
    assert alarm.reason == "the last 20 gradients were nearer to their usual values"


@pytest.mark.parametrize(("every", "steps"), [(1, 20), (2, 20), (4, 20), (10, 50), (25, 125)])
def test_five_quiet_readings_are_enough_where_they_are_far_apart(every: int, steps: int) -> None:
    alarm = steady(range(0, 100 * every, every))
    events = [observe_gradient(alarm, (100 + k) * every, times({"stem": 14.0 if k == 0 else 1.0})) for k in range(60)]
    first = 100 * every
    assert levels(events) == [(first, ALARM), (first + steps, WATCH), (first + 2 * steps, QUIET)]


def test_a_larger_gradient_that_lasts_becomes_the_usual_one() -> None:
    alarm = steady()
    events = [observe_gradient(alarm, 100 + k, times({"stem": 4.0})) for k in range(200)]
    assert [level for _, level in levels(events)] == [WATCH, ALARM, WATCH, QUIET]
    events = [observe_gradient(alarm, 300 + k, times({"stem": 4.0 * 20})) for k in range(10)]
    assert levels(events) == [(302, WATCH), (303, ALARM)]  # the run has stood such a rise: see test_stood.py


@pytest.mark.parametrize("layers", [1, 3, 30, 300])
def test_gradients_that_scatter_and_shrink_are_healthy_in_however_many_layers(layers: int) -> None:
    """Half of the scatter is common to all layers, as from the draw of a batch."""
    alarm, rng, events = EarlyWarning(), random.Random(0), []
    for step in range(1000 if layers < 300 else 300):
        common = 0.998**step * math.exp(rng.gauss(0, 0.2))
        norms = {f"{i}": 2.0**-i * common * math.exp(rng.gauss(0, 0.2)) for i in range(layers)}
        events.append(observe_gradient(alarm, step, norms, 1.0 + step / 2000, math.exp(rng.gauss(0, 0.1))))
    assert alarms([e for e in events if e is not None]) == []


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_that_grow_raise_it() -> None:
    """A fifth is 2.28 units, of which 2.2 count: 1.74 after seven steps, and never an alarm."""
    alarm = steady(weights=7.0)
    events = [observe_gradient(alarm, 100 + k, LAYERS, 1.2 * 7.0) for k in range(20)]
    assert levels(events) == [(106, WATCH)]
    assert alarm.reason == "the weights grew by 20%"


def test_weights_and_gradient_add_up() -> None:
    """Neither is an alarm alone: 1.97 of the worst gradient's spreads, and 1.82 of growth."""
    for gradient, weights, level in ((1.48, 1.0, WATCH), (1.0, 1.157, WATCH), (1.48, 1.157, ALARM)):
        alarm = steady(weights=1.0)
        for step in range(100, 120):
            observe_gradient(alarm, step, times({"stem": gradient}), weights)
        assert alarm.level is level


def test_weights_that_shrink_speak_against_it() -> None:
    alarm = steady(weights=1.0)
    for step in range(100, 120):
        observe_gradient(alarm, step, times({"stem": 2.0}), 0.75)  # 3.5 - 3.6
    assert alarm.level is QUIET
    observe_gradient(alarm, 120, times({"stem": 1e9}), 1e-9)  # they count five spreads at most
    assert alarm.level is WATCH


def test_where_only_the_weights_grew_no_layer_is_named() -> None:
    alarm = steady(weights=7.0)
    events = [observe_gradient(alarm, 100 + k, LAYERS, 1.2 * 7.0) for k in range(7)]
    assert [e.layers for e in events if e is not None] == [()]
    assert alarm.reason == "the weights grew by 20%"


@pytest.mark.parametrize("every", [1, 5, 25, 50])
def test_weights_that_grow_slowly_are_healthy_however_seldom_they_are_read(every: int) -> None:
    """By 0.15 % a step, as in a small classifier while it still learns: 30 % in 200 steps."""
    alarm = EarlyWarning()
    steps = range(0, 2000, every)
    assert [observe_gradient(alarm, step, LAYERS, 1.0015**step) for step in steps] == [None] * len(steps)


class Recorder(EarlyWarning):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Reading] = []

    def observe(self, reading: Reading) -> Alert | None:
        self.given.append(reading)
        return super().observe(reading)


@pytest.fixture(scope="module")
def healthy() -> list[Reading]:
    """A healthy training whose free signals are read at each step."""
    training, recorder = Training(), Recorder()
    training.monitor.watch.warning = recorder
    training.train(0, 400)
    assert sum(r.key.name == GRAD_NORM.name and not r.layer for r in recorder.given) > 390
    return recorder.given


@pytest.mark.parametrize("every", [1, 5, 10, 25, 50])
def test_a_healthy_training_is_quiet_however_seldom_its_gradients_are_read(healthy: list[Reading], every: int) -> None:
    free = {"grad_norm", "weight_norm", "rms_ratio"}
    seen = [reading for reading in healthy if reading.step % every == 0 or reading.key.name not in free]
    assert alarms(told(EarlyWarning(), seen)) == []


# --- seldom, and in part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 10, 50])
def test_gradients_that_are_read_seldom_are_judged_alike(every: int) -> None:
    alarm = steady(range(0, 20 * every, every), weights=3.0)
    steps = [(20 + k) * every for k in range(3)]
    events = [observe_gradient(alarm, step, times({"trunk": 3.0}), 3.0) for step in steps]
    assert levels(events) == [(steps[1], WATCH), (steps[2], ALARM)]


def test_a_layer_that_is_missing_now_and_then_is_judged_by_what_is_known_of_it() -> None:
    def seen(every: int) -> list[tuple[int, AlertLevel]]:
        """The trunk has a gradient at each so many steps, in time a larger one."""
        alarm, events = EarlyWarning(), []
        for step in range(120):
            layers = times({"trunk": 3.0 if step >= 100 else 1.0})
            if step % every:
                del layers["trunk"]
            events.append(observe_gradient(alarm, step, layers))
        return levels(events)

    assert seen(1)[:2] == [(101, WATCH), (102, ALARM)]
    assert seen(2) == [(102, WATCH), (108, ALARM)]  # 1.10, .88, 1.80, 1.44, 2.25, 1.80, 2.54, 2.03, 2.72
    assert seen(15) == []  # seven readings are not enough


def test_the_layers_of_a_step_whose_whole_gradient_could_not_be_had_are_not_those_of_the_next() -> None:
    alarm = steady()
    for layer, norm in times({"trunk": 100.0}).items():
        assert alarm.observe(Reading(GRAD_NORM, 100, norm, layer)) is None
    assert alarm.observe(Reading(GRAD_NORM, 100, None, reason="it could not be had")) is None
    assert observe_gradient(alarm, 101, {"stem": 1.0, "head": 10.0}) is None


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_alarm_from_the_first_step(norm: float) -> None:
    alarm = EarlyWarning()
    event = observe_gradient(alarm, 0, norm)
    assert event == Alert(0, ALARM, f"the gradient's norm is {norm}", "not finite")
    json.dumps(alarm.state_dict(), allow_nan=False)  # it is not kept
    before = alarm.state_dict()["detectors"]["gradient"]["gradients"]
    observe_gradient(alarm, 1, norm)
    assert alarm.state_dict()["detectors"]["gradient"]["gradients"] == before


def test_a_gradient_that_is_not_finite_is_an_alarm_while_the_loss_falls_and_at_the_edge() -> None:
    alarm = at_edge(1.0)
    observe_loss(alarm, 400, 0.0)
    assert observe_gradient(alarm, 400, math.inf).rule == "not finite"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_the_layers_that_are_not_finite_are_named(norm: float) -> None:
    event = observe_gradient(steady(), 100, {**LAYERS, "trunk": norm})
    assert event is not None
    assert (event.level, event.rule, event.layers) == (ALARM, "not finite", ("trunk",))


# --- what the losses and the edge say -------------------------------------------------------------------------------


def test_it_is_silent_while_the_loss_falls() -> None:
    def seen(pace: float) -> list[tuple[int, AlertLevel]]:
        """From step 100 on the gradient is ten times as large, and the loss falls at this pace."""
        alarm, events = EarlyWarning(), []
        for step in range(140):
            events.append(observe_loss(alarm, step, pace ** max(step - 95, 0)))
            events.append(observe_gradient(alarm, step, times({"head": 10.0 if step >= 100 else 1.0})))
        return levels(events)

    assert seen(0.98) == []
    assert seen(1.0) == [(100, WATCH), (101, ALARM)]


def test_what_rose_while_the_loss_fell_is_told_of_once_it_falls_no_more() -> None:
    alarm, events = EarlyWarning(), []
    for step in range(130):
        loss = 0.98 ** min(max(step - 95, 0), 15)
        events.append(observe_loss(alarm, step, 1.0 if step >= 112 else loss))  # where it was
        events.append(observe_gradient(alarm, step, times({"head": 10.0 if step >= 100 else 1.0})))
    assert [e.rule for e in events if e is not None] == ["gradient"]
    assert 112 <= levels(events)[0][0] <= 115
    assert alarm.level is ALARM


def at_edge(ratio: float, normalised: float = 1.0, rate: float = 0.1) -> EarlyWarning:
    """400 steps at a stability ratio; the loss fell from 1.5 to 0.5. From step 390 on the rate is this one."""
    alarm = EarlyWarning()
    for step in range(400):
        readings = gradient_readings(step, LAYERS, weights=1.0, normalised=normalised)
        assert observe_rate(alarm, step, rate if step >= 390 else 0.1) is None
        assert observe_loss(alarm, step, 1.5 - min(step / 100, 1.0)) is None
        assert step % 5 or observe_ratio(alarm, step, ratio, solved=False) is None
        assert told(alarm, readings) == []
    return alarm


def swing(alarm: EarlyWarning, normalised: float = 1.0, loss: float = 0.5) -> tuple[AlertLevel, str]:
    for step in range(400, 420):
        observe_loss(alarm, step, loss)
        observe_gradient(alarm, step, times({"head": 10.0}), 1.0, normalised)
    return alarm.level, alarm.reason


@pytest.mark.parametrize("ratio", [0.72, 1.0, 1.58])
def test_a_gradient_that_swings_at_the_edge_is_watched(ratio: float) -> None:
    reason = "the gradient rose above its usual size: head 10 times; it swings at the edge of stability"
    assert swing(at_edge(ratio)) == (WATCH, reason)


@pytest.mark.parametrize("ratio", [0.2, 0.68, 1.62, 5.0])
def test_below_the_edge_and_beyond_it_nothing_is_expected_to_come_back(ratio: float) -> None:
    assert swing(at_edge(ratio)) == (ALARM, "the gradient rose above its usual size: head 10 times")


@pytest.mark.parametrize(("normalised", "level"), [(1.4, WATCH), (1.6, ALARM)])
def test_nor_where_gradients_have_outgrown_the_second_moments(normalised: float, level: AlertLevel) -> None:
    assert swing(at_edge(1.0), normalised)[0] is level
    assert swing(at_edge(1.0, normalised=0.3), 0.3 * normalised)[0] is level  # beside what is usual


@pytest.mark.parametrize(("rate", "level"), [(0.109, WATCH), (0.115, ALARM)])
def test_nor_where_the_rate_was_raised(rate: float, level: AlertLevel) -> None:
    assert swing(at_edge(1.0, rate=rate))[0] is level


@pytest.mark.parametrize(("loss", "level"), [(0.9, WATCH), (1.2, ALARM)])
def test_nor_where_the_loss_rose_by_more_than_half_of_what_it_has_fallen(loss: float, level: AlertLevel) -> None:
    """It has fallen by 1; after 20 steps its mean is up by .88 of the rise."""
    assert swing(at_edge(1.0), loss=loss)[0] is level


# --- other weights, and resume --------------------------------------------------------------------------------------


def test_what_is_known_of_other_weights_is_forgotten() -> None:
    alarm = steady(weights=1.0)
    observe_gradient(alarm, 100, times({"stem": 20.0}), 1.0, normalised=1.0)
    assert alarm.level is ALARM
    event = alarm.forget(101)
    assert event is not None
    assert (event.step, event.level, event.rule) == (101, QUIET, "calm")
    fresh, state = EarlyWarning().state_dict()["detectors"]["gradient"], alarm.state_dict()["detectors"]["gradient"]
    assert state == fresh
    other = times({"stem": 1000.0})
    assert [observe_gradient(alarm, 101 + k, other, 50.0) for k in range(8)] == [None] * 8
    assert observe_gradient(alarm, 109, {**other, "stem": 20_000.0}, 50.0).layers == ("stem",)


@pytest.mark.parametrize("cut", [0, 5, 8, 51, 98, 101, 103, 130])
def test_a_state_is_gone_on_with_exactly(cut: int) -> None:
    """Cut between the layers of a step too."""
    rng, readings = random.Random(0), []
    for step in range(150):
        layers = {n: g * math.exp(rng.gauss(0, 0.2)) for n, g in times({"stem": 1 + 5.0 * (step >= 100)}).items()}
        readings += gradient_readings(step, layers, 1.2 if step > 120 else 1.0, math.exp(rng.gauss(0, 0.2)))
    for place in range(6 * cut, 6 * cut + 6):
        whole, first, second = EarlyWarning(), EarlyWarning(), steady(weights=2.0)
        expected, before = told(whole, readings), told(first, readings[:place])
        assert any(e.level is ALARM for e in expected)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert second.state_dict() == first.state_dict()
        assert before + told(second, readings[place:]) == expected
        assert second.state_dict() == whole.state_dict()
