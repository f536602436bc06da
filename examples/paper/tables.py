"""The tables of docs/paper.md, written from the stored results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from examples.paper.networks import violations


def write(found: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    trainings = found["networks"] | found["beyond"]
    return "\n".join(
        [
            "### Counts\n",
            *_table(("", "solutions by flow", "rises beyond the error bar"), _counts(found)),
            "### Scalar networks: one step from random starts, rises of φ / starts\n",
            *_map(found["map"]["depths"]),
            "### Trainings: the full solution at each iterate\n",
            *_table(
                ("training", "iterates", "φ first → last", "error bar, median and largest", "rises beyond it",
                 "sharpness / threshold, last half", "gradients per solution", "RK4 needs", "ratio"),
                (_training(name, run) for name, run in trainings.items()),
            ),
            "### The same by RK4\n",
            *_table(
                ("training", "step", "φ", "error bar", "φ by RK4, step 1/λ₁", "gradients", "gradients of RK4"),
                (
                    (r["name"], f"{r['step']}", f"{r['phi']:.5f}", f"{r['error']:.5f}", f"{r['rk4']:.5f}",
                     f"{r['gradients']:,}", f"{r['rk4 gradients']:,}")
                    for r in found["rk4"]
                ),
            ),
            "### Horizon k against the full solution\n",
            *_horizon(found["horizon"]),
        ]
    )  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _counts(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    flows = [s for run in found["scalar"]["runs"] for s in run["steps"] if "flow" in s]
    worst = max(abs(s["flow"] / s["phi"] - 1) for s in flows)
    rows = [("scalar, flow against closed form", f"{len(flows)}", f"largest relative difference {worst:.0e}")]
    runs = [d["runs"] for d in found["map"]["depths"]]
    rose = f"{sum(r['rose'] for r in runs)} of {sum(r['runs'] for r in runs):,} runs"
    rows.append(("scalar, whole runs from 0 ≤ π ≤ 1, ηφ ≤ 2√2", "closed form", rose))
    flows = [f for run in found["regression"]["runs"] for f in run["flows"]]
    worst = max(abs(f["flow"] / f["phi"] - 1) for f in flows)
    rows.append(
        ("regression, flow against the known solution", f"{len(flows)}", f"largest relative difference {worst:.0e}")
    )
    for covered, name in ((True, "regression, ηφ ≤ 2√2 at the start"), (False, "regression, above")):
        some = [r for r in found["regression"]["runs"] if r["covered"] == covered]
        rose, iterates = sum(r["rises"] for r in some), sum(r["iterates"] for r in some)
        rows.append(
            (
                name,
                "closed form",
                f"{rose} of {iterates:,} iterates ({sum(r['rises'] > 0 for r in some)} of {len(some)} runs)",
            )
        )
    for key, name in (("networks", "networks, squared loss, full batch"), ("beyond", "beyond the paper")):
        iterates = [i for run in found[key].values() for i in run["iterates"]]
        rises = sum(len(violations(run["iterates"])) for run in found[key].values())
        left_out = sum(not i["converged"] for i in iterates)
        rows.append(
            (
                name,
                f"{len(iterates)} (three times each)",
                f"{rises}" + (f"; {left_out} without an end" if left_out else ""),
            )
        )
    return rows


def _map(depths: Sequence[Any]) -> list[str]:
    rows = [
        (name, *(f"{d['regions'][name][0]:,} / {d['regions'][name][1]:,}" for d in depths))
        for name in depths[0]["regions"]
    ]
    return _table(("region", *(f"D = {d['depth']}" for d in depths)), rows)


def _training(name: str, run: dict[str, Any]) -> tuple[str, ...]:
    settled = [i for i in run["iterates"] if i["converged"]]
    bars = [i["error"] / i["phi"] for i in settled]
    late = [r[3] for r in run["raw"][len(run["raw"]) // 2 :] if r[3] is not None]
    cost, rk4 = median(i["gradients"] for i in settled), median(i["rk4"] for i in settled)
    needs = ("–", "–") if run["settings"]["cutoff"] is not None else (f"{rk4:,.0f}", f"{rk4 / cost:.0f}")
    return (
        name,
        f"{len(settled)}" + (f" of {len(run['iterates'])}" if len(settled) < len(run["iterates"]) else ""),
        f"{settled[0]['phi']:.4g} → {settled[-1]['phi']:.4g}",
        f"{median(bars):.0e}, {max(bars):.0e}",
        f"{len(violations(run['iterates']))}",
        f"{min(late):.2f}–{max(late):.2f}",
        f"{cost:,.0f}",
        *needs,
    )


def _horizon(found: dict[str, Any]) -> list[str]:
    ks = [r["k"] for r in next(iter(found.values()))["rows"]]
    head = ("training", *("raw" if k == 0 else f"k = {k}" for k in ks), "flow ends at k", "carries it from k")
    rows = []
    for name, one in found.items():
        cells = [f"{r['distance']:.0%}, " + ("–" if r["levels"] is None else f"{r['levels']:.2f}") for r in one["rows"]]
        rows.append(
            (name, *cells, f"{one['full time']:,.0f}", "none" if one["carries"] is None else f"{one['carries']}")
        )
    return _table(head, rows)
