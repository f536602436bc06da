"""How much of what the full gradient flow solution says the sharpness after flow for k·η carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import spearmanr

CARRIES = (0.9, 0.05)  # rank correlation with the full value at least, median distance from it at most


def compute(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """For each workload and k: distance, rank correlation of levels and of changes; k = 0 is the raw sharpness."""
    return {name: _of(run) for name, run in runs.items()}


def _of(run: dict[str, Any]) -> dict[str, Any]:
    raw = {step: sharpness for step, _, sharpness, *_ in run["raw"]}
    settled = [i for i in run["iterates"] if i["converged"]]
    rows = []
    for k in (0, *run["settings"]["horizons"]):
        pairs = [(raw[i["step"]] if k == 0 else i["short"].get(str(k), i["phi"]), i["phi"]) for i in settled]
        short, full = np.array(pairs).T
        row: dict[str, Any] = {"k": k, "distance": float(np.median(np.abs(short / full - 1)))}
        row |= {"levels": rank(short, full), "changes": rank(np.diff(short), np.diff(full))}
        row["rises"] = sum(bool(b > 1.01 * a) for a, b in pairwise(short))
        rows.append(row)
    carries = next((r["k"] for r in rows if (r["levels"] or 0) >= CARRIES[0] and r["distance"] <= CARRIES[1]), None)
    time = float(np.median([i["time"] for i in settled]))
    full_rises = sum(b["phi"] > 1.01 * a["phi"] for a, b in pairwise(settled))
    return {"rows": rows, "carries": carries, "full time": time, "full rises": full_rises, "iterates": len(settled)}


def rank(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ``None`` where there is none."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
