"""The eigenvalue solver on a grid of spectra, beside two Lanczos methods with few vectors, and on states of trainings.

Writes spectra.json, and its section of eigenvalues.md. Run (3 minutes): OMP_NUM_THREADS=1 python -m benchmarks.spectra
"""

from __future__ import annotations

import itertools
import json
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from gfs_core.curvature import Hessian
from gfs_core.eigen import largest_eigenvalues
from gfs_core.objective import Objective
from gfs_core.vectors import mix_in, random_like

HERE = Path(__file__).parent
BEGIN = "<!-- benchmarks/spectra.py -->"
TOL, MOST, SEEDS, STATES = 1e-2, 1000, 9, 70
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


def ours(d: Any, v: Any, cold: bool) -> tuple[float, int, bool]:
    like = torch.tensor(d)
    start = torch.tensor(v)
    generator = torch.Generator().manual_seed(int(1e6 * abs(v[0])))
    found = largest_eigenvalues(
        lambda x: [like * x[0]], [like], tol=TOL, max_hvps=MOST, start=None if cold else [[start]], generator=generator
    )
    return found.value, found.hvps, found.converged


def thick_restart(d: Any, v: Any, cold: bool, most: int = 6, keep: int = 3) -> tuple[float, int, bool]:
    """6 vectors, of which a restart keeps the 3 largest; full reorthogonalisation, the residual looked at each step."""
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


def arpack(d: Any, v: Any, cold: bool) -> tuple[float, int, bool]:
    """Scipy's eigsh with ncv=6."""
    count = [0]

    def product(x: Any) -> Any:
        count[0] += 1
        return d * x.ravel()

    try:
        operator = LinearOperator((len(d), len(d)), matvec=product, dtype=d.dtype)
        values = eigsh(operator, k=1, which="LA", tol=TOL, ncv=min(6, len(d)), v0=v, maxiter=300)[0]
    except (ArpackNoConvergence, RuntimeError) as error:
        found = getattr(error, "eigenvalues", [])
        return float(found[0]) if len(found) else float("nan"), count[0], False
    return float(values[0]), count[0], True


SOLVERS: dict[str, Callable[..., tuple[float, int, bool]]] = {
    "gfs_core": ours, "thick restart, 6": thick_restart, "ARPACK, ncv 6": arpack
}  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    for precision in ("float64", "float32"):
        for name, values in spectra().items():
            d = values.astype(precision)
            for start in STARTS:
                cells: dict[str, Any] = {}
                for solver, run in SOLVERS.items():
                    found = []
                    for seed in range(SEEDS):
                        noise = np.random.default_rng(seed).standard_normal(len(d))
                        v = noise / np.linalg.norm(noise)
                        if start is not None:
                            v = start * v
                            v[int(np.argmax(d))] += 1
                        value, products, converged = run(d, v.astype(precision), start is None)
                        top = float(values.max())
                        error = abs(value - top) / (abs(top) or 1.0)
                        found.append((products, error, converged))
                    worst = [e for _, e, c in found if c]
                    cells[solver] = {
                        "products": median(p for p, _, _ in found), "most": max(p for p, _, _ in found),
                        "error": max(worst) if worst else None, "converged": len(worst),
                    }  # fmt: skip
                yield {"spectrum": name, "precision": precision, "start": start, "solvers": cells}


# --- states of trainings ----------------------------------------------------------------------------------------------


class Characters(nn.Module):
    """A small transformer that predicts the next character."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(kinds, 32), nn.Parameter(0.02 * torch.randn(24, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, kinds, 24)."""
        mask = nn.Transformer.generate_square_subsequent_mask(24)
        out: Tensor = self.head(self.block(self.embed(x) + self.place, mask)).transpose(1, 2)
        return out


