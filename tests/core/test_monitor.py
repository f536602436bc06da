from __future__ import annotations

import dataclasses
import functools
import gc
import io
import math
import re
import warnings
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from gfs_core.config import GONE
from gfs_core.run import measuring
from gfs_core.run.budget import Charged, OverheadBudget
from gfs_core.run.history import append
from gfs_core.signals.measuring import Measured, measure
from tests.core.options import tuned
from tests.log_keys import documented


def setup(config: gfs.GFSConfig, seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return model, optimizer, gfs.StabilityMonitor(model, optimizer, config)


def batches(count: int):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(12, 6, generator=generator) for _ in range(count)]


def run(model, optimizer, monitor, data) -> list[gfs.Measurement]:
    out = []
    for x in data:
        loss_fn = lambda b: (model(b) - b[:, :3].sin()).square().mean()  # noqa: E731
        optimizer.zero_grad()
        loss_fn(x).backward()
        measurement = monitor.step(loss_fn, x)
        out += [measurement.having(seconds=None, overhead=None)] if measurement else []
        optimizer.step()
    return out


@pytest.mark.parametrize("pace", [1.01, 0.99, 1.0, 1.5])
def test_the_early_warning_knows_the_rate_of_each_step_of_a_schedule(pace: float) -> None:
    """Steps that wait together, too."""
    model, optimizer, monitor = setup(gfs.GFSConfig(max_overhead=0.01))
    used = []
    for step, x in enumerate(batches(60)):
        optimizer.param_groups[0]["lr"] = 0.001 * pace ** (step % 40)
        used.append(optimizer.param_groups[0]["lr"])
        run(model, optimizer, monitor, [x])
    monitor.state_dict()  # passes on what waits
    assert monitor.watch.warning is not None
    rates = monitor.watch.warning.state_dict()["detectors"]["rate"]["rates"]
    assert rates == pytest.approx(used[-50:])


def test_an_alert_at_a_step_that_was_measured_does_not_hide_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    config = gfs.GFSConfig(tier="sharpness", every=1, max_overhead=None, history=str(path))
    model, optimizer, monitor = setup(config)
    measured = run(model, optimizer, monitor, batches(2))[-1]
    monitor.record_loss(math.nan)  # as where a framework tells of the loss once the step was measured
    told = monitor.update_detectors(measured.step)
    assert told is not None
    assert (told.step, told.alarm, told.sharpness) == (1, 2, measured.sharpness)
    assert told.sharpness is not None
    assert [(m.step, m.alarm, m.sharpness) for m in gfs.read_history(path)][-1] == (1, 2, told.sharpness)


def test_cadence_and_keys() -> None:
    found = run(*setup(gfs.GFSConfig(every=4, max_overhead=None)), batches(13))
    assert [m.step for m in found] == [0, 2, 4, 5, 6, 8, 10, 12]  # the running estimate settles at every second step
    assert found[0].threshold is None  # Adam has no second moments yet
    logged = found[2].as_log_dict()
    assert logged["gfs/stability_ratio"] == pytest.approx(
        logged["gfs/preconditioned_sharpness"] / logged["gfs/threshold"]
    )
    assert documented(logged) <= gfs.log_keys().keys()
    assert "gfs/gfs_sharpness_full" not in logged


def test_resumed_is_the_same_to_the_bit() -> None:
    config = gfs.GFSConfig(every=1, max_overhead=None)
    data = batches(40)
    model, optimizer, monitor = setup(config)
    whole = run(model, optimizer, monitor, data)
    model, optimizer, monitor = setup(config)
    run(model, optimizer, monitor, data[:15])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), monitor.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, optimizer, monitor = setup(config, seed=3)
    for thing, state in zip((model, optimizer, monitor), states, strict=True):
        thing.load_state_dict(state)
    assert run(model, optimizer, monitor, data[15:]) == whole[15:]


