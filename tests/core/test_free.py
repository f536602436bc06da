"""Free signals: the values, against sums by hand; when they are read; what is logged and written of them."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.run.free import FreeSignals, Pace
from gfs_core.run.notices import Notices
from gfs_core.signals.base import Reading

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float((t.detach().double() ** 2).sum()) for t in tensors))


def free_of(model: nn.Module, optimizer: Any, limited: bool = False, **more: Any) -> FreeSignals:
    return FreeSignals(model, optimizer, limited, None, Notices(strict=True, ranks=None), **more)


def backward(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch_of(step)).backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.1),
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: SGD(p, 0.1, weight_decay=0.01, maximize=True),
        lambda p: Adam(p, 0.01),
        lambda p: Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
        lambda p: AdamW(p, 0.01, weight_decay=0.0, betas=(0.8, 0.95)),
        lambda p: AdamW(p, 0.01, weight_decay=0.0, fused=True),
        lambda p: torch.optim.RMSprop(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    ],
)
def test_norms_and_the_update_are_those_that_the_weights_show(make: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    free = free_of(model, optimizer)
    for step in range(6):
        backward(model, optimizer, step)
        before = [p.detach().clone() for p in model.parameters()]
        gradient, layer = norm(p.grad for p in model.parameters()), norm(p.grad for p in model[2].parameters())
        free.before_step(step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        found = {(r.key.name, r.layer): r for r in free.arrived()}
        assert found["grad_norm", ""].value == pytest.approx(gradient, rel=1e-5)
        assert found["grad_norm", "2"].value == pytest.approx(layer, rel=1e-5)
        assert found["weight_norm", ""].value == pytest.approx(norm(before), rel=1e-5)
        moved = norm(b - p for b, p in zip(before, model.parameters(), strict=True))
        # weights after the step are what coupled decay is taken of
        assert found["update_ratio", ""].value == pytest.approx(moved / norm(model.parameters()), rel=5e-3)
        assert {r.step for r in found.values()} == {step}
        assert {r.layer for r in found.values()} == {"", "0", "2"}


def test_the_root_mean_square_is_that_of_adams_own_quotient() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 0.01, betas=(0.9, 0.9))
    free = free_of(model, optimizer)
    second = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(5):
        backward(model, optimizer, step)
        if step == 4:
            for p in model.parameters():
                p.grad *= 30  # a gradient that the second moment does not know yet
        free.before_step(step)
        optimizer.step()
        quotients = []
        for v, p in zip(second, model.parameters(), strict=True):
            v.mul_(0.9).add_(p.grad**2, alpha=0.1)
            quotients.append(p.grad / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8))
        expected = norm(quotients) / math.sqrt(sum(p.numel() for p in model.parameters()))
        [found] = [r.value for r in free.arrived() if r.key.name == "rms_ratio" and not r.layer]
        assert found == pytest.approx(expected, rel=1e-4)
    assert found > 1.5  # the peak: without bias correction 1 / √(1 − β₂) is the largest


def test_what_an_optimizer_does_not_have_is_absent_and_a_reason_says_so_once() -> None:
    model = network()
    optimizer = torch.optim.Adamax(model.parameters(), 0.01)
    config = gfs.GFSConfig(tier="sharpness", every=10**9, running_every=None, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    found = []
    for step in range(110):
        backward(model, optimizer, step)
        found.append(monitor.step(lambda b: loss_of(model, b), batch_of(step)))
        optimizer.step()
    told = [m for m in found[1:] if m is not None]
    assert [m.step for m in told] == [50, 100]
    assert all(m.grad_norm and m.update_ratio is None and m.rms_ratio is None for m in told)
    assert "Adamax" in str(found[0].reasons if found[0] else ()) + str(told[0].reasons)
    assert "Adamax" not in str(told[1].reasons)
    plain = free_of(model, SGD(model.parameters(), 0.1))
    plain.before_step(0)
    plain.optimizer.step()
    assert {r.key.name for r in plain.arrived()} == {"grad_norm", "nonfinite", "weight_norm", "update_ratio"}


def test_entries_that_are_not_finite_are_counted() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    free = free_of(model, optimizer)
    backward(model, optimizer, 0)
    model[0].weight.grad[1, :3] = math.nan
    model[0].weight.grad[2, 0] = math.inf
    free.before_step(0)
    optimizer.step()
    found = {(r.key.name, r.layer): r.value for r in free.arrived()}
    entries = sum(p.numel() for p in model.parameters())
    assert found["nonfinite", ""] == pytest.approx(4 / entries)
    assert found["nonfinite", "0"] == pytest.approx(4 / (6 * 8 + 8))
    assert found["nonfinite", "2"] == 0.0
    assert not math.isfinite(found["grad_norm", ""] or 0.0)
    assert found["grad_norm", "2"] == pytest.approx(norm(p.grad for p in model[2].parameters()))
    readings, reasons = free.publish(0)
    assert reasons == ["grad_norm: the gradient is not finite"]
    line = gfs.Measurement(0).also(readings).finite()
    assert line.grad_norm is None
    assert line.nonfinite == pytest.approx(4 / entries, rel=1e-5)
    assert line.layers("nonfinite").keys() == {"0"}  # a layer without any is left out of the history


def test_a_layer_without_a_gradient_has_no_value_instead_of_zero() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 0.01)
    free = free_of(model, optimizer)
    model[0].requires_grad_(False)
    backward(model, optimizer, 0)
    model[0].requires_grad_(True)
    free.before_step(0)
    optimizer.step()
    found = {(r.key.name, r.layer) for r in free.arrived()}
    assert {layer for name, layer in found if name in ("grad_norm", "nonfinite", "update_ratio")} == {"", "2"}
    assert ("weight_norm", "0") in found


@pytest.mark.parametrize("where", ["before unscale_", "after unscale_", "in the step"])
def test_a_scaled_gradient_is_not_taken_for_the_gradient(where: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.01)
    free, scaler = free_of(model, optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    values = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(step))
        expected = norm(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        scaler.scale(loss).backward()
        if where == "after unscale_":
            scaler.unscale_(optimizer)
        if where == "in the step":
            free.step = step
        else:
            free.before_step(step)
        scaler.step(optimizer)
        scaler.update()
        values += [(step, r.value, expected) for r in free.arrived() if r.key.name == "grad_norm" and not r.layer]
    # What was read before the first step may have been scaled: it is left out.
    assert [step for step, *_ in values] == ([0, 1, 2] if where == "in the step" else [1, 2])
    assert [v for _, v, _ in values] == pytest.approx([e for *_, e in values], rel=1e-5)


def test_gradients_of_the_step_before_are_not_taken_for_those_of_the_next() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    free = free_of(model, optimizer)
    for step in range(3):  # a loop that tells of the step before it has computed the gradients
        free.before_step(step)
        backward(model, optimizer, step)
        expected = norm(p.grad for p in model.parameters())
        optimizer.step()
        [found] = [r for r in free.arrived() if r.key.name == "grad_norm" and not r.layer]
        assert (found.step, found.value) == (step, pytest.approx(expected, rel=1e-5))


def test_clipped_gradients_have_no_norm_and_the_reason_says_so() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    free = free_of(model, optimizer)
    for step, cap in enumerate((1e-3, 1e6)):
        backward(model, optimizer, step)
        nn.utils.clip_grad_norm_(model.parameters(), cap)
        free.before_step(step, clipped_at=cap)
        optimizer.step()
        [found] = [r.value for r in free.arrived() if r.key.name == "grad_norm" and not r.layer]
        assert (found is None) == (step == 0)
        readings, reasons = free.publish(step)
        assert ("grad_norm" in {r.key.name for r in readings}) == (step == 1)
        assert ("clipped to 0.001" in str(reasons)) == (step == 0)


def test_reading_takes_its_share_of_the_time() -> None:
    now = [0.0]
    pace = Pace(0.01, lambda: now[0])
    done = []
    for step in range(1000):
        now[0] += 1.0
        if pace.due:
            began = now[0]
            now[0] += 0.2
            pace.took(began)
            done.append(step)
    assert done[:2] == [0, 1]  # the first is not counted
    assert len(done) == pytest.approx(1000 * 0.01 / 0.2, abs=2)
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    free = free_of(model, optimizer, limited=True, clock=lambda: now[0])
    seen = 0
    for step in range(10):
        backward(model, optimizer, step)
        free.before_step(step)
        optimizer.step()
        seen += len([r for r in free.arrived() if r.key.name == "grad_norm" and not r.layer])
    assert seen == 10  # no time has passed: it costs nothing


def test_the_history_keeps_few_lines_with_layers_and_loggers_get_none(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 1e-3)
    path = tmp_path / "history.jsonl"
    config = gfs.GFSConfig(
        tier="sharpness", every=10**9, running_every=None, max_overhead=None, history=str(path), alarm="off"
    )
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    free = monitor.free
    backward(model, optimizer, 0)
    free.before_step(0)
    optimizer.step()
    free.arrived()
    lines = with_layers = 0
    for step in range(0, 100_000, 10):
        readings, _ = free.publish(step)
        lines, with_layers = lines + 1, with_layers + any(r.layer for r in readings)
    assert lines == 10_000
    assert 450 < with_layers < 750
    backward(model, optimizer, 1)
    free._layers_at = 0
    line = monitor.update_detectors(100_030)
    assert line is None  # published just now
    line = monitor.update_detectors(100_050)
    assert line is not None
    assert {k for k in line.as_log_dict()} == {"gfs/grad_norm", "gfs/nonfinite", "gfs/weight_norm", "gfs/update_ratio"}
    [held] = gfs.read_history(path)
    assert held.layers("grad_norm").keys() == {"0", "2"}
    assert held.grad_norm == line.grad_norm


def test_resumed_values_are_the_same_and_the_early_warning_gets_each_reading() -> None:
    def run(stop: int | None) -> tuple[list[Any], list[Reading]]:
        model = network()
        optimizer = AdamW(model.parameters(), 0.01)
        config = gfs.GFSConfig(tier="sharpness", every=7, running_every=None, max_overhead=None)
        monitor = gfs.StabilityMonitor(model, optimizer, config)
        seen: list[Reading] = []

        def watched(monitor: gfs.StabilityMonitor) -> None:
            assert monitor.watch.warning is not None
            own = monitor.watch.warning.in_order
            monitor.watch.warning.in_order = lambda rs: own([seen.append(r) or r for r in rs])  # type: ignore

        watched(monitor)
        lines = []
        for step in range(120):
            if step == stop:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict(), monitor.state_dict()], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = network()
                optimizer = AdamW(model.parameters(), 0.01)
                monitor = gfs.StabilityMonitor(model, optimizer, config)
                for held, state in zip((model, optimizer, monitor), states, strict=True):
                    held.load_state_dict(state)
                watched(monitor)
            backward(model, optimizer, step)
            model_now = model
            line = monitor.step(lambda b, m=model_now: loss_of(m, b), batch_of(step), step)
            optimizer.step()
            if line is not None:
                lines.append([(r.key.name, r.layer, r.value) for r in line.readings if r.key.name != "seconds"])
        return [[r for r in line if r[0] != "overhead"] for line in lines], seen

    whole, seen = run(None)
    assert len(whole) > 16
    assert run(61)[0] == whole
    norms = [r.step for r in seen if r.key.name == "grad_norm" and not r.layer]
    assert norms == list(range(120))


def test_training_is_bitwise_the_same() -> None:
    def train(watched: bool) -> list[Tensor]:
        model = network()
        optimizer = AdamW(model.parameters(), 0.01)
        free = free_of(model, optimizer) if watched else None
        for step in range(20):
            backward(model, optimizer, step)
            if free is not None:
                free.before_step(step)
            optimizer.step()
            if free is not None:
                free.arrived()
        if free is not None:
            free.close()
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
        return [*(p.detach() for p in model.parameters()), *(s["exp_avg_sq"] for s in optimizer.state.values())]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_a_monitor_whose_numbers_are_on_their_way_can_be_copied() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 0.01)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(max_overhead=None))
    backward(model, optimizer, 0)
    monitor.read_gradients(0)
    optimizer.step()
    again = pickle.loads(pickle.dumps(monitor))
    assert [r.key.name for r in again.free.arrived()] == []
    assert monitor.free.arrived()
