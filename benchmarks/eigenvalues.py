"""Largest eigenvalues: accuracy against dense Hessians, and what a warm measurement costs beside other libraries.

Needs benchmarks/requirements.txt. Writes eigenvalues.json and eigenvalues.md.
Run: OMP_NUM_THREADS=1 python -m benchmarks.eigenvalues
"""

from __future__ import annotations

import copy
import importlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import curvlinops
import numpy as np
import scipy
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gfs_core as gfs
from benchmarks import spectra, states
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.loss.learned import Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian
from tests.core.reference import MODELS, cross_entropy, data, make, top_eigenvalues

HERE = Path(__file__).parent
TOL = 1e-2
DISTANCES = (1, 5, 20, 50)
STATES = 8  # measured after the first one of each sequence
Batch = tuple[Tensor, Tensor]


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy() -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        for k in (1, 3):
            model = make(name)
            truth = top_eigenvalues(model, k)
            found = gfs.sharpness(model, cross_entropy, data(), k=k, tol=1e-8, max_hvps=5000)
            rows.append(_accuracy_row(name, k, found.values, truth, found.hvps))
    spectra = {
        "negative eigenvalues dominate": [-100.0, -50.0, 3.0, 2.0, 0.5, -1.0],
        "two eigenvalues crossing (1e-9 apart)": [4.0, 4.0 - 4e-9, 1.0, 0.5, -2.0, 0.1],
        "zero Hessian": [0.0] * 6,
        "a single parameter": [7.0],
    }
    for name, spectrum in spectra.items():
        d = torch.tensor(spectrum, dtype=torch.float64)
        for k in (1, 3):
            if k > len(spectrum):
                continue
            rotation = torch.linalg.qr(
                torch.randn(len(d), len(d), generator=torch.Generator().manual_seed(2)).double()
            )[0]
            dense = rotation @ torch.diag(d) @ rotation.T
            found = largest_eigenvalues(lambda v, a=dense: [a @ v[0]], [d], k=k, tol=1e-8, max_hvps=5000)
            rows.append(_accuracy_row(name, k, found.values, sorted(spectrum, reverse=True)[:k], found.hvps))
    return rows


def _accuracy_row(name: str, k: int, found: list[float], truth: list[float], hvps: int) -> dict[str, Any]:
    error = max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, truth, strict=True))
    return {"problem": name, "k": k, "error": error, "hvps": hvps}


# --- runs to measure along --------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A small transformer that reads a digit as eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.zeros(8, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of shape (n, 64)."""
        out: Tensor = self.head(self.block(self.embed(x.reshape(-1, 8, 8)) + self.place).mean(1))
        return out


class Squared(nn.Module):
    """Half the squared distance to the one-hot target, mean over the batch."""

    reduction = "mean"  # curvlinops asks for it

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Of logits (n, 10) and classes (n,)."""
        return (output - nn.functional.one_hot(target, 10)).square().sum(1).mean() / 2


@dataclass
class Run:
    """A training run, and the probe that is measured."""

    name: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    examples: int
    batch: int
    probe: int
    first: int

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch."""
        return self.criterion(model(batch[0]), batch[1])

    def states(self) -> tuple[Batch, dict[int, dict[str, Tensor]]]:
        """The probe, and the weights at every step that is measured."""
        digits = load_digits()
        x = torch.tensor(digits.data[: self.examples] / 16.0, dtype=torch.float32)
        y = torch.tensor(digits.target[: self.examples])
        wanted = {self.first + d * i for d in DISTANCES for i in range(STATES + 1)}
        order, states = torch.Generator().manual_seed(0), {}
        for step in range(max(wanted) + 1):
            if step in wanted:
                states[step] = copy.deepcopy(self.model.state_dict())
            rows = torch.randperm(self.examples, generator=order)[: self.batch]
            self.optimizer.zero_grad()
            self.loss(self.model, (x[rows], y[rows])).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return (x[: self.probe], y[: self.probe]), states


