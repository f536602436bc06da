from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.linalg.chebyshev import stability_interval, stages_needed, step
from gfs_core.linalg.vectors import clone
from gfs_core.loss.flow import _MAX_STAGES
from tests.core.reference import cross_entropy, data, make


class Quadratic(nn.Module):
    def __init__(self, curvatures: list[float]) -> None:
        super().__init__()
        self.h = torch.tensor(curvatures, dtype=torch.float64)
        self.w = nn.Parameter(torch.ones_like(self.h))


def quadratic(model: nn.Module, batch: object = None) -> Tensor:
    return 0.5 * (model.h * model.w.square()).sum()


def fixed_steps(model: Quadratic, h: float, steps: int, s: int) -> None:
    objective = gfs.Objective(model, quadratic, [None])
    params = [p.detach() for p in objective.params]

    def descent() -> tuple[float, list[Tensor]]:
        loss, gradient = objective.gradient()
        return loss, [-g for g in gradient]

    field = descent()[1]
    for _ in range(steps):
        field = step(descent, params, (clone(params), field), (clone(params), clone(params)), h, s).field


@pytest.mark.parametrize("s", [2, 5, 9])
def test_order_two(s: int) -> None:
    errors = []
    for steps in (8, 16, 32):
        model = Quadratic([1.0, 0.3, 2.0])
        fixed_steps(model, 1.0 / steps, steps, s)
        errors.append((model.w - torch.exp(-model.h)).norm().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([2.0, 2.0], abs=0.15)


@pytest.mark.parametrize("s", [2, 4, 10, 40])
def test_stability_interval_from_both_sides(s: int) -> None:
    for factor, stable in ((0.98, True), (1.06, False)):
        model = Quadratic([1.0])
        try:
            fixed_steps(model, factor * stability_interval(s), 200, s)
        except gfs.MeasurementError:  # the loss overflowed
            assert not stable
        else:
            assert (abs(model.w.item()) < 1) is stable
    assert stages_needed(stability_interval(s) * 0.999) == s
    assert stability_interval(s) == pytest.approx(0.65299 * (s**2 - 1), rel=1e-4)  # Sommeijer et al. 1998, eq. 2.9


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_a_stiff_linear_flow_against_its_exact_solution(rtol: float) -> None:
    model = Quadratic([1000.0, 10.0, 1.0, 0.01])
    flow = gfs.Flow(gfs.Objective(model, quadratic, [None]), lambda: 1000.0, rtol=rtol)
    state = flow.advance(flow.start(), 1.0)
    assert state.reason is gfs.Reason.OK
    assert state.time == 1.0
    assert (model.w - torch.exp(-model.h)).norm().item() < 2 * rtol * model.w.norm().item()
    assert flow.grad_evals < 1000 / 2.8 * 4  # RK4 at its stability limit


def test_the_largest_eigenvalue_is_asked_for_again_as_the_flow_goes_on() -> None:
    """About every ten of its time scales, at longer and longer intervals: after about 10, 20, 40, … of them."""
    asked: list[float] = []
    model = Quadratic([8.0, 1.0, 0.1])
    flow = gfs.Flow(gfs.Objective(model, quadratic, [None]), lambda: asked.append(0.0) or 8.0)
    state = flow.advance(flow.start(), 40.0)
    assert state.reason is gfs.Reason.OK
    assert 4 <= len(asked) <= 7  # log₂(40·8.8/10) = 5.1
    assert not flow.doubtful


def test_the_loss_never_rises_along_the_flow() -> None:
    model = make("mlp")
    with gfs.StateSnapshot(model) as isolation:
        objective = gfs.Objective(model, cross_entropy, [data()], isolation=isolation)
        rho = lambda: gfs.largest_eigenvalues(gfs.Hessian(objective), objective.params).value  # noqa: E731
        flow = gfs.Flow(objective, rho)
        state = flow.start()
        losses = [state.loss]
        for k in range(1, 60):
            state = flow.advance(state, k * 2.0)
            losses.append(objective.loss())
            assert losses[-1] == state.loss
    assert all(b <= a + 1e-14 for a, b in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


def test_a_preconditioned_flow_is_gradient_flow_of_the_rescaled_problem() -> None:
    plain, scaled = Quadratic([3.0, 1.0]), Quadratic([6.0, 0.5])
    factors = torch.tensor([2.0, 0.5], dtype=torch.float64)
    flow = gfs.Flow(gfs.Objective(plain, quadratic, [None]), lambda: 6.0, preconditioner=[factors], rtol=1e-6)
    flow.advance(flow.start(), 0.7)
    assert torch.allclose(plain.w, torch.exp(-scaled.h * 0.7), atol=2e-4)


class Scalar(nn.Module):
    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))