def trainings() -> Iterator[tuple[str, nn.Module, Any, Tensor, Tensor, Any, int]]:
    """Name, model, loss, inputs, targets, optimizer, batch; none of them was used to choose anything in the solver."""
    torch.manual_seed(7)
    digits, patients = load_digits(), load_diabetes()
    images, classes = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    inputs = torch.tensor(patients.data * 20, dtype=torch.float32)
    targets = torch.tensor((patients.target - patients.target.mean()) / patients.target.std(), dtype=torch.float32)
    text = re.sub(r"\s+", " ", "".join(str(t) for t in pydoc_data.topics.topics.values()))[:40_000].lower()
    kinds = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([kinds[c] for c in text]).unfold(0, 25, 7)
    entropy, squared = nn.CrossEntropyLoss(), nn.MSELoss()
    optim, batches, shifted = torch.optim, ids[:, :24], ids[:, 1:]

    def dense(*widths: int) -> nn.Module:
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        return nn.Sequential(*layers[:-1])

    def convolved() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 10, 3), nn.GELU(), nn.Conv2d(10, 10, 3), nn.GELU(), nn.Flatten(),
            nn.Linear(160, 10),
        )  # fmt: skip

    model = dense(64, 40, 40, 10)
    yield (
        "MLP, digits, momentum, batch 32",
        model,
        entropy,
        images,
        classes,
        optim.SGD(model.parameters(), 0.02, 0.9),
        32,
    )
    model = dense(64, 40, 40, 10)
    yield (
        "MLP, digits, Adam, batch 256",
        model,
        entropy,
        images,
        classes,
        optim.Adam(model.parameters(), 3e-3),
        256,
    )
    model = convolved()
    yield "CNN, digits, SGD, batch 64", model, entropy, images, classes, optim.SGD(model.parameters(), 0.1), 64
    model = convolved()
    yield (
        "CNN, digits, AdamW, batch 16",
        model,
        entropy,
        images,
        classes,
        optim.AdamW(model.parameters(), 2e-3),
        16,
    )
    model = nn.Sequential(dense(10, 64, 64, 1), nn.Flatten(0))
    yield (
        "MLP, diabetes, squared, SGD, batch 64",
        model,
        squared,
        inputs,
        targets,
        optim.SGD(model.parameters(), 0.02),
        64,
    )
    model = nn.Sequential(dense(10, 64, 64, 1), nn.Flatten(0))
    yield (
        "MLP, diabetes, squared, RMSprop, all",
        model,
        squared,
        inputs,
        targets,
        optim.RMSprop(model.parameters(), 1e-3),
        442,
    )
    model = Characters(len(kinds))
    adam = optim.AdamW(model.parameters(), 3e-3)
    yield "transformer, text, AdamW, batch 16", model, entropy, batches, shifted, adam, 16
    model = Characters(len(kinds))
    yield (
        "transformer, text, SGD, batch 32",
        model,
        entropy,
        ids[:, :24],
        ids[:, 1:],
        optim.SGD(model.parameters(), 0.3),
        32,
    )


def reference(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> float:
    """By ARPACK in float64, tol 1e-10."""
    double = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    inputs, target = (t.double() if t.is_floating_point() else t for t in (x, y))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = loss(torch.func.functional_call(model, double, (inputs,)), target)
        weights = list(double.values())
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, weights, create_graph=True)])

        def product(v: Any) -> Any:
            parts = torch.autograd.grad(flat, weights, torch.tensor(v.ravel()), retain_graph=True, allow_unused=True)
            filled = (torch.zeros_like(w) if g is None else g for g, w in zip(parts, weights, strict=True))
            return torch.cat([g.reshape(-1) for g in filled]).numpy()

        operator = LinearOperator((len(flat),) * 2, matvec=product, dtype=np.float64)
        return float(eigsh(operator, k=1, which="LA", tol=1e-10, ncv=40, v0=np.ones(len(flat)))[0][0])


def states() -> Iterator[dict[str, Any]]:
    """One row for each training; every state is measured on the batch that comes next, cold and warm."""
    for name, model, loss, x, y, optimizer, size in trainings():
        order, mixing = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        row: dict[str, Any] = {
            "training": name,
            "cold": [],
            "warm": [],
            "cold_error": [],
            "warm_error": [],
            "failed": 0,
        }
        vector = None
        for step in range(5 * (STATES + 1)):
            rows = torch.randperm(len(x), generator=order)[:size]
            batch = (x[rows], y[rows])
            if step % 5 == 0:
                hessian = Hessian(Objective(model, lambda m, b, f=loss: f(m(b[0]), b[1]), [batch]))
                true = reference(model, loss, *batch)
                found = {}
                for kind in ("cold", "warm") if vector is not None else ("cold",):
                    start = None if kind == "cold" or vector is None else vector
                    if start is not None and step % 50 == 0:
                        mix_in(hessian.gradient(), 0.3, start)
                        mix_in(random_like(start, mixing), 0.3, start)
                    found[kind] = largest_eigenvalues(
                        hessian, hessian.objective.weights, tol=TOL, start=None if start is None else [start],
                        generator=torch.Generator().manual_seed(step),
                    )  # fmt: skip
                vector = found.get("warm", found["cold"]).vector
                if "warm" in found:
                    for kind, result in found.items():
                        row[kind].append(result.hvps)
                        row["failed"] += not result.converged
                        row[f"{kind}_error"].append(abs(result.value / true - 1))
            optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
        yield row


