"""Each rule of the early warning: what it speaks of, and what it lets pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from gfs_core import Alert, AlertLevel, EarlyWarning, Key, Profile, Reading
from gfs_core.detectors.trend import steps_to_edge
from gfs_core.signals.shares import CURVATURE_SHARE, RUNNING_CURVATURE_SHARE
from tests.core.observed import (
    alarms,
    half_raised,
    observe_gradient,
    observe_loss,
    observe_rate,
    observe_ratio,
    play,
    settled,
    stream,
)

# --- ratios and losses ----------------------------------------------------------------------------------------------


def test_a_jump_of_the_ratio_is_an_alarm_at_once_where_the_loss_is_half_raised() -> None:
    alarm = half_raised()
    event = observe_ratio(alarm, 300, 0.6, solved=False)
    reason = "the stability ratio rose to 0.6, 3.0 times its usual 0.2"
    assert event == Alert(300, AlertLevel.ALARM, reason, "rise")
    assert (alarm.level, alarm.reason) == (AlertLevel.ALARM, reason)
    assert observe_ratio(alarm, 305, 0.6, solved=False) is None  # no change, no event


@pytest.mark.parametrize(("key", "solved"), [(RUNNING_CURVATURE_SHARE, False), (CURVATURE_SHARE, True)])
def test_a_rise_names_the_layers_in_which_the_curvature_sits(key: Key, solved: bool) -> None:
    """Those of the same measurement, three at most, with a tenth of it each."""
    alarm = EarlyWarning()
    play(stream(300, lambda step: 0.2), alarm, solved)
    events = []
    for step in (300, 305):  # of solved ones two have to agree
        for layer, share in {"a": 0.09, "b": 0.2, "c": 0.4, "d": 0.11, "e": 0.2}.items():
            assert alarm.observe(Reading(key, step, share, layer)) is None
        events.append(observe_ratio(alarm, step, 0.6, solved))
    [event] = [event for event in events if event is not None]
    assert event.layers == ("c", "b", "e")
    assert event.reason.endswith("the curvature sits in c (40%), b (20%), e (20%)")
    for layer, share in {"a": 0.95, "b": 0.05}.items():
        alarm.observe(Reading(key, 310, share, layer))
    state = alarm.state_dict()["detectors"]["stability_ratio" if solved else "running_stability_ratio"]
    assert state["shares"] == {"a": 0.95, "b": 0.05}


@pytest.mark.parametrize("ratio", [0.6, 20.0])
@pytest.mark.parametrize("solved", [True, False])
def test_a_ratio_alone_is_watched_however_far_it_jumps(ratio: float, solved: bool) -> None:
    alarm = EarlyWarning()
    play(stream(300, lambda step: 0.2), alarm, solved)
    events = [observe_ratio(alarm, 300 + 5 * k, ratio, solved) for k in range(50)]
    assert [(e.level, e.rule) for e in events if e is not None] == [(AlertLevel.WATCH, "rise")]


@pytest.mark.parametrize(
    ("gradient", "raised", "found"),
    [(7.0, AlertLevel.WATCH, AlertLevel.ALARM), (1.0, AlertLevel.QUIET, AlertLevel.WATCH)],
)
def test_a_gradient_that_is_half_raised_makes_a_ratio_an_alarm_too(
    gradient: float, raised: AlertLevel, found: AlertLevel
) -> None:
    alarm = settled()
    assert [observe_gradient(alarm, step, 1.0) for step in range(300)] == [None] * 300
    observe_gradient(alarm, 300, gradient)
    assert alarm.level is raised
    observe_ratio(alarm, 300, 0.6, solved=False)
    assert alarm.level is found


def test_what_was_half_raised_counts_no_more_once_it_is_over() -> None:
    alarm = half_raised()
    assert [observe_loss(alarm, 301 + k, 1.0) is None for k in range(40)].count(False) == 1  # quiet again
    assert observe_ratio(alarm, 345, 0.6, solved=False).level is AlertLevel.WATCH


def test_a_small_rise_is_watched_and_a_larger_one_an_alarm() -> None:
    alarm = settled()
    event = observe_ratio(alarm, 300, 0.37, solved=False)
    assert event is not None
    assert (event.level, event.rule) == (AlertLevel.WATCH, "rise")
    observe_loss(alarm, 300, 1.4)
    assert alarm.level is AlertLevel.WATCH
    event = observe_ratio(alarm, 305, 0.44, solved=False)
    assert event is None  # 2.2 times
    event = observe_ratio(alarm, 310, 0.5, solved=False)
    assert event is not None
    assert event.level == AlertLevel.ALARM
    assert event.reason.startswith("the stability ratio rose to 0.5, 2.5 times its usual 0.2")


@pytest.mark.parametrize("ratio", [0.02, 0.3, 1.05])
def test_no_level_counts_as_unhealthy_by_itself(ratio: float) -> None:
    settled(ratio)


def test_a_rise_far_below_the_edge_is_of_no_interest() -> None:
    alarm = half_raised(0.01)
    assert observe_ratio(alarm, 300, 0.04, solved=False) is None
    event = observe_ratio(alarm, 305, 0.06, solved=False)
    assert event is not None
    assert event.level == AlertLevel.ALARM


def test_steady_growth_names_the_step_at_which_it_crosses_the_edge() -> None:
    def seen(raised: bool) -> list[Alert]:
        """The loss rises with the ratio by so little that it is only watched."""
        ratios = stream(400, lambda step: 0.4 * 1.02 ** max(step - 300, 0))
        return play([(step, 1.04 if raised and step > 300 else loss, ratio) for step, loss, ratio in ratios])

    events = seen(raised=True)
    crosses = 300 + math.log(1 / 0.4) / math.log(1.02)  # 346.3
    assert [(e.level, e.rule) for e in seen(raised=False)] == [(AlertLevel.WATCH, "growth")]
    last = alarms(events)[0]
    assert last.rule == "growth"
    assert last.step <= 335  # when it has just doubled
    named = int(last.reason.split("(step ")[1].rstrip(")"))
    assert named == pytest.approx(crosses, abs=6)  # the fit still holds some of the level before
    assert f"in about {named - last.step} steps" in last.reason


@pytest.mark.parametrize(("every", "pace"), [(1, 1.1), (5, 1.02), (20, 1.004)])
def test_the_crossing_of_a_ratio_that_grows_without_noise_is_exact(every: int, pace: float) -> None:
    points = [(step, 0.4 * pace**step) for step in range(0, 9 * every, every)]
    crosses = math.log(1 / 0.4) / math.log(pace)
    assert steps_to_edge(points, Profile()) == math.ceil(crosses - points[-1][0])
    past = [(step, 1.5 * ratio) for step, ratio in points]
    assert steps_to_edge(past[2:], Profile()) == max(math.ceil(math.log(1 / 0.6) / math.log(pace) - past[-1][0]), 0)
    assert steps_to_edge([(step, 0.4) for step, _ in points], Profile()) is None


def test_growth_beyond_the_edge_crosses_it_now() -> None:
    alarm = half_raised(0.9)
    for k in range(8):
        observe_ratio(alarm, 300 + 5 * k, 0.9 * 1.1 ** (k + 1), solved=False)
    assert alarm.level == AlertLevel.ALARM
    assert alarm.reason.startswith("the stability ratio rose to 1.")
    assert alarm.reason.endswith("at this pace it crosses the edge now")


def test_slow_growth_is_not_extrapolated() -> None:
    alarm = settled()
    events = [observe_ratio(alarm, 300 + 5 * k, 0.325 * 1.015**k, solved=False) for k in range(6)]
    assert events[:5] == [None] * 5
    assert events[5] == Alert(
        325, AlertLevel.WATCH, "the stability ratio rose to 0.35, 1.8 times its usual 0.2", "rise"
    )


def test_a_loss_spike_is_an_alarm() -> None:
    alarm = EarlyWarning()
    assert play(stream(100, lambda step: 0.2, lambda step: 1.0 + 0.01 * (step % 10)), alarm) == []
    event = observe_loss(alarm, 100, 2.0)
    assert event is not None
    assert (event.step, event.level, event.rule) == (100, AlertLevel.ALARM, "spike")
    assert event.reason.startswith("the loss is 2, far above its median 1.05")


def test_a_burst_of_the_loss_adds_up() -> None:
    """One loss that is a fifth of the first above is nothing; a second is watched, for a spread is .05 of its half."""
    alarm = settled()
    events = [observe_loss(alarm, 300 + k, 1.2) for k in range(3)]
    assert [None if e is None else (e.level, e.rule) for e in events] == [
        None,
        (AlertLevel.WATCH, "spike"),
        (AlertLevel.ALARM, "loss"),
    ]


@pytest.mark.parametrize(("first", "told"), [(100.0, []), (1.0, [(300, AlertLevel.ALARM)])])
def test_a_loss_that_is_small_beside_what_it_has_lost_may_be_many_times_its_usual_value(
    first: float, told: list[tuple[int, AlertLevel]]
) -> None:
    """It falls from ``first`` to 0.01 in 100 steps, and rises a hundredfold 200 steps later."""
    alarm = EarlyWarning()
    losses = [max(first * 10 ** (-step / 20), 0.01) for step in range(300)]
    assert [observe_loss(alarm, step, loss) for step, loss in enumerate(losses)] == [None] * 300
    events = [observe_loss(alarm, 300 + k, 1.0) for k in range(100)]
    assert [(e.step, e.level) for e in events if e is not None] == told


@pytest.mark.parametrize(
    ("loss", "level"), [(1.025, AlertLevel.QUIET), (1.04, AlertLevel.WATCH), (1.06, AlertLevel.ALARM)]
)
def test_a_mean_that_rises_is_judged_beside_what_the_loss_has_fallen(loss: float, level: AlertLevel) -> None:
    """A tenth of half the first loss is an alarm, .6 of that is watched."""
    alarm = settled()
    assert {observe_loss(alarm, 300 + k, loss) is None for k in range(45)} >= {True}
    assert alarm.level is level


def test_a_swing_of_the_loss_at_the_edge_is_watched_unless_it_goes_beyond_half_of_what_was_lost() -> None:
    """The loss fell from 1.5 to 0.5, and rises by so much."""

    def at_edge(ratio: float, above: float, rates: tuple[float, float] = (0.1, 0.1)) -> tuple[AlertLevel, str]:
        alarm = EarlyWarning()
        for step in range(400):
            observe_rate(alarm, step, rates[step >= 390])
            observe_loss(alarm, step, 1.5 - min(step / 100, 1.0))
            assert step % 5 or observe_ratio(alarm, step, ratio, solved=False) is None
        for step in range(400, 420):
            observe_rate(alarm, step, rates[1])
            observe_loss(alarm, step, 0.5 + above)
        return alarm.level, alarm.reason

    assert at_edge(1.0, 0.4)[0] is AlertLevel.WATCH
    assert at_edge(1.0, 0.4)[1].endswith("it swings at the edge of stability")
    assert at_edge(1.0, 0.7)[0] is AlertLevel.ALARM  # beyond half of 1
    for below_or_past in (0.6, 1.7):
        assert at_edge(below_or_past, 0.4)[0] is AlertLevel.ALARM
        assert "swings" not in at_edge(below_or_past, 0.4)[1]
    assert at_edge(1.0, 0.4, rates=(0.1, 0.115))[0] is AlertLevel.ALARM  # the rate was raised


def test_a_loss_that_creeps_up_is_seen_in_its_mean() -> None:
    alarm = EarlyWarning()
    events = play(stream(400, lambda step: 0.2, lambda step: 1.0 + 0.004 * max(step - 300, 0), 0.05), alarm)
    event = alarms(events)[0]
    assert event.rule == "loss"
    assert 320 < event.step < 360  # the loss is up by a tenth to a fifth
    assert event.reason.startswith("the mean loss rose by 0.")


def test_losses_may_be_negative() -> None:
    def play_at(offset: float) -> list[tuple[int, AlertLevel]]:
        events = play(stream(120, lambda step: 0.2, lambda step: offset + 0.01 * (step % 10) + 2 * (step > 100)))
        return [(e.step, e.level) for e in events]

    assert play_at(-2.0) == play_at(-0.5) == play_at(2.0)
    assert play_at(2.0)[0] == (101, AlertLevel.ALARM)


def test_the_loss_of_a_short_batch_is_not_held_against_the_others() -> None:
    alarm = EarlyWarning()
    for step in range(100):
        rest = step % 8 == 7
        assert observe_loss(alarm, step, 3.0 if rest else 1.0 + 0.01 * (step % 5), 31 if rest else 64) is None
    assert observe_loss(alarm, 100, 3.0, 32) is not None  # half of the usual counts
    assert observe_loss(EarlyWarning(), 0, math.nan, 1) is not None


def test_batches_that_are_smaller_for_good_are_soon_the_usual_ones() -> None:
    alarm = EarlyWarning()
    for step in range(100):
        observe_loss(alarm, step, 1.0, 64)
    assert [observe_loss(alarm, 100 + i, 3.0, 16) is not None for i in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_alarm_from_the_first_step(loss: float) -> None:
    alarm = EarlyWarning()
    assert observe_loss(alarm, 0, loss) == Alert(0, AlertLevel.ALARM, f"the loss is {loss}", "not finite")
    json.dumps(alarm.state_dict(), allow_nan=False)  # it is not kept


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("solved", [True, False])
def test_a_ratio_that_is_no_measurement_is_passed_over(ratio: float, solved: bool) -> None:
    alarm = settled()
    before = alarm.state_dict()
    assert observe_ratio(alarm, 300, ratio, solved) is None
    assert alarm.state_dict() == before


def test_the_solved_ratio_has_its_own_usual_value() -> None:
    alarm = settled(0.2)
    for step in range(0, 300, 5):
        assert observe_ratio(alarm, step, 0.5, solved=True) is None  # 2.5 times the running one
    assert observe_ratio(alarm, 300, 0.5, solved=True) is None
    event = observe_ratio(alarm, 300, 0.5, solved=False)
    assert event is not None
    assert event.reason == "the stability ratio rose to 0.5, 2.5 times its usual 0.2"


def test_of_solved_ratios_two_in_a_row_are_believed() -> None:
    alarm = half_raised()
    for step in range(0, 4000, 100):
        assert observe_ratio(alarm, step, 0.2, solved=True) is None
    assert observe_ratio(alarm, 4000, 0.9, solved=True) is None  # one batch
    assert observe_ratio(alarm, 4100, 0.2, solved=True) is None
    assert observe_ratio(alarm, 4200, 0.9, solved=True) is None
    event = observe_ratio(alarm, 4300, 0.5, solved=True)
    reason = "the stability ratio rose to 0.5, 2.5 times its usual 0.2"
    assert event == Alert(4300, AlertLevel.ALARM, reason, "rise")


def test_a_loss_with_a_heavy_tail_is_healthy() -> None:
    """Every sixth loss is ten times the others, so that their mean is far above their median."""
    assert play([(step, 10.0 if step % 6 == 0 else 1.0, None) for step in range(300)]) == []


def test_it_waits_until_the_usual_ratio_is_known() -> None:
    alarm = EarlyWarning()
    for step in range(0, 100, 5):
        assert observe_ratio(alarm, step, 0.2, solved=False) is None
    assert observe_ratio(alarm, 100, 2.0, solved=False) is None


# --- the rate and the edge ------------------------------------------------------------------------------------------


def test_a_jump_of_the_rate_is_seen_before_the_step() -> None:
    alarm = settled(0.2)
    assert [observe_rate(alarm, step, 0.1) for step in range(60)] == [None] * 60
    assert observe_rate(alarm, 60, 0.21) is None
    event = observe_rate(alarm, 61, 0.23)
    assert (event.level, event.rule) == (AlertLevel.WATCH, "rate")
    assert observe_rate(alarm, 61, 10.0) is None  # the same step again
    event = observe_rate(alarm, 62, 0.26)
    assert event == Alert(62, AlertLevel.ALARM, "the learning rate rose to 0.26, 2.6 times its usual 0.1", "rate")
    events = [observe_rate(alarm, step, 0.1) for step in range(63, 103)]
    assert [e.level for e in events if e is not None] == [AlertLevel.WATCH, AlertLevel.QUIET]
    assert "the last 20 learning rates" in alarm.reason


def test_a_rate_that_matters_little_may_jump() -> None:
    alarm = settled(0.001)
    for step in range(60):
        observe_rate(alarm, step, 0.1)
    assert observe_rate(alarm, 60, 1.0) is None  # ten times as near to the edge as next to nothing
    assert observe_rate(alarm, 61, 10.0).level is AlertLevel.ALARM


@pytest.mark.parametrize("warmup", [5, 30, 200, 2000])
def test_a_linear_warm_up_and_a_cosine_are_healthy(warmup: int) -> None:
    alarm = EarlyWarning()
    rates = [min(1.0, (t + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * t / 3000)) for t in range(3000)]
    assert [observe_rate(alarm, step, rate) for step, rate in enumerate(rates)] == [None] * 3000
    assert observe_rate(alarm, 3001, 0.0) is None  # no step is taken


@pytest.mark.parametrize("name", ["mean_square_stability_ratio", "directional_stability_ratio"])
def test_ratios_of_other_kinds_are_not_judged(name: str) -> None:
    alarm = settled()
    before = alarm.state_dict()
    assert [alarm.observe(Reading(Key(name, ""), 300 + k, 30.0)) for k in range(50)] == [None] * 50
    assert alarm.state_dict() == before


def test_past_the_edge_from_the_start_is_no_alarm_by_itself() -> None:
    """A run may live at any ratio; where it does not, its loss and its gradient say so."""
    alarm = EarlyWarning()
    assert play(stream(400, lambda step: 3.0), alarm) == []
    assert observe_loss(alarm, 400, 3.0).level is AlertLevel.ALARM


def test_what_the_rate_meant_for_other_weights_is_forgotten() -> None:
    alarm = settled(0.001)
    for step in range(60):
        observe_rate(alarm, step, 0.1)
    alarm.forget(60)
    assert observe_rate(alarm, 60, 1.0).level is AlertLevel.ALARM  # the rate matters little to them no more


def test_a_rate_is_judged_once_so_many_are_known() -> None:
    first = Profile().rate_first
    alarm = EarlyWarning()
    assert [observe_rate(alarm, step, 0.1) for step in range(first - 1)] == [None] * (first - 1)
    assert observe_rate(alarm, first - 1, 1.0) is None
    alarm = EarlyWarning()
    for step in range(first):
        observe_rate(alarm, step, 0.1)
    assert observe_rate(alarm, first, 1.0).level is AlertLevel.ALARM


# --- healthy runs ---------------------------------------------------------------------------------------------------


def sharpening(step: int) -> float:
    """From 0.05 to 1 in 600 steps, where it stays."""
    return 0.05 * 20 ** min(step / 600, 1.0)


def plateau(step: int) -> float:
    return 0.15


def warm_cosine(step: int) -> float:
    return 0.3 * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / 1000)) + 1e-6


def long_warm_up(step: int) -> float:
    """While the rate warms up the curvature grows fivefold."""
    return 0.5 * min(1.0, (step + 1) / 600) * (1 - 0.8 * math.exp(-step / 300))


@pytest.mark.parametrize("ratio", [sharpening, plateau, warm_cosine, long_warm_up])
@pytest.mark.parametrize("seed", range(10))
def test_no_alarm_in_a_healthy_run(ratio: Callable[[int], float], seed: int) -> None:
    events = play(stream(1000, ratio, lambda step: 0.3 + 2 * math.exp(-step / 150), 0.08, seed))
    assert alarms(events) == []


def test_a_ratio_that_has_long_been_rising_is_only_watched_unless_it_jumps() -> None:
    alarm = EarlyWarning()
    for step in range(100):
        observe_loss(alarm, step, 1.0)
    observe_loss(alarm, 100, 1.4)  # half raised
    for k in range(32):
        observe_ratio(alarm, 5 * k, 0.02 * 1.12**k, solved=False)
    assert alarm.level == AlertLevel.WATCH  # 2.5 times its usual value
    event = observe_ratio(alarm, 160, 5.0, solved=False)
    assert event is not None
    assert event.level == AlertLevel.ALARM


def test_sharpening_while_the_loss_falls_fast_is_healthy() -> None:
    """A plateau at first, then the loss falls by half in 20 steps and the ratio rises tenfold."""

    def ratio(step: int) -> float:
        return 0.02 * 10 ** min(max(step - 300, 0) / 60, 1.0)

    falls = play(stream(380, ratio, lambda step: 0.5 ** (max(step - 300, 0) / 20)))
    stays = play(stream(380, ratio))
    assert falls == []
    assert [(e.level, e.rule) for e in stays] == [(AlertLevel.WATCH, "rise")]
