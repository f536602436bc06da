"""Accuracy against dense Hessians."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gfs_core as gfs
from benchmarks.lib.store import Row
from gfs_core.linalg.eigen import largest_eigenvalues
from tests.core.reference import MODELS, cross_entropy, data, make, top_eigenvalues


def run() -> Iterator[Row]:
    """One row for each model or spectrum, and number of eigenvalues."""
    for name in MODELS:
        for k in (1, 3):
            model = make(name)
            truth = top_eigenvalues(model, k)
            found = gfs.sharpness(model, cross_entropy, data(), k=k, tol=1e-8, max_hvps=5000)
            yield _row(name, k, found.values, truth, found.hvps)
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
            yield _row(name, k, found.values, sorted(spectrum, reverse=True)[:k], found.hvps)


def _row(name: str, k: int, found: list[float], truth: list[float], hvps: int) -> Row:
    error = max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, truth, strict=True))
    return {"problem": name, "k": k, "error": error, "hvps": hvps}
