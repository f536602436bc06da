"""Sparse gradients, complex weights, points without a second derivative: the plain model's values, or a refusal."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from tests.core.options import tuned
from tests.core.reference import dense_hessian

EVERY: dict[str, Any] = {"every": 1, "running_every": 1, "max_overhead": None, "alarm": "off"}
ALONG = {"directional": 1}


class Bag(nn.Module):
    """Ids, some of them twice in an example, to three logits; ids above 24 are never seen."""

    def __init__(self, sparse: bool, bag: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.embed, self.out, self.bag = kind(30, 4, sparse=sparse), nn.Linear(4, 3), bag
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.out(torch.tanh(h if self.bag else h.mean(1)))


def ids(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(25, (16, 5), generator=generator), torch.randint(3, (16,), generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    loss=loss_fn,
    tol: float = 1e-6,
    parts: int | None = None,
    **options: Any,
) -> tuple[list[gfs.Measurement], list[str]]:
    config = gfs.GFSConfig(**{**EVERY, "tier": "gfs", **options}, strict=True)
    monitor = tuned(
        gfs.StabilityMonitor(model, optimizer, config), beside=ALONG, parts=parts, whole=parts is None, tol=tol
    )
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            found.append(monitor.step(lambda b: loss(model, b), batch))
            optimizer.step()
    return found, [str(w.message) for w in told if issubclass(w.category, gfs.GFSWarning)]


def assert_same(found: list[gfs.Measurement], expected: list[gfs.Measurement], error: float) -> None:
    for f, e in zip(found, expected, strict=True):
        got, want = f.values(), e.values()
        for name in ("seconds", "overhead", "hvps", "grad_evals"):  # the last two go by the last bit of a residual
            got.pop(name), want.pop(name)
        bounds = [v.pop("residual") for v in (got, want)]  # below `tol` it goes by the last bit too
        assert bounds[0] == pytest.approx(bounds[1], rel=error, abs=1e-6)
        assert got == pytest.approx(want, rel=error, nan_ok=False)


SPARSE = {
    "sgd": lambda p: torch.optim.SGD(p, 0.3),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize(
    ("kind", "hvp", "parts"), [("sgd", "auto", None), ("momentum", "gradients", 4), ("adagrad", "auto", None)]
)
def test_sparse_gradients_give_the_values_of_dense_ones(kind: str, hvp: str, parts: int | None, bag: bool) -> None:
    batches = [ids(s) for s in range(10)]
    runs = []
    for sparse in (True, False):
        model = Bag(sparse, bag)
        optimizer = SPARSE[kind](model.parameters())
        runs.append((train(model, optimizer, batches, hvp=hvp, parts=parts, tol=1e-4), model))
    ((found, told), sparse_model), ((expected, told_of_dense), dense_model) = runs
    assert_same(found, expected, 1e-6)
    assert told == told_of_dense
    assert [m.gfs_sharpness is not None for m in found[1:]] == [True] * 9
    assert [m.directional_sharpness is not None for m in found[1:]] == [True] * 9
    assert [m.running_sharpness is not None for m in found[8:]] == [True] * 2  # settled by eight products
    for a, b in zip(sparse_model.parameters(), dense_model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)  # trained alike


def test_the_ratio_of_sparse_adam_is_that_of_adam_where_every_row_is_in_the_batch() -> None:
    x, y = torch.arange(30).reshape(6, 5), torch.arange(6) % 3
    ratios = []
    for sparse in (True, False):
        model = Bag(sparse, bag=False)
        model.out.requires_grad_(False)
        optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(model.embed.parameters(), 0.01, eps=1e-14)
        found, _ = train(model, optimizer, [(x, y)] * 4, tier="sharpness")
        ratios.append([m.stability_ratio for m in found])
    assert ratios[0][0] is ratios[1][0] is None  # no second moments yet
    assert ratios[0][1:] == pytest.approx(ratios[1][1:], rel=1e-6)


@pytest.mark.filterwarnings("ignore:gfs:gfs_core.GFSWarning")
@pytest.mark.parametrize("functional", [False, True])
def test_an_embedding_that_rescales_its_rows_is_put_back_and_it_is_told(functional: bool) -> None:
    """A difference crosses the ball that the rows are held in, and the loss itself moves the weights back."""
    model = Bag(sparse=False, bag=False)
    if functional:
        model.embed.forward = lambda x: nn.functional.embedding(x, model.embed.weight, max_norm=1.0)
    else:
        model.embed.max_norm = 1.0
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    found, [text] = train(model, optimizer, [ids(s) for s in range(3)], tier="sharpness", tol=1e-2)
    assert "weights that it rescales" in text
    assert [(m.sharpness is None, m.residual) for m in found] == [(False, None)] * 3
    before = [p.detach().clone() for p in model.parameters()]
    gfs.sharpness(model, loss_fn, ids(9), hvp="gradients")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Spectral(nn.Module):
    """Linear layers on complex numbers and a Fourier transform between them, three logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 5, dtype=torch.complex128, generator=generator) / 3)
        self.b = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128, generator=generator) / 3)
        self.c = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.c

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weights()
        return (torch.fft.fft(torch.tanh(x.to(a.dtype) @ a)) @ b).abs() * c


