"""The page, with the sections of `benchmarks.spectra` and `benchmarks.states`."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import spectra, states
from benchmarks.lib.store import Row
from benchmarks.lib.tables import middle_and_largest, table

HEAD = """# Largest eigenvalues

## Accuracy

Against dense Hessians in float64 (models of tests/core/reference.py, and matrices with a given spectrum),
tol 1e-8: the largest relative error among the k values (absolute for the zero Hessian), and the products.
"""
COST = """
## Cost of a warm measurement

Five trainings on scikit-learn's digits, float32, one thread; in each, sequences of 8 states after a first one,
1, 5, 20 and 50 steps apart. Errors of the value are against ARPACK in float64 at tol 1e-9. Plain attention
kernels are set for all: fused attention has no second derivative, and only gfs_core changes the kernel by
itself. What a measurement takes in time is in [peers.md](peers.md).
"""
LIBRARIES = """
*MLP, squared loss* is hard: its two largest eigenvalues are within some per cent of each other and cross. An
error above the tolerance means that the solver stayed at the second one, which a residual cannot tell; a
monitor therefore mixes the gradient and a random vector into its third start, and every tenth after it.

### Beside other libraries

All distances pooled. PyHessian's power iteration has no warm start and stops on the change of its value.
eigsh starts from the last eigenvector. *Lanczos, from random* is the algorithm of hessian-eigenthings at its
most favourable: stopped at the first step whose residual passes; that library takes a fixed number of steps.
*Lanczos, warm, all vectors kept* is the best a Krylov method can do with the same start and
stop rule; gfs_core keeps at most seven vectors.
"""


def render(results: dict[str, Any]) -> str:
    """The whole page; both sections are read from their own results."""
    accurate = [[r["problem"], r["k"], f"{r['error']:.0e}", r["hvps"]] for r in results["accuracy"]]
    rows = results["warm"]
    by_method: dict[str, dict[str, list[Row]]] = {}
    for r in rows:
        by_method.setdefault(r["run"], {}).setdefault(r["method"], []).append(r)
    ours, beside = [], []
    for run, methods in by_method.items():
        own = next(iter(methods.values()))
        errors = [e for r in own for e in r["errors"]]
        share = f"{sum(e <= 1e-3 for e in errors)} of {len(errors)}"
        steps = ", ".join(middle_and_largest(r["hvps"]) for r in own)
        ours.append([run, steps, share, f"{max(errors):.0e}"])
        for method, some in methods.items():
            hvps, errors = [h for r in some for h in r["hvps"]], [e for r in some for e in r["errors"]]
            accuracy = f"{median(errors):.0e} ({max(errors):.0e})"
            beside.append([run, method, middle_and_largest(hvps), some[0]["cold"], accuracy])
    head = ["run", "products at 1, 5, 20, 50 steps: median (largest)", "share of errors ≤ 1e-3", "largest error"]
    columns = ["run", "method", "products: median (largest)", "cold", "error: median (largest)"]
    lines = [HEAD, *table(["problem", "k", "error", "products"], accurate), COST, *table(head, ours)]
    lines += [LIBRARIES, *table(columns, beside), ""]
    return "\n".join(["\n".join(lines), spectra.section(), states.section()])
