"""The eigenvalue solver on a grid of spectra, beside two Lanczos methods with few vectors, and beside rounding.

Writes spectra.json, and its section of eigenvalues.md. Run (1 minute): OMP_NUM_THREADS=1 python -m benchmarks.spectra
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from benchmarks.lib.store import FOLDER, Store
from benchmarks.lib.tables import middle_and_largest, table
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.linalg.vectors import random_like

BEGIN = "<!-- benchmarks/spectra.py -->"
TOL, MOST, SEEDS = 1e-2, 1000, 9
STARTS = (None, 0.01, 0.1, 0.3)


def spectra(n: int = 600) -> dict[str, Any]:
    """Eigenvalues by name."""
    g = np.random.default_rng(0)
    bulk = g.uniform(-0.3, 0.3, n)
    pastur = np.linalg.svd(g.standard_normal((n, 2 * n)) / np.sqrt(2 * n), compute_uv=False) ** 2
    ranks = np.arange(1.0, n + 1)

    def above(bulk: Any, *values: float) -> Any:
        return np.concatenate([values, bulk[len(values) :]])

    out = {
        f"two outliers at −{x:g}, −{0.7 * x:g}": above(bulk, 1, 0.8, 0.6, -x, -0.7 * x) for x in (1, 10, 100, 1e3, 1e4)
    }
    out |= {f"five outliers from −{x:g}": above(bulk, 1, 0.8, *(-x * np.linspace(1, 0.6, 5))) for x in (10, 1e3, 1e4)}
    out |= {
        "clustered top": above(bulk, *(1 - 0.03 * np.arange(8))),
        "Marchenko–Pastur": pastur,
        "Marchenko–Pastur, 3 outliers": above(pastur / pastur.max(), 5, 4, 3),
        "power law, 1/i": 1 / ranks,
        "power law, 1/√i": ranks**-0.5,
        "nearly double top, 1e-2 apart": above(bulk, 1, 0.99),
        "nearly double top, 1e-3 apart": above(bulk, 1, 0.999),
        "single outlier": above(0.1 * bulk, 1),
        "all negative": -1 - 10 * np.abs(bulk),
        "flat": np.linspace(0, 1, n),
        "rank one": above(0 * bulk, 1),
        "zero": 0 * bulk,
        "three dimensions": np.array([2.0, 1.0, -3.0]),
    }
    return out


@dataclass(frozen=True)
class Start:
    """Where every solver begins: cold from a random vector, or warm from one near the eigenvector.

    Attributes:
        vector: of any length.
        seed: of the generator that the vector of a cold start came from; ``None``: a warm one.
    """

    vector: Any
    seed: int | None


def start_at(d: Any, noise: float | None, seed: int) -> Start:
    """Cold where there is no ``noise``; else the eigenvector, and a random vector of this length."""
    [v] = random_like([torch.tensor(d)], torch.Generator().manual_seed(seed))
    if noise is None:
        return Start(v.numpy(), seed)
    v *= noise / v.norm()
    v[int(np.argmax(d))] += 1
    return Start(v.numpy(), None)


Solved = tuple[float, int, bool]  # the eigenvalue, products, and whether it is called converged


def ours(d: Any, start: Start) -> Solved:
    """A cold start is drawn by the solver itself: the same vector, from the same generator."""
    like = torch.tensor(d)
    cold = start.seed is not None
    found = largest_eigenvalues(
        lambda x: [like * x[0]], [like], tol=TOL, max_hvps=MOST, start=None if cold else [[torch.tensor(start.vector)]],
        generator=torch.Generator().manual_seed(start.seed if start.seed is not None else 0),
    )  # fmt: skip
    return found.value, found.hvps, found.converged


def thick_restart(d: Any, start: Start, most: int = 6, keep: int = 3) -> Solved:
    """6 vectors, of which a restart keeps the 3 largest; full reorthogonalisation, the residual looked at each step."""
    v = start.vector
    basis, t = [v / np.linalg.norm(v)], np.zeros((most, most), d.dtype)
    done = count = 0
    while True:
        w = d * basis[done]
        count += 1
        t[: done + 1, done] = t[done, : done + 1] = [b @ w for b in basis]
        for _ in range(2):
            for b in basis:
                w = w - (b @ w) * b
        left = np.linalg.norm(w)
        done += 1
        theta, s = np.linalg.eigh(t[:done, :done])
        passed = left * abs(s[-1, -1]) <= TOL * abs(theta[-1])
        if passed or count >= MOST or done == len(d):
            return float(theta[-1]), count, bool(passed or done == len(d))
        if done == most:
            kept = s[:, -keep:]
            basis = list((np.array(basis).T @ kept).T)
            t = np.zeros((most, most), d.dtype)
            t[:keep, :keep] = np.diag(theta[-keep:])
            done = keep
        basis.append((w / left).astype(d.dtype))


def arpack(d: Any, start: Start) -> Solved:
    """Scipy's eigsh with ncv=6."""
    count = [0]

    def product(x: Any) -> Any:
        count[0] += 1
        return d * x.ravel()

    try:
        operator = LinearOperator((len(d), len(d)), matvec=product, dtype=d.dtype)
        values = eigsh(operator, k=1, which="LA", tol=TOL, ncv=min(6, len(d)), v0=start.vector, maxiter=300)[0]
    except (ArpackNoConvergence, RuntimeError) as error:
        found = getattr(error, "eigenvalues", [])
        return float(found[0]) if len(found) else float("nan"), count[0], False
    return float(values[0]), count[0], True