class RealSpectral(Spectral):
    """The same with real weights, the last axis of which holds real and imaginary part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.view_as_real(t.detach()).clone()) for t in (self.a, self.b))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.view_as_complex(self.a), torch.view_as_complex(self.b), self.c


def signals(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


COMPLEX = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("kind", COMPLEX)
def test_complex_weights_give_the_values_of_their_real_and_imaginary_parts(kind: str) -> None:
    batches = [signals(s) for s in range(8 if kind == "radam" else 4)]
    runs = []
    for model in (Spectral(), RealSpectral()):
        runs.append((train(model, COMPLEX[kind](model.parameters()), batches), model))
    ((found, told), model), ((expected, told_of_real), real) = runs
    assert_same(found, expected, 1e-6)
    assert told == told_of_real
    assert [m.stability_ratio is not None for m in found[1:]] == [True] * (len(batches) - 1)
    for a, b in zip(model.parameters(), real.parameters(), strict=True):
        assert torch.allclose(torch.view_as_real(a) if a.is_complex() else a, b, rtol=0, atol=1e-12)


def test_the_sharpness_of_complex_weights_is_that_of_the_dense_hessian() -> None:
    real = RealSpectral()
    truth = torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(real, signals(0)), list(real.parameters()), False))[-1]
    for hvp, error in (("exact", 1e-8), ("gradients", 1e-4)):
        assert gfs.sharpness(Spectral(), loss_fn, signals(0), tol=1e-6, hvp=hvp).value == pytest.approx(
            truth.item(), rel=error
        )


def test_a_measurement_of_complex_weights_is_saved_and_goes_on() -> None:
    """Warm vectors and the weights before a step are real views, and fit the complex weights again."""

    def made() -> tuple[nn.Module, gfs.StabilityMonitor]:
        model = Spectral()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**EVERY, tier="sharpness", strict=True))
        return model, tuned(monitor, beside=ALONG)

    model, monitor = made()
    for step in range(2):
        monitor.step(lambda b: loss_fn(model, b), signals(step))
    state = copy.deepcopy(monitor.state_dict())
    other, resumed = made()
    resumed.load_state_dict(state)
    first = monitor.step(lambda b: loss_fn(model, b), signals(2))
    second = resumed.step(lambda b: loss_fn(other, b), signals(2))
    assert_same([second], [first], 1e-12)
    assert second.hvps == first.hvps  # it started warm


class Lengths(nn.Module):
    """Embeds, and looks at how long an embedding is, or how far from the first one of its example."""

    def __init__(self, far: bool, padding: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.far = nn.Embedding(25, 4, padding_idx=0), nn.Linear(5, 3), far
        if not padding:
            self.embed.padding_idx = None  # the row of zeros has a gradient of its own
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        length = (h - h[:, :1]).norm(dim=-1) if self.far else h.square().sum(-1).sqrt()
        return self.out(torch.tanh(length))


def with_padding(step: int) -> tuple[Tensor, Tensor]:
    x, y = ids(step)
    return x.masked_fill(x < 3, 0), y


@pytest.mark.parametrize("far", [False, True])
def test_where_the_second_derivative_is_infinite_products_come_from_gradients_and_it_is_told_once(far: bool) -> None:
    model = Lengths(far, padding=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [with_padding(s) for s in range(5)]
    found, told = train(model, optimizer, batches, tier="sharpness", tol=1e-2)
    [text] = told
    assert "products come from differences of gradients" in text
    assert "not finite at these weights" in text
    smooth = Lengths(far, padding=True)  # the same but for the root of a number that is not quite zero
    smooth.forward = lambda x: smooth.out(torch.tanh(_length(smooth, x)))
    truth, _ = train(smooth, torch.optim.SGD(smooth.parameters(), 0.1), batches, tier="sharpness", tol=1e-4)
    for m, t in zip(found, truth, strict=True):
        assert m.sharpness == pytest.approx(t.sharpness, rel=3e-3)


def _length(model: Lengths, x: Tensor) -> Tensor:
    h = model.embed(x)
    h = h - h[:, :1] if model.far else h
    square = h.square().sum(-1)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


def test_a_gradient_that_is_not_finite_is_refused_by_the_name_of_its_weight() -> None:
    with pytest.raises(gfs.MeasurementError, match=r"the gradient of `embed.weight` is not finite in 4 of 100 entries"):
        gfs.sharpness(Lengths(far=False, padding=False), loss_fn, with_padding(0))


def test_exact_products_that_are_not_finite_are_refused() -> None:
    with pytest.raises(gfs.MeasurementError, match=r"hvp='exact' was asked for.*not finite at these weights"):
        gfs.sharpness(Lengths(far=True, padding=True), loss_fn, with_padding(0), hvp="exact")
