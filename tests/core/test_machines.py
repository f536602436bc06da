"""Saved and loaded at any point, alarm, control and monitor go on as if they never had been."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, get_args

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.actions.lowered import Lowered
from gfs_core.actions.rate import Control
from gfs_core.config import Policy
from tests.core.observed import observe_loss, observe_mean_square, observe_rate, observe_ratio
from tests.core.options import tuned

FEW = settings(max_examples=15, stateful_step_count=15, deadline=None, derandomize=True)
MANY = settings(FEW, max_examples=60, stateful_step_count=25)
NUMBERS = st.floats(1e-3, 1e3) | st.sampled_from([0.2, 0.21, 0.4, 0.9, 1.1, 0.0, -1.0, float("nan"), float("inf")])
RATES = st.sampled_from([0.0, 1e-3, 0.1, 0.12, 0.2]) | st.floats(1e-4, 1.0)


def saved_and_loaded(state: Any) -> Any:
    """The state as it comes from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Alarms(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.whole, self.resumed = gfs.EarlyWarning(), gfs.EarlyWarning()

    def both(self, observe: Callable[..., gfs.Alert | None], *args: Any) -> None:
        self.step += 1
        assert observe(self.whole, self.step, *args) == observe(self.resumed, self.step, *args)
        assert (self.whole.level, self.whole.reason) == (self.resumed.level, self.resumed.reason)

    @rule(count=st.integers(5, 40), ratio=st.floats(0.05, 1.2), loss=st.floats(0.1, 10), solved=st.booleans())
    def train(self, count: int, ratio: float, loss: float, solved: bool) -> None:
        for i in range(count):
            self.both(observe_rate, 0.1)
            self.both(observe_loss, loss * (1 + 0.01 * (i % 7)))
            self.both(observe_ratio, ratio * (1 + 0.01 * (i % 5)), solved)
            self.both(observe_mean_square, ratio)

    @rule(loss=NUMBERS)
    def lose(self, loss: float) -> None:
        self.both(observe_loss, loss)

    @rule(ratio=NUMBERS, solved=st.booleans())
    def measure(self, ratio: float, solved: bool) -> None:
        self.both(observe_ratio, ratio, solved)
        self.both(observe_mean_square, ratio)

    @rule(rate=RATES, again=st.booleans())
    def change_the_rate(self, rate: float, again: bool) -> None:
        self.both(observe_rate, rate)
        self.step -= again
        self.both(observe_rate, rate)

    @rule(level=st.floats(0.1, 0.9), pace=st.floats(1.0, 1.3))
    def grow(self, level: float, pace: float) -> None:
        for i in range(8):
            self.both(observe_ratio, level * pace**i, False)

    @rule()
    def save_and_load(self) -> None:
        state = saved_and_loaded(self.resumed.state_dict())
        self.resumed = gfs.EarlyWarning()
        self.resumed.load_state_dict(state)
        assert self.resumed.state_dict() == self.whole.state_dict()


class Controls(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(get_args(Policy)), adaptive=st.booleans())
    def start(self, policy: Policy, adaptive: bool) -> None:
        self.made = lambda: Control(policy, None, adaptive)
        self.whole, self.resumed = self.made(), self.made()

    def same(self, rate: float) -> None:
        for name in ("waiting", "starting", "holding", "lost", "last"):
            assert getattr(self.whole, name) == getattr(self.resumed, name)
        assert self.whole.scale(rate) == self.resumed.scale(rate)

    @rule(
        rate=RATES,
        ratio=st.none() | st.floats(1e-3, 10),
        solved=st.none() | st.floats(1e-3, 10),
        curvature=st.none() | st.floats(-10, 10),
        critical=st.none() | st.floats(1e-3, 1),
        count=st.integers(1, 5),
    )
    def measure(self, rate: float, ratio: Any, solved: Any, curvature: Any, critical: Any, count: int) -> None:
        measurement = gfs.Measurement.of(
            0,
            mean_square_stability_ratio=ratio,
            stability_ratio=solved,
            directional_sharpness=curvature,
            critical_lr=critical,
        )
        for _ in range(count):
            self.whole.measured(rate, measurement.values())
            self.resumed.measured(rate, measurement.values())
        self.same(rate)

    @rule(rate=RATES, count=st.integers(1, 60))
    def step(self, rate: float, count: int) -> None:
        for _ in range(count):
            assert self.whole.step(rate) == self.resumed.step(rate)
        self.same(rate)

    @rule()
    def save_and_load(self) -> None:
        state = saved_and_loaded(self.resumed.state_dict())
        self.resumed = self.made()
        self.resumed.load_state_dict(state)
        assert vars(self.resumed) == vars(self.whole)


class Lowerings(RuleBasedStateMachine):
    """A rate that is lowered at trouble: shares, before and after a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.resumed = Lowered(), Lowered()

    @rule()
    def fall(self) -> None:
        if self.whole.may_fall:
            self.whole.fall()
            self.resumed.fall()

    @rule(rate=RATES, count=st.integers(1, 60))
    def step(self, rate: float, count: int) -> None:
        for _ in range(count):
            assert self.whole.step(rate) == self.resumed.step(rate)
        assert 0 < self.whole.share <= 1

    @rule()
    def save_and_load(self) -> None:
        state = saved_and_loaded(self.resumed.state_dict())
        self.resumed = Lowered()
        self.resumed.load_state_dict(state)
        assert vars(self.resumed) == vars(self.whole)


class Training:
    """A model with dropout and BatchNorm, its optimizer and its monitor."""

    def __init__(
        self, config: gfs.GFSConfig, optimizer: type[torch.optim.Optimizer], beside: dict[str, int], seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 2))
        self.optimizer = optimizer(self.model.parameters(), lr=0.02)
        self.events: list[gfs.Alert] = []
        monitor = gfs.StabilityMonitor(self.model, self.optimizer, config, on_alarm=self.events.append)
        self.monitor = tuned(monitor, beside=beside, parts=2, tol=0.1, rtol=0.1)

    def loss_of(self, x: Tensor) -> Tensor:
        return (self.model(x) - x[:, :2].sin()).square().mean()

    def lost(self, x: Tensor) -> Tensor:
        return self.loss_of(x) * float("nan")

    def step(self, seed: int, told: bool, micro_batches: bool) -> Any:
        """One optimizer step; what was measured and the weights after it."""
        torch.manual_seed(seed)
        x = torch.randn(8, 4)
        self.optimizer.zero_grad()
        loss = self.loss_of(x)
        loss.backward()
        batch = [x[:4], x[4:]] if micro_batches else x
        found = self.monitor.step(self.loss_of, batch, micro_batches=micro_batches, loss=loss if told else None)
        self.optimizer.step()
        held = None if found is None else found.having(seconds=None, overhead=None)
        return held, [p.detach().clone() for p in self.model.parameters()]


def counts(monitor: gfs.StabilityMonitor) -> tuple[Any, ...]:
    """What a monitor counts, and how it cuts."""
    measuring = monitor.measuring
    running, mean, eigenvalue = measuring.signals.named(["running", "batch_sharpness", "sharpness"])
    return monitor.count, measuring.count, eigenvalue.solved, mean.mean, running.turn, measuring.learned.parts


class Monitors(RuleBasedStateMachine):
    @initialize(
        tier=st.sampled_from(["directional", "running", "batch_sharpness", "sharpness", "gfs"]),
        beside=st.booleans(),
        probe=st.sampled_from(["batch", "fixed"]),
        control=st.sampled_from(get_args(Policy)),
        optimizer=st.sampled_from([torch.optim.Adam, torch.optim.SGD, torch.optim.Adadelta]),
        hvp=st.sampled_from(["auto", "gradients"]),
    )
    def start(self, tier: Any, beside: bool, probe: Any, control: Any, optimizer: Any, hvp: Any) -> None:
        if tier in ("directional", "batch_sharpness") and control in ("cap", "follow", "warmup"):
            control = "observe"  # they need a ratio
        more = {"directional": 2, "running": 2} if beside and tier in ("sharpness", "gfs") else {}
        config = gfs.GFSConfig(
            tier=tier,
            every=3,
            probe=probe,
            probe_size=16 if probe == "fixed" else None,
            control=control,
            hvp=hvp,
            max_overhead=None,
        )
        self.made = lambda seed=0: Training(config, optimizer, more, seed)
        self.whole, self.resumed, self.steps = self.made(), self.made(), 0

    @rule(count=st.integers(1, 4), told=st.booleans(), micro_batches=st.booleans())
    def train(self, count: int, told: bool, micro_batches: bool) -> None:
        for _ in range(count):
            self.steps += 1
            (one, weights), (other, others) = (
                training.step(self.steps, told, micro_batches) for training in (self.whole, self.resumed)
            )
            assert one == other
            assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
        assert self.whole.events == self.resumed.events

    @rule(factor=st.sampled_from([0.5, 1.0, 4.0]))
    def change_the_rate(self, factor: float) -> None:
        for training in (self.whole, self.resumed):
            training.optimizer.param_groups[0]["lr"] *= factor

    @rule()
    def fail(self) -> None:
        for training in (self.whole, self.resumed):
            torch.manual_seed(self.steps)
            training.monitor.step(training.lost, torch.randn(8, 4))

    @rule()
    def save_and_load(self) -> None:
        old, self.resumed = self.resumed, self.made(1)
        held = [old.model.state_dict(), old.optimizer.state_dict(), old.monitor.state_dict()]
        model, optimizer, monitor = saved_and_loaded(held)
        self.resumed.model.load_state_dict(model)
        self.resumed.optimizer.load_state_dict(optimizer)
        self.resumed.monitor.load_state_dict(monitor)
        self.resumed.events += old.events
        old.monitor.close()
        assert counts(self.resumed.monitor) == counts(self.whole.monitor)  # some act rarely


TestAlarm = Alarms.TestCase
TestAlarm.settings = MANY
TestControl = Controls.TestCase
TestControl.settings = MANY
TestLowered = Lowerings.TestCase
TestLowered.settings = MANY
TestMonitor = Monitors.TestCase
TestMonitor.settings = FEW