SOLVERS: dict[str, Callable[[Any, Start], Solved]] = {
    "gfs_core": ours, "thick restart, 6": thick_restart, "ARPACK, ncv 6": arpack
}  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    for precision in ("float64", "float32"):
        for name, values in spectra().items():
            d = values.astype(precision)
            for noise in STARTS:
                starts = [start_at(d, noise, seed) for seed in range(SEEDS)]
                cells = {solver: _cell([run(d, s) for s in starts], values.max()) for solver, run in SOLVERS.items()}
                yield {"spectrum": name, "precision": precision, "start": noise, "solvers": cells}


def _cell(found: list[Solved], top: float) -> dict[str, Any]:
    errors = [abs(value - top) / (abs(top) or 1.0) for value, _, converged in found if converged]
    products = [p for _, p, _ in found]
    return {
        "products": median(products), "most": max(products), "error": max(errors, default=None),
        "converged": len(errors),
    }  # fmt: skip


def rounding() -> Iterator[dict[str, Any]]:
    """Full matrices in float32 with a top of 1 beside one eigenvalue far below: the products themselves round."""
    for negative in (-1e2, -1e3, -1e4, -1e5, -1e6):
        row: dict[str, Any] = {"negative": negative, "converged": 0, "bounded": 0, "errors": [], "products": []}
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            d = torch.cat([torch.tensor([negative, 1.0]), torch.linspace(-0.5, 0.5, 298)]).double()
            q = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
            matrix = (q @ d.diag() @ q.T).float()
            true = torch.linalg.eigvalsh(matrix.double())
            found = largest_eigenvalues(lambda v, a=matrix: [a @ v[0]], [matrix[0]], tol=TOL, generator=generator)
            row["converged"] += found.converged
            row["bounded"] += bool((true - found.value).abs().min() <= found.residual)
            row["products"].append(found.hvps)
            if found.converged:
                row["errors"].append(abs(found.value / float(true[-1]) - 1))
        yield row


def section() -> str:
    """The section of eigenvalues.md, from spectra.json."""
    results = Store("spectra").results
    return "\n".join([BEGIN, "", *_of_the_grid(results["grid"]), "", *_of_rounding(results["rounding"])]) + "\n"