@pytest.mark.parametrize("probe", ["batch", "fixed"])
def test_the_rest_that_ends_an_epoch_is_not_measured(probe: str) -> None:
    config = gfs.GFSConfig(
        tier="sharpness",
        every=1,
        running_every=None,
        max_overhead=None,
        probe=probe,
        probe_size=36 if probe == "fixed" else None,
    )
    model, optimizer, monitor = setup(config)
    data = [x[:5] if i % 4 == 1 else x for i, x in enumerate(batches(12))]
    found = [m.step for m in run(model, optimizer, monitor, data) if m.sharpness]
    assert found == ([0, 2, 3, 4, 6, 7, 8, 10, 11] if probe == "batch" else [3, 4, 6, 7, 8, 10, 11])
    assert all(len(x) == 12 for x in monitor.state_dict()["measuring"]["probe"]["fixed"])


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_healthy_run_with_a_short_last_batch_makes_no_warning(drop_last: bool) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(x, y), 256, shuffle=True, drop_last=drop_last)  # seven, and a rest of 5
    events: list[gfs.Alert] = []
    config = gfs.GFSConfig(tier="running", running_every=5, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, optimizer, config, on_alarm=events.append)
    loss_of = lambda b: nn.functional.cross_entropy(model(b[0]), b[1])  # noqa: E731
    for _ in range(50):
        for batch in loader:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss_of, batch, loss=loss)
            optimizer.step()
    assert events == []


def test_a_warm_start_of_another_model_is_dropped() -> None:
    _, _, monitor = setup(gfs.GFSConfig())
    state = monitor.state_dict()
    state["measuring"]["signals"]["sharpness"]["raw"] = [torch.ones(2)]
    monitor.load_state_dict(state)
    held = monitor.state_dict()["measuring"]["signals"]["sharpness"]
    assert (held["raw"], held["preconditioned"]) == (None, None)


def told_the_time(monitor: gfs.StabilityMonitor, clock: Callable[[], float]) -> None:
    """Its budget goes by this clock, which begins now."""
    monitor.schedule.budget.clock, monitor.schedule.budget.began = clock, clock()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.SGD])
@pytest.mark.parametrize("still", [1, 3])
def test_nothing_is_measured_of_a_warm_up_before_its_rate_has_risen_from_zero(
    kind: type[torch.optim.Optimizer], still: int
) -> None:
    model, _, _ = setup(gfs.GFSConfig())
    optimizer = kind(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0, s + 1 - still) / 5)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig())
    found = []
    for x in batches(2 * still + 2):
        found += run(model, optimizer, monitor, [x])
        schedule.step()
    assert [m.step for m in found][:1] == [still + still % 2]  # the running estimate settles at every second step
    assert all(m.threshold is not None for m in found)
    assert [r for m in found for r in m.reasons if "second moments" in r or "rate is 0" in r] == []


@pytest.mark.parametrize("price", [0.01, 0.5])
def test_the_budget_holds(monkeypatch: pytest.MonkeyPatch, price: float) -> None:
    now = [0.0]
    config = gfs.GFSConfig(every=5, running_every=None, max_overhead=0.05)
    model = nn.Linear(6, 3)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    told_the_time(monitor, lambda: now[0])

    def loss_fn(x):
        return model(x).square().mean()

    def slow(*args):
        now[0] += price
        return dataclasses.replace(measure(*args), seconds={"sharpness": 0.2 * price, "gfs": 0.8 * price})

    monkeypatch.setattr(measuring, "measure", slow)
    steps = []
    for step, x in enumerate(batches(1) * 10_000):
        now[0] += 0.01
        if monitor.step(loss_fn, x) is not None:
            steps.append(step)
    assert steps[0] == 0  # the first is not charged
    fraction = (len(steps) - 1) * price / (now[0] - price)
    assert 0.03 < fraction <= 0.05 * 1.1


