"""Ways to the largest eigenvalue: each returns the value, and the products that it took."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import curvlinops
import numpy as np
import scipy
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.lib.data import Batch
from benchmarks.lib.store import Row
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.loss.learned import Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian

TOL = 1e-2


class Task(Protocol):
    """What a method has to know of a training."""

    criterion: Any

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch."""


# Of a task, its model, the probe, what is kept between measurements, and the tolerance.
Method = Callable[[Any, nn.Module, Batch, Row, float], tuple[float, float]]


def exact_products(model: nn.Module, loss: Any, batch: Batch) -> Hessian:
    """Products with the Hessian, known to exist by double backward: no time goes to find out.

    Args:
        model: whose weights the loss is of.
        loss: of the model and a batch.
        batch: the probe.
    """
    return Hessian(Objective(model, loss, [batch]), learned=Learned(double_backward_verified=True))


def ours(task: Task, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, int]:
    """From the last eigenvector, where there is one."""
    hessian = exact_products(model, task.loss, batch)
    start = [memory["vector"]] if "vector" in memory else None
    found = largest_eigenvalues(hessian, hessian.objective.params, tol=tol, start=start)
    memory["vector"] = found.vector
    return found.value, found.hvps


def pyhessian(task: Task, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, int]:
    """Power iteration of PyHessian, which has no warm start; its products are counted where it looks them up."""
    count = [0]
    module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name
    plain = module.hessian_vector_product

    def counted(*args: Any) -> Any:
        count[0] += 1
        return plain(*args)

    module.hessian_vector_product = counted
    try:
        [value], _ = module.hessian(model, task.criterion, data=batch, cuda=batch[0].is_cuda).eigenvalues(tol=tol)
    finally:
        module.hessian_vector_product = plain
        model.zero_grad()  # it leaves gradients with graphs that hold themselves
    return float(value), count[0]


def scipy_eigsh(ncv: int | None) -> Method:
    """Scipy's eigsh on our products."""

    def measure(task: Task, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, int]:
        hessian = exact_products(model, task.loss, batch)
        params = hessian.objective.params
        return arpack(lambda v: flat(hessian(parts_of(v, params))), sum(p.numel() for p in params), memory, ncv, tol)

    return measure


def curvlinops_eigsh(ncv: int | None) -> Method:
    """Scipy's eigsh on the operator of curvlinops."""

    def measure(task: Task, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, int]:
        params = list(model.parameters())
        operator = curvlinops.HessianLinearOperator(model, task.criterion, params, [batch], check_deterministic=False)
        return arpack(operator.to_scipy().matvec, sum(p.numel() for p in params), memory, ncv, tol)

    return measure


def arpack(product: Callable[[Any], Any], n: int, memory: Row, ncv: int | None, tol: float) -> tuple[float, int]:
    """From the last eigenvector, where there is one; ``ncv`` vectors kept, 20 by default."""
    count = [0]

    def counted(v: Any) -> Any:
        count[0] += 1
        return product(np.asarray(v, np.float32).ravel())

    operator = LinearOperator((n, n), matvec=counted, dtype=np.float32)
    random = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    values, vectors = eigsh(operator, k=1, which="LA", tol=tol, v0=memory.get("vector", random), ncv=ncv)
    memory["vector"] = vectors[:, 0]
    return float(values[0]), count[0]


def lanczos(warm: bool) -> Method:
    """Lanczos with full reorthogonalisation, stopped at the first step that passes."""

    def measure(task: Task, model: nn.Module, batch: Batch, memory: Row, tol: float) -> tuple[float, int]:
        hessian = exact_products(model, task.loss, batch)
        params = hessian.objective.params
        n = sum(p.numel() for p in params)
        v = memory["vector"] if "vector" in memory else np.random.default_rng(0).standard_normal(n)
        basis, alphas, betas = [v / np.linalg.norm(v)], [], []
        while True:
            w = np.asarray(flat(hessian(parts_of(basis[-1].astype(np.float32), params))), np.float64)
            alphas.append(float(w @ basis[-1]))
            for _ in range(2):
                for b in basis:
                    w -= (w @ b) * b
            betas.append(float(np.linalg.norm(w)))
            theta, s = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1])
            if betas[-1] * abs(s[-1, -1]) <= tol * abs(theta[-1]):
                if warm:
                    memory["vector"] = np.stack(basis, 1) @ s[:, -1]
                return float(theta[-1]), hessian.hvps
            basis.append(w / betas[-1])

    return measure


def flat(parts: list[Tensor]) -> Any:
    """As one numpy vector."""
    return torch.cat([p.detach().reshape(-1) for p in parts]).cpu().numpy()


def parts_of(vector: Any, like: list[Tensor]) -> list[Tensor]:
    """A numpy vector in the shapes of these."""
    split = torch.as_tensor(vector).split([p.numel() for p in like])
    return [a.reshape(p.shape).to(p) for a, p in zip(split, like, strict=True)]


METHODS: dict[str, tuple[Method, float]] = {  # with the tolerance
    "gfs_core, tol 1e-2": (ours, TOL),
    "PyHessian, tol 1e-2": (pyhessian, TOL),
    "PyHessian, tol 1e-3 (default)": (pyhessian, 1e-3),
    "scipy eigsh, v0 warm": (scipy_eigsh(None), TOL),
    "scipy eigsh, v0 warm, ncv 3": (scipy_eigsh(3), TOL),
    "curvlinops + eigsh, v0 warm": (curvlinops_eigsh(None), TOL),
    "Lanczos, from random": (lanczos(warm=False), TOL),
    "Lanczos, warm, all vectors kept": (lanczos(warm=True), TOL),
}


def truth(task: Task, model: nn.Module, batch: Batch, tol: float = 1e-9, ncv: int = 60, start: Any = None) -> float:
    """By ARPACK in float64, from ones or another start."""
    model, (x, y) = copy.deepcopy(model).double(), batch
    double = x.double() if x.is_floating_point() else x
    hessian = exact_products(model, task.loss, (double, y))
    params = hessian.objective.params
    n = sum(p.numel() for p in params)
    operator = LinearOperator((n, n), matvec=lambda v: flat(hessian(parts_of(v.ravel(), params))), dtype=np.float64)
    first = np.ones(n) if start is None else start(n)
    return float(eigsh(operator, k=1, which="LA", tol=tol, ncv=ncv, v0=first)[0][0])
