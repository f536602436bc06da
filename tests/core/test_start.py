"""``control="start"`` in plain loops: the rate rises to the user's, or as far as the run bears it."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch

import gfs_core as gfs
from gfs_core.actions.start import FIRST, GROWTH, HELD, SHARE, Lost, Start
from tests.bitwise import assert_same
from tests.core.test_guarded import HEALTHY, Regression
from tests.core.test_rescue import Training

RISE = math.ceil(-math.log(FIRST) / math.log(GROWTH))  # steps until the rate is the user's


def stepped(start: Start, *rates: float) -> list[float]:
    """The rates that are used."""
    return [rate * start.step(rate) for rate in rates]


def test_the_rate_rises_by_a_constant_factor_and_is_then_the_users_to_the_bit() -> None:
    run = Regression("start").run(0, 300)
    assert run.used[0] == FIRST * run.users[0]
    factors = [b / a for a, b in zip(run.used, run.used[1:RISE], strict=False)]
    assert factors == pytest.approx([GROWTH] * (RISE - 1), rel=1e-3)  # the schedule falls by a little
    assert run.used[RISE:] == run.users[RISE:]
    assert all(used <= users for used, users in zip(run.used, run.users, strict=True))
    start = run.monitor.rates.start
    assert start is not None
    assert not start.rising
    assert start.share(1e9) == 1.0
    assert run.end < 0.02


@pytest.mark.parametrize("name", HEALTHY)
def test_with_every_optimizer_and_every_kind_of_loop(name: str) -> None:
    run = Training("log", control="start", **HEALTHY[name])
    used: list[float] = []
    run.optimizer.register_step_post_hook(lambda *_: used.append(run.monitor.rates.start.last))  # type: ignore[union-attr]
    run.steps(RISE + 5)
    shares = [FIRST * GROWTH**i for i in range(RISE)] + [1.0] * 5
    assert used == pytest.approx([min(share, 1.0) for share in shares], rel=0.02)  # the schedule falls by a little
    assert not any("lost" in text for text in run.told)


@pytest.mark.parametrize("tensor", [False, True])
def test_at_thirty_times_the_rate_the_limit_is_fixed_for_good(tensor: bool) -> None:
    lost, held = (Regression(control, tensor).times(30.0).run(0, 600) for control in ("observe", "start"))
    assert math.isnan(lost.end)
    assert held.end < 0.02
    said = [(step, text) for step, text in enumerate(held.said) if "as the rate rose" in text]
    assert len(said) == 1
    step, text = said[0]
    assert "the run went back to the weights of step" in text
    end = max(held.used[:step])
    assert held.shares[step:] == pytest.approx([held.shares[step]] * (600 - step), rel=1e-6)
    assert held.shares[step] == pytest.approx(SHARE * end / max(held.users), rel=0.01)
    assert max(held.used[step:]) <= SHARE * end * 1.01


def test_the_way_back_leads_to_where_the_rate_was_about_what_it_is_to_be() -> None:
    run = Regression("start").times(30.0).run(0, 200)
    step, text = next((step, text) for step, text in enumerate(run.said) if "as the rate rose" in text)
    went_to = int(text.split("to the weights of step ")[1].split(";")[0].split(",")[0])
    assert run.users[step] == run.users[went_to]  # the schedule went back too
    limit = SHARE * max(run.used[:step])
    assert 0.3 * limit < run.used[went_to] <= 1.1 * limit


def test_resumed_while_the_rate_rises_the_run_is_the_same_to_the_bit() -> None:
    whole = Regression("start").run(0, 120)
    first = Regression("start").run(0, 20)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first.model, first.optimizer, first.scheduler, first.monitor)], file)
    second = Regression("start")
    file.seek(0)
    parts = (second.model, second.optimizer, second.scheduler, second.monitor)
    for part, held in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(held)
    second.run(20, 120)
    assert second.used == whole.used[20:]
    assert second.used[0] < 0.2 * second.users[0]
    assert_same(second.model.state_dict(), whole.model.state_dict())


def test_resumed_after_it_the_limit_is_kept() -> None:
    first = Regression("start").times(30.0).run(0, 120)
    second = Regression("start")
    for part, held in zip(
        (second.model, second.optimizer, second.scheduler, second.monitor),
        (first.model, first.optimizer, first.scheduler, first.monitor),
        strict=True,
    ):
        part.load_state_dict(held.state_dict())
    assert second.run(120, 130).shares == pytest.approx([first.shares[-1]] * 10, rel=1e-6)


def test_the_state_is_all_that_the_start_depends_on() -> None:
    start = Start()
    for step in range(40):
        start.saw([1.0 / (1 + step)])
        start.step(0.1)
    again = Start()
    again.load_state_dict(start.state_dict())
    assert again.state_dict() == start.state_dict()
    for each in (start, again):
        each.saw([2.0] * 5)
    assert start.lost
    assert again.lost


def test_steps_at_rate_0_do_not_count() -> None:
    start = Start()
    assert stepped(start, 0.0, 0.0, 0.5, 0.0, 0.5) == pytest.approx([0, 0, 0.5 * FIRST, 0, 0.5 * FIRST * GROWTH])
    run = Regression("start").times(0.0).run(0, 3)
    assert run.used == [0.0] * 3


def test_a_warm_up_of_the_users_goes_on_inside() -> None:
    start, users = Start(), [min(1.0, (i + 1) / 200) for i in range(400)]
    used = stepped(start, *users)
    assert all(a <= b for a, b in zip(used, users, strict=True))
    assert all(b <= a * GROWTH * (1 + 1e-9) or b == u for a, b, u in zip(used, used[1:], users[1:], strict=False))
    at = next(i for i, (a, b) in enumerate(zip(used, users, strict=True)) if a == b)
    assert at <= 80
    assert used[at:] == users[at:]


def test_it_lasts_while_the_users_rate_rises() -> None:
    start = Start()
    stepped(start, *[min(1.0, (i + 1) / 200) for i in range(200 + HELD - 1)])
    assert start.rising
    stepped(start, 1.0, 1.0)
    assert not start.rising


def test_a_limit_holds_a_rate_that_still_rises_and_keeps_the_shape_of_one_that_falls() -> None:
    start = Start()
    stepped(start, *[(i + 1) / 200 for i in range(100)])
    start.end(start.limit)
    assert stepped(start, 0.6, 0.8, 1.0) == pytest.approx([0.05] * 3)
    assert stepped(start, 0.5, 0.1, 1.0) == pytest.approx([0.025, 0.005, 0.05])


def test_what_is_logged_is_what_was_used(tmp_path: Any) -> None:
    run = Regression("start", every=5, history=str(tmp_path / "h.jsonl")).times(30.0).run(0, 200)
    run.monitor.close()
    logged = [m for m in gfs.read_history(tmp_path / "h.jsonl") if m.lr_scale is not None]
    assert len(logged) > 30
    assert all(m.lr_effective == pytest.approx(run.used[m.step], rel=1e-3) for m in logged)
    assert not any("the learning rate rose" in text for text in run.said)  # what a start decides is no alarm


def test_without_losses_one_warning_says_what_is_missing() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(control="start", tier="running"))
    batch = torch.randn(8, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(30):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            monitor.step(lambda x: model(x).square().mean(), batch)
            optimizer.step()
    assert sum("control='start' goes by the losses of training and knows none" in str(w.message) for w in told) == 1


def test_where_nothing_can_be_gone_back_from_the_rate_is_the_users() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(control="start"))
    assert monitor.rates.scale() == FIRST
    with pytest.warns(gfs.GFSWarning, match="there is no way back: nobody knows"):
        monitor.rescuing.leave_out("nobody knows")  # type: ignore[union-attr]
    assert monitor.rates.scale() == 1.0


def scheduled(factor: float) -> Regression:
    """With an ``EdgeOfStabilityLR``, whose rates the optimizer holds, in place of the option."""
    run = Regression("observe").times(factor)
    run.scheduler = gfs.EdgeOfStabilityLR(run.optimizer, run.scheduler, policy="start")  # type: ignore[assignment]
    run.monitor = gfs.StabilityMonitor(run.model, run.optimizer, run.monitor.config)
    run.monitor.protect(run.scheduler)
    return run


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_a_scheduler_puts_the_same_rate_into_the_optimizer(factor: float) -> None:
    by_option, run = Regression("start").times(factor).run(0, 100), scheduled(factor).run(0, 100)
    assert run.used == pytest.approx(by_option.used, rel=1e-9)
    assert run.users == run.used  # the optimizer holds what is used
    assert run.losses == pytest.approx(by_option.losses, rel=1e-4)
    assert any("as the rate rose" in text for text in run.said) is (factor > 1)
    again = scheduled(factor)
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    assert again.scheduler.get_last_lr() == run.scheduler.get_last_lr()
    assert again.scheduler.start.state_dict() == run.scheduler.start.state_dict()  # type: ignore[attr-defined]


def test_a_scheduler_without_alarms_or_without_a_way_back() -> None:
    run = scheduled(1.0)
    with pytest.raises(gfs.ConfigError, match="goes by alarms, and `alarm` is 'off'"):
        gfs.StabilityMonitor(run.model, run.optimizer, gfs.GFSConfig(alarm="off"))
    assert run.optimizer.param_groups[0]["lr"] == 0.1 * FIRST
    with pytest.warns(gfs.GFSWarning, match="there is no way back: nobody knows"):
        run.monitor.rescuing.leave_out("nobody knows")  # type: ignore[union-attr]
    assert run.optimizer.param_groups[0]["lr"] == 0.1


def test_a_loss_that_begins_at_zero_ends_no_start() -> None:
    """As that of a policy does, which hardly moves its weights in its first steps."""
    run = Training("log", control="start", make=lambda params: torch.optim.SGD(params, 1e-6))
    for step in range(RISE + HELD + 5):
        run.step(said=0.0 if step == 0 else 0.1)
    assert not any("lost" in text for text in run.told)
    assert run.monitor.rates.scale() == 1.0
    assert not run.monitor.rates.start.rising  # type: ignore[union-attr]


def test_other_weights_than_those_of_the_snapshots_are_not_gone_back_from() -> None:
    run = Regression("start").times(30.0).run(0, 20)
    run.monitor.rescuing.snapshots.drop()  # type: ignore[union-attr]
    run.run(20, 21)
    with torch.no_grad():
        run.model[0].weight.fill_(math.nan)
    run.monitor.rescuing.snapshots.drop()  # type: ignore[union-attr]
    run.run(21, 23)
    assert "there is no snapshot of the weights trained now to go back to" in run.said[21]
    assert run.shares[-1] == pytest.approx(SHARE * run.shares[20], rel=1e-3)


FALLING = [2.0 - 0.02 * i for i in range(60)]


@pytest.mark.parametrize(
    ("losses", "lost"),
    [
        (FALLING, False),
        ([*FALLING, math.nan], True),
        ([*FALLING, 50.0, 50.0], False),  # a bad batch or two
        ([*FALLING, *[1.8] * 3], True),  # cliff
        ([*FALLING, *[1.3] * 11], True),  # a part of what was gained, for long
        ([*FALLING, *[0.9] * 30], False),
        ([2.0 + 0.2 * (-1) ** i for i in range(80)], False),  # scatter
        ([2.0] * 40 + [2.5] * 20, False),
        ([2.0] * 40 + [2.7] * 20, True),  # nothing was gained, and it rises by a third
        ([0.0] + [0.1] * 40, False),
    ],
)
def test_when_a_loss_is_lost(losses: list[float], lost: bool) -> None:
    rule = Lost()
    assert any([rule.saw(loss) for loss in losses]) is lost


def test_it_goes_by_alarms() -> None:
    with pytest.raises(gfs.ConfigError, match="control='start' goes by alarms"):
        gfs.GFSConfig(control="start", alarm="off")
