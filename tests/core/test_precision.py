from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.loss.learned import Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.precision import Precision
from gfs_core.loss.snapshot import StateSnapshot
from tests.core.options import tuned

HALVES = [torch.bfloat16, torch.float16]


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(64, 12, generator=g).to(dtype), torch.randint(0, 4, (64,), generator=g)


def loss_fn(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(b[0]).float(), b[1])


def autocast(dtype: torch.dtype, seen: list[bool] | None = None):
    def loss(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            if seen is not None:
                seen.append(torch.is_autocast_enabled("cpu"))
            out = model(b[0])
        return nn.functional.cross_entropy(out.float(), b[1])

    return loss


def test_exact_products_are_trainings_own_in_bfloat16_and_float32_in_float16() -> None:
    model, true = make(), gfs.sharpness(make(), loss_fn, batch(), tol=1e-5).value
    for dtype, own in ((torch.bfloat16, True), (torch.float16, False)):
        seen: list[bool] = []
        found = gfs.sharpness(model, autocast(dtype, seen), batch(), tol=1e-3, hvp="exact")
        assert seen[-1] is own  # the checks are in float32
        assert any(seen) is own
        error = abs(found.value / true - 1)
        assert error < (0.02 if own else 1e-5)
        assert not own or error > 1e-5  # it is half precision
    found = gfs.sharpness(model, autocast(torch.bfloat16, seen := []), batch(), tol=1e-3, precision="float32")
    assert not any(seen)
    assert found.value == pytest.approx(true, rel=1e-5)
    gfs.sharpness(model, autocast(torch.float16, seen := []), batch(), tol=1e-3, precision="training")
    assert all(seen)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_autocast_around_and_inside_the_loss_and_weights_in_half_precision(dtype, hvp) -> None:
    model = make()
    true = gfs.sharpness(model, loss_fn, batch(), tol=1e-5).value
    limit = 0.02 if hvp == "exact" else 3e-3
    inside = gfs.sharpness(model, autocast(dtype), batch(), tol=1e-3, hvp=hvp)
    with torch.autocast("cpu", dtype):
        around = gfs.sharpness(model, loss_fn, batch(), tol=1e-3, hvp=hvp)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is dtype
    for found in (inside, around):
        assert found.value == pytest.approx(true, rel=limit)
    halved = copy.deepcopy(model).to(dtype)
    before = [p.clone() for p in halved.parameters()]
    true = gfs.sharpness(copy.deepcopy(halved).float(), loss_fn, (batch(dtype)[0].float(), batch()[1]), tol=1e-5).value
    found = gfs.sharpness(halved, loss_fn, batch(dtype), tol=1e-3, hvp=hvp)
    assert found.value == pytest.approx(true, rel=limit)
    assert found.vector[0].dtype is torch.float32
    assert all(torch.equal(a, b) and b.dtype is dtype for a, b in zip(before, halved.parameters(), strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_flow_of_half_precision_weights_is_in_float32(dtype) -> None:
    model = make().to(dtype)
    like = copy.deepcopy(model).float()
    x = (batch(dtype)[0].float(), batch()[1])
    true = gfs.gfs_sharpness(like, loss_fn, x, horizon=16, learning_rate=0.5)
    found = gfs.gfs_sharpness(model, loss_fn, batch(dtype), horizon=16, learning_rate=0.5)
    assert found.sharpness == pytest.approx(true.sharpness, rel=1e-3)
    assert found.loss == pytest.approx(true.loss, rel=1e-4)
    assert all(p.dtype is dtype for p in model.parameters())
    away = gfs.gfs_sharpness(model, loss_fn, batch(dtype), horizon=16, learning_rate=0.5, precision="training")
    assert away.loss != pytest.approx(true.loss, rel=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_training_in_half_precision_is_bitwise_the_same_and_measured_well(dtype, how) -> None:
    def autocasts() -> bool:
        with torch.autocast("cpu", dtype):
            return torch.is_autocast_enabled("cpu")

    def run(measure: bool) -> tuple[list[Tensor], list[gfs.Measurement]]:
        model = make() if how == "autocast" else make().to(dtype)
        loss = autocast(dtype) if how == "autocast" else loss_fn
        x = batch() if how == "autocast" else batch(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, eps=1e-4)  # 1e-8 is 0 in float16
        config = gfs.GFSConfig(tier="gfs", every=2, max_overhead=None)
        monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), beside={"directional": 2})
        found = []
        for _ in range(9):
            optimizer.zero_grad()
            loss(model, x).backward()
            if measure and (m := monitor.step(lambda b: seen.append(autocasts()) or loss(model, b), x)):
                found.append(m)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], found

    seen: list[bool] = []
    measured, found = run(True)
    if how == "autocast":
        assert any(seen) is (dtype is torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(measured, run(False)[0], strict=True))
    solved = [m for m in found if m.sharpness is not None]
    assert len(solved) >= 4
    assert solved[-1].gfs_sharpness is not None
    assert any(m.directional_sharpness is not None for m in found)
    checked = [m.precision_error for m in solved if m.precision_error is not None]
    if dtype is torch.bfloat16:
        assert len(checked) == 1  # the first of ten
        assert 0 < checked[0] < 0.05
    else:  # it is measured in float32
        assert checked == []


def test_half_precision_that_changes_too_much_gives_way_to_float32() -> None:
    model = make()
    true = gfs.sharpness(model, loss_fn, batch(), tol=1e-5).value

    def loss(b):
        with torch.autocast("cpu", torch.bfloat16):
            coarse = torch.is_autocast_enabled("cpu")
            out = model(b[0]).float()
        return nn.functional.cross_entropy(out * (1.05 if coarse else 1.0), b[1])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None)
    monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), tol=1e-3)
    with pytest.warns(gfs.GFSWarning, match="bfloat16.*in float32"):
        first = monitor.step(loss, batch())
    assert first.precision_error > 0.05
    assert first.sharpness == pytest.approx(true, rel=1e-4)
    second = monitor.step(loss, batch())
    assert second.sharpness == pytest.approx(true, rel=1e-4)
    assert second.precision_error is None
    again = tuned(gfs.StabilityMonitor(model, optimizer, config), tol=1e-3)
    again.load_state_dict(monitor.state_dict())
    assert again.step(loss, batch()).sharpness == pytest.approx(true, rel=1e-4)


