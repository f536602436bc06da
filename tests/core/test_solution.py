"""Where a full gradient flow solution ends: closed forms and independent solutions, from saddles and plateaus too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gfs_core as gfs
from examples.paper.scalar import phi


class Weights(nn.Module):
    """Factors of a product, each a parameter."""

    def __init__(self, *factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.ParameterList(nn.Parameter(f.clone()) for f in factors)


def scalars(*values: float, dtype: torch.dtype = torch.float64) -> Weights:
    return Weights(torch.tensor(values, dtype=dtype))


def product(model: Weights, _: object) -> Tensor:
    weights = model.factors[0]
    value = weights[0]
    for w in weights[1:]:
        value = value * w
    return 0.5 * (value - 1) ** 2


PLATEAUS = [
    (1.1e-3, 1e-3),
    (1e-3, 1e-3),
    (1e-12, 3e-12),
    (1.0, -1 + 1e-6),
    (1.0, -1 + 1e-12),
    (2.0, -0.5),
    (0.1, 0.1, 0.1),
    (1e-4, 1e-4, 1e-4),
    (1.0, 1.0, -0.9),
    (0.01, 0.011, 0.012, 0.013),
    (1.0, 1.0, -1.0, 0.5),
]


@pytest.mark.parametrize("start", PLATEAUS)
def test_a_scalar_network_ends_at_its_closed_form_whatever_the_unit_of_time(start: tuple[float, ...]) -> None:
    expected = float(phi(np.array([start]))[0])
    for rate in (1e-6, 1e-4, 1e-2, 1.0):
        found = gfs.gfs_sharpness(scalars(*start), product, None, learning_rate=rate)
        assert found.converged, (rate, found.reason)
        assert found.sharpness == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("start", [(1e-3, 1e-3), (1.0, -1 + 1e-6), (0.1, 0.1, 0.1), (0.01, 0.011, 0.012, 0.013)])
def test_the_same_in_float32(start: tuple[float, ...]) -> None:
    found = gfs.gfs_sharpness(scalars(*start, dtype=torch.float32), product, None, learning_rate=1e-2)
    assert found.converged, found.reason
    assert found.sharpness == pytest.approx(float(phi(np.array([start]))[0]), rel=1e-2)


@pytest.mark.parametrize("start", [(1.0, -1.0), (1e-3, -1e-3), (0.0, 0.0), (1.0, 0.0, 0.0), (0.0,) * 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flow_that_ends_at_a_saddle_says_so(start: tuple[float, ...], dtype: torch.dtype) -> None:
    """Of equal size and with a product below 0 the weights go to 0, exactly; so they do not from anywhere nearby."""
    found = gfs.gfs_sharpness(scalars(*start, dtype=dtype), product, None, learning_rate=1e-2)
    assert (found.converged, found.reason) == (False, gfs.Reason.SADDLE)
    assert found.loss == pytest.approx(0.5)


def test_a_saddle_without_curvature_is_reached_without_end_and_says_so() -> None:
    """Three weights: their size falls as 1/t, and every eigenvalue with it."""
    found = gfs.gfs_sharpness(
        scalars(1.0, 1.0, -1.0), lambda m, _: 0.5 * (m.factors[0].prod() - 1) ** 2, None, learning_rate=1e-2
    )
    assert (found.converged, found.reason) == (False, gfs.Reason.SADDLE)
    assert found.sharpness < 1e-10


def test_a_flow_that_starts_at_its_end_stays_there() -> None:
    for rate in (1e-6, 1.0):
        found = gfs.gfs_sharpness(scalars(1.0, 1.0), product, None, learning_rate=rate)
        assert (found.converged, found.loss) == (True, 0.0)
        assert found.sharpness == pytest.approx(2.0, rel=1e-6)


def test_an_offset_of_the_loss_changes_nothing() -> None:
    """A loss below 0, a negative log-likelihood for instance: nothing may rest on its size."""
    for offset in (-5.0, 5.0):
        found = gfs.gfs_sharpness(scalars(2.0, 0.1), lambda m, b: product(m, b) + offset, None, learning_rate=1e-2)  # noqa: B023
        assert found.converged
        assert found.sharpness == pytest.approx(float(phi(np.array([[2.0, 0.1]]))[0]), rel=1e-2)
        assert found.loss == pytest.approx(offset, abs=1e-6)


def test_a_plateau_that_outlasts_the_gradients_is_not_an_end() -> None:
    found = gfs.gfs_sharpness(scalars(1e-3, 1e-3), product, None, learning_rate=1e-2, max_grads=60)
    assert (found.converged, found.reason) == (False, gfs.Reason.MAX_GRADIENTS)


def test_a_kink_is_not_an_end() -> None:
    """Least absolute deviations: at the kink the gradient is ±1, and no step is short enough."""
    found = gfs.gfs_sharpness(
        scalars(1.0, 0.5),
        lambda m, _: (m.factors[0].abs() + m.factors[0] ** 2).sum(),
        None,
        learning_rate=0.1,
        max_grads=2000,
    )
    assert not found.converged
    assert found.reason in (gfs.Reason.STEP_TOO_SMALL, gfs.Reason.MAX_GRADIENTS)


def test_a_loss_that_has_no_minimum_has_no_end() -> None:
    found = gfs.gfs_sharpness(
        scalars(0.0), lambda m, _: nn.functional.softplus(-m.factors[0]).sum(), None, learning_rate=0.1, max_grads=3000
    )
    assert not found.converged


def test_a_long_finite_horizon_finds_a_top_that_the_start_has_nothing_of() -> None:
    """From equal weights the first top is (1, −1), that of the end (1, 1)."""
    found = gfs.gfs_sharpness(scalars(1e-3, 1e-3), product, None, horizon=4000, learning_rate=1e-2)
    assert found.sharpness == pytest.approx(2.0, rel=1e-2)


def chain(model: Weights, target: Tensor) -> Tensor:
    """Squared distance of a product of matrices."""
    value = model.factors[0]
    for w in model.factors[1:]:
        value = w @ value
    return 0.5 * (value - target).square().sum()


def random(scale: float, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def diagonal(model: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared regression on β = u∘u − v∘v."""
    u, v = model.factors
    return 0.5 * (batch[0] @ (u**2 - v**2) - batch[1]).square().mean()