def mlp() -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def runs() -> Iterator[Run]:
    """Five trainings; the third has its two largest eigenvalues close together."""
    entropy = nn.CrossEntropyLoss()
    model = mlp()
    yield Run("MLP, GD 0.5", model, entropy, torch.optim.SGD(model.parameters(), 0.5), 1500, 1500, 1500, 300)
    model = mlp()
    yield Run("MLP, SGD 0.1", model, entropy, torch.optim.SGD(model.parameters(), 0.1), 1500, 64, 256, 300)
    model = mlp()
    yield Run(
        "MLP, squared loss, GD 0.2, at the edge",
        model,
        Squared(),
        torch.optim.SGD(model.parameters(), 0.2),
        200,
        200,
        200,
        700,
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    yield Run("CNN, SGD 0.05, momentum 0.9", model, entropy, sgd, 1500, 64, 256, 200)
    torch.manual_seed(0)
    model = Rows()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    yield Run("transformer, Adam 1e-3", model, entropy, adam, 1500, 64, 256, 300)


# --- methods: each returns the value, and the products it took ---------------------------------------------------

Method = Callable[[Run, nn.Module, Batch, dict[str, Any]], tuple[float, int]]


def ours(run: Run, model: nn.Module, batch: Batch, memory: dict[str, Any]) -> tuple[float, int]:
    hessian = Hessian(Objective(model, run.loss, [batch]), learned=Learned(double_backward_verified=True))
    start = [memory["vector"]] if "vector" in memory else None
    found = largest_eigenvalues(hessian, hessian.objective.params, tol=TOL, start=start)
    memory["vector"] = found.vector
    return found.value, found.hvps


def pyhessian_power(tol: float) -> Method:
    def measure(run: Run, model: nn.Module, batch: Batch, memory: dict[str, Any]) -> tuple[float, int]:
        count = [0]
        module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name
        plain = module.hessian_vector_product

        def counted(*args: Any) -> Any:
            count[0] += 1
            return plain(*args)

        module.hessian_vector_product = counted
        try:
            [value], _ = module.hessian(model, run.criterion, data=batch, cuda=batch[0].is_cuda).eigenvalues(tol=tol)
        finally:
            module.hessian_vector_product = plain
        return float(value), count[0]

    return measure


def scipy_eigsh(ncv: int | None) -> Method:
    def measure(run: Run, model: nn.Module, batch: Batch, memory: dict[str, Any]) -> tuple[float, int]:
        hessian = Hessian(Objective(model, run.loss, [batch]), learned=Learned(double_backward_verified=True))
        params = hessian.objective.params
        return _arpack(lambda v: _flat(hessian(_parts(v, params))), sum(p.numel() for p in params), memory, ncv)

    return measure


def curvlinops_eigsh(run: Run, model: nn.Module, batch: Batch, memory: dict[str, Any]) -> tuple[float, int]:
    params = list(model.parameters())
    operator = curvlinops.HessianLinearOperator(model, run.criterion, params, [batch], check_deterministic=False)
    return _arpack(operator.to_scipy().matvec, sum(p.numel() for p in params), memory, None)


def _arpack(product: Callable[[Any], Any], n: int, memory: dict[str, Any], ncv: int | None) -> tuple[float, int]:
    count = [0]

    def counted(v: Any) -> Any:
        count[0] += 1
        return product(np.asarray(v, np.float32).ravel())

    operator = LinearOperator((n, n), matvec=counted, dtype=np.float32)
    random = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    values, vectors = eigsh(operator, k=1, which="LA", tol=TOL, v0=memory.get("vector", random), ncv=ncv)
    memory["vector"] = vectors[:, 0]
    return float(values[0]), count[0]


def lanczos(warm: bool) -> Method:
    """Lanczos with full reorthogonalisation, stopped at the first step that passes."""

    def measure(run: Run, model: nn.Module, batch: Batch, memory: dict[str, Any]) -> tuple[float, int]:
        hessian = Hessian(Objective(model, run.loss, [batch]), learned=Learned(double_backward_verified=True))
        params = hessian.objective.params
        n = sum(p.numel() for p in params)
        v = memory["vector"] if "vector" in memory else np.random.default_rng(0).standard_normal(n)
        basis, alphas, betas = [v / np.linalg.norm(v)], [], []
        while True:
            w = np.asarray(_flat(hessian(_parts(basis[-1].astype(np.float32), params))), np.float64)
            alphas.append(float(w @ basis[-1]))
            for _ in range(2):
                for b in basis:
                    w -= (w @ b) * b
            betas.append(float(np.linalg.norm(w)))
            theta, s = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1])
            if betas[-1] * abs(s[-1, -1]) <= TOL * abs(theta[-1]):
                if warm:
                    memory["vector"] = np.stack(basis, 1) @ s[:, -1]
                return float(theta[-1]), hessian.hvps
            basis.append(w / betas[-1])

    return measure


def _flat(parts: list[Tensor]) -> Any:
    return torch.cat([p.detach().reshape(-1) for p in parts]).cpu().numpy()


def _parts(vector: Any, like: list[Tensor]) -> list[Tensor]:
    split = torch.as_tensor(vector).split([p.numel() for p in like])
    return [a.reshape(p.shape).to(p) for a, p in zip(split, like, strict=True)]


METHODS: dict[str, Method] = {
    "gfs_core, tol 1e-2": ours,
    "PyHessian, tol 1e-2": pyhessian_power(1e-2),
    "PyHessian, tol 1e-3 (default)": pyhessian_power(1e-3),
    "scipy eigsh, v0 warm": scipy_eigsh(None),
    "scipy eigsh, v0 warm, ncv 3": scipy_eigsh(3),
    "curvlinops + eigsh, v0 warm": curvlinops_eigsh,
    "Lanczos, from random": lanczos(warm=False),
    "Lanczos, warm, all vectors kept": lanczos(warm=True),
}


@dataclass(frozen=True)
class Row:
    """One method along one sequence of states, the first of them cold."""

    run: str
    distance: int
    method: str
    cold: int
    hvps: list[int]
    errors: list[float]