@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_cheap_and_dear_tiers_share_the_budget(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    now, spent = [0.0], {"running": 0.0, "gfs": 0.0}
    prices = {"running": 0.01, "gfs": 0.5}

    def measured(signals, step, learned, given):
        names = [signal.name for signal in signals if signal.name in prices]
        seconds = {name: prices[name] for name in names}
        now[0] += 0.001 + sum(seconds.values())
        for name in names:
            spent[name] += prices[name]
        spent[names[-1]] += 0.001
        return Measured([], [], dataclasses.replace(learned, hvp="exact", double_backward_verified=True), seconds)

    monkeypatch.setattr(measuring, "measure", measured)
    model = nn.Linear(2, 1)
    config = gfs.GFSConfig(max_overhead=budget, every=10)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    told_the_time(monitor, lambda: now[0])
    for _ in range(60_000):
        now[0] += 0.01
        monitor.step(lambda x: model(x).mean(), torch.ones(4, 2))
    spent["running"] -= 12 * (prices["running"] + 0.001)  # the first ones, by which it settles, are free
    fractions = {tier: total / now[0] for tier, total in spent.items()}
    assert 0.9 * budget < sum(fractions.values()) <= 1.01 * budget
    assert fractions["gfs"] > 0.05 * budget
    assert fractions["running"] > 0.5 * budget
    assert monitor.schedule.budget.overhead() == pytest.approx(sum(fractions.values()), rel=0.1)


@pytest.mark.parametrize("plain", [True, False])
def test_what_the_first_hook_does_once_is_not_charged(plain: bool) -> None:
    """A second before the first measurement, as to compare losses, then hooks of 1 ms in steps of 100 ms."""
    now = [0.0]
    budget = OverheadBudget({}, lambda: now[0])

    def hook(seconds: float, measured: float = 0.0) -> None:
        with nullcontext() if plain else Charged([budget]):
            now[0] += 0.0 if plain else seconds
            with budget.counting():
                now[0] += seconds if plain else 0.0
                if measured:
                    began = now[0]
                    now[0] += measured
                    budget.measured(began, now[0], ["running"], {})

    hook(0.25)
    hook(1.0, measured=0.5)
    assert (budget.ours, budget.start, budget.since) == (1.75, 1.75, 1.75)
    assert budget.beside() == 0.0
    for _ in range(10):
        now[0] += 0.1
        hook(0.001)
    assert budget.start == 1.75
    assert budget.beside() == pytest.approx(0.01 / 1.01)
    assert budget.overhead() == pytest.approx(1.76 / 2.76)
    hook(0.001, measured=0.02)
    assert budget.start == 1.75  # the second measurement is charged


@pytest.mark.parametrize(("step_ms", "told"), [(10.0, True), (100.0, False)])
def test_that_the_budget_cannot_be_held_is_told_once_measurements_are_charged(
    monkeypatch: pytest.MonkeyPatch, step_ms: float, told: bool
) -> None:
    """Hooks take 0.5 ms of every step by this clock; the first one takes half a second."""
    now = [0.0]
    timed = {"running": 0.001}
    monkeypatch.setattr(measuring, "measure", lambda *given: dataclasses.replace(measure(*given), seconds=timed))
    model = nn.Linear(6, 3)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(tier="running"))
    told_the_time(monitor, lambda: now[0])
    found = []
    for step, x in enumerate(batches(1) * 300):
        with Charged([monitor.schedule.budget]):
            now[0] += 0.0005 if step else 0.5
            found.append(monitor.step(lambda b: model(b).square().mean(), x))
        now[0] += 1e-3 * step_ms
    notes = [(m.step, r) for m in found if m is not None for r in m.reasons if "max_overhead" in r]
    assert len(notes) == told
    if told:
        step, text = notes[0]
        assert step >= 20  # the first that is charged
        assert re.match(r"more than max_overhead=0\.05 may be taken: the hooks take 4\.[5-8]% of the wall time", text)
        assert "which may take 2.5% all the same" in text


def test_failures_are_told_once_and_training_goes_on() -> None:
    model, _, monitor = setup(gfs.GFSConfig(every=1, max_overhead=None))
    x = batches(1)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert monitor.step(lambda b: model(b).sum() * float("inf"), x) is None
        assert monitor.step(lambda b: model(b).square().mean(), x) is not None
    assert ["not finite" in str(w.message) for w in caught] == [True]
    _, _, strict = setup(gfs.GFSConfig(every=1, max_overhead=None, strict=True))
    with pytest.raises(gfs.MeasurementError, match="0-dim tensor, got a tensor of shape \\(12, 3\\)"):
        strict.step(lambda b: model(b), x)