def product_loss(model: nn.Module, batch: object) -> Tensor:
    return 0.5 * (model.w.prod() - 1) ** 2


# Sharpness of the gradient flow solution of scalar networks in closed form: sum of 1/u_i², u_i² = c + w_i² − min w²,
# c such that the product of all u_i² is 1.
SCALAR = [
    ([3.0, 0.34], 0.25, [9.106732, 9.106515]),
    ([2.0, 1.5, 0.1], 0.20, [10.268413, 9.285854]),
    ([2.0, 1.5, 1.0, 0.33], 0.05, [10.720515, 10.720491]),
]


@pytest.mark.parametrize(("weights", "rate", "expected"), SCALAR)
def test_full_solution_of_scalar_networks(weights: list[float], rate: float, expected: list[float]) -> None:
    model = Scalar(weights)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for phi in expected:
        result = gfs.gfs_sharpness(model, product_loss, None, learning_rate=rate, rtol=1e-5, tol=1e-8)
        assert result.converged
        assert result.sharpness == pytest.approx(phi, rel=2e-6)
        optimizer.zero_grad()
        product_loss(model, None).backward()
        optimizer.step()


def test_the_end_of_the_flow_does_not_depend_on_where_on_the_path_it_starts() -> None:
    model = Scalar([2.0, 1.5, 0.1])
    full = gfs.gfs_sharpness(model, product_loss, None, learning_rate=0.2, rtol=1e-6, tol=1e-6, estimate_error=True)
    assert full.error is not None
    assert full.error < 1e-3
    objective = gfs.Objective(model, product_loss, [None])
    flow = gfs.Flow(objective, lambda: 12.0, rtol=1e-6)
    flow.advance(flow.start(), 0.5)
    later = gfs.gfs_sharpness(model, product_loss, None, learning_rate=0.2, rtol=1e-6, tol=1e-6)
    assert later.sharpness == pytest.approx(full.sharpness, rel=1e-4)


def test_a_loss_that_rises_along_its_own_gradient_ends_the_flow() -> None:
    """The loss is not what its gradient says: a step is refused however short it is."""

    def rising(model: Quadratic, batch: object = None) -> Tensor:
        loss = quadratic(model)
        return 10.0 + loss - 2 * loss.detach()

    model = Quadratic([1.0, 0.3])
    flow = gfs.Flow(gfs.Objective(model, rising, [None]), lambda: 1.0)
    state = flow.advance(flow.start(), 5.0)
    assert state.reason is gfs.Reason.STEP_TOO_SMALL
    assert (state.time, state.steps) == (0.0, 0)
    assert torch.equal(model.w, torch.ones_like(model.w))


def test_separable_cross_entropy_ends_at_its_cutoff_and_says_so() -> None:
    model = make("mlp")
    result = gfs.gfs_sharpness(model, cross_entropy, data(), learning_rate=0.1, loss_cutoff=0.1)
    assert result.reason is gfs.Reason.LOSS_CUTOFF
    assert result.loss == pytest.approx(0.1, rel=0.02)


def test_the_limit_of_gradients_is_kept_and_told() -> None:
    model = make("mlp")
    result = gfs.gfs_sharpness(model, cross_entropy, data(), learning_rate=0.1, max_grads=50)
    assert (result.converged, result.reason) == (False, gfs.Reason.MAX_GRADIENTS)


def test_a_flow_that_has_had_its_gradients_takes_no_further_step() -> None:
    flow = gfs.Flow(gfs.Objective(Quadratic([3.0, 0.2]), quadratic, [None]), lambda: 3.0)
    state = flow.advance(flow.start(), 1.0)
    flow.max_grads = used = flow.grad_evals
    state = flow.advance(state, 50.0)
    assert (state.reason, state.time, flow.grad_evals) == (gfs.Reason.MAX_GRADIENTS, 1.0, used)