def _of_the_grid(grid: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## A grid of spectra", "",
        f"Diagonal matrices of dimension 600, tol {TOL}, {SEEDS} starts, the same for every solver: products, median",
        "(largest); cold from a random vector, and from the eigenvector with a random vector of 1, 10 and 30 % of its",
        "length. *Thick restart* is Lanczos with 6 vectors, of which a restart keeps the 3 largest Ritz vectors (as",
        "ARPACK does with ncv 6); its residual is looked at after each product, as ours is. It and gfs_core hold 7",
        "vectors at most. ARPACK (scipy's eigsh, which='LA') holds 10, multiplies the start before its first cycle,",
        "and looks at the end of a cycle only. All ask for a residual of at most tol·|λ|. Stopped at",
        f"{MOST} products. *Error* is the worst relative one of ours among the converged; † not all of the starts",
        "converged.", "",
    ]  # fmt: skip
    rows = []
    for row in grid:
        cells = []
        for cell in row["solvers"].values():
            mark = "" if cell["converged"] == SEEDS else " †"
            cells.append(f"{cell['products']:g} ({cell['most']}){mark}")
        error = row["solvers"]["gfs_core"]["error"]
        name = row["spectrum"] + (", float32" if row["precision"] == "float32" else "")
        rows.append([name, _start(row), *cells, "–" if error is None else f"{error:.0e}"])
    lines += [
        *table(["spectrum", "start", *SOLVERS, "error"], rows),
        "",
        f"Of {len(grid)} rows the median of gfs_core is larger than:",
        "",
    ]
    for other in (s for s in SOLVERS if s != "gfs_core"):
        behind = [r for r in grid if r["solvers"]["gfs_core"]["products"] > r["solvers"][other]["products"]]
        names = "; ".join(
            f"{r['spectrum']} ({r['precision']}, {_start(r)}): {r['solvers']['gfs_core']['products']:g} against "
            f"{r['solvers'][other]['products']:g}"
            for r in behind
        )
        lines.append(f"- that of {other} in {len(behind)}: {names or 'none'}.")
    worst = max(row["solvers"]["gfs_core"]["error"] or 0.0 for row in grid)
    return [
        *lines, "",
        "*Zero* is a price that is paid on purpose: a product that is 0 is believed of a random vector only, not of a",
        "warm start, which the next batch may not touch. Beside five outlying eigenvalues a warm start fills all",
        "6 vectors with them and the top; there ARPACK's product before the first cycle helps.", "",
        f"The worst error of what gfs_core called converged is {worst:.1e}.",
    ]  # fmt: skip


def _start(row: dict[str, Any]) -> str:
    return "cold" if row["start"] is None else f"{row['start']:.0%}"


def _of_rounding(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Rounding", "",
        "Full matrices of dimension 300 in float32, a top of 1 beside one eigenvalue far below, which a product's",
        f"rounding goes by; {SEEDS} matrices each, cold. *Within the bound*: an eigenvalue lies within the residual of",
        "the value, converged or not.", "",
    ]  # fmt: skip
    cells = []
    for r in rows:
        error = f"{max(r['errors']):.0e}" if r["errors"] else "–"
        counts = [f"{r['converged']} of {SEEDS}", error, f"{r['bounded']} of {SEEDS}"]
        cells.append([f"{r['negative']:.0e}", middle_and_largest(r["products"]), *counts])
    head = ["far eigenvalue", "products: median (largest)", "called converged", "worst error of these"]
    return [*lines, *table([*head, "within the bound"], cells)]


def into_page(section: str) -> None:
    """Put a section, which begins with the comment that names its script, in the place of the former one."""
    page = FOLDER / "eigenvalues.md"
    begin = section.splitlines()[0]
    parts = re.split(r"(?m)^(?=<!-- benchmarks/)", page.read_text())
    kept = [p.rstrip("\n") + "\n" for p in parts if not p.startswith(begin)]
    page.write_text("\n".join([*kept, section]))


def main() -> None:
    store = Store("spectra", fresh=True)
    store.put("grid", list(grid()))
    store.put("rounding", list(rounding()))
    into_page(section())


if __name__ == "__main__":
    main()
