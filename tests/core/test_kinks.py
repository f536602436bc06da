"""Weights at which the gradient jumps: no value, and that is said; what is only steep, or flat, is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gfs_core as gfs
from gfs_core.linalg.vectors import random_like
from gfs_core.signals.lab import Lab
from tests.core.options import tuned
from tests.core.reference import dense_hessian
from tests.core.test_symmetry import ORDINARY
from tests.core.test_unusual_weights import ALONG, EVERY, ids, loss_fn

ANCHOR = torch.tensor([1.0, -2.0, 0.5, 0.3])
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda h: h.norm(dim=-1, keepdim=True),
    "root": lambda h: h.square().sum(-1, keepdim=True).sqrt(),
    "normalize": lambda h: F.normalize(h, dim=-1)[..., :1],
    "cosine": lambda h: F.cosine_similarity(h, ANCHOR.to(h).expand_as(h), dim=-1)[..., None],
    "distance": lambda h: F.pairwise_distance(h, torch.zeros_like(h), eps=0.0)[..., None],
    "abs": lambda h: h.abs().sum(-1, keepdim=True),
    "relu": lambda h: h.relu().sum(-1, keepdim=True),
}


class Read(nn.Module):
    """Embeds, one row of zeros among them, and reads how long an embedding is or where it leads to."""

    def __init__(self, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.read = nn.Embedding(25, 4), nn.Linear(1, 3), READS[how]
        nn.init.zeros_(self.embed.weight.data[7])
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(torch.tanh(self.read(h) + h[..., 1:2]).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("how", "hvp"),
    [("norm", "auto"), ("normalize", "auto"), ("cosine", "auto"), ("distance", "auto"), ("normalize", "gradients"),
     ("root", "gradients"), ("abs", "gradients"), ("relu", "gradients")],
)  # fmt: skip
def test_a_kink_at_the_present_weights_is_refused_as_one(how: str, hvp: str, dtype: torch.dtype) -> None:
    with pytest.raises(gfs.MeasurementError, match="the loss has a kink at the present weights"):
        gfs.sharpness(Read(how, dtype), loss_fn, ids(0), hvp=hvp)


@pytest.mark.parametrize("hvp", ["auto", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["abs", "relu"])
def test_exact_products_take_the_side_of_the_kink_that_training_takes(how: str, dtype: torch.dtype, hvp: str) -> None:
    model = Read(how, dtype)
    truth = torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(model, ids(0)), list(model.parameters())))[-1]
    found = gfs.sharpness(model, loss_fn, ids(0), hvp=hvp, tol=1e-3)
    assert (found.value, found.converged) == (pytest.approx(truth.item(), rel=1e-3), True)


@pytest.mark.parametrize("how", ["norm", "normalize", "cosine"])
def test_it_is_told_once_and_measured_exactly_where_training_has_left_the_kink(how: str) -> None:
    model = Read(how, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**EVERY, tier="sharpness"))
    tuned(monitor, beside=ALONG, tol=1e-6)
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(4):
            if step == 2:
                nn.init.normal_(model.embed.weight.data[7], generator=torch.Generator().manual_seed(1))
            loss_fn(model, ids(step)).backward()
            found.append(monitor.step(lambda b: loss_fn(model, b), ids(step)))
            optimizer.step()
            optimizer.zero_grad()
    truth = [
        torch.linalg.eigvalsh(dense_hessian(lambda s=s: loss_fn(model, ids(s)), list(model.parameters())))[-1]
        for s in (2, 3)
    ]
    assert found[:2] == [None, None]
    assert [m.sharpness for m in found[2:]] == [pytest.approx(t.item(), rel=1e-5) for t in truth]
    [text] = {str(w.message) for w in told if issubclass(w.category, gfs.GFSWarning)}
    assert "the loss has a kink at the present weights" in text


class Sparse(Read):
    """A penalty on how long each row is makes whole rows zero. Id 20 is zero and stays so while it is not seen."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("norm", dtype)
        self.read = lambda h: h[..., :1]
        nn.init.normal_(self.embed.weight.data[7], generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.embed.weight.data[20])


