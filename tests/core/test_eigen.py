from __future__ import annotations

from statistics import median

import pytest
import torch

import gfs_core as gfs
from benchmarks.spectra import MOST, STARTS, TOL, ours, spectra, start_at, thick_restart
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


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_products_that_are_not_finite_are_no_eigenvalue(solver: str) -> None:
    like = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(gfs.MeasurementError, match="a Hessian-vector product is not finite"):
        gfs.largest_eigenvalues(lambda v: [v[0] * torch.inf], like, solver=solver)


def test_what_cannot_be_asked_for_is_refused() -> None:
    operator, like = diagonal([3.0, 1.0])
    for k in (0, 3):
        with pytest.raises(ValueError, match=rf"between 1 and the number of parameters \(2\), got {k}"):
            gfs.largest_eigenvalues(operator, like, k=k)
    with pytest.raises(ValueError, match="`solver` must be 'lanczos' or 'power', got 'ritz'"):
        gfs.largest_eigenvalues(operator, like, solver="ritz")
    with pytest.raises(ValueError, match="finds one eigenvalue, and k is 2"):
        gfs.largest_eigenvalues(operator, like, k=2, solver="power")


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_the_start_is_the_generators_and_the_global_state_is_left_alone(solver: str) -> None:
    operator, like = diagonal(torch.linspace(0, 1, 500).tolist())

    def early(seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return gfs.largest_eigenvalues(operator, like, max_hvps=3, solver=solver, generator=generator).value

    before = torch.get_rng_state()
    assert early(None) == early(None) == early(0)
    assert early(7) == early(7) != early(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_power_iteration_says_how_it_went() -> None:
    for magnitude in (1e-8, 1.0, 1e8):
        operator, like = diagonal([magnitude * v for v in (4.0, 1.0, 0.5, -2.0)])
        result = gfs.largest_eigenvalues(operator, like, tol=1e-9, max_hvps=500, solver="power")
        assert (result.converged, result.reason) == (True, gfs.Reason.OK)
        assert result.value == pytest.approx(4 * magnitude, rel=1e-6)
        assert result.residual <= 1e-3 * result.value
        assert result.error_bound == result.residual / result.value
        few = gfs.largest_eigenvalues(operator, like, tol=1e-9, max_hvps=3, solver="power")
        assert (few.converged, few.hvps, few.reason) == (False, 3, gfs.Reason.MAX_PRODUCTS)
        assert few.residual == pytest.approx(float((few.vector[0] * like[0] - few.value * few.vector[0]).norm()))
    operator, like = diagonal([0.0, 0.0])
    result = gfs.largest_eigenvalues(operator, like, solver="power")
    assert (result.value, result.hvps, result.converged, result.error_bound) == (0.0, 1, True, 0.0)


class Noisy:
    """Products that are off by ``error`` relative to the largest eigenvalue, otherwise each time."""

    def __init__(self, values: torch.Tensor, error: float) -> None:
        self.values, self.error, self.generator = values, error, torch.Generator().manual_seed(3)

    def __call__(self, v: list[torch.Tensor]) -> list[torch.Tensor]:
        noise = torch.randn(len(self.values), generator=self.generator, dtype=torch.float64)
        return [self.values * v[0] + self.error * self.values.max() * v[0].norm() * noise / noise.norm()]


@pytest.mark.parametrize("magnitude", [0.01, 1.0, 100.0])
def test_products_with_an_error_are_not_asked_for_more(magnitude: float) -> None:
    """A residual below three times the error of the products is noise: the solver stops there, neither before it nor
    long after."""
    values = magnitude * torch.cat([torch.tensor([1.0, 0.9, 0.8]), torch.linspace(-0.5, 0.5, 200)]).double()

    def solved(declared: float) -> gfs.EigenResult:
        noisy = Noisy(values, 1e-3)
        return gfs.largest_eigenvalues(noisy, [values], tol=1e-7, max_hvps=120, product_error=declared)

    known = solved(1e-3)
    assert (known.converged, known.reason) == (False, gfs.Reason.INEXACT_PRODUCTS)
    assert 6 < known.hvps < 20
    assert known.residual <= 3e-3 * magnitude * 1.01
    assert known.value == pytest.approx(magnitude, rel=1e-2)
    better = solved(1e-6)  # declared too small: it ends when nothing has been gained for a while
    assert better.reason is gfs.Reason.INEXACT_PRODUCTS
    assert known.hvps + 10 < better.hvps < 60
    assert solved(0.0).reason is gfs.Reason.MAX_PRODUCTS


@pytest.mark.parametrize("solver", ["lanczos", "power"])
@pytest.mark.parametrize("products", [1, 2, 3, 6, 60])
def test_the_residual_is_that_of_the_vector_whenever_it_ends(solver: str, products: int) -> None:
    operator, like = diagonal([30.0, 1.0, 0.5, -20.0, 3.0, 2.0, 2.5])
    result = gfs.largest_eigenvalues(operator, like, tol=1e-7, max_hvps=products, solver=solver)
    [x] = result.vector
    assert float(x.norm()) == pytest.approx(1.0, rel=1e-12)
    assert float(x @ (like[0] * x)) == pytest.approx(result.value, rel=1e-9)
    assert float((like[0] * x - result.value * x).norm()) == pytest.approx(result.residual, rel=1e-5, abs=1e-9)
    assert result.converged is (products == 60)


def beside_a_large_negative_one(negative: float) -> torch.Tensor:
    """A full symmetric matrix in float32 with eigenvalues 1, ±0.5 and less, and one far below: its products round."""
    d = torch.cat([torch.tensor([negative, 1.0]), torch.linspace(-0.5, 0.5, 60)]).double()
    q = torch.linalg.qr(torch.randn(62, 62, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return (q @ d.diag() @ q.T).float()


def test_a_tolerance_below_rounding_ends_at_rounding_and_says_so() -> None:
    """In float32, beside a spectrum a thousand times larger: the residual cannot be less than what a product loses."""
    matrix = beside_a_large_negative_one(-1000.0)
    for start in (None, [[torch.linalg.eigh(matrix.double())[1][:, -1].float()]]):
        result = gfs.largest_eigenvalues(lambda v: [matrix @ v[0]], [matrix[0]], tol=1e-12, max_hvps=300, start=start)
        assert (result.converged, result.reason) == (False, gfs.Reason.INEXACT_PRODUCTS)
        assert result.hvps < 30
        assert result.value == pytest.approx(1.0, abs=1e-3)
        assert result.residual <= 4 * torch.finfo(torch.float32).eps * 1000 * 1.01
        assert gfs.largest_eigenvalues(lambda v: [matrix @ v[0]], [matrix[0]]).converged


@pytest.mark.parametrize("negative", [-1e3, -1e4, -1e5, -1e6, -1e7])
def test_what_rounding_may_hide_is_not_converged(negative: float) -> None:
    """Nothing that is called converged is further from an eigenvalue than the tolerance; the bound holds throughout."""
    matrix = beside_a_large_negative_one(negative)
    result = gfs.largest_eigenvalues(lambda v: [matrix @ v[0]], [matrix[0]], tol=1e-2)
    true = torch.linalg.eigvalsh(matrix.double())
    assert result.converged is (negative >= -1e4)
    assert result.reason is (gfs.Reason.OK if result.converged else gfs.Reason.INEXACT_PRODUCTS)
    assert float((true - result.value).abs().min()) <= result.residual
    assert result.converged <= (abs(result.value / float(true[-1]) - 1) <= 1e-2)
    assert (result.error_bound <= 0.1) is (negative >= -1e5)  # worse than that is left out of a measurement


@pytest.mark.parametrize("negative", [-1e1, -1e2, -1e3, -1e4])
@pytest.mark.parametrize("outliers", [2, 5])
def test_outlying_negative_eigenvalues_stay_deflated(negative: float, outliers: int) -> None:
    """Thick-restart Lanczos with 6 vectors needs 10 to 20 products where there are two; more than 100 with five, where
    a restart keeps a fixed number of the largest."""
    low = negative * torch.linspace(1.0, 0.6, outliers)
    d = torch.cat([torch.tensor([1.0, 0.8]), low, torch.linspace(-0.3, 0.3, 600)]).double()
    counts = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        result = gfs.largest_eigenvalues(lambda v: [d * v[0]], [d], max_hvps=1000, generator=generator)
        assert result.converged
        assert result.value == pytest.approx(1.0, rel=1e-3)
        counts.append(result.hvps)
    assert max(counts) <= (20 if outliers == 2 else 40)


@pytest.mark.parametrize("name", [name for name in spectra() if name != "zero"])
def test_not_worse_than_thick_restart_lanczos_with_as_many_vectors(name: str) -> None:
    """From the same starts, cold and warm; what is called converged is the largest eigenvalue.

    Where all is zero one product more is spent on not believing a warm start: see the next tests.
    """
    values = spectra()[name].astype("float32")
    for noise in STARTS:
        starts = [start_at(values, noise, seed) for seed in range(3)]
        found = [ours(values, start) for start in starts]
        for value, _, converged in found:
            assert converged
            assert value == pytest.approx(values.max(), rel=TOL)
        most = median(products for _, products, _ in found)
        assert most <= median(thick_restart(values, start)[1] for start in starts)
        assert most < MOST / 10


def test_a_restart_may_give_up_a_single_vector() -> None:
    """Five outlying eigenvalues and the top fill the basis: 14 to 19 products where a restart gives up two."""
    values = spectra()["five outliers from −10000"]
    for noise in (0.1, 0.3):
        assert max(ours(values, start_at(values, noise, seed))[1] for seed in range(5)) <= 13


def in_blocks(*blocks: list[float]) -> torch.Tensor:
    """A block-diagonal matrix with these eigenvalues: a product never leads from one block into another."""
    generator = torch.Generator().manual_seed(1)
    rotations = [torch.linalg.qr(torch.randn(len(b), len(b), generator=generator).double())[0] for b in blocks]
    return torch.block_diag(
        *(q @ torch.tensor(b).double().diag() @ q.T for q, b in zip(rotations, blocks, strict=True))
    )


@pytest.mark.parametrize("first", [[0.0] * 4, [0.3, 0.2, 0.1, 0.0]])
@pytest.mark.parametrize("k", [1, 2])
def test_a_start_that_the_operator_does_not_know_is_mixed(first: list[float], k: int) -> None:
    """All of the start, or its larger part, where the curvature is 0: the next batch may not touch it."""
    matrix = in_blocks(first, [5.0, 4.0, 1.0, -2.0, 0.5], [0.0] * 3)
    for touched in (0.0, 0.5):
        start = [[torch.eye(12, dtype=torch.float64)[9 + i] + touched * torch.eye(12).double()[i]] for i in range(k)]
        result = gfs.largest_eigenvalues(lambda v: [matrix @ v[0]], [matrix[0]], k=k, start=start)
        assert result.converged
        assert result.values == pytest.approx([5.0, 4.0][:k], rel=1e-2)


def test_a_zero_is_only_believed_of_a_random_vector() -> None:
    operator, like = diagonal([0.0] * 5)
    result = gfs.largest_eigenvalues(operator, like, start=[[torch.eye(5, dtype=torch.float64)[0]]])
    assert (result.value, result.converged, result.hvps) == (0.0, True, 2)


@pytest.mark.parametrize("error", [0.0, 1e-11])
def test_slow_convergence_is_not_taken_for_the_error_of_the_products(error: float) -> None:
    """A warm start beside the second of two close eigenvalues: its residual stays for long where it is, and rises."""
    diagonal = torch.cat([torch.tensor([1.0, 0.999]), torch.linspace(-1, 0.99, 400)]).double()
    start = torch.full_like(diagonal, 1e-3)
    start[:2] = torch.tensor([1e-2, 1.0])
    found = gfs.largest_eigenvalues(
        lambda v: [diagonal * v[0]], [diagonal], start=[[start]], tol=1e-7, max_hvps=500, product_error=error
    )
    assert (found.value, found.converged) == (pytest.approx(1.0, abs=1e-9), True)


@pytest.mark.parametrize("seed", range(3))
def test_the_basis_stays_orthogonal_through_many_restarts(seed: int) -> None:
    """In float32: errors of the basis that grow from product to product end in vectors of any length, and in nan."""
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    matrix = (rotation @ torch.logspace(0, -6, 300).double().diag() @ rotation.T).float()
    true = torch.linalg.eigvalsh(matrix.double()).flip(0)
    for k, most in ((1, 60), (3, 200)):
        generator = torch.Generator().manual_seed(seed)
        result = gfs.largest_eigenvalues(
            lambda v: [matrix @ v[0]], [matrix[0]], k=k, tol=6e-7, max_hvps=400, generator=generator
        )
        assert result.converged
        assert result.hvps < most
        assert result.values == pytest.approx(true[:k].tolist(), rel=1e-6)
        vectors = torch.stack([v[0] for v in result.vectors])
        assert float((vectors @ vectors.T - torch.eye(k)).abs().max()) < 5e-6