@pytest.mark.parametrize("probe", ["batch", "fixed"])
def test_what_runs_out_of_memory_is_met_by_a_smaller_probe(probe) -> None:
    options = gfs.GFSConfig(tier="sharpness", every=1, running_every=4, max_overhead=None, probe=probe)
    model, _, monitor = setup(options)
    tuned(monitor, parts=2)
    sizes: list[int] = []

    def loss_fn(b):
        sizes.append(len(b))
        if len(b) > 3:
            raise torch.OutOfMemoryError("no room")
        return (model(b) - b[:, :3].sin()).square().mean()

    x = batches(1)[0]  # 12 examples
    with pytest.warns(gfs.GFSWarning, match="half as many"):
        found = [monitor.step(loss_fn, x, step) for step in range(2)]
    assert sizes[:3] == [12, 6, 3]  # so are the parts held against a smaller whole
    sizes.clear()
    found += [monitor.step(loss_fn, x, step) for step in range(2, 4)]
    assert [m is not None for m in found] == [False, False, True, True]
    assert set(sizes) == {3}
    kept = setup(options)[2]
    kept.load_state_dict(monitor.state_dict())
    sizes.clear()
    assert kept.step(lambda b: loss_fn(b), x, 5) is not None
    assert sizes[0] == 3

    sizes.clear()
    running = gfs.StabilityMonitor(
        model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(tier="running", every=1, max_overhead=None)
    )
    tuned(running, parts=2)
    with pytest.warns(gfs.GFSWarning, match="half as many"):
        assert running.step(loss_fn, x, 0) is None
    assert sizes[-1] == 6
    sizes.clear()
    assert [running.step(loss_fn, x, step) is not None for step in (1, 2)] == [True, True]
    assert set(sizes) == {3}


@pytest.mark.parametrize("tier", ["sharpness", "running"])
def test_memory_that_becomes_free_is_used_again(tier) -> None:
    alone = {"running_every": None} if tier == "sharpness" else {}
    options = gfs.GFSConfig(tier=tier, every=1, max_overhead=None, **alone)
    model, _, _ = setup(options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gfs.StabilityMonitor(model, optimizer, options)
    sizes: list[int] = []
    size = {"sharpness": 12, "running": 96}[tier]  # the running estimate takes a sixteenth
    room = 3

    def loss_fn(b):
        sizes.append(len(b))
        if len(b) > room:
            raise torch.OutOfMemoryError("no room")
        return (model(b) - b[:, :3].sin()).square().mean()

    def largest(steps: int) -> list[int]:
        """Examples that were tried at each step."""
        out = []
        for _ in range(steps):
            sizes.clear()
            monitor.step(loss_fn, x)
            out.append(max(sizes))
        return out

    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(7))
    monitor.step(lambda b: (model(b) - b[:, :3].sin()).square().mean(), x)
    with pytest.warns(gfs.GFSWarning, match="half as many") as told:
        tried = largest(100)
    assert max(tried[5:]) > room  # more were tried, …
    assert 2 < sum(n > room for n in tried) < 8  # … seldom, …
    assert len(told) == 1  # … and without a word
    saved = monitor.state_dict()
    room = size
    usual = {"sharpness": 12, "running": 6}[tier]
    tried = largest(260)
    assert tried[-1] == usual
    monitor.load_state_dict(saved)
    assert largest(260) == tried  # a resumed run tries again at the same steps


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("part", "left"),  # measurements that there are all the same
    [
        ("rates.look", 3),
        ("watch.observe", 3),
        ("journal._write", 3),
        ("measuring.keep_weights", 1),
        ("measuring.probe.short", 0),
        ("rates.take_in", 0),
        ("schedule.due", 0),
    ],
)
def test_nothing_that_fails_beside_a_measurement_ends_training(part, left, strict, monkeypatch, tmp_path) -> None:
    options = {"tier": "directional", "every": 1, "control": "cdat", "max_overhead": None, "strict": strict}
    model, optimizer, monitor = setup(gfs.GFSConfig(history=str(tmp_path / "history.jsonl"), **options))

    def fails(*args, **kwargs):
        raise RuntimeError("out of something")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, optimizer, monitor, batches(3))
    *path, name = part.split(".")
    monkeypatch.setattr(functools.reduce(getattr, path, monitor), name, fails)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if strict:
            with pytest.raises(RuntimeError, match="out of something"):
                run(model, optimizer, monitor, batches(3))
            return
        found = run(model, optimizer, monitor, batches(3))
    assert len(found) == left
    assert [str(w.message).endswith("RuntimeError: out of something") for w in told] == [True]
    monkeypatch.undo()
    assert len(run(model, optimizer, monitor, batches(3))) >= 2


