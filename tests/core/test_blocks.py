"""Blocks of the Hessian: which weights share one, and the running estimate with a direction in each."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.linalg.blocks import RunningBlocks, uncoupled
from gfs_core.linalg.power import Sample
from tests.core.options import tuned

Batch = tuple[Tensor, Tensor]


def data(count: int = 64) -> Batch:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1]).tanh()[:, None]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


class Networks(nn.Module):
    """A sum of losses of networks; ``shared`` puts one layer in front of all."""

    def __init__(self, count: int, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.front = nn.Linear(6, 6) if shared else nn.Identity()
        self.members = nn.ModuleList(net() for _ in range(count))
        self.unused = nn.Parameter(torch.zeros(100))
        self.scales, self.together = [1.0] * count, 0.0

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        out = [m(self.front(x)) for m in self.members]
        each = [s * (o - y).square().mean() for s, o in zip(self.scales, out, strict=True)]
        return torch.stack(each).sum() + self.together * torch.stack(out).mean(0).square().mean()


class Products:
    """v ↦ H·v, counted."""

    def __init__(self, model: Networks) -> None:
        self.model, self.weights, self.count = model, list(model.parameters()), 0

    def __call__(self, vector: list[Tensor]) -> list[Tensor]:
        self.count += 1
        gradient = torch.autograd.grad(
            self.model.loss(data()), self.weights, create_graph=True, allow_unused=True, materialize_grads=True
        )
        along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        return list(torch.autograd.grad(along, self.weights, allow_unused=True, materialize_grads=True))

    def gradient(self, _: bool = True) -> list[Tensor]:
        grads = torch.autograd.grad(self.model.loss(data()), self.weights, allow_unused=True, materialize_grads=True)
        return list(grads)


def turn(estimate: RunningBlocks, products: Products, count: int) -> None:
    for _ in range(count):
        estimate.average(estimate.update(Sample(products, products.weights, None, products.gradient)))


def places(model: Networks, of: nn.Module) -> list[int]:
    held = {id(p) for p in of.parameters()}
    return [i for i, p in enumerate(model.parameters()) if id(p) in held]


@pytest.mark.parametrize("count", [2, 3])
def test_networks_that_share_no_weight_are_blocks_of_their_own(count: int) -> None:
    model = Networks(count)
    products = Products(model)
    blocks = uncoupled(Sample(products, products.weights))
    for member in model.members:
        mine = places(model, member)
        assert [b for b in blocks if set(mine) & set(b)] == [b for b in blocks if set(mine) <= set(b)]
    held = [next(k for k, b in enumerate(blocks) if places(model, m)[0] in b) for m in model.members]
    assert len(set(held)) == count
    assert sorted(i for b in blocks for i in b) == list(range(len(products.weights)))


def test_weights_behind_one_layer_share_a_block_and_one_product_tells_it() -> None:
    model = Networks(3, shared=True)
    model.unused.requires_grad_(False)
    products = Products(model)
    products.weights = [p for p in model.parameters() if p.requires_grad]
    assert uncoupled(Sample(products, products.weights)) == [list(range(len(products.weights)))]
    assert products.count <= 2


def test_more_blocks_than_are_looked_for_share_the_last() -> None:
    model = Networks(5)
    products = Products(model)
    blocks = uncoupled(Sample(products, products.weights), most=3)
    assert len(blocks) == 3
    assert sorted(i for b in blocks for i in b) == list(range(len(products.weights)))


def true(model: Networks) -> float:
    return gfs.sharpness(model, lambda m, b: m.loss(b), data(), tol=1e-6).value


@pytest.mark.parametrize("factor", [1.5, 2.0, 10.0])
def test_a_network_that_overtakes_is_found_within_ten_measurements(factor: float) -> None:
    model = Networks(3)
    model.unused.requires_grad_(False)
    tops = []
    for member in range(3):
        model.scales = [float(i == member) for i in range(3)]
        tops.append(true(model))
    model.scales = [1 / tops[0], 0.5 / tops[1], 0.5 / tops[2]]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-9)
    config = gfs.GFSConfig(tier="running", every=1, max_overhead=None, alarm="off")
    monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), parts=16)
    before = [monitor.step(model.loss, data()) for _ in range(30)]
    assert before[-1].running_sharpness == pytest.approx(1.0, rel=0.15)  # on parts of the data
    model.scales[2] = factor / tops[2]
    found = [monitor.step(model.loss, data()) for _ in range(10)]
    assert found[-1].running_sharpness > 0.85 * factor
    products = sum(m.hvps for m in found)
    assert products <= 1.1 * 14  # ten, and one more for each pair


def test_blocks_that_grow_together_become_one() -> None:
    model = Networks(2)
    products = Products(model)
    estimate = RunningBlocks()
    turn(estimate, products, 20)
    assert len(estimate.blocks) == 2
    model.together = 3.0
    turn(estimate, products, 100)
    assert len(estimate.blocks) == 1
    anew = RunningBlocks()
    turn(anew, products, 100)
    assert len(anew.blocks) == 1
    assert estimate.value == pytest.approx(anew.value, rel=0.1)  # other random vectors are mixed in
    assert 0.8 * true(model) < estimate.value <= true(model)  # below it by what is mixed into the direction


def test_saved_and_loaded_it_goes_on_the_same() -> None:
    model = Networks(2)
    products = Products(model)
    estimate = RunningBlocks()
    for _ in range(6):
        estimate.average(estimate.update(Sample(products, products.weights, products, products.gradient)))
    stored = io.BytesIO()
    torch.save(estimate.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    other = RunningBlocks()
    other.load_state_dict(copy.deepcopy(state))
    for each in (estimate, other):
        turn(each, products, 5)
    assert estimate.value == other.value
    assert all(torch.equal(a, b) for a, b in zip(estimate.vector, other.vector, strict=True))
    state["blocks"][0] = state["blocks"][0][1:]
    with pytest.raises(ValueError, match="every weight once"):
        RunningBlocks().load_state_dict(state)


def test_a_direction_that_is_zero_in_a_block_grows_again() -> None:
    model = Networks(2)
    products = Products(model)
    estimate = RunningBlocks()
    turn(estimate, products, 3)
    for i in places(model, model.members[1]):
        estimate.vector[i].zero_()
    model.scales[1] = 10.0
    turn(estimate, products, 25)
    assert estimate.value == pytest.approx(true(model), rel=0.05)