def penalised(model: Sparse, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss_fn(model, batch) + 0.1 * model.embed.weight.norm(dim=1).mean()


def left_out(model: Sparse, batch: tuple[Tensor, Tensor]) -> Tensor:
    kept = [i for i in range(25) if i != 20]
    return loss_fn(model, batch) + 0.1 * model.embed.weight[kept].norm(dim=1).sum() / 25


def without_20(step: int) -> tuple[Tensor, Tensor]:
    x, y = ids(step)
    return torch.where(x == 20, 3, x), y


@pytest.mark.parametrize("hvp", ["auto", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_a_norm_keeps_at_zero_are_left_out(dtype: torch.dtype, hvp: str) -> None:
    model = Sparse(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tol = 1e-2 if dtype == torch.float32 else 1e-5
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**EVERY, tier="sharpness", hvp=hvp))
    tuned(monitor, beside=ALONG, parts=1, tol=tol)
    found, truth = [], []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(10):
            optimizer.zero_grad()
            penalised(model, without_20(step)).backward()
            hessian = dense_hessian(lambda s=step: left_out(model, without_20(s)), list(model.parameters()))
            truth.append(torch.linalg.eigvalsh(hessian)[-1].item())
            found.append(monitor.step(lambda b: penalised(model, b), without_20(step)))
            optimizer.step()
    assert not model.embed.weight[20].any()
    assert [m.sharpness for m in found] == [pytest.approx(t, rel=2 * tol) for t in truth]
    assert all(m.running_sharpness is not None for m in found[8:])
    texts = [str(w.message) for w in told if issubclass(w.category, gfs.GFSWarning)]
    assert sum("4 weights are zero at a kink of the loss" in text for text in texts) == 1
    x, y = ids(0)
    x[0, 0] = 20
    with pytest.raises(gfs.MeasurementError, match="the loss has a kink at the present weights"):
        gfs.sharpness(model, penalised, (x, y), hvp=hvp)


def test_a_kink_in_other_batches_than_the_first_is_noticed() -> None:
    model = Read("normalize", torch.float64)
    x, y = ids(0)
    free = (torch.where(x == 7, 3, x), y)
    with gfs.StateSnapshot(model) as isolation:
        lab = Lab(gfs.Objective(model, loss_fn, [(x, y)], isolation=isolation), "gradients")
        start = random_like(lab.objective.weights, torch.Generator().manual_seed(0))
        with lab.on([free]):
            lab.hessian(start)
        with pytest.raises(gfs.MeasurementError, match="the loss has a kink at the present weights"):
            lab.hessian(start)
        with lab.on([free]):  # and it is not taken for one that has it
            lab.hessian(start)


def test_a_kink_beside_the_first_direction_is_noticed() -> None:
    model = Read("normalize", torch.float64)
    with gfs.StateSnapshot(model) as isolation:
        objective = gfs.Objective(model, loss_fn, [ids(0)], isolation=isolation)
        hessian = gfs.Hessian(objective, "gradients")
        along = random_like(objective.weights, torch.Generator().manual_seed(0))
        along[0][7] = 0.0  # as a step that has not moved that row
        hessian(along)
        with pytest.raises(gfs.MeasurementError, match="the loss has a kink at the present weights"):
            hessian(random_like(objective.weights, torch.Generator().manual_seed(1)))


class Point(nn.Module):
    """Weights alone; the loss makes of them what it likes."""

    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(at.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_minimum_and_steep_smooth_losses_are_no_kinks(dtype: torch.dtype) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x @ w

    def least_squares(model: Point, batch: Tensor) -> Tensor:
        return 0.5 * (x.to(dtype) @ model.w - y.to(dtype)).square().mean()

    truth = torch.linalg.eigvalsh(x.T @ x / 40)[-1].item()
    for off in (0.0, 1e-6, 1e-3):
        found = gfs.sharpness(Point((w + off).to(dtype)), least_squares, x, hvp="gradients")
        assert found.value == pytest.approx(truth, rel=2e-2)
    for steep in (1e1, 1e2):  # curvature steep² at scale 1 / steep
        found = gfs.sharpness(Point(w.to(dtype)), lambda m, b, s=steep: -(s * m.w).cos().mean(), x, hvp="gradients")
        assert found.value == pytest.approx((steep * steep * (steep * w).cos()).max().item() / 6, rel=2e-2)


@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_makes_of_differences_is_no_kink(seed: int) -> None:
    make, loss, batch = ORDINARY["cnn, bfloat16"]
    torch.manual_seed(seed)
    model = make()
    with gfs.StateSnapshot(model) as isolation:
        hessian = gfs.Hessian(gfs.Objective(model, loss, [batch], isolation=isolation), "gradients")
        hessian(random_like(hessian.objective.weights, torch.Generator().manual_seed(0)))
    assert hessian.error > 0.05
