from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from tests.bitwise import assert_same


class Meter:
    def __init__(self) -> None:
        self.total, self.values = 0.0, []


class Messy(nn.Module):
    """Leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4))
        self.outs, self.calls, self.by_phase, self.meter = [], 0, {"train": [0.0]}, Meter()
        self.running = torch.zeros(3)
        self.stop_at: int | None = None
        self.error: type[BaseException] = RuntimeError

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.outs.append(float(loss.detach()))
        self.by_phase["train"].append(random.random())
        self.by_phase["new"] = [np.random.rand()]
        self.meter.total += 1.0
        self.meter.values.append(1)
        self.running += 1
        self.calls += 1
        self.net[1].eval() if self.calls > 100 else None
        Messy.evaluations += 1
        if self.stop_at is not None and Messy.evaluations >= self.stop_at:
            self.net[4].weight.data.mul_(2)
            raise self.error("stop")
        return loss

    evaluations = 0


def everything(model: Messy) -> tuple:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        [m.training for m in model.modules()],
        [list(model.outs), model.calls, {k: list(v) for k, v in model.by_phase.items()}],
        (model.meter.total, list(model.meter.values), model.running.clone(), id(model.running)),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 12, generator=generator), torch.randint(4, (20,), generator=generator)


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
@pytest.mark.parametrize(("stop_at", "error"), [(None, RuntimeError), (2, RuntimeError), (3, KeyboardInterrupt)])
def test_a_measurement_leaves_no_trace(hvp: str, stop_at: int | None, error: type[BaseException]) -> None:
    model = Messy()
    model(batch()).backward()
    hooked: list[int] = []
    model.net[0].weight.register_hook(lambda g: hooked.append(1) or g * 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.stop_at, model.error, Messy.evaluations = stop_at, error, 0
    before = everything(model)
    if stop_at is None:
        measurement = gfs.stability(model, lambda m, b: m(b), batch(), optimizer, hvp=hvp)
        assert measurement.gfs_sharpness is not None
    else:
        with pytest.raises(error, match="stop"):
            gfs.stability(model, lambda m, b: m(b), batch(), optimizer, hvp=hvp)
    after = everything(model)
    assert_same(before, after)
    assert all(a[0] is b[0] for a, b in zip(before[1], after[1], strict=True))
    assert hooked == []
    model.stop_at = None
    model(batch()).backward()
    assert hooked == [1]


def test_every_evaluation_is_the_same_function() -> None:
    model = Messy()
    with gfs.Isolation(model) as isolation:
        objective = gfs.Objective(model, lambda m, b: m(b), [batch()], isolation=isolation)
        assert len({objective.loss() for _ in range(3)}) == 1
        first, second = objective.gradient()[1], objective.gradient()[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_large_attribute_changed_in_place_is_named() -> None:
    model = nn.Linear(3, 1)
    model.huge = torch.zeros(2_000_000)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        m.huge.add_(1)
        return m(x).square().mean()

    measurement = gfs.stability(model, loss_fn, torch.ones(2, 3), torch.optim.SGD(model.parameters(), 0.1))
    assert any("huge" in reason and "too large to be put back" in reason for reason in measurement.reasons)


def test_compiled_code_is_left_to_training() -> None:
    """A probe of another shape would have it compiled again; a CUDA graph that it holds would be disturbed."""
    compiled, ran = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compiled.append(graph)
        return lambda *args: ran.append(1) or graph.forward(*args)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = torch.compile(model, backend=backend)
    x = torch.randn(12, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="gfs", every=1, probe_size=5, max_overhead=None, running_every=1)
    monitor = gfs.StabilityMonitor(run, optimizer, config)
    for _ in range(2):
        run(x).square().mean().backward()
        before = (len(compiled), len(ran))
        measurement = monitor.step(lambda b: run(b).square().mean(), x)
        assert measurement.gfs_sharpness > 0
        assert (len(compiled), len(ran)) == before
        optimizer.step()
    assert before == (1, 2)


def test_an_output_that_the_module_keeps_is_the_same_again() -> None:
    """With its graph: rebinding the attribute is enough, and all that can be done."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Linear(3, 1), torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.net(x)
            return self.last.square().mean()

    model = Keeps()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3))
    kept = model.last
    assert gfs.stability(model, lambda m, b: m(b), torch.ones(2, 3), optimizer).sharpness is not None
    assert model.last is kept
    kept.sum().backward()  # its graph is still there
    assert model.net.bias.grad.item() == 2.0
