"""The sharpness at the midpoint of three iterates: its value, when it is absent, and what it leaves behind."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import gfs_core as gfs
from gfs_core.optimizers.thresholds import stability_of
from tests.bitwise import assert_same
from tests.core.options import tuned

EVERY = 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 3.0),
    "momentum and decay": lambda p: torch.optim.SGD(p, 0.6, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02),
}


def digits(count: int = 60) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:count] / 16)[:, ::4], torch.tensor(y[:count])  # float64


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 10)).double()


class Run:
    """A training on the full batch, with a monitor, that keeps its iterates."""

    def __init__(self, optimizer: str = "SGD", monitored: bool = True, **options: Any) -> None:
        self.model, self.batch = small(), digits()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.iterates: list[list[Tensor]] = []
        self.found: list[gfs.Measurement] = []
        self.skips: set[int] = set()
        chosen: dict[str, Any] = {"tier": "midpoint", "every": EVERY, "running_every": None, "max_overhead": None}
        config = gfs.GFSConfig(**chosen | options)
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config) if monitored else None

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def steps(self, of: range, micro: int = 1) -> Iterator[int]:
        parts = list(zip(*(t.chunk(micro) for t in self.batch), strict=True))
        for step in of:
            self.iterates.append([p.detach().clone() for p in self.model.parameters()])
            self.optimizer.zero_grad()
            for part in parts:
                (self.loss_of(part) / micro).backward()
            yield step
            if self.monitor is not None:
                measured = self.monitor.step(self.loss_of, parts, step, micro_batches=True)
                self.found += [] if measured is None else [measured]
            if step not in self.skips:
                self.optimizer.step()

    def run(self, of: range, micro: int = 1) -> list[gfs.Measurement]:
        for _ in self.steps(of, micro):
            pass
        return self.found

    def exact(self, operator: tuple[Tensor, Tensor], step: int) -> float:
        """Largest eigenvalue of S·(H + shift)·S at the midpoint, from the dense Hessian there."""
        middle = [(a + 2 * b + c) / 4 for a, b, c in zip(*self.iterates[step - 2 : step + 1], strict=True)]
        names = [n for n, _ in self.model.named_parameters()]
        sizes, shapes = [m.numel() for m in middle], [m.shape for m in middle]

        def loss(flat: Tensor) -> Tensor:
            weights = [f.reshape(s) for f, s in zip(flat.split(sizes), shapes, strict=True)]
            out = functional_call(self.model, dict(zip(names, weights, strict=True)), self.batch[0])
            return nn.functional.cross_entropy(out, self.batch[1])

        hessian = torch.autograd.functional.hessian(loss, torch.cat([m.flatten() for m in middle]))
        scale, shift = operator
        return float(torch.linalg.eigvalsh(scale[:, None] * (hessian + torch.diag(shift)) * scale)[-1])

    def operator(self) -> tuple[Tensor, Tensor]:
        """The diagonals S and shift of the optimizer's operator now."""
        params = list(self.model.parameters())
        stability = stability_of(self.optimizer, params)
        ones = [torch.ones(p.shape, dtype=torch.float64) for p in params]
        scale, shift = stability.scale or [1.0] * len(ones), stability.shift or [0.0] * len(ones)
        return tuple(torch.cat([(one * f).flatten() for one, f in zip(ones, by, strict=True)]) for by in (scale, shift))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_largest_eigenvalue_at_the_midpoint(name: str) -> None:
    run = Run(name)
    tuned(run.monitor, tol=1e-6)
    operators = {step: run.operator() for step in run.steps(range(2 * EVERY + 1))}
    first, *later = run.found
    assert first.midpoint_sharpness is None
    assert first.midpoint_stability_ratio is None
    assert first.reasons[-1] == "midpoint left out: the weights before the last 2 steps were not kept"
    assert [m.step for m in later] == [EVERY, 2 * EVERY]
    for m in later:
        exact = run.exact(operators[m.step], m.step)
        assert m.midpoint_sharpness == pytest.approx(exact, rel=1e-7)
        assert m.midpoint_stability_ratio == pytest.approx(exact / m.threshold, rel=1e-7)
        assert abs(m.midpoint_stability_ratio / m.stability_ratio - 1) > 1e-3  # not the one at the present weights


def test_a_swing_of_period_two_cancels() -> None:
    """At the edge the raw ratio swings, and the midpoint's does not."""
    run = Run(every=1)
    monitor, run.monitor = run.monitor, None
    run.run(range(300))
    run.monitor = monitor
    found = run.run(range(300, 342))[2:]

    def roughness(values: list[float]) -> float:
        return sum(abs(b / a - 1) for a, b in pairwise(values)) / len(values)

    raw = roughness([m.stability_ratio for m in found])
    middle = roughness([m.midpoint_stability_ratio for m in found])
    assert raw > 0.01
    assert middle < raw / 3


@pytest.mark.parametrize("skipped", [EVERY - 2, EVERY - 1])
def test_it_is_absent_where_a_step_has_moved_nothing(skipped: int) -> None:
    run = Run()
    run.skips = {skipped}
    run.run(range(EVERY + 1))
    assert run.found[-1].midpoint_sharpness is None
    assert run.found[-1].stability_ratio > 0
    assert run.found[-1].reasons == (
        "midpoint sharpness left out: the weights have not moved, or by less than rounding",
    )


def test_it_is_absent_where_the_monitor_has_not_seen_a_step() -> None:
    run = Run()
    for step in run.steps(range(EVERY + 1)):
        if step == EVERY - 1:
            monitor, run.monitor = run.monitor, None
        elif step == EVERY:
            run.monitor = monitor
    assert run.found[-1].midpoint_sharpness is None
    assert "not kept" in run.found[-1].reasons[-1]
    assert run.monitor.measuring.iterates.state_dict() == []  # freed after the measurement


