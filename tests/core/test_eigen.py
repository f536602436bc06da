from __future__ import annotations

import pytest
import torch

import gfs_core as gfs
from tests.core.reference import MODELS, cross_entropy, data, make, top_eigenvalues


def diagonal(values: list[float]):
    d = torch.tensor(values, dtype=torch.float64)
    return (lambda v: [d * v[0]]), [d]


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_dense_hessian(name: str) -> None:
    model = make(name)
    result = gfs.sharpness(model, cross_entropy, data(), tol=1e-8, max_hvps=2000)
    assert result.converged
    assert result.value == pytest.approx(top_eigenvalues(model)[0], rel=1e-6)
    assert result.residual <= 1e-8 * result.value


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_three_eigenvalues(name: str) -> None:
    model = make(name)
    result = gfs.sharpness(model, cross_entropy, data(), k=3, tol=1e-8, max_hvps=3000)
    assert result.values == pytest.approx(top_eigenvalues(model, 3), rel=1e-6)


def test_the_largest_algebraic_one_although_a_negative_one_dominates() -> None:
    operator, like = diagonal([-100.0, -50.0, 3.0, 2.0, 0.5, -1.0])
    assert gfs.largest_eigenvalues(operator, like, tol=1e-8).value == pytest.approx(3.0, rel=1e-6)
    power = gfs.largest_eigenvalues(operator, like, tol=1e-9, max_hvps=5000, solver="power")
    assert power.value == pytest.approx(-100.0, rel=1e-6)


def test_a_spectrum_without_a_positive_eigenvalue() -> None:
    operator, like = diagonal([-3.0, -2.0, -1.0])
    assert gfs.largest_eigenvalues(operator, like, tol=1e-8).value == pytest.approx(-1.0, rel=1e-6)


def test_a_repeated_eigenvalue() -> None:
    operator, like = diagonal([5.0, 5.0, 4.0, 1.0, 0.0, -2.0, 0.3])
    result = gfs.largest_eigenvalues(operator, like, k=3, tol=1e-8, max_hvps=500)
    assert result.values == pytest.approx([5.0, 5.0, 4.0], rel=1e-6)


def test_zero_hessian() -> None:
    operator, like = diagonal([0.0] * 5)
    for k in (1, 3):
        result = gfs.largest_eigenvalues(operator, like, k=k)
        assert (result.values, result.converged) == ([0.0] * k, True)


def test_a_single_parameter() -> None:
    operator, like = diagonal([7.0])
    result = gfs.largest_eigenvalues(operator, like, tol=1e-12)
    assert (result.value, result.hvps) == (pytest.approx(7.0), 1)


@pytest.mark.parametrize("magnitude", [1e-8, 1e-3, 1e8])
def test_scale_does_not_matter(magnitude: float) -> None:
    operator, like = diagonal([magnitude * v for v in (4.0, 1.0, 0.5, -2.0)])
    assert gfs.largest_eigenvalues(operator, like, tol=1e-6).value == pytest.approx(4 * magnitude, rel=1e-6)


def test_a_warm_start_at_the_eigenvector_costs_one_product() -> None:
    operator, like = diagonal([5.0, 1.0, -9.0])
    first = gfs.largest_eigenvalues(operator, like, tol=1e-10)
    assert gfs.largest_eigenvalues(operator, like, tol=1e-6, start=[first.vector]).hvps == 1


def test_says_when_it_did_not_converge() -> None:
    operator, like = diagonal(torch.linspace(0, 1, 500).tolist())
    result = gfs.largest_eigenvalues(operator, like, tol=1e-10, max_hvps=10)
    assert not result.converged
    assert result.reason is gfs.Reason.MAX_PRODUCTS
    assert abs(result.value - 1) <= 0.1
    assert result.hvps <= 10


def test_wrong_k_and_non_finite_products() -> None:
    operator, like = diagonal([1.0, 2.0])
    with pytest.raises(ValueError, match="between 1 and the number of parameters \\(2\\), got 3"):
        gfs.largest_eigenvalues(operator, like, k=3)
    with pytest.raises(gfs.MeasurementError, match="not finite"):
        gfs.largest_eigenvalues(lambda v: [v[0] * float("nan")], like)


def test_start_vectors_that_are_no_basis_are_made_one() -> None:
    operator, like = diagonal([5.0, 3.0, 1.0, -9.0])
    same = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64)
    for second in (same, torch.zeros_like(same), torch.full_like(same, torch.nan), 2 * same):
        result = gfs.largest_eigenvalues(operator, like, k=2, tol=1e-9, start=[[same.clone()], [second.clone()]])
        assert result.values == pytest.approx([5.0, 3.0], rel=1e-6)
        assert abs(float(result.vectors[0][0] @ result.vectors[1][0])) < 1e-9


@pytest.mark.parametrize("solver", ["ritz", "power"])
def test_products_that_are_not_finite_are_no_eigenvalue(solver: str) -> None:
    like = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(gfs.MeasurementError, match="a Hessian-vector product is not finite"):
        gfs.largest_eigenvalues(lambda v: [v[0] * torch.inf], like, solver=solver)
