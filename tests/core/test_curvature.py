from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gfs_core as gfs
from gfs_core.linalg.vectors import random_like
from gfs_core.optimizers.preconditioner import Preconditioned
from tests.core.reference import MODELS, cross_entropy, data, dense_hessian, make, trainable


def product_and_truth(model: nn.Module, method: str, loss_fn=cross_entropy) -> tuple[gfs.Hessian, Tensor, Tensor]:
    params = trainable(model)
    with gfs.StateSnapshot(model) as isolation:
        hessian = gfs.Hessian(gfs.Objective(model, loss_fn, [data()], isolation=isolation), method)
        vector = random_like(params, torch.Generator().manual_seed(3))
        product = torch.cat([t.reshape(-1) for t in hessian(vector)])
    truth = dense_hessian(lambda: loss_fn(model, data()), params) @ torch.cat([t.reshape(-1) for t in vector])
    return hessian, product, truth


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "error"), [("auto", 1e-12), ("gradients", 1e-6)])
def test_products_agree_with_the_dense_hessian(name: str, method: str, error: float) -> None:
    _, product, truth = product_and_truth(make(name), method)
    assert (product - truth).norm() <= error * truth.norm()


def test_fused_attention_is_replaced_by_the_plain_kernel_first() -> None:
    hessian, _, _ = product_and_truth(make("transformer"), "auto")
    assert (hessian.method, hessian.learned.plain_kernels, hessian.reason) == ("exact", True, "")


class _OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class OnceDifferentiable(nn.Module):
    def __init__(self, custom: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.custom = nn.Linear(12, 6), nn.Linear(6, 4), custom
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_OnlyOnce.apply(self.a(x)) if self.custom else self.a(x).sin())


class Reentrant(OnceDifferentiable):
    def forward(self, x: Tensor) -> Tensor:
        if not self.custom:
            return self.b(self.a(x).sin())
        return self.b(checkpoint(lambda v: self.a(v).sin(), x.requires_grad_(), use_reentrant=True))


@pytest.mark.parametrize("kind", [OnceDifferentiable, Reentrant])
def test_without_a_second_derivative_the_products_come_from_gradients(kind) -> None:
    with gfs.StateSnapshot(model := kind(True)) as isolation:
        hessian = gfs.Hessian(gfs.Objective(model, cross_entropy, [data()], isolation=isolation))
        vector = random_like(trainable(model), torch.Generator().manual_seed(3))
        product = torch.cat([t.reshape(-1) for t in hessian(vector)])
    plain = kind(False)
    truth = dense_hessian(lambda: cross_entropy(plain, data()), trainable(plain))
    truth = truth @ torch.cat([t.reshape(-1) for t in vector])
    assert hessian.method == "gradients"
    assert "no second derivative" in hessian.reason
    assert 0 < hessian.error < 1e-3
    assert (product - truth).norm() <= 1e-5 * truth.norm()


def test_exact_is_refused_where_there_is_no_second_derivative() -> None:
    model = OnceDifferentiable(True)
    hessian = gfs.Hessian(gfs.Objective(model, cross_entropy, [data()]), "exact")
    with pytest.raises(gfs.MeasurementError, match="hvp='exact' was asked for"):
        hessian([torch.ones_like(p) for p in model.parameters()])


def test_several_batches_are_their_mean() -> None:
    model, (x, y) = make("mlp"), data()
    parts = [(x[:10], y[:10]), (x[10:], y[10:])]
    joined = gfs.sharpness(model, cross_entropy, (x, y), tol=1e-9)
    split = gfs.sharpness(model, cross_entropy, parts, tol=1e-9)
    assert split.value == pytest.approx(joined.value, rel=1e-10)


def test_the_preconditioned_operator() -> None:
    model = make("mlp")
    params = trainable(model)
    vector = random_like(params, torch.Generator().manual_seed(3))
    scale = [t.abs() + 0.1 for t in random_like(params, torch.Generator().manual_seed(4))]
    operator = Preconditioned(gfs.Hessian(gfs.Objective(model, cross_entropy, [data()])), scale, [0.3] * len(params))
    s = torch.cat([t.reshape(-1) for t in scale])
    dense = dense_hessian(lambda: cross_entropy(model, data()), params) + 0.3 * torch.eye(len(s), dtype=s.dtype)
    truth = s * (dense @ (s * torch.cat([t.reshape(-1) for t in vector])))
    product = torch.cat([t.reshape(-1) for t in operator(vector)])
    assert torch.allclose(product, truth, rtol=1e-10, atol=1e-12)


def test_a_loss_linear_in_the_weights_has_curvature_zero() -> None:
    model = make("mlp")
    result = gfs.sharpness(model, lambda m, b: sum(p.sum() for p in m.parameters()), data())
    assert (result.value, result.converged) == (0.0, True)


def test_the_next_measurement_begins_with_the_plain_kernel_also_after_a_resume() -> None:
    """A forward pass with the fused kernel, whose backward then has no second derivative, is not made again."""
    model = make("transformer")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None, strict=True)
    fused: list[bool] = []

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return cross_entropy(model, batch)

    def measured(monitor: gfs.StabilityMonitor) -> list[bool]:
        fused.clear()
        found = monitor.step(loss, data())
        assert found is not None
        assert found.sharpness is not None
        return list(fused)

    monitor = gfs.StabilityMonitor(model, optimizer, config)
    first = measured(monitor)
    assert first[-1] is False  # the graph of all products
    state = copy.deepcopy(monitor.state_dict())
    assert measured(monitor) == [True, False]  # the loss on the probe, and that graph
    resumed = gfs.StabilityMonitor(model, optimizer, config)
    resumed.load_state_dict(state)
    assert measured(resumed) == [True, False]


class _FusedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, out: Tensor) -> Tensor:
        return 2 * x * mask * out

    @staticmethod
    def backward(ctx, out: Tensor) -> None:
        raise RuntimeError("the derivative for '_fused_backward' is not implemented")


class _Fused(torch.autograd.Function):
    """x²·mask without a second derivative, as fused attention has none."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x.square() * mask

    @staticmethod
    def backward(ctx, out: Tensor) -> tuple[Tensor, None]:
        return _FusedBackward.apply(*ctx.saved_tensors, out), None


def test_dropout_that_other_kernels_draw_otherwise_is_no_incomplete_derivative() -> None:
    """What the plain kernel gives is held against differences in the plain kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 1)).double()

    def loss(batch: Tensor) -> Tensor:
        hidden = model[0](batch)
        if torch.backends.cuda.flash_sdp_enabled():
            hidden = _Fused.apply(hidden, 2.0 * (torch.rand(16, len(batch)).T > 0.5))
        else:
            hidden = hidden.square() * 2.0 * (torch.rand(len(batch), 16) > 0.5)
        return model[1](hidden).square().mean()

    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config = gfs.GFSConfig(tier="sharpness", running_every=None, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", gfs.GFSWarning)  # products from differences would be told
        found = monitor.step(loss, x)
    assert found is not None
    assert found.sharpness is not None