def test_a_loss_that_is_no_number_is_not_taken_in() -> None:
    monitor = setup(gfs.GFSConfig(every=1000))[2]
    with pytest.warns(gfs.GFSWarning, match=r"not taken in: it has the shape \(3,\), and is no number"):
        monitor.record_loss(torch.ones(3))
    monitor.record_loss(2.0)
    assert monitor.update_detectors(1) is None
    assert monitor.measuring.mean_loss.value() == 2.0


def test_what_on_alarm_raises_ends_training() -> None:
    class Pruned(Exception):
        pass

    def prune(event: gfs.Alert) -> None:
        raise Pruned

    model, optimizer, _ = setup(gfs.GFSConfig())
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(every=1000, alarm="log"), on_alarm=prune)

    def losses(loss: float, steps: range) -> None:
        for step in steps:
            monitor.record_loss(loss)
            monitor.update_detectors(step)

    losses(1.0, range(50))
    with pytest.raises(Pruned):
        losses(float("nan"), range(50, 60))


def test_an_eigenvalue_that_overtakes_is_found() -> None:
    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(20, dtype=torch.float64))

    model = Crossing()
    h = torch.linspace(0, 0.5, 20, dtype=torch.float64)
    monitor = gfs.StabilityMonitor(
        model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(every=1, tier="sharpness", max_overhead=None)
    )
    values = []
    for step in range(25):
        h[-1], h[0] = 1.0, 0.2 * step  # exactly orthogonal to the tracked eigenvector
        values.append(monitor.step(lambda b: 0.5 * (h * model.w.square()).sum(), None).sharpness)
    assert values[4] == pytest.approx(1.0, rel=1e-3)
    late = [i for i, v in enumerate(values) if i > 6 and v > 1.01]
    assert late[0] <= 16
    assert all(values[i] == pytest.approx(0.2 * i, rel=1e-3) for i in late)


def test_the_third_measurement_leaves_a_vector_that_the_first_was_wrong_with() -> None:
    """A cold start that leads to the second eigenvalue: the third start takes in the gradient and a random vector."""
    model = nn.Linear(6, 1, bias=False).double()
    h = torch.tensor([3.0, 0.1, 0.2, 0.0, -0.1, 0.0], dtype=torch.float64)
    config = gfs.GFSConfig(every=1, tier="sharpness", max_overhead=None)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)

    def measured() -> float | None:
        return monitor.step(lambda b: 0.5 * (h * model.weight.square()).sum(), None).sharpness

    assert measured() == pytest.approx(3.0, rel=1e-3)
    state = monitor.state_dict()
    state["measuring"]["signals"]["sharpness"]["raw"] = [torch.eye(6, dtype=torch.float64)[:1].clone()]  # exactly
    monitor.load_state_dict(state)
    h[5] = 5.0
    assert measured() == pytest.approx(3.0, rel=1e-3)
    assert measured() == pytest.approx(5.0, rel=1e-3)


def test_nothing_is_kept_but_the_warm_start() -> None:
    model, optimizer, monitor = setup(gfs.GFSConfig(every=1, max_overhead=None))
    run(model, optimizer, monitor, batches(5))

    def elements() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))

    before, weights = elements(), sum(p.numel() for p in model.parameters())
    run(model, optimizer, monitor, batches(3))
    assert elements() - before < weights  # what other tests left may go meanwhile
    warm = monitor.state_dict()["measuring"]["signals"]["sharpness"]
    assert [sum(t.numel() for t in warm[name]) for name in ("raw", "preconditioned")] == [weights, weights]


