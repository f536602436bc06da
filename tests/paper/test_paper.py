"""The reproduction of the paper: closed forms against brute force, the smoke run, and the stored results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from examples.paper import __main__ as paper
from examples.paper import networks, regression, scalar, tables

PAGE = Path(__file__).parent.parent.parent / "docs" / "paper.md"


@pytest.mark.parametrize(
    ("start", "rate", "values"),
    [
        ((3.0, 0.34), 0.25, {0: 9.106732, 1: 9.106515, 5: 9.103120, 20: 7.149211, 102: 6.703559}),
        ((2.0, 1.5, 0.1), 0.20, {0: 10.268413, 1: 9.285854, 5: 7.885496, 20: 7.857622}),
        ((2.0, 1.5, 1.0, 0.33), 0.05, {0: 10.720515, 1: 10.720491, 5: 10.720484, 20: 10.720484}),
    ],
)
def test_phi_along_gradient_descent(start: tuple[float, ...], rate: float, values: dict[int, float]) -> None:
    w = np.array([start])
    for t in range(max(values) + 1):
        if t in values:
            assert float(scalar.phi(w)[0]) == pytest.approx(values[t], abs=1e-6)
        w = scalar.step(w, np.array([rate]))


@pytest.mark.parametrize("start", [(1.5, 0.3), (1.5, -0.3), (2.0, 1.5, 0.1), (0.9, -0.5, 1.4, 1.1, 0.7)])
def test_phi_is_where_the_flow_ends(start: tuple[float, ...]) -> None:
    w0 = np.array(start)
    end = solve_ivp(
        lambda _, w: -(w.prod() - 1) * w.prod() / w, (0, 200), w0, method="LSODA", rtol=1e-11, atol=1e-13
    ).y[:, -1]
    assert end.prod() == pytest.approx(1, abs=1e-9)
    assert float(scalar.phi(w0[None])[0]) == pytest.approx(float((1 / end**2).sum()), rel=1e-7)


def test_with_product() -> None:
    generator = np.random.default_rng(0)
    balances = scalar.balances_of(generator.uniform(0, 3, (50, 4)))
    product = generator.uniform(-1, 3, 50)
    w = scalar.with_product(balances, product)
    np.testing.assert_allclose(w.prod(1), product, rtol=1e-10)
    np.testing.assert_allclose(scalar.balances_of(w), balances, atol=1e-12)


def test_one_step_scales_each_balance() -> None:
    # by 1 − η²(π−1)²π²/(wᵢ²wⱼ²)
    w, rate = np.array([[1.7, 0.4, 0.9]]), 0.1
    after, product = scalar.step(w, np.array([rate]))[0], w.prod()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        factor = 1 - rate**2 * (product - 1) ** 2 * product**2 / (w[0, i] * w[0, j]) ** 2
        assert after[i] ** 2 - after[j] ** 2 == pytest.approx(factor * (w[0, i] ** 2 - w[0, j] ** 2), rel=1e-12)


def test_regression_solution_is_where_the_flow_ends() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((3, 6)), generator.standard_normal(3)
    u, v = generator.uniform(0.3, 0.8, (2, 6))

    def field(_: float, w: np.ndarray) -> np.ndarray:
        slope = x.T @ (x @ (w[:6] ** 2 - w[6:] ** 2) - y) / 3
        return np.concatenate([-2 * w[:6] * slope, 2 * w[6:] * slope])

    end = solve_ivp(field, (0, 400), np.concatenate([u, v]), method="LSODA", rtol=1e-11, atol=1e-13).y[:, -1]
    found_u, found_v, _ = regression.solution(x, y, u, v)
    np.testing.assert_allclose(np.concatenate([found_u, found_v]), end, rtol=1e-7)
    np.testing.assert_allclose(found_u * found_v, u * v, rtol=1e-12)  # conserved
    # at a residual of zero the dense Hessian's largest eigenvalue is the closed form
    assert regression.sharpness(x, y, found_u, found_v) == pytest.approx(regression.phi(x, found_u, found_v), rel=1e-8)


def test_violations() -> None:
    def iterates(*values: tuple[float, float]) -> list[dict[str, object]]:
        return [{"step": i, "phi": p, "error": e, "converged": True} for i, (p, e) in enumerate(values)]

    assert networks.violations(iterates((3, 0.1), (2, 0.1), (2.15, 0.1), (1.0, 0.5))) == []
    assert networks.violations(iterates((3, 0.1), (2, 0.1), (2.15, 0.1), (2.3, 0.1))) == [(1, 3)]
    assert (
        networks.violations([*iterates((3, 0.1), (2, 0.1)), {"step": 9, "phi": 9, "error": 0, "converged": False}])
        == []
    )


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper.main(["--smoke", "--out", str(tmp_path)])
    pictures = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert pictures == sorted(f"paper-{name}.png" for name in paper.NAMES)
    results = tmp_path / "results"
    for run in json.loads((results / "scalar.json").read_text())["runs"]:
        for s in run["steps"]:
            assert s.get("flow", s["phi"]) == pytest.approx(s["phi"], rel=1e-5)
    for depth in json.loads((results / "map.json").read_text())["depths"]:
        regions = depth["regions"]
        assert regions["0 ≤ π ≤ 1, ηφ ≤ 2√2"][0] == depth["runs"]["rose"] == 0
        assert regions["π > 1, ηφ > 2√2"][0] > 20
    for run in json.loads((results / "regression.json").read_text())["runs"]:
        for f in run["flows"]:
            assert f["flow"] == pytest.approx(f["phi"], rel=1e-4)
    iterates = json.loads((results / "tanh.json").read_text())["iterates"]
    assert [i["step"] for i in iterates] == [0, 5, 10]
    assert all(i["converged"] and i["loss"] < 1e-4 and i["error"] < 0.5 * i["phi"] for i in iterates)
    assert iterates[0]["short"]["1"] < iterates[0]["phi"]
    for row in json.loads((results / "rk4.json").read_text()):
        assert row["phi"] == pytest.approx(row["rk4"], rel=0.02)
    # again: nothing is computed, only drawn
    before = {p.name: p.stat().st_mtime_ns for p in results.glob("*.json")}
    capsys.readouterr()
    paper.main(["networks", "horizon", "--smoke", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("\n") == 2
    assert {p.name: p.stat().st_mtime_ns for p in results.glob("*.json")} == before


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nets"], "no figure is called 'nets'"), (["--smoke"], "needs --out")]
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main(arguments)
    assert message in capsys.readouterr().err


def test_the_stored_results_say_what_the_page_says() -> None:
    results = paper.Results(paper.HERE / "results", again=False, smoke=False)
    missing = [w.name for w in networks.COVERED + networks.BEYOND if not (results.folder / f"{w.name}.json").exists()]
    assert missing == []
    found = {name: paper.data(name, results) for name in (*paper.NAMES, "rk4")}
    assert tables.write(found) in PAGE.read_text()
    # the goal: no rise beyond the error bar where the paper's claim is
    assert sum(d["regions"]["0 ≤ π ≤ 1, ηφ ≤ 2√2"][0] for d in found["map"]["depths"]) == 0
    assert sum(d["runs"]["rose"] for d in found["map"]["depths"]) == 0
    for run in found["scalar"]["runs"]:
        assert run["rate"] * run["steps"][0]["phi"] <= 2 * math.sqrt(2)
        for s in run["steps"]:
            assert s.get("flow", s["phi"]) == pytest.approx(s["phi"], rel=1e-5)