def test_a_loss_that_fails_in_float32_is_measured_as_training_computes_it() -> None:
    model = make().to(torch.bfloat16)

    def loss(b):
        x = b[0].to(torch.bfloat16)  # of this type whatever the weights are
        return nn.functional.cross_entropy(model(x).float(), b[1])

    config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None, hvp="exact")
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    true = gfs.sharpness(copy.deepcopy(model).float(), loss_fn, batch(), tol=1e-5).value
    with pytest.warns(gfs.GFSWarning, match="fails in float32"):
        first = monitor.step(loss, batch())
    assert first.sharpness == pytest.approx(true, rel=0.03)
    assert model[0].weight.dtype is torch.bfloat16
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("choice", ["auto", "training", "float32"])
def test_products_of_half_precision_weights_are_in_float32_and_repeatable(choice) -> None:
    model = make().to(torch.bfloat16)
    precision = Precision(choice, model, model.parameters())
    with StateSnapshot(model) as isolation, precision.governing():
        objective = Objective(model, loss_fn, [batch(torch.bfloat16)], isolation=isolation, precision=precision)
        hessian = gfs.Hessian(objective, "exact", Learned(double_backward_verified=True))
        vector = [torch.ones_like(p, dtype=torch.float32) for p in model.parameters()]
        first, again = hessian(vector), hessian(vector)
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(first, again, strict=True))
    assert sum(float(t.abs().sum()) for t in again) > 0


def test_everything_is_as_before_after_an_error() -> None:
    model = make().to(torch.bfloat16)
    precision = Precision("auto", model, model.parameters())
    enter = torch.autocast.__enter__
    with pytest.raises(KeyboardInterrupt), StateSnapshot(model) as isolation, precision.governing():  # noqa: PT012
        objective = Objective(model, loss_fn, [batch(torch.bfloat16)], isolation=isolation, precision=precision)
        with objective.in_float32():
            assert objective.weights[0].dtype is torch.float32
            raise KeyboardInterrupt
    assert torch.autocast.__enter__ is enter
    assert objective.weights[0].dtype is torch.bfloat16
    assert math.isfinite(gfs.sharpness(model, loss_fn, batch(torch.bfloat16)).value)


def test_differences_in_half_precision_see_the_weights_move() -> None:
    """Autocast keeps its casts of weights while an outer autocast lasts."""
    model, true = make(), gfs.sharpness(make(), loss_fn, batch(), tol=1e-5).value
    with torch.autocast("cpu", torch.float16):
        found = gfs.sharpness(model, loss_fn, batch(), tol=3e-2, hvp="gradients", precision="training")
    assert found.value == pytest.approx(true, rel=0.3)  # rough, as is to be expected, but no zero


def test_gradient_scaling_changes_nothing_of_the_values() -> None:
    def run(scaled: bool, measure: bool = True) -> tuple[list[Tensor], list[gfs.Measurement]]:
        model, loss = make(), autocast(torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        config = gfs.GFSConfig(tier="gfs", every=2, max_overhead=None)
        monitor = gfs.StabilityMonitor(model, optimizer, config)
        found = []
        for _ in range(6):
            optimizer.zero_grad()
            value = loss(model, batch())
            scaler.scale(value).backward()
            if measure and (m := monitor.step(lambda b: loss(model, b), batch(), loss=value)):
                found.append(m)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in model.parameters()], found

    weights, found = run(True)
    assert all(torch.equal(a, b) for a, b in zip(weights, run(True, measure=False)[0], strict=True))
    for a, b in zip(found, run(False)[1], strict=True):
        assert a.stability_ratio is None or a.stability_ratio == pytest.approx(b.stability_ratio, rel=1e-2)
    assert sum(m.gfs_sharpness is not None for m in found) == 3