def truth(run: Run, model: nn.Module, batch: Batch) -> float:
    """By ARPACK in float64."""
    model = copy.deepcopy(model).double()
    hessian = Hessian(
        Objective(model, run.loss, [(batch[0].double(), batch[1])]), learned=Learned(double_backward_verified=True)
    )
    params = hessian.objective.params
    n = sum(p.numel() for p in params)
    operator = LinearOperator((n, n), matvec=lambda v: _flat(hessian(_parts(v.ravel(), params))), dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", tol=1e-9, ncv=60, v0=np.ones(n))[0][0])


def warm() -> Iterator[Row]:
    for run in runs():
        batch, states = run.states()
        model = copy.deepcopy(run.model)
        truths: dict[int, float] = {}
        for step, state in states.items():
            model.load_state_dict(state)
            with sdpa_kernel(SDPBackend.MATH):
                truths[step] = truth(run, model, batch)
        for distance in DISTANCES:
            steps = [run.first + distance * i for i in range(STATES + 1)]
            for name, method in METHODS.items():
                memory: dict[str, Any] = {}
                hvps, errors = [], []
                for step in steps:
                    measured = copy.deepcopy(run.model)
                    measured.load_state_dict(states[step])
                    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative of fused attention
                        value, products = method(run, measured, batch, memory)
                    hvps.append(products)
                    errors.append(abs(value / truths[step] - 1))
                yield Row(run.name, distance, name, hvps[0], hvps[1:], errors[1:])


def main() -> None:
    accurate = accuracy()
    rows = []
    for row in warm():
        rows.append(row)
        print(row, flush=True)
    environment = {"torch": torch.__version__, "scipy": scipy.__version__, "python": platform.python_version()}
    results = {"environment": environment, "accuracy": accurate, "warm": [asdict(r) for r in rows]}
    (HERE / "eigenvalues.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "eigenvalues.md").write_text("\n".join([table(accurate, rows), spectra.section(), states.section()]))


def table(accurate: list[dict[str, Any]], rows: list[Row]) -> str:
    lines = [
        "# Largest eigenvalues",
        "",
        "## Accuracy",
        "",
        "Against dense Hessians in float64 (models of tests/core/reference.py, and matrices with a given spectrum),",
        "tol 1e-8: the largest relative error among the k values (absolute for the zero Hessian), and the products.",
        "",
        "| problem | k | error | products |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['problem']} | {r['k']} | {r['error']:.0e} | {r['hvps']} |" for r in accurate]
    lines += [
        "",
        "## Cost of a warm measurement",
        "",
        "Five trainings on scikit-learn's digits, float32, one thread; in each, sequences of "
        f"{STATES} states after a first one,",
        "1, 5, 20 and 50 steps apart. Errors of the value are against ARPACK in float64 at tol 1e-9. Plain attention",
        "kernels are set for all: fused attention has no second derivative, and only gfs_core changes the kernel by",
        "itself. What a measurement takes in time is in [peers.md](peers.md).",
        "",
        "| run | products at 1, 5, 20, 50 steps: median (largest) | share of errors ≤ 1e-3 | largest error |",
        "|---|---|---|---|",
    ]
    first = next(iter(METHODS))
    for run in dict.fromkeys(r.run for r in rows):
        some = [r for r in rows if (r.run, r.method) == (run, first)]
        errors = [e for r in some for e in r.errors]
        steps = ", ".join(f"{median(r.hvps):g} ({max(r.hvps)})" for r in some)
        lines.append(f"| {run} | {steps} | {_share(errors)} | {max(errors):.0e} |")
    lines += [
        "",
        "*MLP, squared loss* is hard: its two largest eigenvalues are within some per cent of each other and cross. An",
        "error above the tolerance means that the solver stayed at the second one, which a residual cannot tell; a",
        "monitor therefore mixes the gradient and a random vector into its third start, and every tenth after it.",
        "",
        "### Beside other libraries",
        "",
        "All distances pooled. PyHessian's power iteration has no warm start and stops on the change of its value.",
        "eigsh starts from the last eigenvector. *Lanczos, from random* is the algorithm of hessian-eigenthings at its",
        "most favourable: stopped at the first step whose residual passes; that library takes a fixed number of steps.",
        "*Lanczos, warm, all vectors kept* is the best a Krylov method can do with the same start and",
        "stop rule; gfs_core keeps at most seven vectors.",
        "",
        "| run | method | products: median (largest) | cold | error: median (largest) |",
        "|---|---|---|---|---|",
    ]
    for run in dict.fromkeys(r.run for r in rows):
        for method in METHODS:
            some = [r for r in rows if (r.run, r.method) == (run, method)]
            hvps, errors = [h for r in some for h in r.hvps], [e for r in some for e in r.errors]
            lines.append(
                f"| {run} | {method} | {median(hvps):g} ({max(hvps)}) | {some[0].cold} "
                f"| {median(errors):.0e} ({max(errors):.0e}) |"
            )
    return "\n".join(lines) + "\n"


def _share(errors: list[float]) -> str:
    return f"{sum(e <= 1e-3 for e in errors)} of {len(errors)}"


if __name__ == "__main__":
    main()