def section() -> str:
    """The section of eigenvalues.md, from spectra.json."""
    results = json.loads((HERE / "spectra.json").read_text())
    lines = [
        BEGIN, "", "## A grid of spectra", "",
        f"Diagonal matrices of dimension 600, tol {TOL}, {SEEDS} starts: products, median (largest); cold from a",
        "random vector, and from the eigenvector with a random vector of 1, 10 and 30 % of its length. *Thick",
        "restart* is Lanczos with 6 vectors, of which a restart keeps the 3 largest Ritz vectors; its residual is",
        "looked at after each product, as ours is. ARPACK (scipy's eigsh) looks at the end of a cycle only. Stopped at",
        f"{MOST} products. *Error* is the worst relative one of ours among the converged; † not all of the starts",
        "converged.", "",
        "| spectrum | start | gfs_core | thick restart, 6 | ARPACK, ncv 6 | error |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results["grid"]:
        cells = []
        for cell in row["solvers"].values():
            mark = "" if cell["converged"] == SEEDS else " †"
            cells.append(f"{cell['products']:g} ({cell['most']}){mark}")
        error = row["solvers"]["gfs_core"]["error"]
        start = "cold" if row["start"] is None else f"{row['start']:.0%}"
        name = row["spectrum"] + (", float32" if row["precision"] == "float32" else "")
        lines.append(f"| {name} | {start} | {' | '.join(cells)} | {'–' if error is None else f'{error:.0e}'} |")
    behind: dict[str, list[str]] = {s: [] for s in SOLVERS if s != "gfs_core"}
    for row in results["grid"]:
        for other, list_ in behind.items():
            if row["solvers"]["gfs_core"]["products"] > row["solvers"][other]["products"]:
                start = "cold" if row["start"] is None else f"{row['start']:.0%}"
                list_.append(f"{row['spectrum']} ({row['precision']}, {start})")
    lines += ["", f"Of {len(results['grid'])} rows the median of gfs_core is larger than:", ""]
    lines += [f"- that of {other} in {len(list_)}: {'; '.join(list_) or 'none'}." for other, list_ in behind.items()]
    rows = results["states"]
    if not rows:
        return "\n".join(lines) + "\n"
    count = sum(len(r["warm"]) for r in rows)
    lines += [
        "", "## Errors over states of trainings", "",
        f"{count} states of {len(rows)} trainings, 5 steps apart, each measured on the batch that comes next, cold and",
        "warm from the last state's eigenvector (on another batch); every tenth warm start takes in the gradient and",
        "a random vector, as in a monitor.",
        f"float32, tol {TOL}; errors relative to ARPACK in float64 at tol 1e-10. No training was used",
        "to choose anything in the solver.",
        "", "| training | products cold: median (largest) | warm | error cold: median, 95 %, worst | warm |",
        "|---|---|---|---|---|",
    ]  # fmt: skip

    def errors(values: list[float]) -> str:
        return ", ".join(f"{np.quantile(values, q):.0e}" for q in (0.5, 0.95, 1.0))

    pooled = {k: [v for r in rows for v in r[k]] for k in ("cold", "warm", "cold_error", "warm_error")}
    for row in [*rows, {"training": "**all**", **pooled}]:
        products = [f"{median(row[k]):g} ({max(row[k])})" for k in ("cold", "warm")]
        lines.append(
            f"| {row['training']} | {' | '.join(products)} "
            f"| {errors(row['cold_error'])} | {errors(row['warm_error'])} |"
        )
    lines += ["", f"Not converged: {sum(r['failed'] for r in rows)} of {2 * count}."]
    return "\n".join(lines) + "\n"


def save(results: dict[str, Any]) -> None:
    (HERE / "spectra.json").write_text(json.dumps(results) + "\n")
    page = HERE / "eigenvalues.md"
    page.write_text(page.read_text().split(BEGIN)[0].rstrip("\n") + "\n\n" + section())


def main() -> None:
    results: dict[str, Any] = {"grid": list(grid()), "states": []}
    save(results)
    for row in states():
        results["states"].append(row)
        save(results)
        print(row["training"], median(row["warm"]), max(row["warm_error"]), flush=True)


if __name__ == "__main__":
    main()