MODES = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64).diag()


def test_matrix_factors_from_near_zero_learn_all_modes() -> None:
    """One plateau after another, a saddle each: the sharpness at the end is twice the largest mode, the loss 0."""
    for scale in (1e-3, 1e-6):
        for rate in (1e-2, 1e-4):
            found = gfs.gfs_sharpness(Weights(*random(scale, (4, 4), (4, 4))), chain, MODES, learning_rate=rate)
            assert found.converged
            assert found.sharpness == pytest.approx(4.0, rel=1e-2)
            assert found.loss < 1e-5  # without the smallest mode, 0.005


def test_modes_that_are_missing_from_the_weights_are_a_saddle() -> None:
    """Diagonal factors with a zero: that mode has no gradient, and its curvature is −1/2."""
    start = torch.diag(torch.tensor([0.1, 0.1, 0.0, 0.1], dtype=torch.float64))
    found = gfs.gfs_sharpness(Weights(start, start), chain, MODES, learning_rate=1e-2)
    assert (found.converged, found.reason) == (False, gfs.Reason.SADDLE)
    assert found.loss == pytest.approx(0.125, rel=1e-3)


def by_another_solver(model: nn.Module, loss_fn: object, batch: object, time: float) -> float:
    """Sharpness at the end of the flow, by LSODA and a dense Hessian."""
    params = list(model.parameters())

    def loss(w: Tensor) -> Tensor:
        vector_to_parameters(w, params)
        return loss_fn(model, batch)  # type: ignore[operator]

    def field(_: float, w: np.ndarray) -> np.ndarray:
        grads = torch.autograd.grad(loss(torch.tensor(w)), params)
        return -torch.cat([g.reshape(-1) for g in grads]).numpy()

    start = parameters_to_vector(params).detach().numpy()
    end = solve_ivp(field, (0, time), start, method="LSODA", rtol=1e-9, atol=1e-14).y[:, -1]
    loss(torch.tensor(end))
    sharpness = gfs.sharpness(model, loss_fn, batch, tol=1e-8, max_hvps=2000).value  # type: ignore[arg-type]
    vector_to_parameters(torch.tensor(start), params)
    return sharpness


def test_networks_from_near_zero_end_where_another_solver_ends() -> None:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = x, x[:, 0] - 0.7 * x[:, 3]
    small = torch.full((12,), 1e-5, dtype=torch.float64)
    for model, loss_fn, batch, time in (
        (Weights(small, small), diagonal, data, 1000.0),
        (Weights(*random(0.1, (4, 4), (4, 4), (4, 4))), chain, MODES, 2000.0),
    ):
        found = gfs.gfs_sharpness(model, loss_fn, batch, learning_rate=1e-2, max_grads=30_000)
        assert found.converged, (loss_fn, found.reason)
        expected = by_another_solver(model, loss_fn, batch, time)
        assert found.sharpness == pytest.approx(expected, rel=1e-2), loss_fn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_deep_tanh_network_from_near_zero_leaves_its_plateau(dtype: torch.dtype) -> None:
    """Three layers at a fiftieth of their usual size: the loss stays at its start's for 99 % of the first stretches."""
    torch.manual_seed(0)
    sizes = [
        nn.Linear(3, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 2, bias=False),
    ]
    model = nn.Sequential(*sizes).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.05)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    target = torch.stack([x[:, 0].sin(), 0.5 * x[:, 1]], 1)

    def loss_fn(m: nn.Module, b: Tensor) -> Tensor:
        return 0.5 * (m(b) - target).square().sum(1).mean()

    start = float(loss_fn(model, x).detach())
    found = gfs.gfs_sharpness(model, loss_fn, x, learning_rate=1e-4, max_grads=30_000)
    assert found.loss < 1e-3 * start
    assert found.converged, found.reason
    assert math.isfinite(found.sharpness)
