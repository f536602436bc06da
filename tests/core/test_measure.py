from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs


class Quartic(nn.Module):
    """L = Σ cᵢwᵢ⁴/4: the flow dwᵢ/dt = −pᵢcᵢwᵢ³ has the solution wᵢ(0) / √(1 + 2pᵢcᵢwᵢ(0)²t)."""

    def __init__(self) -> None:
        super().__init__()
        self.c = [torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([9.0, 0.5], dtype=torch.float64)]
        self.w = nn.ParameterList(
            [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in ([2.0, 1.0], [0.5, 3.0])]
        )

    def loss(self) -> torch.Tensor:
        return sum((c * w**4).sum() for c, w in zip(self.c, self.w, strict=True)) / 4

    def top_after(self, p: list[torch.Tensor], time: float) -> float:
        ends = [
            w.detach() / (1 + 2 * p * c * w.detach() ** 2 * time).sqrt()
            for p, c, w in zip(p, self.c, self.w, strict=True)
        ]
        return torch.cat([3 * c * p * w**2 for p, c, w in zip(p, self.c, ends, strict=True)]).max().item()


def measured(model: Quartic, optimizer: torch.optim.Optimizer) -> gfs.Measurement:
    options = {"tol": 1e-6, "rtol": 1e-5, "horizon": 6.0}
    return gfs.stability(model, lambda m, _: m.loss(), torch.zeros(1), optimizer, **options)


def test_the_short_flow_goes_in_the_coordinates_of_adam() -> None:
    model = Quartic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=0.1)
    model.loss().backward()
    optimizer.step()
    p = [1 / ((optimizer.state[w]["exp_avg_sq"] / 0.001).sqrt() + 0.1) for w in model.w]
    found = measured(model, optimizer)
    assert found.preconditioned_sharpness == pytest.approx(model.top_after(p, 0.0), rel=1e-6)
    assert found.gfs_sharpness == pytest.approx(model.top_after(p, 6 * 0.02), rel=1e-5)
    assert found.gfs_sharpness < 0.99 * found.preconditioned_sharpness


def test_the_short_flow_goes_at_the_rate_of_each_group() -> None:
    model = Quartic()
    optimizer = torch.optim.SGD([{"params": [model.w[0]], "lr": 0.02}, {"params": [model.w[1]], "lr": 0.005}])
    p = [torch.ones(2, dtype=torch.float64), torch.full((2,), 0.25, dtype=torch.float64)]
    found = measured(model, optimizer)
    assert found.threshold == pytest.approx(2 / 0.02)
    assert found.sharpness == pytest.approx(13.5)
    assert found.preconditioned_sharpness == pytest.approx(12.0)
    assert found.gfs_sharpness == pytest.approx(model.top_after(p, 6 * 0.02), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Rprop])
def test_the_full_solution_needs_no_threshold(kind: type[torch.optim.Optimizer]) -> None:
    """L = ½(w₀w₁ − 1)²: the flow conserves w₀² − w₁² = 3, and ends at sharpness √(3² + 4)."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    optimizer = kind(model.parameters(), lr=0.01)
    found = gfs.stability(
        model, lambda m, _: 0.5 * (m.weight.prod() - 1) ** 2, torch.zeros(1), optimizer, tier="gfs_full", rtol=1e-4
    )
    assert found.threshold is None
    assert found.gfs_sharpness_full == pytest.approx(13**0.5, rel=1e-4)


def test_a_list_is_several_batches_and_never_one_by_mistake() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])
    model = torch.nn.Linear(1, 1, bias=False)

    def loss_fn(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    batch = next(iter(DataLoader(TensorDataset(x, y), 2)))
    assert isinstance(batch, list)
    for calls in (gfs.sharpness, partial(gfs.gfs_sharpness, learning_rate=0.1)):
        with pytest.raises(gfs.ConfigError, match=r"holds 2 bare tensors; if it is one batch.*write `\[batch\]`"):
            calls(model, loss_fn, batch)
        with pytest.raises(gfs.MeasurementError, match="the probe is empty; give at least one batch"):
            calls(model, loss_fn, [])
    for given in ([batch], tuple(batch), [batch, batch]):
        assert gfs.sharpness(model, loss_fn, given).value == pytest.approx(2.5)  # mean of x²
    assert gfs.sharpness(model, lambda m, b: m(b).square().mean() / 2, [x]).value == pytest.approx(2.5)
