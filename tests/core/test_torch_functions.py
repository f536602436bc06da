"""The losses and layers of torch: exact products are those of differences, or there are none and that is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gfs_core as gfs
from gfs_core.linalg.inner import WHOLE
from gfs_core.linalg.vectors import axpy, clone, random_like

N = 6
_generator = torch.Generator().manual_seed(0)
T = torch.randn(N, 4, generator=_generator, dtype=torch.float64)
P = torch.softmax(T, -1)
Y = torch.randint(4, (N,), generator=_generator)
SIGN = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
HOT = F.one_hot(Y, 4).double()

# What is done with an output of the shape (6, 4) that depends smoothly on all weights.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "binary_cross_entropy": lambda h: F.binary_cross_entropy(h.sigmoid(), P),
    "binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(h, P),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(h, T, SIGN),
    "cosine_similarity": lambda h: F.cosine_similarity(h, T).mean(),
    "cross_entropy": lambda h: F.cross_entropy(h, Y),
    "cross_entropy, smoothed": lambda h: F.cross_entropy(h, Y, label_smoothing=0.1),
    "gaussian_nll_loss": lambda h: F.gaussian_nll_loss(h, T, h.exp()),
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h.square(), torch.sign(T)),
    "huber_loss": lambda h: F.huber_loss(h, T),
    "kl_div": lambda h: F.kl_div(h.log_softmax(-1), P, reduction="batchmean"),
    "l1_loss": lambda h: F.l1_loss(h, T),
    "margin_ranking_loss": lambda h: F.margin_ranking_loss(h[:, 0].sin(), h[:, 1].sin(), SIGN, margin=0.5),
    "mse_loss": lambda h: F.mse_loss(h, T),
    "multilabel_soft_margin_loss": lambda h: F.multilabel_soft_margin_loss(h, HOT),
    "nll_loss": lambda h: F.nll_loss(h.log_softmax(-1), Y),
    "pairwise_distance": lambda h: F.pairwise_distance(h, T).mean(),
    "poisson_nll_loss": lambda h: F.poisson_nll_loss(h, P),
    "smooth_l1_loss": lambda h: F.smooth_l1_loss(h, T),
    "soft_margin_loss": lambda h: F.soft_margin_loss(h[:, 0], SIGN),
    "triplet_margin_loss": lambda h: F.triplet_margin_loss(h, T, T.flip(0)),
    "triplet_margin_with_distance_loss": lambda h: F.triplet_margin_with_distance_loss(h, T, T.flip(0)),
    "in-batch negatives": lambda h: F.cross_entropy(F.normalize(h) @ F.normalize(T).T / 0.1, torch.arange(N)),
    "quantiles": lambda h: torch.maximum(0.9 * (T - h.sin()), -0.1 * (T - h.sin())).mean(),
    # layers and functions
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True).sin().mean(),
    "layer_norm": lambda h: F.layer_norm(h, (4,)).sin().mean(),
    "group_norm": lambda h: F.group_norm(h, 1).sin().mean(),
    "instance_norm": lambda h: F.instance_norm(h[None]).sin().mean(),
    "rms_norm": lambda h: F.rms_norm(h, (4,)).sin().mean(),
    "local_response_norm": lambda h: F.local_response_norm(h[None], 2).sin().mean(),
    "normalize": lambda h: F.normalize(h).sin().mean(),
    "gelu": lambda h: F.gelu(h).mean(),
    "silu": lambda h: F.silu(h).mean(),
    "mish": lambda h: F.mish(h).mean(),
    "elu": lambda h: F.elu(h).mean(),
    "celu": lambda h: F.celu(h).mean(),
    "selu": lambda h: F.selu(h).mean(),
    "softplus": lambda h: F.softplus(h).mean(),
    "logsigmoid": lambda h: F.logsigmoid(h).mean(),
    "softsign": lambda h: F.softsign(h).mean(),
    "tanhshrink": lambda h: F.tanhshrink(h).mean(),
    "hardswish": lambda h: F.hardswish(h).sin().mean(),
    "hardtanh": lambda h: F.hardtanh(h).sin().mean(),
    "leaky_relu": lambda h: F.leaky_relu(h).sin().mean(),
    "prelu": lambda h: F.prelu(h, h[0, :1]).sin().mean(),
    "glu": lambda h: F.glu(h).sin().mean(),
    "softmax": lambda h: h.softmax(-1).square().mean(),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h).square().mean(),
    "dropout": lambda h: F.dropout(h).sin().mean(),
    "max_pool1d": lambda h: F.max_pool1d(h[None], 2).sin().mean(),
    "max_pool2d": lambda h: F.max_pool2d(h[None], 2).sin().mean(),
    "avg_pool2d": lambda h: F.avg_pool2d(h[None], 2).sin().mean(),
    "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(h[None], 3).sin().mean(),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h[None], 2).sin().mean(),
    "lp_pool1d": lambda h: F.lp_pool1d(h[None].exp(), 2.0, 2).sin().mean(),
    "interpolate": lambda h: F.interpolate(h[None, None], scale_factor=2, mode="bilinear").sin().mean(),
    "bicubic": lambda h: F.interpolate(h[None, None], scale_factor=2, mode="bicubic").sin().mean(),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.reshape(1, 4, 2, 3), 2).sin().mean(),
    "unfold": lambda h: F.unfold(h[None, None], 2).sin().mean(),
    "pad": lambda h: F.pad(h[None], (1, 1), mode="reflect").sin().mean(),
    "conv1d": lambda h: F.conv1d(h[None], h[:2, :3].expand(6, 2, 3).transpose(0, 1)).sin().mean(),
    "conv_transpose1d": lambda h: F.conv_transpose1d(h[None], h[:, :3][:, None]).sin().mean(),
    "bilinear": lambda h: F.bilinear(h, h, h.T[None, :, :4]).sin().mean(),
    "topk": lambda h: h.topk(2).values.sin().mean(),
    "sort": lambda h: (h.sort(-1).values.sin() * T).mean(),
    "median": lambda h: h.median(-1).values.sin().mean(),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(0, Y[:, None].expand(N, 4), h).sin().mean(),
    "index_add": lambda h: torch.zeros_like(h).index_add(0, Y, h).sin().mean(),
    "scatter_reduce": lambda h: (
        torch.zeros_like(h).scatter_reduce(0, Y[:, None].expand(N, 4), h, "mean", include_self=False).sin().mean()
    ),
    "cumsum": lambda h: h.cumsum(0).sin().mean(),
    "cumprod": lambda h: h.cumprod(0).sin().mean(),
    "logcumsumexp": lambda h: h.logcumsumexp(0).sin().mean(),
    "prod": lambda h: h.prod(0).sin().mean(),
    "std": lambda h: h.std(0).mean(),
    "einsum": lambda h: torch.einsum("ij,kj,ik->", h, h, h @ h.T),
    "fft": lambda h: torch.fft.fft(h).abs().mean(),
    "rfft2": lambda h: torch.fft.rfft2(h).abs().square().sin().mean(),
    "stft": lambda h: (
        torch.stft(h.reshape(-1), 8, window=torch.hann_window(8).double(), return_complex=True).abs().mean()
    ),
    "linalg.svd": lambda h: torch.linalg.svd(h).S.sin().mean(),
    "linalg.eigh": lambda h: torch.linalg.eigh(h.T @ h).eigenvectors.square().sin()[0].mean(),
    "linalg.cholesky": lambda h: torch.linalg.cholesky(h.T @ h + torch.eye(4).double()).sin().mean(),
    "linalg.qr": lambda h: torch.linalg.qr(h).R.square().sin().mean(),
    "linalg.solve": lambda h: torch.linalg.solve(h.T @ h + torch.eye(4).double(), h.T).sin().mean(),
    "linalg.inv": lambda h: torch.linalg.inv(h.T @ h + torch.eye(4).double()).sin().mean(),
    "linalg.det": lambda h: torch.linalg.det(h[:4]),
    "logdet": lambda h: torch.logdet(h.T @ h + torch.eye(4).double()),
    "linalg.matrix_exp": lambda h: torch.linalg.matrix_exp(0.1 * h[:4]).sin().mean(),
    "linalg.pinv": lambda h: torch.linalg.pinv(h).sin().mean(),
    "lgamma": lambda h: torch.lgamma(h.exp()).mean(),
    "erf": lambda h: torch.erf(h).mean(),
    "atan2": lambda h: torch.atan2(h[:, 0], h[:, 1]).sin().mean(),
    "normal": lambda h: -torch.distributions.Normal(h[:, 0], h[:, 1].exp()).log_prob(T[:, 0]).mean(),
    "kl of normals": lambda h: torch.distributions.kl_divergence(
        torch.distributions.Normal(h, h.exp()), torch.distributions.Normal(T, 1.0)
    ).mean(),
    "dirichlet": lambda h: -torch.distributions.Dirichlet(h.exp()).log_prob(P).mean(),
    "scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None]).sin().mean(),
}
# No second derivative in torch: of these the products are those of gradients' differences.
NONE: dict[str, Callable[[Tensor], Tensor]] = {
    "cdist": lambda h: torch.cdist(h, T).sin().mean(),
    "pdist": lambda h: F.pdist(h).sin().mean(),
    "ctc_loss": lambda h: F.ctc_loss(
        h[:, None].log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([N]), torch.tensor([2])
    ),
    "multi_margin_loss": lambda h: F.multi_margin_loss(h, Y, p=2),
    "multilabel_margin_loss": lambda h: F.multilabel_margin_loss(h.sin(), HOT.long()),
}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def products(function: Callable[[Tensor], Tensor], *methods: str) -> tuple[list[gfs.Hessian], list[list[Tensor]]]:
    net, x = model(), torch.randn(N, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hessians, found = [], []
    for method in methods:
        with gfs.StateSnapshot(net) as isolation:
            hessian = gfs.Hessian(gfs.Objective(net, lambda m, b: function(m(b)), [x], isolation=isolation), method)
            hessians.append(hessian)
            found.append(hessian(random_like(hessian.objective.weights, torch.Generator().manual_seed(3))))
            hessian.release()
    return hessians, found


@pytest.mark.parametrize("name", LOSSES)
def test_the_exact_product_is_that_of_differences(name: str) -> None:
    [hessian, other], [product, true] = products(LOSSES[name], "auto", "gradients")
    assert (hessian.method, hessian.reason) == ("exact", "")
    assert other.symmetric
    size = WHOLE.norm(true)
    apart = clone(product)
    axpy(-1.0, true, apart)
    assert size > 0
    assert WHOLE.norm(apart) <= max(1e-6, 10 * other.error) * size
    assert other.error < 1e-3


@pytest.mark.parametrize("name", NONE)
def test_without_a_second_derivative_it_is_said(name: str) -> None:
    [hessian, other], [product, true] = products(NONE[name], "auto", "gradients")
    assert (hessian.method, hessian.symmetric, other.symmetric) == ("gradients", True, True)
    assert "no second derivative" in hessian.reason
    assert all(torch.allclose(p, t, rtol=1e-6, atol=1e-9) for p, t in zip(product, true, strict=True))
