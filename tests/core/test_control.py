"""The learning rate held at the edge: policies, the overlay on the optimizer's steps, the scheduler."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gfs_core as gfs
from gfs_core.actions.rate import Control, ControlProfile
from gfs_core.optimizers.learning_rate import LearningRateHook
from tests.core.observed import observe_ratio
from tests.core.options import tuned

RATE = 0.1


def measured(ratio: float | None = None, **values: Any) -> dict[str, float]:
    return gfs.Measurement.of(0, mean_square_stability_ratio=ratio, **values).values()


def started(policy: Any, ratio: float = 1.0, margin: float = 0.5) -> Control:
    """A control that has had its first four measurements, all at ``ratio``."""
    control = Control(policy, margin)
    for _ in range(4):
        assert control.waiting
        assert control.step(RATE) == 0.01
        control.measured(RATE, measured(ratio))
    assert not control.waiting
    return control


# --- policies -------------------------------------------------------------------------------------------------------


def test_cap_starts_low_grows_by_two_per_cent_and_falls_at_once() -> None:
    control = started("cap")  # ratio 1 at margin ½: half the rate is allowed, three tenths of that at first
    assert control.scale(RATE) == pytest.approx(0.15 * 1.02)
    assert [control.step(RATE) for _ in range(3)] == pytest.approx([0.15 * 1.02**k for k in (1, 2, 3)])
    for _ in range(100):
        control.step(RATE)
    assert control.scale(RATE) == pytest.approx(0.5)
    control.measured(RATE, measured(4.0))
    assert control.step(RATE) == pytest.approx(0.125)
    control.measured(RATE, measured(0.01))
    assert control.step(RATE) == pytest.approx(0.125 * 1.02)
    for _ in range(300):
        control.step(RATE)
    assert control.scale(RATE) == 1.0  # never above the user's rate
    assert control.scale(0.0) == 1.0


def test_a_limit_without_a_step_at_any_rate_scales_nothing() -> None:
    control = Control("follow")
    for _ in range(4):
        control.measured(RATE, measured(1.0))
    assert control.scale(0.0) == 1.0


def test_another_profile_is_gone_by_and_is_no_part_of_the_state() -> None:
    profile = ControlProfile(
        margin_adaptive=0.2, growth_adaptive=1.5, first=2, first_scale=0.25, first_share=0.5, free=3,
        ratio=lambda m, noisy: m.get("gfs_stability_ratio"),
    )  # fmt: skip
    control = Control("cap", adaptive=True, profile=profile)
    assert (control.margin, control.growth) == (0.2, 1.5)
    for _ in range(2):
        assert control.waiting
        assert control.step(RATE) == 0.25
        control.measured(RATE, measured(7.0))  # holds no GFS ratio: nothing that this profile goes by
        control.measured(RATE, measured(7.0, gfs_stability_ratio=2.0))  # a tenth of the rate is allowed
    assert (control.waiting, control.starting) == (False, True)
    assert [control.step(RATE) for _ in range(3)] == pytest.approx([0.05 * 1.5, 0.1, 0.1])
    assert control.state_dict().keys() == Control("cap").state_dict().keys()
    control.profile = ControlProfile()
    assert (control.margin, control.growth) == (0.75, 1.05)


@pytest.mark.parametrize("kind", ["monitor", "scheduler"])
def test_the_margin_and_the_growth_are_those_that_the_optimizer_stands(kind: str) -> None:
    def control(make: Any, policy: Any, margin: float | None = None) -> Control:
        model = net()
        optimizer = make(model.parameters(), lr=0.1)
        if kind == "scheduler":
            return gfs.EdgeOfStabilityLR(optimizer, None, policy, margin).control
        return gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(control=policy, margin=margin)).control

    found = [control(torch.optim.SGD, "cap"), control(torch.optim.AdamW, "cap"), control(torch.optim.RMSprop, "follow")]
    assert [(c.margin, c.growth) for c in found] == [(0.5, 1.02), (0.75, 1.05), (0.75, 1.05)]
    assert control(torch.optim.AdamW, "cdat").margin == 0.5
    assert control(torch.optim.AdamW, "cap", 0.25).margin == 0.25
    adaptive = found[1]
    for _ in range(4):
        adaptive.step(RATE)
        adaptive.measured(RATE, measured(7.5))  # a tenth of the rate is allowed
    assert [adaptive.step(RATE) for _ in range(3)] == pytest.approx([0.03 * 1.05**k for k in (1, 2, 3)])
    for _ in range(100):
        adaptive.step(RATE)
    assert adaptive.scale(RATE) == pytest.approx(0.1)
    kept = Control("cap", 0.5, adaptive=True)
    kept.load_state_dict(adaptive.state_dict())
    assert (kept.margin, kept.growth) == (0.5, 1.05)


def test_the_limit_is_a_rate_whatever_the_schedule_does() -> None:
    control = started("cap")
    for _ in range(100):
        control.step(RATE)
    assert control.scale(2 * RATE) == pytest.approx(0.25)
    assert control.scale(RATE / 4) == 1.0


def test_follow_keeps_the_shape_of_the_schedule_and_not_its_height() -> None:
    control = started("follow", ratio=0.1)  # five times the rate is allowed
    for _ in range(200):
        control.step(RATE)
    assert control.scale(RATE) == pytest.approx(5.0)
    assert control.scale(RATE / 10) * RATE / 10 == pytest.approx(5.0 * RATE / 10)  # a tenth of its peak: a tenth
    control.measured(RATE, measured(1.0))  # a tenth of what was allowed: a fifth of it counts, in the logarithm
    assert control.scale(RATE) == pytest.approx(5.0 * 0.1**0.2)
    control.measured(RATE, measured(1e-9))
    for _ in range(2000):
        control.step(RATE)
    assert control.scale(RATE) == 100.0


def test_warmup_is_over_after_exactly_a_hundred_such_steps() -> None:
    control = started("warmup", ratio=0.01)  # fifty times the rate is allowed: nothing to hold back
    for _ in range(100):
        assert control.holding
        assert control.step(RATE) == 1.0
    assert not control.holding


@pytest.mark.parametrize("rate", [1e-6, 0.1, 30.0])
def test_follow_does_not_depend_on_the_unit_of_the_rate(rate: float) -> None:
    control = Control("follow", 0.5)
    for _ in range(4):
        control.step(rate)
        control.measured(rate, measured(0.25))
    assert control.step(rate) == pytest.approx(0.3 * 2 * 1.02)


def test_warmup_is_over_when_nothing_was_held_back_for_a_hundred_steps() -> None:
    control = started("warmup", ratio=1.0)
    control.measured(RATE, measured(0.1))
    steps = 0
    while control.step(RATE) < 1:
        steps += 1
    assert steps == math.floor(math.log(1 / 0.15) / math.log(1.02))
    for _ in range(50):
        control.step(RATE)
    control.measured(RATE, measured(1.0))  # still in it
    assert control.step(RATE) == pytest.approx(0.5)
    control.measured(RATE, measured(0.1))
    for _ in range(36 + 60):  # 36 to be back at the user's rate; the 50 before do not count any more
        control.step(RATE)
    control.measured(RATE, measured(1.0))
    assert control.step(RATE) == pytest.approx(0.5)
    control.measured(RATE, measured(0.1))
    for _ in range(150):
        control.step(RATE)
    control.measured(RATE, measured(100.0))
    assert control.scale(RATE) == 1.0


def test_cdat_averages_descent_and_curvature_apart() -> None:
    control = Control("cdat", 0.5)
    for critical, curvature in ((0.4, 1.0), (0.4, 1.0), (0.4, 1.0), (2.0, 4.0)):
        control.measured(RATE, measured(directional_sharpness=curvature, critical_lr=critical))
        control.step(RATE)
    mean = (0.8 * 0.4 + 0.2 * 8.0) / (0.8 * 1.0 + 0.2 * 4.0)
    assert control.scale(RATE) == pytest.approx(0.5 * mean * 0.3 * 1.02**2 / RATE)
    control.measured(RATE, measured(directional_sharpness=1.0))  # nothing that would stop the step: nothing is learnt
    assert control.scale(RATE) == pytest.approx(0.5 * mean * 0.3 * 1.02**2 / RATE)


def test_without_measurements_the_rate_is_given_free_in_the_end() -> None:
    control = Control("follow", 0.5)
    control.measured(RATE, measured(None))
    control.measured(0.0, measured(1.0))  # at rate 0 a ratio says nothing
    assert [control.step(RATE) for _ in range(50)] == [0.01] * 50
    assert control.lost
    assert control.step(RATE) == 1.0


def test_steps_at_rate_0_do_not_count() -> None:
    control = Control("warmup", 0.5)
    assert [control.step(0.0) for _ in range(200)] == [0.01] * 200
    assert control.waiting
    for _ in range(4):
        control.step(RATE)
        control.measured(RATE, measured(0.01))
    assert [control.step(0.0) for _ in range(200)] == [1.0] * 200  # nothing is held back, and nothing tried
    assert control.holding


def test_a_control_that_was_lost_begins_when_it_has_its_measurements() -> None:
    control = Control("cap", 0.5)
    for _ in range(60):
        control.step(RATE)
    assert control.lost
    for _ in range(4):
        assert control.step(RATE) == 1.0
        control.measured(RATE, measured(1.0))
    assert not control.lost
    assert control.step(RATE) == pytest.approx(0.15 * 1.02)


def test_of_other_weights_the_first_measurements_are_taken_anew() -> None:
    control = started("cap")
    control.renew()
    assert control.waiting
    assert control.step(RATE) == 0.01
    for _ in range(4):  # those of the former weights had a ratio in the mean square, and these need none
        control.measured(RATE, measured(stability_ratio=1.0))
    assert not control.waiting


def test_the_solved_ratio_serves_where_there_is_no_running_one() -> None:
    control = Control("cap", 0.5)
    for _ in range(4):
        control.measured(RATE, measured(stability_ratio=2.0))
    for _ in range(100):
        control.step(RATE)
    assert control.scale(RATE) == pytest.approx(0.25)


def test_the_running_ratio_serves_where_that_in_the_mean_square_could_not_be_had() -> None:
    control = started("cap")
    control.measured(RATE, measured(running_stability_ratio=5.0, stability_ratio=0.1))
    assert control.step(RATE) == pytest.approx(0.1)
    control.measured(RATE, measured(stability_ratio=0.01))  # solved for in between: without the noise
    assert control.step(RATE) == pytest.approx(0.1)
    fresh = Control("cap", 0.5)
    fresh.measured(RATE, measured(running_stability_ratio=5.0))  # the very first part: nothing to go by yet
    for _ in range(3):
        fresh.measured(RATE, measured(1.0))
    assert fresh.waiting


def test_observe_changes_nothing() -> None:
    control = Control("observe", 0.5)
    control.measured(RATE, measured(100.0))
    assert control.step(RATE) == 1.0
    assert not control.waiting


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("measured"), st.floats(1e-3, 1e3)),
        st.tuples(st.just("step"), st.floats(0.0, 10.0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["cap", "follow", "warmup", "cdat"]), EVENTS, st.integers(0, 60))
def test_loaded_at_any_point_it_goes_on_as_if_never_interrupted(policy: Any, events: list[Any], at: int) -> None:
    def run(control: Control, events: list[Any]) -> list[float]:
        scales = []
        for kind, value in events:
            if kind == "measured":
                along = {"directional_sharpness": value, "critical_lr": 1 / value}
                control.measured(RATE, measured(value, **along))
            else:
                scales.append(control.step(value))
                assert 0 < scales[-1] <= 100
        return scales

    control = Control(policy, 0.5)
    first = run(control, events[:at])
    resumed = Control(policy, 0.5)
    resumed.load_state_dict(control.state_dict())
    assert first + run(resumed, events[at:]) == run(Control(policy, 0.5), events)


def test_a_measurement_at_another_scale() -> None:
    m = gfs.Measurement.of(0, threshold=20.0, stability_ratio=0.5, learning_rate=0.1, sharpness=10.0)
    half = m.at_scale(0.5)
    assert (half.threshold, half.stability_ratio, half.learning_rate, half.sharpness) == (40.0, 0.25, 0.05, 10.0)
    assert half.running_stability_ratio is None


# --- the overlay ----------------------------------------------------------------------------------------------------


class Fixed(Control):
    """Half the rate, and nothing else."""

    def __init__(self) -> None:
        super().__init__("cap", 0.5)
        self.steps = 0

    def step(self, rate: float) -> float:
        self.steps += 1
        return 0.5


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "tensor rate": lambda p, lr: torch.optim.SGD(p, torch.tensor(lr), momentum=0.9),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr),
    "foreach": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
    "fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    "fused tensor rate": lambda p, lr: torch.optim.AdamW(p, torch.tensor(lr), fused=True),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr),
}
X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, closure: bool = False) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (model(X).squeeze(1) - X.sum(1)).square().mean()
        value.backward()
        return value

    for _ in range(count):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_steps_are_those_of_the_smaller_rate_to_the_bit(kind: str, closure: bool) -> None:
    halved, plain = net(), net()
    optimizer = OPTIMIZERS[kind](halved.parameters(), 0.01)
    held = optimizer.param_groups[0]["lr"]
    overlay = LearningRateHook(optimizer, Fixed())
    steps(halved, optimizer, closure=closure)
    steps(plain, OPTIMIZERS[kind](plain.parameters(), 0.005), closure=closure)
    assert all(torch.equal(a, b) for a, b in zip(halved.parameters(), plain.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] is held  # a tensor is changed in place: a captured step reads it there
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    overlay.close()
    before = [p.detach().clone() for p in halved.parameters()]
    assert not optimizer._optimizer_step_pre_hooks
    steps(halved, optimizer, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, halved.parameters(), strict=True))


def test_a_compiled_step_follows_a_scale_that_changes() -> None:
    models = net(), net()
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]
    LearningRateHook(optimizers[0], started("cap"))
    compiled = [torch.compile(o.step, backend="eager") for o in optimizers]
    control = started("cap")
    for _ in range(12):
        optimizers[1].param_groups[0]["lr"] = 0.01 * control.step(0.01)
        for model, optimizer, step in zip(models, optimizers, compiled, strict=True):
            optimizer.zero_grad()
            (model(X).squeeze(1) - X.sum(1)).square().mean().backward()
            step()
        assert optimizers[0].param_groups[0]["lr"] == 0.01
    assert control.last > 0.16
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_keep_their_proportions() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": torch.tensor(0.4)}]
    optimizer = torch.optim.SGD(groups, 1.0)
    seen = []
    LearningRateHook(optimizer, Fixed())
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append([float(g["lr"]) for g in o.param_groups]))
    steps(model, optimizer, 1)
    assert seen == [pytest.approx([0.1, 0.2])]
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.2, 0.4])


def test_a_closure_and_a_checkpoint_see_the_users_rate() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    overlay = LearningRateHook(optimizer, Fixed())
    seen = []

    def closure() -> torch.Tensor:
        seen.append(optimizer.param_groups[0]["lr"])
        return model(X).sum()

    optimizer.step(closure)
    optimizer.step(closure=closure)
    assert seen == [0.1, 0.1]

    class Twice(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            return closure(), closure()

    seen.clear()
    twice = Twice(model.parameters(), {"lr": 0.1})
    LearningRateHook(twice, Fixed())
    twice.step(lambda: [seen.append(twice.param_groups[0]["lr"]), model(X).sum()][1])
    assert seen == [0.1, 0.1]
    with overlay.scaled(0.5):
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1


def test_a_step_that_breaks_off_leaves_the_users_rate() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    LearningRateHook(optimizer, Fixed())

    def fails() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["lr"] == 0.1
    broken = optimizer.register_step_pre_hook(lambda o, a, k: fails())  # after the rate was scaled
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    broken.remove()
    steps(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_gradient_scaling_skips_is_no_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    control = Fixed()
    LearningRateHook(optimizer, control)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(X).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert control.steps == 2


def test_lbfgs_is_refused() -> None:
    with pytest.raises(gfs.ConfigError, match="LBFGS evaluates the loss several times"):
        gfs.StabilityMonitor(net(), torch.optim.LBFGS(net().parameters()), gfs.GFSConfig(control="cap"))


# --- with the monitor -----------------------------------------------------------------------------------------------


class Fit:
    """A classification on random batches, resumable."""

    def __init__(self, kind: str, rate: float, steps: int = 200, **options: Any) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(512, 10)
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()
        self.model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
        make = {"sgd": lambda p: torch.optim.SGD(p, rate, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, rate)}
        self.optimizer = make[kind](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        config = gfs.GFSConfig(**{"tier": "running", "every": 5, "max_overhead": None, "control": "cap"} | options)
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        self.found: list[gfs.Measurement] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def run(self, start: int, stop: int) -> Fit:
        for step in range(start, stop):
            rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
            batch = self.x[rows], self.y[rows]
            self.optimizer.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            m = self.monitor.step(self.loss, batch, step, loss=loss)
            if m is not None:
                self.found.append(m)
            self.optimizer.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.scheduler.step()
            self.losses.append(loss.item())
        return self

    def state(self) -> list[Any]:
        parts = (self.model, self.optimizer, self.scheduler, self.monitor)
        return [part.state_dict() for part in parts]

    def load(self, state: list[Any]) -> Fit:
        for part, held in zip((self.model, self.optimizer, self.scheduler, self.monitor), state, strict=True):
            part.load_state_dict(held)
        return self


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("control", ["cap", "follow"])
def test_a_rate_far_too_high_is_held(kind: str, control: str) -> None:
    rate = {"sgd": 10.0, "adamw": 1.0}[kind]
    free = Fit(kind, rate, control="observe").run(0, 200)
    held = Fit(kind, rate, control=control).run(0, 200)
    assert max(held.losses) < 1.0 < 10.0 < max(free.losses)
    assert sum(held.losses[-20:]) < 0.5 * sum(free.losses[-20:])
    assert held.rates == free.rates  # the schedule is the user's in both
    assert all(m.lr_scale is None and m.lr_effective is None for m in free.found)
    late = [m for m in held.found if m.hvps][20:]  # without what only the early warning said
    for m in late:
        assert m.lr_effective == pytest.approx(m.lr_scale * held.rates[m.step])
    if kind == "sgd":
        for m in late:  # thresholds and ratios belong to the rate that is really used
            assert m.threshold * m.lr_effective == pytest.approx(2 * 1.9)
            assert m.running_stability_ratio == pytest.approx(m.running_sharpness / m.threshold)
        assert all(m.mean_square_bound <= 0.51 for m in late) or control == "follow"  # what the control goes by
        assert all(m.mean_square_stability_ratio >= m.running_stability_ratio for m in late)


def test_a_rate_that_the_control_lets_rise_is_no_alarm() -> None:
    fit = Fit("sgd", 10.0)  # held far below that
    assert fit.monitor.watch.warning is not None
    observe_ratio(fit.monitor.watch.warning, 0, 0.5, solved=True)  # the rule says nothing far from the edge
    events: list[gfs.Alert] = []
    fit.monitor.watch.function = events.append
    fit.run(0, 41)
    control = fit.monitor.control
    assert control._limit is not None
    assert control._target is not None
    control._limit, control._target = 5 * control._limit, 5 * control._target  # what a measurement may find
    before = control.last
    fit.run(41, 43)
    assert control.last > 4 * before
    assert [e for e in events if e.rule == "rate"] == []


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 7),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=40),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)],
        [5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_goes_on_under_it(name: str) -> None:
    """The rates that a scheduler sets are the same to the bit with and without a control, which holds them."""
    rates = {}
    for control in ("observe", "follow"):
        fit = Fit("sgd", 1.0, control=control)
        scheduler = SCHEDULERS[name](fit.optimizer)
        metric = (1.0,) if name == "plateau" else ()
        fit.scheduler.step = functools.partial(scheduler.step, *metric)  # type: ignore[method-assign]
        rates[control] = fit.run(0, 40).rates
    assert rates["follow"] == rates["observe"]
    assert len(set(rates["observe"])) > 2
    assert fit.found[-1].lr_scale != 1.0


def test_a_rate_that_is_safe_is_left_alone() -> None:
    held = Fit("sgd", 0.01).run(0, 150)
    assert held.found[-1].lr_scale == 1.0
    assert held.found[-1].lr_effective == held.rates[held.found[-1].step]


@pytest.mark.parametrize("control", ["cap", "follow", "warmup", "cdat"])
def test_a_resumed_run_goes_on_to_the_bit(control: str, tmp_path: Any) -> None:
    def fit() -> Fit:
        made = Fit("adamw", 0.1, control=control)
        tuned(made.monitor, whole=True)  # what takes less time differs from run to run
        return made

    whole, first = fit().run(0, 60), fit().run(0, 31)
    torch.save(first.state(), tmp_path / "state.pt")
    second = fit().load(torch.load(tmp_path / "state.pt")).run(31, 60)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.lr_scale for m in whole.found] == [m.lr_scale for m in first.found + second.found]


def test_switched_off_in_the_middle_the_rate_is_the_users() -> None:
    fit = Fit("sgd", 0.5).run(0, 30)
    assert fit.found[-1].lr_scale < 1
    fit.monitor.control.policy = "observe"
    seen: list[float] = []
    fit.optimizer.register_step_pre_hook(lambda o, a, k: seen.append(o.param_groups[0]["lr"]))
    fit.run(30, 40)
    assert seen == fit.rates[30:]
    assert fit.found[-1].lr_scale is None


def test_the_budget_waits_until_the_control_has_started() -> None:
    fit = Fit("sgd", 0.5, 400, max_overhead=1e-9, tier="running", every=1).run(0, 80)
    measured = [m.step for m in fit.found if m.grad_evals]
    begun = next(at for at, step in enumerate(measured) if step != at)
    assert 27 <= begun <= 30  # eight settle, and have no value for the control
    assert fit.found[0].mean_square_stability_ratio is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control": "cap", "tier": "directional"}, "control='cap' needs a stability ratio"),
        ({"margin": 1.5}, r"`margin` must be in \(0, 1\], the edge of stability; got 1.5"),
        ({"control": "guard", "alarm": "off"}, "control='guard' goes by alarms"),
        ({"control": "edge"}, "`control` must be one of 'observe', 'guard', 'start', 'plateau', 'cap'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gfs.ConfigError, match=words):
        gfs.GFSConfig(**options)


# --- the early warning in the monitor -------------------------------------------------------------------------------


class Spiking(Fit):
    """Its labels are wrong at one step."""

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        return 50 * loss if self.spiking else loss

    spiking = False

    def run(self, start: int, stop: int) -> Fit:
        self.spiking = start == 100
        return super().run(start, stop)


def test_a_spike_of_the_loss_is_an_alarm_with_all_its_consequences(tmp_path: Any) -> None:
    events: list[gfs.Alert] = []
    fit = Spiking("sgd", 0.05, control="observe", alarm="stop", history=f"{tmp_path}/h.jsonl")
    fit.monitor.watch.function = events.append
    assert fit.monitor.watch.warning is not None
    observe_ratio(fit.monitor.watch.warning, 0, 0.5, solved=True)  # the rule says nothing far from the edge
    fit.run(0, 100)
    assert not fit.monitor.should_stop
    with pytest.warns(gfs.GFSWarning, match="alarm at step 100: the loss is .*, far above its median"):
        fit.run(100, 101)
    assert [e.level for e in events][-1] is gfs.AlertLevel.ALARM
    assert fit.monitor.should_stop
    assert fit.monitor.wants_checkpoint
    last = gfs.read_history(tmp_path / "h.jsonl")[-1]
    assert (last.step, last.alarm) == (100, 2)
    assert "the loss is" in last.reasons[-1]
    fit.run(101, 150)
    state = fit.monitor.state_dict()
    resumed = Fit("sgd", 0.05, control="observe").monitor
    resumed.load_state_dict(state)
    assert resumed.watch.warning is not None
    assert resumed.watch.warning.state_dict() == fit.monitor.watch.warning.state_dict()


def test_without_an_alarm_nothing_is_watched() -> None:
    fit = Fit("sgd", 0.05, alarm="off", control="observe").run(0, 30)
    assert fit.monitor.watch.warning is None
    assert all(m.alarm is None for m in fit.found)
    assert Fit("sgd", 0.05, control="observe").run(0, 30).found[-1].alarm == 0


# --- the scheduler --------------------------------------------------------------------------------------------------


def test_the_scheduler_puts_the_same_scale_into_the_rate() -> None:
    by_option = Fit("sgd", 10.0).run(0, 40)
    fit = Fit("sgd", 10.0, control="observe")
    fit.scheduler = gfs.EdgeOfStabilityLR(fit.optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(fit.optimizer, 200))
    fit.monitor = gfs.StabilityMonitor(fit.model, fit.optimizer, fit.monitor.config)
    fit.run(0, 40)
    for a, b in zip(by_option.model.parameters(), fit.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.lr_effective for m in fit.found] == [m.lr_effective for m in by_option.found]
    assert [fit.rates[m.step] for m in fit.found] == pytest.approx([m.lr_effective for m in fit.found])
    assert fit.scheduler.get_last_lr() == [fit.optimizer.param_groups[0]["lr"]]


def test_a_resumed_scheduler_goes_on_to_the_bit() -> None:
    def fit() -> Fit:
        made = Fit("adamw", 0.1, control="observe")
        base = torch.optim.lr_scheduler.LinearLR(made.optimizer, 0.1, total_iters=20)
        made.scheduler = gfs.EdgeOfStabilityLR(made.optimizer, base, policy="follow")
        made.monitor = tuned(gfs.StabilityMonitor(made.model, made.optimizer, made.monitor.config), whole=True)
        return made

    whole, first = fit().run(0, 60), fit().run(0, 31)
    second = fit().load(first.state()).run(31, 60)
    assert whole.rates == first.rates + second.rates
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scheduler_that_does_not_fit() -> None:
    optimizer = torch.optim.SGD(net().parameters(), 0.1)
    other = torch.optim.SGD(net().parameters(), 0.1)
    lr = torch.optim.lr_scheduler
    for arguments, words in (
        ((optimizer, lr.ReduceLROnPlateau(optimizer)), "is stepped with a metric"),
        ((optimizer, lr.StepLR(other, 3)), "belongs to another optimizer"),
        ((optimizer, None, "edge"), "`policy` must be one of"),
        ((optimizer, None, "cap", 2.0), "`margin` must be in"),
    ):
        with pytest.raises(gfs.ConfigError, match=words):
            gfs.EdgeOfStabilityLR(*arguments)
    scheduler = gfs.EdgeOfStabilityLR(optimizer)  # noqa: F841
    with pytest.raises(gfs.ConfigError, match="beside an EdgeOfStabilityLR"):
        gfs.StabilityMonitor(net(), optimizer, gfs.GFSConfig(control="cap"))
