"""Steps that are skipped, and ways back, in plain loops."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.actions.lowered import APART, FALLS, HOLD, Lowered
from gfs_core.actions.rescue import SKIPS, WAIT, Decision, Rescue
from gfs_core.optimizers.skipping import SkipHook
from gfs_core.run.rescuing import EVERY
from gfs_core.run.rollback import Snapshots
from tests.bitwise import assert_same

ALARM, QUIET = gfs.AlertLevel.ALARM, gfs.AlertLevel.QUIET
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, amsgrad=True),
    "fused": lambda params: torch.optim.AdamW(params, torch.tensor(0.01), fused=True),
    "nadam": lambda params: torch.optim.NAdam(params, 0.01, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, 0.01),
    "schedule-free": lambda params: _schedule_free(params),  # counts steps in its groups
}


def _schedule_free(params: Any) -> torch.optim.Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(params, 0.01)
    optimizer.train()
    return optimizer


class Training:
    """A small classifier in a plain loop; whatever it needs beside is a keyword."""

    def __init__(
        self,
        alarm: str = "rescue",
        make: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["adamw"],
        scaler: bool = False,
        accumulate: int = 1,
        protect: bool = True,
        closure: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(512, 8)
        self.y = (self.x @ torch.randn(8, 3)).argmax(1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 400)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaler, growth_interval=20)
        config = gfs.GFSConfig(tier="running", alarm=alarm, max_overhead=None, **options)  # type: ignore[arg-type]
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        if protect:
            self.monitor.protect(self.scheduler, self.scaler)
        self.accumulate, self.closure, self.count = accumulate, closure, 0
        self.told: list[str] = []

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def batch(self, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        rows = torch.randint(512, (32,))
        return self.x[rows] * factor, self.y[rows]

    def step(self, factor: float = 1.0, unscale: bool = False, said: float | None = None) -> gfs.Measurement | None:
        """One step of the optimizer on inputs times ``factor``; the monitor is told of the loss ``said``, if given."""
        batches = [self.batch(factor if i == 0 else 1.0) for i in range(self.accumulate)]
        self.optimizer.zero_grad()
        losses = [self.loss_of(b) / self.accumulate for b in batches]
        for loss in losses:
            self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            mean = float(sum(loss.detach() for loss in losses))
            made = self.monitor.step(self.loss_of, batches, micro_batches=True, loss=mean if said is None else said)
        self.told += [str(w.message) for w in told if "gfs" in str(w.message)]
        if self.closure:
            self.optimizer.step(lambda: mean)  # type: ignore[arg-type, return-value]
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.count += 1
        return made

    def steps(self, count: int) -> Training:
        for _ in range(count):
            self.step()
            self.scheduler.step()
        return self

    def break_weights(self) -> None:
        with torch.no_grad():
            self.model[0].weight.fill_(math.nan)

    def kept(self) -> Any:
        """A copy of everything that a step updates."""
        state = {i: self.optimizer.state.get(p) for i, p in enumerate(self.model.parameters())}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return copy.deepcopy([self.model.state_dict(), state, groups])

    def all_kept(self) -> Any:
        return [self.kept(), copy.deepcopy([self.scheduler.state_dict(), self.scaler.state_dict()])]


def reasons(measurement: gfs.Measurement | None) -> str:
    return "" if measurement is None else "; ".join(measurement.reasons)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("alarm", ["skip", "rescue"])
def test_a_skipped_step_updates_nothing(name: str, alarm: str) -> None:
    run = Training(alarm, OPTIMIZERS[name]).steps(30)
    before = run.kept()
    made = run.step(math.nan)
    assert_same(run.kept(), before)
    assert "the step was skipped: nothing is updated by it" in reasons(made)
    assert all(p.grad is not None for p in run.model.parameters())  # given back
    run.step()
    assert not torch.equal(run.model[0].weight, before[0]["0.weight"])
    assert all(p.isfinite().all() for p in run.model.state_dict().values())


def test_without_it_the_same_batch_ends_the_run() -> None:
    run = Training("log").steps(30)
    run.step(math.nan)
    assert not run.model[0].weight.isfinite().any()


@pytest.mark.parametrize("closure", [False, True])
def test_of_an_accumulated_step_nothing_is_left(closure: bool) -> None:
    run = Training(accumulate=3, closure=closure).steps(30)
    before = run.kept()
    run.step(math.nan)
    assert_same(run.kept(), before)
    assert not torch.equal(run.steps(1).model[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaling_takes_a_skipped_step_for_a_usual_one(unscale: bool) -> None:
    run = Training(scaler=True).steps(30)
    scale, tracker, before = run.scaler.get_scale(), run.scaler._get_growth_tracker(), run.kept()
    made = run.step(unscale=unscale, said=math.inf)
    assert "the step was skipped" in reasons(made)
    assert_same(run.kept(), before)
    assert (run.scaler.get_scale(), run.scaler._get_growth_tracker()) == (scale, tracker + 1)


def test_a_step_that_gradient_scaling_skips_itself_leaves_nothing_for_the_next() -> None:
    run = Training(scaler=True).steps(30)
    scale, before = run.scaler.get_scale(), run.kept()
    run.step(math.nan)
    assert run.scaler.get_scale() == scale / 2  # an overflow, by the scaler's own rule
    assert_same(run.kept(), before)
    run.step()
    assert not torch.equal(run.model[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rollback_puts_back_to_the_bit(name: str) -> None:
    run = Training(make=OPTIMIZERS[name], scaler=True).steps(EVERY)
    # The snapshot is taken before the step is, when its gradients are there: nothing is put back but what was then.
    then: list[Any] = []
    take = Snapshots.take

    def noting(self: Snapshots, step: int) -> Any:
        then[:] = [run.all_kept()]
        return take(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots, "take", noting)
        run.steps(9)
    run.break_weights()
    while "went back" not in (said := reasons(run.step(math.nan))):
        run.scheduler.step()
        assert run.count < EVERY + 20
    assert f"to the weights of step {EVERY}" in said
    assert sum("went back" in text for text in run.told) == 1
    # The scaler has seen an overflow since.
    [state, [scheduler, _]], [was, [then_scheduler, scaling]] = run.all_kept(), then[0]
    assert_same(state, was)
    assert_same(scheduler, then_scheduler)
    assert run.scaler.get_scale() == scaling["scale"] / 2
    weights = copy.deepcopy(run.model.state_dict())
    run.steps(5)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert not torch.equal(run.model[0].weight, weights["0.weight"])


def test_a_rollback_lowers_the_rate_for_a_while_and_the_scheduler_goes_on() -> None:
    used: list[float] = []
    run = Training(make=OPTIMIZERS["sgd"])
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    run.steps(EVERY + 9)
    run.break_weights()
    run.steps(4)
    users = [run.optimizer.param_groups[0]["lr"]]
    used.clear()
    for _ in range(180):
        run.steps(1)
        users.append(run.optimizer.param_groups[0]["lr"])
    shares = [a / b for a, b in zip(used, users[:-1], strict=True)]
    stages = [share for stage in (3, 2, 1) for share in [3 ** (-stage / 3)] * HOLD]
    assert shares[:149] == pytest.approx(stages[1:])
    assert shares[149:] == [1.0] * 31
    # The schedule has lost the steps between the snapshot and the rollback, and no others.
    assert run.scheduler.last_epoch == EVERY + 1 + 180


def test_a_scheduler_that_nobody_protects_keeps_its_rates() -> None:
    run = Training(protect=False).steps(EVERY + 9)
    run.break_weights()
    run.steps(3)
    rate = run.optimizer.param_groups[0]["lr"]
    assert "went back" in reasons(run.step())
    assert run.optimizer.param_groups[0]["lr"] == rate
    assert run.model[0].weight.isfinite().all()


def test_what_is_known_starts_anew_after_a_rollback(tmp_path: Path) -> None:
    run = Training(every=2, history=str(tmp_path / "history.jsonl")).steps(EVERY + 9)
    run.break_weights()
    run.steps(4)
    assert run.monitor.watch.level == QUIET
    run.steps(100)
    run.monitor.close()
    history = gfs.read_history(tmp_path / "history.jsonl")
    [back] = [m for m in history if "went back" in reasons(m)]
    assert back.alarm == ALARM
    assert [m.alarm for m in history if m.step > back.step + 1][:5] == [QUIET] * 5
    measured = [m for m in history if m.step > back.step and m.threshold is not None]
    assert measured[0].running_stability_ratio is None  # nothing is left of what was measured on other weights
    assert any(m.running_stability_ratio is not None for m in measured)
    assert [m.lr_scale for m in history if m.step > back.step + 1 and m.lr_scale is not None][:3] == [1 / 3] * 3
    first = reasons(history[0])
    assert "3 snapshots to go back to take" in first
    assert "MB on the host" in first


def test_the_bytes_told_are_those_taken() -> None:
    run = Training(make=lambda params: torch.optim.SGD(params, 0.1)).steps(1)
    numbers = sum(p.numel() for p in run.model.parameters()) + 32
    assert run.monitor.rescuing is not None
    assert run.monitor.rescuing.snapshots.bytes == 3 * (4 * numbers + 8)


def test_a_snapshot_right_before_the_alarm_is_not_trusted() -> None:
    run = Training().steps(EVERY + 3)
    run.break_weights()
    said = [reasons(run.step()) for _ in range(4)]
    assert "to the weights of step 0," in said[-1]


def test_an_older_snapshot_where_the_newest_leads_to_the_same_trouble() -> None:
    run = Training().steps(2 * EVERY + 9)
    went = []
    for _ in range(3):
        run.break_weights()
        while "went back" not in (said := reasons(run.step())):
            assert run.count < 400
        went.append(int(said.split("weights of step ")[1].split(",")[0].split(";")[0]))
    assert went == [2 * EVERY, EVERY, 0]


def test_at_most_so_many_rollbacks_and_then_a_checkpoint() -> None:
    run = Training().steps(EVERY + 9)
    went = 0
    while not run.monitor.wants_checkpoint:
        run.break_weights()
        went += "went back" in reasons(run.step())
        assert run.count < 400
    assert went == FALLS
    assert run.monitor.rates.scale() == 3.0**-FALLS
    assert any("did not help: a checkpoint is saved" in text for text in run.told)
    assert not run.model[0].weight.isfinite().any()  # training goes on as it is
    assert not run.monitor.should_stop


def test_nothing_is_done_in_a_quiet_run() -> None:
    a, b = Training("log").steps(120), Training("rescue").steps(120)
    assert_same(a.kept(), b.kept())
    assert not any("back" in text for text in b.told)


def test_a_run_with_a_jump_of_the_rate_ends_as_well_as_one_without() -> None:
    ends = {}
    for alarm, jump in (("log", False), ("log", True), ("rescue", True)):
        run = Training(alarm, OPTIMIZERS["sgd"])
        for step in range(360):
            if jump and step == 150:
                run.optimizer.param_groups[0]["lr"] *= 300
            run.steps(1)
        run.model.eval()
        ends[alarm, jump] = run.loss_of((run.x, run.y)).item()
    assert not ends["log", True] < 3 * ends["log", False]
    assert ends["rescue", True] < 1.3 * ends["log", False] + 0.02


def test_a_resumed_run_rescues_too() -> None:
    run = Training().steps(EVERY + 9)
    state = run.monitor.state_dict()
    again = Training().steps(EVERY + 3)
    again.monitor.load_state_dict(state)
    again.count = run.count
    again.steps(10)
    before = again.kept()
    again.step(math.nan)
    assert_same(again.kept(), before)
    again.break_weights()
    again.steps(4)
    assert again.model[0].weight.isfinite().all()


def test_where_it_cannot_be_one_message_says_so() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(gfs.GFSWarning, match="no step is skipped, and there is no way back: LBFGS evaluates") as told:
        gfs.StabilityMonitor(model, torch.optim.LBFGS(model.parameters()), gfs.GFSConfig(alarm="rescue"))
    assert sum("LBFGS evaluates" in str(w.message) for w in told) == 1
    config = gfs.GFSConfig(alarm="rescue", strict=True)
    with pytest.raises(gfs.MeasurementError, match="LBFGS"):
        gfs.StabilityMonitor(model, torch.optim.LBFGS(model.parameters()), config)


# --- the decisions ------------------------------------------------------------------------------------------------


def alert(step: int) -> list[gfs.Alert]:
    return [gfs.Alert(step, ALARM, "said so", "test")]


def quiet(goes_back: bool = True, steps: int = 60) -> Rescue:
    rescue = Rescue(goes_back)
    for step in range(steps):
        assert rescue.decide(step, QUIET, [], [1.0 + 0.1 * (step % 3)]) is Decision.TAKE
    return rescue


def test_an_alarm_of_which_the_loss_shows_nothing_costs_one_step() -> None:
    rescue = quiet()
    assert rescue.decide(60, ALARM, alert(60), [1.0]) is Decision.SKIP
    for step in range(61, 200):  # it lasts
        assert rescue.decide(step, ALARM, [], [1.0]) is Decision.TAKE


def test_a_loss_that_has_not_fallen_is_bad_an_eighth_of_the_first_one_above_it() -> None:
    """As in a game of two networks."""
    for loss, going_back in ((1.2, False), (1.26, True)):
        rescue = quiet()  # begins at 1, and lies at 1, 1.1 and 1.2
        found = [rescue.decide(60 + k, ALARM, alert(60) if k == 0 else [], [loss]) for k in range(8)]
        assert (Decision.GO_BACK in found) is going_back


@pytest.mark.parametrize("alarm", ["skip", "rescue"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("closure", [False, True])
def test_a_gradient_that_is_not_finite_never_updates_anything(alarm: str, value: float, closure: bool) -> None:
    """Thirty in a row, at a loss that is well; more than an alarm skips."""
    training = Training(alarm, closure=closure).steps(60)
    spoil = training.model[3].bias.register_hook(lambda grad: grad * value)
    weights, state = copy.deepcopy(training.model[0].weight), copy.deepcopy(training.optimizer.state_dict()["state"])
    made = [training.step() for _ in range(30)]
    assert torch.equal(training.model[0].weight, weights)
    assert_same(training.optimizer.state_dict()["state"], state)
    assert sum("the step before was skipped: its gradient was not finite" in reasons(m) for m in made) > 5
    spoil.remove()
    training.steps(5)
    assert not torch.equal(training.model[0].weight, weights)
    assert all(p.isfinite().all() for p in training.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_whose_squares_overflow_is_finite(dtype: torch.dtype) -> None:
    weights, large = torch.zeros(100, dtype=dtype, requires_grad=True), torch.finfo(dtype).max
    optimizer = torch.optim.SGD([weights, empty := torch.zeros(0, requires_grad=True)], 1e-3)
    hook = SkipHook(optimizer, finite_only=True)
    moved = []
    for value in (large, math.inf):
        weights.grad, empty.grad = torch.full_like(weights, value), torch.zeros(0)
        before = weights.detach().clone()
        optimizer.step()
        moved.append((not torch.equal(weights, before), hook.not_finite))
    assert moved == [(True, False), (False, True)]


def test_so_many_steps_of_an_alarm_are_skipped_and_then_training_goes_on() -> None:
    rescue = quiet(goes_back=False)
    found = [rescue.decide(60, ALARM, alert(60), [5.0])]
    found += [rescue.decide(step, ALARM, [], [5.0]) for step in range(61, 100)]
    assert found == [Decision.SKIP] * SKIPS + [Decision.TAKE] * (40 - SKIPS)
    assert rescue.decide(100, ALARM, alert(100), [9.0]) is Decision.SKIP  # a second rise


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.3])
def test_where_losses_stay_bad_the_run_goes_back(loss: float) -> None:
    rescue = quiet()
    found = [rescue.decide(60, ALARM, alert(60), [loss])]
    found += [rescue.decide(step, ALARM, [], [loss]) for step in range(61, 64)]
    assert found == [Decision.SKIP] * 3 + [Decision.GO_BACK]


def test_losses_no_higher_than_in_quiet_call_for_nothing() -> None:
    rescue = quiet()
    assert rescue.decide(60, ALARM, alert(60), [1.2]) is Decision.SKIP
    assert {rescue.decide(step, ALARM, [], [1.2]) for step in range(61, 100)} == {Decision.TAKE}


def test_a_small_loss_may_rise_without_a_way_back() -> None:
    rescue = Rescue(True)
    for step in range(60):
        rescue.decide(step, QUIET, [], [2.0 if step < 3 else 0.1])
    assert rescue.decide(60, ALARM, alert(60), [0.5]) is Decision.SKIP
    assert {rescue.decide(step, ALARM, [], [0.5]) for step in range(61, 100)} == {Decision.TAKE, Decision.LOWER}
    found = [rescue.decide(step, ALARM, [], [0.6]) for step in range(100, 104)]  # 0.1 + (2 - 0.1)/4 is 0.575
    assert found == [Decision.SKIP] * 3 + [Decision.GO_BACK]


def test_where_losses_of_an_alarm_are_high_and_not_bad_the_rate_is_lowered() -> None:
    rescue = quiet()  # the highest is 1.2, and a loss is bad above 1.25
    found = [rescue.decide(60, ALARM, alert(60), [1.22])]
    found += [rescue.decide(step, ALARM, [], [1.22]) for step in range(61, 64)]
    assert found == [Decision.SKIP] + [Decision.TAKE] * 2 + [Decision.LOWER]
    rescue.lowered(63)
    found = [rescue.decide(step, ALARM, [], [1.22]) for step in range(64, 64 + WAIT)]
    assert found == [Decision.TAKE] * (WAIT - 1) + [Decision.LOWER]  # the first fall has time to act
    rescue = quiet(goes_back=False)
    assert {rescue.decide(step, ALARM, [], [1.22]) for step in range(60, 99)} == {Decision.TAKE}


def test_a_run_that_breaks_as_it_begins_goes_back_without_an_alarm() -> None:
    rescue = Rescue(True)
    found = [rescue.decide(step, QUIET, [], [loss]) for step, loss in enumerate([2.3, 2.9, 8.0, 60.0, 40.0, 50.0])]
    assert found == [Decision.TAKE] * 5 + [Decision.GO_BACK]
    assert rescue.began == 2
    rescue = Rescue(True)
    assert {rescue.decide(step, QUIET, [], [6.8 + 0.1 * (step % 2)]) for step in range(200)} == {Decision.TAKE}
    rescue = Rescue(True)
    for step in range(60):
        assert rescue.decide(step, QUIET, [], [2.3]) is Decision.TAKE
    assert {rescue.decide(step, QUIET, [], [9.0]) for step in range(60, 99)} == {Decision.TAKE}  # an alarm decides


def test_a_first_loss_that_was_small_by_chance_sends_the_run_back_once() -> None:
    rescue = Rescue(True)
    found = [rescue.decide(step, QUIET, [], [loss]) for step, loss in enumerate([0.1, 1.0, 0.9, 1.1, 1.0])]
    assert found[-1] is Decision.GO_BACK
    rescue.went_back(4)
    assert {rescue.decide(step, QUIET, [], [1.0 + 0.1 * (step % 3)]) for step in range(5, 99)} == {Decision.TAKE}


# --- the share of the rate ------------------------------------------------------------------------------------------


def shares(lowered: Lowered, steps: int) -> list[float]:
    return [lowered.step(0.1) for _ in range(steps)]


def test_the_share_grows_back_in_stages_to_exactly_one() -> None:
    lowered = Lowered()
    lowered.fall()
    found = shares(lowered, 3 * HOLD + 1)
    assert [found[stage * HOLD] for stage in range(4)] == [1 / 3, 3 ** (-2 / 3), 3 ** (-1 / 3), 1.0]
    assert all(len(set(found[stage * HOLD : (stage + 1) * HOLD])) == 1 for stage in range(3))
    waiting = Lowered()
    waiting.fall()
    assert [waiting.step(0.0) for _ in range(2 * HOLD)] == [1 / 3] * 2 * HOLD  # steps at rate 0 do not count


def test_trouble_at_a_stage_goes_back_to_the_one_that_held_and_stays_there_longer() -> None:
    lowered = Lowered()
    lowered.fall()
    shares(lowered, HOLD + 5)
    lowered.fall()
    assert shares(lowered, 2 * HOLD) == [1 / 3] * 2 * HOLD
    assert lowered.share == 3 ** (-2 / 3)
    shares(lowered, 4 * HOLD)
    assert lowered.share == 1.0
    shares(lowered, APART - 1)
    lowered.fall()
    assert lowered.share == 3 ** (-1 / 3)  # the stage before held
    again = Lowered()
    again.fall()
    shares(again, 3 * HOLD + APART)
    again.fall()
    assert (again.share, again.hold) == (1 / 3, HOLD)  # a first one again


def test_so_many_falls_that_did_not_help_are_the_last_for_a_while() -> None:
    lowered = Lowered()
    for _ in range(FALLS):
        assert lowered.may_fall()
        shares(lowered, HOLD - 1)
        lowered.fall()
    assert lowered.share == 3.0**-FALLS
    assert not lowered.may_fall()
    shares(lowered, 3 * FALLS * HOLD)
    assert lowered.share == 1.0
    shares(lowered, APART - 1)
    assert not lowered.may_fall()
    shares(lowered, 1)
    assert lowered.may_fall()


@given(st.lists(st.sampled_from(["fall", "may", "step", "hold", "zero"]), max_size=40), st.integers(0, 40))
def test_a_share_that_is_loaded_goes_on_as_if_never_interrupted(events: list[str], at: int) -> None:
    def run(lowered: Lowered, events: list[str]) -> list[Any]:
        act: dict[str, Callable[[], Any]] = {
            "fall": lowered.fall,
            "may": lowered.may_fall,
            "step": lambda: lowered.step(0.1),
            "hold": lambda: shares(lowered, lowered.hold),
            "zero": lambda: lowered.step(0.0),
        }
        return [act[event]() for event in events] + [vars(lowered)]

    whole, first, second = Lowered(), Lowered(), Lowered()
    before = run(first, events[:at])
    second.load_state_dict(first.state_dict())
    assert before[:-1] + run(second, events[at:]) == run(whole, events)