def test_large_weights_that_hardly_matter_loosen_nothing() -> None:
    """A pretrained model's embeddings, say: the error is held against the way of the flow, not against |w| alone."""

    class Embedded(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
            self.words = nn.Parameter(torch.full((100,), size, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + 1e-9 * self.words.mean()

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss_fn(model: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return (model(b) - 3 * b[:, :2].sin()).square().mean()

    true = gfs.gfs_sharpness(Embedded(1.0), loss_fn, x, horizon=16, learning_rate=0.2, rtol=1e-4)
    for size in (1.0, 1e3, 1e5):
        found = gfs.gfs_sharpness(Embedded(size), loss_fn, x, horizon=16, learning_rate=0.2)
        assert found.sharpness == pytest.approx(true.sharpness, rel=1e-2)


def test_kinks_do_not_shorten_the_steps_without_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss_fn(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return (m(b) - b[:, :4].sin()).square().sum(1).mean()

    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(400):  # to the edge of stability
        optimizer.zero_grad()
        loss_fn(model, x).backward()
        optimizer.step()
    fine = gfs.gfs_sharpness(model, loss_fn, x, horizon=16, learning_rate=0.2, rtol=3e-4)
    found = gfs.gfs_sharpness(model, loss_fn, x, horizon=16, learning_rate=0.2)
    assert found.sharpness == pytest.approx(fine.sharpness, rel=2e-2)
    assert found.grad_evals <= 100


class Far(nn.Module):
    """A quadratic whose minimum is far from zero: in float32 the weights themselves are rounded to 6e-5."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.h = torch.tensor([50.0, 7.0, 1.0, 0.02]).repeat(250).to(dtype)
        self.w = nn.Parameter(torch.full((1000,), 1001.0, dtype=dtype))


def far(model: nn.Module, batch: object = None) -> Tensor:
    return 0.5 * (model.h * (model.w - 1000.0).square()).sum()


def test_weights_that_are_rounded_coarsely_do_not_loosen_the_limit() -> None:
    errors = {}
    for rtol in (1e-2, 1e-4):
        model = Far(torch.float32)
        flow = gfs.Flow(gfs.Objective(model, far, [None]), lambda: 50.0, rtol=rtol)
        state = flow.advance(flow.start(), 1.0)
        assert state.reason is gfs.Reason.OK
        error = model.w.detach().double() - 1000.0 - torch.exp(-model.h.double())
        errors[rtol] = float(error.norm() / 1000**0.5)
    assert errors[1e-2] < 5e-3
    assert errors[1e-4] < 2e-4  # three roundings of a weight


def test_a_full_solution_in_float32_ends_where_it_does_in_float64() -> None:
    """The loss falls to 1e-11 and below, where rounding makes it rise and fall."""

    def trained() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).double()
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        batch = x, x[:, :4].sin()
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(200):
            optimizer.zero_grad()
            squared(model, batch).backward()
            optimizer.step()
        return model, batch

    def squared(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return (m(b[0]) - b[1]).square().sum(1).mean() / 2

    model, batch = trained()
    true = gfs.gfs_sharpness(model, squared, batch, learning_rate=0.2, rtol=1e-3)
    single = tuple(t.float() for t in batch)
    found = gfs.gfs_sharpness(model.float(), squared, single, learning_rate=0.2, rtol=1e-3)
    assert true.converged
    assert found.converged, found.reason
    assert found.loss < 1e-9
    assert found.sharpness == pytest.approx(true.sharpness, rel=1e-3)


class Fit(nn.Module):
    """Least squares whose outputs are of size 100: in float32 the loss is not known below 1e-10."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20, 50, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 50).double()
        start = 30 * torch.randn(50, generator=generator, dtype=torch.float64)
        moved = start + 0.01 * torch.randn(50, generator=generator, dtype=torch.float64)
        self.x, self.y, self.w = x.float(), (x @ moved).float(), nn.Parameter(start.float())
        self.sharpness = float(torch.linalg.eigvalsh(x.T @ x / 20)[-1])


def test_a_loss_that_rounding_makes_rise_does_not_hold_the_flow_up() -> None:
    model = Fit()
    objective = gfs.Objective(model, lambda m, _: (m.x @ m.w - m.y).square().mean() / 2, [None])
    flow = gfs.Flow(objective, lambda: model.sharpness, rtol=1e-3, max_grads=3000)
    start = flow.start()
    first = start.loss
    state = flow.advance(start, 3000.0)
    assert state.reason is gfs.Reason.OK
    assert state.loss < 1e-4 * first


def test_a_flow_that_runs_into_a_wall_says_so() -> None:
    """Down a slope of 1 to where the loss is no number any more: the flow cannot be followed beyond."""
    model = Scalar([0.0])

    def wall(model: nn.Module, batch: object) -> Tensor:
        return torch.where(model.w < 1, -model.w, torch.inf).sum()

    flow = gfs.Flow(gfs.Objective(model, wall, [None]), lambda: 1.0)
    state = flow.advance(flow.start(), 5.0)
    assert state.reason is gfs.Reason.STEP_TOO_SMALL
    assert 0.99 < model.w.item() < 1
    assert state.time == pytest.approx(model.w.item(), rel=1e-9)  # dw/dt = 1
    assert state.rejected > 3


def test_a_curvature_that_is_none_bounds_no_step() -> None:
    """Where the estimate of ρ is 0, negative or no number, steps go by the error alone."""
    for rho in (0.0, -2.0, math.nan):
        model = Scalar([0.0])
        flow = gfs.Flow(gfs.Objective(model, lambda m, _: -m.w.sum(), [None]), lambda rho=rho: rho)
        state = flow.advance(flow.start(), 100.0)
        assert (state.reason, state.time) == (gfs.Reason.OK, 100.0)
        assert model.w.item() == pytest.approx(100.0)


@pytest.mark.parametrize(("horizon", "rate"), [(0.0, 0.1), (-1.0, 0.1), (16.0, 0.0), (16.0, math.inf), (math.nan, 0.1)])
def test_a_horizon_or_rate_that_is_none_is_refused(horizon: float, rate: float) -> None:
    with pytest.raises(ValueError, match="`horizon` and `learning_rate` must be > 0"):
        gfs.gfs_sharpness(Scalar([1.0]), product_loss, None, horizon=horizon, learning_rate=rate)


@pytest.mark.parametrize("s", [2, 3, 5, 9, 30])
def test_a_step_is_the_chebyshev_polynomial(s: int) -> None:
    """On w' = −w a step gives a + b·T_s(w₀ − w₁·h), which matches exp(−h) to second order (Sommeijer et al. 1998)."""
    w0 = 1 + 2 / 13 / s**2
    polynomial = Chebyshev.basis(s)
    first, second = polynomial.deriv()(w0), polynomial.deriv(2)(w0)
    b, w1 = second / first**2, first / second
    for part in (0.01, 0.2, 0.9):
        model, h = Quadratic([1.0]), part * stability_interval(s)
        fixed_steps(model, h, 1, s)
        assert model.w.item() == pytest.approx(1 - b * polynomial(w0) + b * polynomial(w0 - w1 * h), rel=1e-9, abs=1e-9)


def test_a_flow_that_is_below_its_cutoff_stays_where_it_is() -> None:
    model = Quadratic([1.0, 2.0])
    flow = gfs.Flow(gfs.Objective(model, quadratic, [None]), lambda: 2.0)
    state = flow.advance(flow.start(), 10.0, loss_cutoff=5.0)
    assert (state.time, state.steps, state.reason) == (0.0, 0, gfs.Reason.LOSS_CUTOFF)
    assert model.w.tolist() == [1.0, 1.0]


def test_stages_are_as_many_as_rounding_allows() -> None:
    for dtype, rtol, most in ((torch.float32, 1e-2, 289), (torch.float32, 1e-4, 28), (torch.float32, 1e-7, 8)):
        model = Quadratic([1.0]).to(dtype)
        flow = gfs.Flow(gfs.Objective(model, quadratic, [None]), lambda: 1.0, rtol=rtol)
        assert flow.max_stages == min(most, _MAX_STAGES)


def test_a_flow_ends_with_the_step_that_reaches_the_limit_of_gradients() -> None:
    model = Quadratic([1000.0, 1.0])
    flow = gfs.Flow(gfs.Objective(model, quadratic, [None]), lambda: 1000.0, max_grads=30)
    state = flow.advance(flow.start(), 50.0)
    assert state.reason is gfs.Reason.MAX_GRADIENTS
    assert 30 <= flow.grad_evals < 60
    assert 0 < state.time < 1
