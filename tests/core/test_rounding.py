"""Losses that round their weights or activations, with a straight-through gradient: the curvature is that there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gfs_core as gfs
from gfs_core.loss.rounding import steps
from tests.core.reference import dense_hessian
from tests.core.test_unusual_weights import train

Quantise = Callable[[Tensor, int], Tensor]
X = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (48,), generator=torch.Generator().manual_seed(1))


def step_of(w: Tensor, bits: int) -> Tensor:
    return w.detach().abs().max() / (2 ** (bits - 1) - 1)


def detached(w: Tensor, bits: int) -> Tensor:
    step = step_of(w, bits)
    return w + ((w / step).round() * step - w).detach()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, step: Tensor) -> Tensor:
        return (w / step).round() * step

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def function(w: Tensor, bits: int) -> Tensor:
    return Straight.apply(w, step_of(w, bits))


def torchs_own(w: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    return torch.fake_quantize_per_tensor_affine(w, float(step_of(w, bits)), 0, -most, most)


def integers(w: Tensor, bits: int) -> Tensor:
    """As with weights that are kept in int8."""
    step = step_of(w, bits)
    return w + ((w / step + 0.5 * w.sign().detach()).to(torch.int8).to(w.dtype) * step - w).detach()


QUANTISE: dict[str, Quantise] = {"detached": detached, "function": function, "torch": torchs_own, "int8": integers}


def mean_size(w: Tensor) -> Tensor:
    return w.detach().abs().mean()


def binary(w: Tensor, bits: int) -> Tensor:
    return w + (torch.where(w > 0, mean_size(w), -mean_size(w)) - w).detach()


def ternary(w: Tensor, bits: int) -> Tensor:
    half = mean_size(w) / 2
    return w + (((w > half).to(w.dtype) - (w < -half).to(w.dtype)) * mean_size(w) - w).detach()


def codebook(w: Tensor, bits: int) -> Tensor:
    levels = torch.linspace(-0.3, 0.3, 2**bits, dtype=w.dtype)
    return w + (levels[(w.detach()[..., None] - levels).abs().argmin(-1)] - w).detach()


COMPARE: dict[str, Quantise] = {"binary": binary, "ternary": ternary, "codebook": codebook}


class Quantised(nn.Linear):
    def __init__(self, inputs: int, outputs: int, quantise: Quantise, bits: int) -> None:
        super().__init__(inputs, outputs)
        self.quantise, self.bits = quantise, bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantise(self.weight, self.bits), self.bias)


def network(quantise: Quantise, bits: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(12, 24, quantise, bits), nn.Tanh(), Quantised(24, 4, quantise, bits))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(50):
        optimizer.zero_grad()
        loss_fn(model, (X, Y)).backward()
        optimizer.step()
    return model


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def at_rounded(model: nn.Sequential) -> float:
    """The largest eigenvalue of the same network, not quantised, at the rounded weights."""
    plain = copy.deepcopy(model)
    for layer in (plain[0], plain[2]):
        layer.weight.data = layer.quantise(layer.weight, layer.bits).detach()
        layer.quantise = lambda w, bits: w
    return torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(plain, (X, Y)), list(plain.parameters())))[-1].item()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("how", QUANTISE)
def test_the_sharpness_is_that_at_the_rounded_weights(how: str, bits: int) -> None:
    model = network(QUANTISE[how], bits)
    for hvp in ("auto", "exact"):
        with pytest.warns(gfs.GFSWarning, match="the loss rounds its weights or activations"):
            found = gfs.sharpness(model, loss_fn, (X, Y), hvp=hvp, tol=1e-3)
        assert (found.value, found.converged) == (pytest.approx(at_rounded(model), rel=1e-3), True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", COMPARE)
def test_weights_that_comparisons_choose_are_rounded_too(how: str, seed: int) -> None:
    model = network(COMPARE[how], 2)
    with pytest.warns(gfs.GFSWarning, match="the loss rounds its weights or activations"):
        found = gfs.sharpness(model, loss_fn, (X, Y), tol=1e-3, seed=seed)
    assert (found.value, found.converged) == (pytest.approx(at_rounded(model), rel=2e-3), True)


def guarded(w: Tensor, bits: int) -> Tensor:
    """Rows of length 1, but no division by 0."""
    length = w.norm(dim=1, keepdim=True)
    return w / torch.where(length > 0, length, torch.ones_like(length))


@pytest.mark.filterwarnings("error::gfs_core.GFSWarning")
@pytest.mark.parametrize("hvp", ["auto", "exact", "gradients"])
def test_a_comparison_that_guards_a_division_rounds_nothing(hvp: str) -> None:
    model = network(guarded, 2).double()
    batch = (X.double(), Y)
    truth = torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(model, batch), list(model.parameters())))[-1]
    assert gfs.sharpness(model, loss_fn, batch, hvp=hvp, tol=1e-3).value == pytest.approx(truth.item(), rel=2e-3)


class HiddenStraight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, step: Tensor) -> Tensor:
        return (w / step).round() * step

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clone(), None


class HiddenTernary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        return ternary(w, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.clone()


def hidden(w: Tensor, bits: int) -> Tensor:
    return HiddenStraight.apply(w, step_of(w, bits))


def hidden_activations(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model[2](hidden(torch.tanh(model[0](batch[0])), 3)), batch[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "quantise", "hvp", "why"),
    [
        ("plain", detached, "gradients", "hvp='gradients' was asked for"),
        ("plain", hidden, "auto", "this model has none"),
        ("plain", ternary, "gradients", "hvp='gradients' was asked for"),
        ("plain", codebook, "gradients", "hvp='gradients' was asked for"),
        ("plain", lambda w, bits: HiddenTernary.apply(w), "auto", "this model has none"),
        ("plain", hidden, "exact", "this model has none"),
        ("activations", lambda w, bits: w, "auto", "this model has none"),
    ],
)
def test_differences_of_gradients_are_refused(loss: str, quantise: Quantise, hvp: str, why: str, seed: int) -> None:
    model = network(quantise, 3)
    with pytest.raises(gfs.MeasurementError, match="the loss rounds its weights or activations") as refused:
        gfs.sharpness(model, loss_fn if loss == "plain" else hidden_activations, (X, Y), hvp=hvp, seed=seed)
    assert why in str(refused.value)


def test_it_is_told_once_and_there_is_no_flow() -> None:
    model = network(detached, 2)
    batches = [(X[i::4], Y[i::4]) for i in range(4)] * 3
    found, told = train(model, torch.optim.SGD(model.parameters(), 0.1), batches, tier="gfs")
    assert [m.gfs_sharpness for m in found] == [None] * 12
    assert all(m.sharpness is not None for m in found)
    assert [m.running_sharpness is not None for m in found] == [False] * 8 + [True] * 4
    assert sum("the loss rounds its weights or activations" in text for text in told) == 1
    with pytest.raises(gfs.MeasurementError, match="there is no gradient flow to follow"):
        gfs.gfs_sharpness(model, loss_fn, (X, Y), learning_rate=0.1)


def activations(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = torch.tanh(F.linear(batch[0], model[0].weight, model[0].bias))
    return F.cross_entropy(F.linear(h + ((h * 4).round() / 4 - h).detach(), model[2].weight), batch[1])


def data_alone(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss_fn(model, ((batch[0] * 8).round() / 8, batch[1]))


def beside_the_loss(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    model.accuracy = (out.argmax(1) == batch[1]).float().mean().mul(100).round()
    return F.cross_entropy(out, batch[1])


def straight(w: Tensor, bits: int) -> Tensor:
    return w


def put_back(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Rounds the weights themselves for the time of a forward pass."""
    held = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = (p.data * 8).round() / 8
    loss = F.cross_entropy(model(batch[0]), batch[1])
    for p, data in zip(model.parameters(), held, strict=True):
        p.data = data
    return loss


@pytest.mark.parametrize(
    ("loss", "quantise", "expected"),
    [
        (loss_fn, straight, False),
        (loss_fn, detached, True),
        (activations, straight, True),
        (data_alone, straight, False),
        (beside_the_loss, straight, False),
        (put_back, straight, True),
    ],
)
def test_only_what_depends_on_the_weights_and_goes_into_the_loss_counts(
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor], quantise: Quantise, expected: bool
) -> None:
    model = network(quantise, 3)
    with gfs.StateSnapshot(model) as isolation:
        assert steps(gfs.Objective(model, loss, [(X, Y)], isolation=isolation)) == (expected, False)
