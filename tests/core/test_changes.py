"""What changes while training runs: rates at 0, steps that no hook sees, other weights, batches without a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core as gfs
from tests.core.options import tuned

Batch = tuple[Tensor, Tensor]
images, labels = load_digits(return_X_y=True)
X, Y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
BATCH = X[:256], Y[:256]


def net(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


class Run:
    """A training on digits; what its monitor measured and said."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.found: list[gfs.Measurement | None] = []
        self.told: list[str] = []
        everything = {"tier": "sharpness", "every": 1, "running_every": 1, "max_overhead": None}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**everything | options))
            tuned(self.monitor, parts=2)
        self._hear(told)

    def _hear(self, told: list[warnings.WarningMessage]) -> None:
        self.told += [str(w.message) for w in told if issubclass(w.category, gfs.GFSWarning)]

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def steps(
        self,
        count: int,
        take: Callable[[], Any] | None = None,
        loss_fn: Callable[[Batch], Any] | None = None,
        batch: Batch = BATCH,
    ) -> gfs.Measurement | None:
        """Measure and step ``count`` times; the last measurement."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(count):
                self.optimizer.zero_grad()
                loss = self.loss(batch)
                if loss.requires_grad and loss.isfinite():
                    loss.backward()
                self.found.append(self.monitor.step(loss_fn or self.loss, batch))
                (take or self.optimizer.step)()
        self._hear(told)
        return self.found[-1]

    def fresh(self) -> float:
        """The sharpness, solved for from a random start."""
        return gfs.sharpness(
            self.model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), [BATCH], tol=1e-3
        ).value

    def holds(self) -> None:
        """The next measurement is right, the running estimate too."""
        expected = self.fresh()
        now = self.steps(1, take=lambda: None)
        assert now is not None
        assert now.sharpness == pytest.approx(expected, rel=0.02)
        if now.preconditioned_sharpness is None:  # which changes fast while the moments of new weights are young
            for _ in range(20):
                if now.running_sharpness is not None:
                    break
                now = self.steps(1, take=lambda: None)  # its direction settles
                assert now is not None
            assert now.running_sharpness == pytest.approx(expected, rel=0.4)


def sgd(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate)


# --- rates at 0, and a control without measurements -------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rate", "frozen"])
def test_a_start_without_steps_does_not_use_up_the_patience(schedule: str) -> None:
    model = net()
    run = Run(model, sgd(model, 30.0), control="cap", tier="running", running_every=None, every=1)
    if schedule == "rate":
        run.optimizer.param_groups[0]["lr"] = 0.0
    else:
        model.requires_grad_(False)
    run.steps(70)
    assert not run.monitor.control.lost
    model.requires_grad_(True)
    run.optimizer.param_groups[0]["lr"] = 30.0
    run.steps(60)
    scales = [m.lr_scale for m in run.found[-30:] if m is not None]
    assert len(scales) == 30
    assert max(scales) < 0.3
    assert run.loss(BATCH).item() < 2.0
    assert len(run.told) == (schedule == "frozen")


def test_a_control_that_gives_up_says_so_once_and_reports_the_users_rate() -> None:
    model = net()
    run = Run(model, sgd(model), control="cap")

    def fails(batch: Batch) -> Tensor:
        raise RuntimeError("no second time")

    run.steps(60, loss_fn=fails)
    told = [t for t in run.told if "control=" in t]
    assert len(told) == 1
    assert "starts from 4 stability ratios, and had 0 in 50 steps (no second time)" in told[0]
    assert "control='observe'" in told[0]
    assert run.monitor.rates.scale() == 1.0
    last = run.steps(10)  # … and it begins where the loss works again
    assert not run.monitor.control.lost
    assert last is not None
    assert last.lr_scale is not None


def test_a_control_that_gives_up_is_an_error_where_it_is_strict() -> None:
    model = net()
    run = Run(model, sgd(model), control="cap", strict=True)
    run.monitor.control.lost = True
    with pytest.raises(gfs.MeasurementError, match="starts from 4 stability ratios"):
        run.steps(1)


# --- steps that no hook sees ------------------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) as it is mostly written: two halves around a base optimizer."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        length = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * group["rho"] / (length + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


def by_halves(run: Run) -> None:
    optimizer: Any = run.optimizer
    optimizer.first_step(zero_grad=True)
    run.loss(BATCH).backward()
    optimizer.second_step(zero_grad=True)


def by_data(run: Run) -> None:
    for p in run.model.parameters():
        p.data.add_(p.grad, alpha=-0.05)


def unhooked(run: Run) -> None:
    type(run.optimizer).step.__wrapped__(run.optimizer)  # type: ignore[attr-defined]


PAST_THE_HOOK = {
    "halves": (lambda p: SAM(p, torch.optim.SGD, lr=3.0, momentum=0.9), by_halves),
    "by hand": (lambda p: torch.optim.SGD(p, 3.0), by_data),
    "the bare function": (lambda p: torch.optim.SGD(p, 3.0), unhooked),
}


@pytest.mark.parametrize("control", ["cap", "cdat", "guard"])
@pytest.mark.parametrize("kind", PAST_THE_HOOK)
def test_steps_that_pass_the_control_by_are_noticed(kind: str, control: str) -> None:
    make, take = PAST_THE_HOOK[kind]
    model = net()
    run = Run(model, make(model.parameters()), control=control)
    run.steps(12, take=lambda: take(run))
    assert all(m.lr_scale == 1.0 and m.lr_effective == 3.0 for m in run.found[1:] if m is not None and m.lr_scale)
    told = [t for t in run.told if "does not act" in t]
    assert len(told) == 1
    assert f"control={control!r} does not act: the weights move without `optimizer.step()`" in told[0]
    assert not run.monitor.control.lost


def test_a_step_inside_the_backward_pass_is_noticed() -> None:
    model = net()
    run = Run(model, sgd(model), control="cap", every=1000, running_every=1000)
    inner = {p: torch.optim.SGD([p], 0.05) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: inner[p].step())
    run.monitor.control._seen = 4  # nothing is measured here: gradients' hooks are another matter
    run.steps(8, take=lambda: None)
    assert ["does not act" in t for t in run.told] == [True]


def test_once_the_steps_come_by_again_the_control_acts() -> None:
    model = net()
    run = Run(model, torch.optim.SGD(model.parameters(), 3.0), control="cap")
    run.steps(8, take=lambda: by_data(run))
    assert run.monitor.rates.scale() == 1.0
    last = run.steps(8)
    assert last is not None
    assert last.lr_scale is not None
    assert last.lr_scale < 1.0


def with_a_closure(run: Run) -> None:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss(BATCH)
        loss.backward()
        return loss

    run.optimizer.step(closure)


class Skipping:
    """Gradient scaling that skips all but every 20th step, as at the start with a scale that is far too large."""

    def __init__(self, run: Run) -> None:
        self.run, self.count = run, 0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def __call__(self) -> None:
        self.count += 1
        self.run.optimizer.zero_grad()
        self.scaler.scale(self.run.loss(BATCH) * (1.0 if self.count % 20 == 0 else float("inf"))).backward()
        self.scaler.step(self.run.optimizer)
        self.scaler.update(2.0)


ACTING: dict[str, Callable[[Run], Callable[[], Any]]] = {
    "closure": lambda run: lambda: with_a_closure(run),
    "compiled": lambda run: torch.compile(run.optimizer.step, backend="eager"),
    "gradient scaling": Skipping,
    "no step at all": lambda run: lambda: None,
}


@pytest.mark.parametrize("kind", ACTING)
def test_steps_that_the_control_reaches_make_no_warning(kind: str) -> None:
    model = net()
    run = Run(model, sgd(model, 3.0), control="cap", tier="running", running_every=None, every=4)
    run.steps(30, take=ACTING[kind](run))
    assert run.told == []
    assert run.monitor.rates.scale() < 1.0


def test_a_sharpness_aware_step_with_a_closure_is_controlled() -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=3.0)
    run = Run(model, optimizer, control="cdat")
    used: list[float] = []
    optimizer.base_optimizer.register_step_pre_hook(lambda o, a, k: used.append(o.param_groups[0]["lr"]))
    run.steps(8, take=lambda: with_a_closure(run))
    assert not [t for t in run.told if "does not act" in t]
    assert used[:4] == pytest.approx([0.03] * 4)  # and then what was measured
    assert 3.0 not in used
    assert optimizer.param_groups[0]["lr"] == 3.0


# --- other weights ----------------------------------------------------------------------------------------------------


def unfreeze(run: Run) -> None:
    run.model.requires_grad_(True)


def freeze_others(run: Run) -> None:
    """As many weights as before, of the same shapes: others."""
    run.model[2].requires_grad_(False)  # type: ignore[index]
    run.model[0].requires_grad_(True)  # type: ignore[index]


def swap(run: Run) -> None:
    torch.manual_seed(5)
    new = nn.Linear(24, 24)
    run.model[2] = new  # type: ignore[index, operator]
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())


def to_double(run: Run) -> None:
    run.model.double()


def add_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": [run.model.late.requires_grad_(True)], "lr": 0.02})  # type: ignore[union-attr]


class Late(nn.Sequential):
    """A scale of the outputs that the optimizer gets to know later."""

    def __init__(self) -> None:
        super().__init__(*net())
        self.late = nn.Parameter(torch.ones(10), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out * self.late


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("change", [unfreeze, freeze_others, swap, add_group])
def test_the_next_measurement_on_other_weights_is_right(change: Callable[[Run], None], adaptive: bool) -> None:
    model = Late() if change is add_group else net()
    if change is unfreeze:
        model[:3].requires_grad_(False)  # type: ignore[index]
    if change is freeze_others:
        model[0].requires_grad_(False)
    held = [p for p in model.parameters() if p is not getattr(model, "late", None)]
    optimizer = torch.optim.AdamW(held, 1e-3) if adaptive else torch.optim.SGD(held, 0.05)
    run = Run(model, optimizer)
    run.steps(12)
    change(run)
    first = run.steps(1)
    assert first is not None
    assert first.sharpness is not None
    run.holds()
    assert [t for t in run.told if "failed" in t or "second derivative" in t] == []


def test_weights_in_another_precision_are_measured_there() -> None:
    model = net()
    run = Run(model, sgd(model), probe="batch")
    run.steps(5)
    model.double()
    batch = BATCH[0].double(), BATCH[1]
    run.steps(3, batch=batch)
    found = run.found[-1]
    assert found is not None
    assert found.sharpness == pytest.approx(
        gfs.sharpness(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), [batch], tol=1e-3).value, rel=0.1
    )
    assert run.told == []


def test_frozen_for_a_while_nothing_is_measured_and_then_it_goes_on() -> None:
    model = net()
    run = Run(model, sgd(model))
    run.steps(6)
    model.requires_grad_(False)
    assert [run.steps(1) for _ in range(5)] == [None] * 5
    assert [t.split(": ", 2)[2] for t in run.told] == [
        "every weight that the optimizer holds is frozen: nothing is measured until one is trained"
    ]
    model.requires_grad_(True)
    run.holds()
    assert len(run.told) == 1


def test_a_control_measures_anew_before_it_lets_new_weights_go() -> None:
    model = net()
    model[:3].requires_grad_(False)
    run = Run(model, sgd(model, 0.5), control="cap", tier="running", running_every=None, every=5)
    run.steps(60)
    assert run.monitor.rates.scale() > 0.3
    unfreeze(run)
    used: list[float] = []
    run.optimizer.register_step_pre_hook(lambda o, a, k: used.append(o.param_groups[0]["lr"]))
    run.steps(15)
    assert used[:11] == pytest.approx([0.005] * 11)  # eight measurements settle, and the control begins with four
    assert used[14] > 0.05
    assert run.told == []


def test_lazy_weights_are_measured_once_they_have_a_shape() -> None:
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyLinear(24), nn.Tanh(), nn.LazyLinear(10))
    run = Run(lazy, torch.optim.AdamW(lazy.parameters(), 1e-3), control="cap")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.monitor.step(run.loss, BATCH) is None  # before the first forward pass, as Lightning's hook is
    assert all(isinstance(p, nn.UninitializedParameter) for p in lazy.parameters())
    run.steps(12)
    run.holds()


def test_an_optimizer_state_loaded_in_the_middle_is_used_at_once() -> None:
    model = net()
    run = Run(model, torch.optim.AdamW(model.parameters(), 1e-3), control="cap")
    run.steps(5)
    kept = run.optimizer.state_dict()
    run.steps(20)
    run.optimizer.load_state_dict(kept)
    expected = gfs.stability(
        model,
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        [BATCH],
        run.optimizer,
        tier="sharpness",
        tol=1e-3,
    )
    now = run.steps(1)
    assert now is not None
    assert now.preconditioned_sharpness == pytest.approx(expected.preconditioned_sharpness, rel=0.02)
    run.steps(2)
    assert run.told == []


def test_a_scheduler_takes_in_a_group_that_is_added() -> None:
    model = Late()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.late], 0.1)
    scheduler = gfs.EdgeOfStabilityLR(optimizer)
    run = Run(model, optimizer)

    def take() -> None:
        optimizer.step()
        scheduler.step()

    run.steps(40, take=take)
    add_group(run)
    run.steps(1, take=take)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * 0.01, 0.02 * 0.01])
    run.steps(150, take=take)
    rates = [g["lr"] for g in optimizer.param_groups]
    assert rates[1] == pytest.approx(0.2 * rates[0])
    assert scheduler.get_last_lr() == rates


def test_ratios_of_weights_that_are_unfrozen_are_not_held_against_those_before() -> None:
    """The ratio of all weights is several times that of the last layer, and no rise of it."""
    model = net()
    model[:4].requires_grad_(False)
    run = Run(model, sgd(model, 0.2))
    run.steps(60)
    before = run.found[-1]
    unfreeze(run)
    run.steps(60)
    after = run.found[-1]
    assert before is not None
    assert after is not None
    assert after.stability_ratio > 2.5 * before.stability_ratio  # type: ignore[operator]
    assert not [r for m in run.found if m is not None for r in m.reasons if "ratio rose" in r]


# --- batches without a loss -------------------------------------------------------------------------------------------


def nothing(batch: Batch) -> None:
    return None


def not_a_number(batch: Batch) -> Tensor:
    return torch.tensor(float("nan"), requires_grad=True) * 1.0


def raising(batch: Batch) -> Tensor:
    raise IndexError("no such label")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (nothing, "the loss is None, as of a batch that training skips"),
        (not_a_number, "not finite"),
        (raising, "IndexError"),
    ],
)
def test_one_bad_batch_is_told_once_and_the_next_measurement_is_right(bad: Any, words: str) -> None:
    model = net()
    run = Run(model, sgd(model))
    run.steps(8)
    [running] = run.monitor.measuring.signals.named(["running"])
    before = running.estimate.vector
    for _ in range(2):
        run.steps(1, loss_fn=bad)
        assert run.found[-1] is None
    assert [words in t for t in run.told] == [True]
    assert running.estimate.vector is before  # it still fits
    run.holds()
    assert len(run.told) == 1


def test_a_batch_that_training_skips_is_no_mistake_where_it_is_strict() -> None:
    model = net()
    run = Run(model, sgd(model), strict=True)
    run.steps(1, loss_fn=nothing)  # while parts are still to be tried
    run.steps(8)
    run.steps(1, loss_fn=nothing)
    assert run.found[0] is None
    assert run.found[-1] is None
    assert ["the loss is None" in t for t in run.told] == [True]
    run.holds()
    with pytest.raises(gfs.MeasurementError, match="not finite"):
        run.steps(1, loss_fn=not_a_number)
