"""``control="guard"`` in plain loops: nothing in a healthy run, and a way out of one that breaks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.actions.lowered import HOLD
from tests.bitwise import assert_same
from tests.core.test_rescue import OPTIMIZERS, Training, reasons
from tests.rates import tell_rates

HEALTHY: dict[str, dict[str, Any]] = {
    **{name: {"make": make} for name, make in OPTIMIZERS.items()},
    "accumulation": {"accumulate": 3},
    "gradient scaling": {"scaler": True},
    "closure": {"closure": True},
    "no budget": {"every": 1},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_the_same_to_the_bit(name: str) -> None:
    kept: list[Any] = []
    for control in ("observe", "guard"):
        run = Training("log", control=control, **HEALTHY[name])
        found = [run.step() for _ in range(120) if run.scheduler.step() is None]
        kept.append(run.all_kept())
    assert_same(*kept)
    scales = {m.lr_scale for m in found if m is not None and m.threshold is not None}
    assert scales <= {1.0, None}
    assert not any("the rate is" in text or "back" in text for text in run.told)


class Regression:
    """A small net with two groups of rates, which rates thirty times as high break."""

    def __init__(self, control: str, tensor: bool = False, protect: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(512, 8)
        self.y = (self.x @ torch.randn(8, 2)).tanh()
        self.model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 2))
        groups = [
            {"params": list(layer.parameters()), "lr": torch.tensor(rate) if tensor else rate}
            for layer, rate in ((self.model[0], 0.1), (self.model[2], 0.05))
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 2000)
        config = gfs.GFSConfig(tier="running", max_overhead=None, control=control, **options)  # type: ignore[arg-type]
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        if protect:
            self.monitor.protect(self.scheduler)
        self.losses: list[float] = []
        self.users: list[float] = []
        self.used: list[float] = []
        self.said: list[str] = []
        tell_rates(self.optimizer, self.used)

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()

    def run(self, start: int, stop: int) -> Regression:
        for step in range(start, stop):
            rows = torch.randint(512, (32,), generator=torch.Generator().manual_seed(step))
            batch = self.x[rows], self.y[rows]
            loss = self.loss_of(batch)
            self.optimizer.zero_grad()
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", gfs.GFSWarning)
                self.said.append(reasons(self.monitor.step(self.loss_of, batch, step, loss=loss)))
            self.users.append(float(self.optimizer.param_groups[0]["lr"]))
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
        return self

    def times(self, factor: float) -> Regression:
        """Let the user's rates be so many times as high from now on."""
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        return self

    @property
    def shares(self) -> list[float]:
        return [a / b for a, b in zip(self.used, self.users, strict=True)]

    @property
    def end(self) -> float:
        last = self.losses[-30:]
        return sum(last) / len(last)


@pytest.mark.parametrize("begins", [0, 200])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_run_at_thirty_times_the_rate_is_saved(begins: int, tensor: bool) -> None:
    lost, held = (
        Regression(control, tensor, protect=False).run(0, begins).times(30.0).run(begins, 700)
        for control in ("observe", "guard")
    )
    assert math.isnan(lost.end)
    assert held.end < 0.2 * held.losses[0]  # it may be trying a higher rate
    assert any("went back" in said for said in held.said)
    assert min(held.shares) < 0.4
    assert set(held.shares[:begins]) <= {1.0}


def test_the_rate_is_the_users_to_the_bit_once_it_has_grown_back() -> None:
    run = Regression("guard").run(0, 120)
    with torch.no_grad():
        run.model[0].weight.fill_(math.nan)
    run.run(120, 124)
    assert "went back at step 123" in run.said[-1]
    run.run(124, 400)
    assert run.used[:123] == run.users[:123]
    stages = [3 ** (-stage / 3) for stage in (3, 2, 1) for _ in range(HOLD)]
    assert run.shares[124 : 123 + 3 * HOLD] == pytest.approx(stages[1:])
    assert run.used[123 + 3 * HOLD :] == run.users[123 + 3 * HOLD :]
    assert run.end < 0.05


def test_a_resumed_run_goes_on_at_the_same_share_to_the_bit() -> None:
    def broken() -> Regression:
        run = Regression("guard").run(0, 120)
        with torch.no_grad():
            run.model[0].weight.fill_(math.nan)
        return run.run(120, 180)

    whole, first = broken().run(180, 300), broken()
    parts = [part.state_dict() for part in (first.model, first.optimizer, first.scheduler, first.monitor)]
    second = Regression("guard")
    for part, held in zip((second.model, second.optimizer, second.scheduler, second.monitor), parts, strict=True):
        part.load_state_dict(held)
    second.run(180, 300)
    assert second.used == whole.used[180:]
    assert second.shares[0] == pytest.approx(3 ** (-2 / 3))
    assert_same(second.model.state_dict(), whole.model.state_dict())


def test_what_is_logged_is_what_was_used(tmp_path: Any) -> None:
    run = Regression("guard", every=5, history=str(tmp_path / "h.jsonl")).run(0, 120)
    with torch.no_grad():
        run.model[0].weight.fill_(math.nan)
    run.run(120, 400)
    run.monitor.close()
    logged = [m for m in gfs.read_history(tmp_path / "h.jsonl") if m.lr_scale is not None]
    assert {m.lr_scale for m in logged if m.step < 120 or m.step > 330} == {1.0}
    assert {round(m.lr_scale, 3) for m in logged if m.lr_scale} == {1.0, 0.333, 0.481, 0.693}
    assert all(m.lr_effective == pytest.approx(run.used[m.step]) for m in logged)


def test_beside_another_control_the_shares_are_multiplied() -> None:
    both, alone = Regression("cap", alarm="rescue"), Regression("cap")
    for run in (both, alone):
        run.run(0, 60)
    assert both.used == alone.used
    assert both.monitor.rates.lowered is not None
    both.monitor.rates.lowered.fall()
    scale = both.monitor.control.scale(both.monitor.rates.base_lr())
    assert both.monitor.rates.scale() == scale / 3


def test_a_loss_that_begins_at_zero_sends_nothing_back() -> None:
    """As that of a policy does, which hardly moves its weights in its first steps."""
    run = Training("log", control="guard", make=lambda params: torch.optim.SGD(params, 1e-6))
    for step in range(40):
        run.step(said=0.0 if step == 0 else 0.1)
    assert not any("back" in text for text in run.told)
    assert run.monitor.rates.scale() == 1.0