@pytest.mark.parametrize("cut", [EVERY - 1, EVERY, EVERY + 3])
def test_a_resumed_run_goes_on_with_its_iterates(cut: int) -> None:
    whole = Run("AdamW")
    whole.run(range(2 * EVERY + 1))
    first = Run("AdamW")
    first.run(range(cut))
    buffer = io.BytesIO()
    torch.save(
        {"monitor": first.monitor.state_dict(), "model": first.model.state_dict(), "opt": first.optimizer.state_dict()},
        buffer,
    )
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second = Run("AdamW")
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["opt"])
    second.monitor.load_state_dict(state["monitor"])
    found = first.found + second.run(range(cut, 2 * EVERY + 1))
    key = "midpoint_sharpness"
    assert [(m.step, getattr(m, key)) for m in found] == [(m.step, getattr(m, key)) for m in whole.found]
    assert whole.found[-1].midpoint_sharpness is not None


def test_training_is_the_same_to_the_last_bit() -> None:
    watched, alone = Run("AdamW", every=1), Run("AdamW", monitored=False)
    for run in (watched, alone):
        run.run(range(12))
    assert sum(m.midpoint_sharpness is not None for m in watched.found) == 10  # all but the first two steps
    assert_same(watched.model.state_dict(), alone.model.state_dict())
    assert_same(watched.iterates, alone.iterates)


def test_micro_batches_give_what_their_batch_gives() -> None:
    one, four = Run(), Run()
    for run, micro in ((one, 1), (four, 4)):
        tuned(run.monitor, tol=1e-6)
        run.run(range(EVERY + 1), micro)
    assert four.found[-1].midpoint_sharpness == pytest.approx(one.found[-1].midpoint_sharpness, rel=1e-6)


def test_half_precision_weights_have_a_midpoint_of_their_own() -> None:
    """Between neighbours in bfloat16 there is none; it is taken in float32."""
    run = Run()
    run.model.to(torch.bfloat16)
    run.batch = (run.batch[0].bfloat16(), run.batch[1])
    run.optimizer = torch.optim.SGD(run.model.parameters(), 0.5)
    config = gfs.GFSConfig(tier="midpoint", every=2, running_every=None, max_overhead=None)
    run.monitor = gfs.StabilityMonitor(run.model, run.optimizer, config)
    tuned(run.monitor, tol=1e-4)
    run.run(range(3))
    run.model.double()
    run.batch = (run.batch[0].double(), run.batch[1])
    run.iterates = [[t.double() for t in held] for held in run.iterates]
    assert run.found[-1].midpoint_sharpness == pytest.approx(run.exact(run.operator(), 2), rel=1e-3)


def test_what_is_measured_after_it_is_at_the_present_weights() -> None:
    beside, alone = Run(), Run(tier="gfs")
    tuned(beside.monitor, tol=1e-6, beside={"gfs": EVERY})
    tuned(alone.monitor, tol=1e-6)
    for run in (beside, alone):
        run.run(range(EVERY + 1))
    assert beside.found[-1].midpoint_sharpness is not None
    assert beside.found[-1].gfs_sharpness == pytest.approx(alone.found[-1].gfs_sharpness, rel=1e-5)


def test_copies_are_kept_for_the_steps_that_need_them_only() -> None:
    run = Run(every=10)
    kept = {step: len(run.monitor.measuring.iterates.state_dict()) for step in run.steps(range(21))}
    assert {step: count for step, count in kept.items() if count} == {9: 1, 10: 2, 19: 1, 20: 2}


def test_once_from_iterates_that_are_handed_over() -> None:
    run = Run()
    run.run(range(EVERY + 1))
    run.model.load_state_dict(dict(zip(run.model.state_dict(), run.iterates[EVERY], strict=True)))
    past = [run.iterates[EVERY - 1], run.iterates[EVERY - 2]]
    loss_fn = lambda model, batch: run.loss_of(batch)  # noqa: E731
    measured = gfs.stability(run.model, loss_fn, [run.batch], run.optimizer, tier="midpoint", before=past, tol=1e-6)
    assert measured.midpoint_sharpness == pytest.approx(run.exact(run.operator(), EVERY), rel=1e-7)
    with pytest.raises(gfs.ConfigError, match=r"tier='midpoint' needs the weights before the last 2 step"):
        gfs.stability(run.model, loss_fn, [run.batch], run.optimizer, tier="midpoint", before=past[0])
    with pytest.raises(gfs.ConfigError, match="`before` does not fit"):
        gfs.stability(run.model, loss_fn, [run.batch], run.optimizer, tier="midpoint", before=[past[0], past[1][::-1]])


@pytest.mark.parametrize(("price", "kept"), [(1.0, [8, 9]), (1.4, [])])
def test_copies_are_kept_if_the_budget_will_allow_the_measurement_by_then(price: float, kept: list[int]) -> None:
    """A tenth of the time: the price 1 is affordable from second 9 on, one of 1.4 from second 12.6 on."""
    run = Run(every=10, max_overhead=0.1)
    schedule = run.monitor.schedule
    budget, seconds = schedule.budget, 0.0
    budget.clock, budget.began, budget.last = lambda: seconds, 0.0, 1.0
    budget.prices = {"": 0.0, "sharpness": price / 2, "midpoint": price / 2}
    found = []
    for step in range(11):
        seconds = float(step)
        found += [step] if schedule.keeps(step) else []
    assert found == kept