def test_probes() -> None:
    seen: list[tuple[int, float]] = []

    def loss_fn(x):
        seen.append((len(x), x[0, 0].item()))
        return model(x).square().mean()

    data = batches(5)
    model, _, monitor = setup(gfs.GFSConfig(every=1, max_overhead=None, probe_size=5, tier="sharpness"))
    monitor.step(loss_fn, data[0])
    assert {n for n, _ in seen} == {12, 5, 2}  # once, the whole and its parts
    seen.clear()
    monitor.step(loss_fn, data[0])
    assert {n for n, _ in seen} == {5}
    with pytest.warns(gfs.GFSWarning, match="a fixed probe of 17 examples is misleading"):
        model, _, monitor = setup(
            gfs.GFSConfig(every=1, max_overhead=None, probe="fixed", probe_size=17, tier="sharpness")
        )
    assert monitor.step(loss_fn, data[0]) is None
    seen.clear()
    for x in data[1:]:
        assert monitor.step(loss_fn, x) is not None
    assert {first for _, first in seen} == {data[0][0, 0].item(), data[1][0, 0].item()}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("every", 0, "`every` must be ≥ 1, got 0"),
        ("every", 2.5, "`every` must be int, got 2.5"),
        ("every", True, "`every` must be int, got True"),
        ("max_memory", 0.0, "`max_memory` must be a number of GiB > 0, or None for no limit; got 0.0"),
        ("max_memory", -1, "`max_memory` must be a number of GiB > 0, or None for no limit; got -1"),
        ("max_overhead", 1.5, "`max_overhead` must be in (0, 1]"),
        (
            "tier",
            "all",
            "`tier` must be one of 'directional', 'running', 'batch_sharpness', 'sharpness', 'midpoint', 'gfs', "
            "'gfs_full'; got 'all'",
        ),
        ("hvp", None, "`hvp` must be one of"),
        ("probe_size", 0, "`probe_size` must be ≥ 1, got 0"),
        ("margin", "x", "`margin` must be float or None, got 'x'"),
        ("history", 3, "`history` must be str or None, got 3"),
        ("horizons", 3, "unknown option `horizons`; the options are alarm, control, every, history, "),
    ],
)
def test_wrong_options_are_named(name: str, value: object, text: str) -> None:
    with pytest.raises(gfs.ConfigError) as error:
        gfs.GFSConfig.from_options(**{name: value})
    assert text in str(error.value)


def test_documented_defaults() -> None:
    config = gfs.GFSConfig()
    assert (config.tier, config.every, config.running_every, config.max_overhead) == ("gfs", 10, 5, 0.05)
    assert (config.probe, config.probe_size, config.hvp) == ("batch", None, "auto")
    assert (config.history, config.strict, config.seed) == (None, False, 0)
    accuracy = setup(config)[2].measuring.accuracy
    assert (accuracy.tol, accuracy.rtol, accuracy.horizon) == (1e-2, 1e-2, 4.0)


@pytest.mark.parametrize("name", GONE)
def test_an_option_that_is_no_more_is_told_with_what_to_use(name: str) -> None:
    for make in (gfs.GFSConfig, gfs.GFSConfig.from_options):
        with pytest.raises(gfs.ConfigError) as error:
            make(**{name: 3})
        assert str(error.value) == f"there is no option `{name}` any more: {GONE[name]}"


@pytest.mark.parametrize("name", ["tol", "rtol", "horizon", "max_hvps", "max_grads"])
@pytest.mark.parametrize("value", [0, -1, "x", True, float("nan"), 1e301])
def test_what_is_no_accuracy_is_named(name: str, value: Any) -> None:
    with pytest.raises(gfs.ConfigError, match=f"`{name}` must be .*, got {re.escape(repr(value))}"):
        gfs.stability(nn.Linear(2, 1), lambda m, b: m(b).mean(), torch.ones(1, 2), None, **{name: value})


def test_nothing_to_measure_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(gfs.ConfigError, match="requires_grad=True"):
        gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(gfs.MeasurementError, match="no trainable parameter"):
        gfs.sharpness(model, lambda m, b: m(b).mean(), torch.ones(1, 2))


def test_history_survives_what_happens_to_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    first, second = gfs.Measurement.of(0, "SGD", sharpness=1.5, reasons=("why",)), gfs.Measurement.of(5, "SGD", hvps=3)
    append(path, first)
    with path.open("a") as file:
        file.write('{"step": 3, "sharp')  # killed in the middle of a line
    append(path, second)
    append(path, second.having(hvps=4))  # a resumed run writes its step again
    with path.open("a") as file:
        file.write('[1]\nnull\n{"step": "x"}\n{"step": 9, "sharpness": "<script>", "later": 1}\n')
    *known, last = gfs.read_history(path)
    assert known == [first, second.having(hvps=4)]
    assert (last.step, last.values()) == (9, {"later": 1})  # a key of a later release is kept
    with pytest.raises(gfs.ConfigError, match="no history at"):
        gfs.read_history(tmp_path / "none")
    with pytest.raises(ValueError, match="JSON compliant"):
        append(path, gfs.Measurement.of(1, sharpness=float("nan")))


def test_public_names() -> None:
    assert sorted(gfs.__all__) == gfs.__all__
    assert {"GFSConfig", "StabilityMonitor", "sharpness", "gfs_sharpness", "stability"} <= set(gfs.__all__)
    assert all(getattr(gfs, name).__doc__ for name in gfs.__all__)


class Pair(NamedTuple):
    x: torch.Tensor
    names: list[str]


class Encoding(UserDict[str, torch.Tensor]):
    """As the tokenizers of transformers return it."""


KEPT = {"x": torch.ones(2, 3), "names": ["a", None], "n": (1, 2.0, True)}


@pytest.mark.parametrize(
    "batch", [KEPT, [KEPT["x"]], Pair(KEPT["x"], ["a"]), Encoding(KEPT)], ids=lambda b: type(b).__name__
)
def test_a_fixed_probe_is_saved_as_data_or_collected_anew(batch: Any) -> None:
    def monitor() -> gfs.StabilityMonitor:
        options = gfs.GFSConfig(every=1, max_overhead=None, probe="fixed", tier="sharpness")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), options)

    def loss(batch: Any) -> torch.Tensor:
        x = batch.x if isinstance(batch, Pair) else batch[0] if isinstance(batch, list) else batch["x"]
        return model(x).square().mean()

    model = nn.Linear(3, 1)
    first, second, file = monitor(), monitor(), io.BytesIO()
    first.step(loss, batch, 0)
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if type(batch) in (dict, list):
        second.load_state_dict(state)
        held = second.measuring.probe.fixed[0]
        assert type(held) is type(batch)
        assert torch.equal(held["x"] if isinstance(held, dict) else held[0], torch.ones(2, 3))
    else:
        with pytest.warns(gfs.GFSWarning, match="the fixed probe was not saved.*it is collected anew"):
            second.load_state_dict(state)
        assert second.step(loss, batch, 1).sharpness == pytest.approx(first.step(loss, batch, 1).sharpness, rel=1e-2)


def test_what_is_no_optimizer_is_named() -> None:
    with pytest.raises(gfs.ConfigError, match=r"expected a torch\.optim\.Optimizer or a wrapper of one, got float"):
        gfs.StabilityMonitor(nn.Linear(2, 1), 0.1)


def test_a_loss_without_a_graph_is_named() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(gfs.MeasurementError, match="does not depend on any trainable parameter"):
        gfs.sharpness(model, lambda m, b: torch.tensor(1.0), torch.ones(1, 2))


def test_the_running_estimate_has_its_price_while_it_settles() -> None:
    """By it the price of a solve is guessed before there was one."""
    model = nn.Linear(6, 1)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(tier="sharpness"))
    found = monitor.step(lambda x: model(x).square().mean(), torch.ones(4, 6), 0)
    assert found is not None
    assert found.running_sharpness is None
    prices = monitor.schedule.budget.prices
    assert prices["running"] > 0
    assert monitor.schedule.budget.price(["sharpness"]) == pytest.approx(prices[""] + 40 * prices["running"])
