"""The figures, drawn from stored results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.paper.networks import violations
from examples.paper.scalar import EDGE

RAW, FULL, LIMIT = "#9aa5b1", "#c0392b", "#222222"


def draw(name: str, data: Any, path: Path) -> None:
    """Draw the figure ``name`` and write it."""
    with plt.rc_context(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure = DRAWN[name](data)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _axes(rows: int, columns: int, width: float = 3.0, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.atleast_1d(axes).flat)


def scalar(data: Any) -> Figure:
    figure, axes = _axes(1, 4)
    for axis, depth in zip(axes, (2, 3, 4, 5), strict=True):
        for run in data["runs"]:
            if run["depth"] != depth:
                continue
            rate = run["rate"]
            axis.plot([s["step"] + 1 for s in run["steps"]], [rate * s["phi"] for s in run["steps"]], color=RAW)
            dots = [(s["step"] + 1, rate * s["flow"]) for s in run["steps"] if "flow" in s]
            axis.plot(*zip(*dots, strict=True), "o", color=FULL, markersize=3)
        axis.axhline(2, color=LIMIT, linestyle="--", linewidth=0.8)
        axis.axhline(EDGE, color=LIMIT, linestyle=":", linewidth=0.8)
        axis.set(xscale="log", title=f"D = {depth}", xlabel="step + 1", ylabel="ηφ" if depth == 2 else None)
    figure.suptitle("Scalar networks: GFS sharpness along gradient descent. Lines: closed form; dots: the flow")
    return figure


def map_of_rises(data: Any) -> Figure:
    figure, axes = _axes(1, 4, height=2.6)
    for axis, found in zip(axes, data["depths"], strict=True):
        share = np.array(found["rose"]) / np.maximum(np.array(found["tried"]), 1)
        mesh = axis.pcolormesh(data["level"], data["product"], np.where(share > 0, share, np.nan), vmin=0, vmax=1)
        axis.axvline(EDGE, color=LIMIT, linestyle=":", linewidth=0.8)
        for edge in (0, 1):
            axis.axhline(edge, color=LIMIT, linewidth=0.6)
        axis.set(title=f"D = {found['depth']}", xlabel="ηφ", ylabel="product π" if found["depth"] == 2 else None)
    figure.colorbar(mesh, ax=axes, label="share of starts")
    figure.suptitle("Where one step of gradient descent raises φ (white: nowhere). Dotted: ηφ = 2√2")
    return figure


def convergence(data: Any) -> Figure:
    figure, axes = _axes(1, 4)
    for axis, found in zip(axes, data["above"], strict=True):
        axis.plot(found["start"], found["end"], ".", color=FULL, markersize=2)
        axis.plot([2, EDGE], [2, 4 - EDGE], color=LIMIT, linewidth=0.8)
        for row in data["below"]:
            if row["depth"] == found["depth"]:
                axis.plot(2 - row["delta"], row["end"][0], "s", color=RAW, markersize=3)
        axis.axhline(2, color=LIMIT, linestyle="--", linewidth=0.8)
        axis.set(
            title=f"D = {found['depth']}", xlabel="ηφ at the start", ylabel="ηφ at the end" if axis is axes[0] else None
        )
    figure.suptitle("Where gradient descent ends from near a minimum. Line: 2 + e → 2 − e; grey: from below 2")
    return figure


def bifurcation(data: Any) -> Figure:
    figure, axes = _axes(1, 3, width=3.6, height=3.2)
    for axis, found in zip(axes, data["pictures"], strict=True):
        for products in found["product"]:
            axis.plot(found["level"], np.array(products, float), ".", color="#1f4e79", markersize=0.6)
        axis.plot(*np.array(found["path"]).T, ".", color=FULL, markersize=2.5)
        axis.set(
            title=f"D = {found['depth']}, η = {found['rate']}",
            xlabel="ηφ",
            ylabel="product π",
            xlim=(1.8, 3.0),
            ylim=(-0.5, 2.2),
        )
    figure.suptitle(
        "Balances frozen: the last 24 of 1,000 steps (blue). Gradient descent itself (red) drifts to the left"
    )
    return figure


def regression(data: Any) -> Figure:
    figure, axes = _axes(1, 3, width=3.4)
    for axis, level in zip(axes, (1.8, 2.6, 3.5), strict=True):
        for run in data["runs"]:
            if run["level"] == level:
                steps = [s + 1 for s in run["steps"]]
                axis.plot(steps, run["raw"], color=RAW, linewidth=0.6)
                axis.plot(steps, run["phi"], color=FULL, linewidth=0.8)
                dots = [(f["step"] + 1, run["rate"] * f["flow"]) for f in run["flows"]]
                axis.plot(*zip(*dots, strict=True), "o", color=FULL, markersize=3)
        axis.axhline(2, color=LIMIT, linestyle="--", linewidth=0.8)
        axis.set(xscale="log", title=f"ηφ = {level} at the start", xlabel="step + 1", ylim=(0.8, 4))
    axes[0].set_ylabel("ηφ (red), η × sharpness (grey)")
    figure.suptitle("Squared regression, ten seeds. Lines: the known solution; dots: the flow")
    return figure


def networks(data: Any) -> Figure:
    columns = min(3, len(data))
    figure, axes = _axes(-(-len(data) // columns), columns, width=3.4)
    for axis in axes[len(data) :]:
        axis.set_axis_off()
    for axis, run in zip(axes, data.values(), strict=False):
        settings, iterates = run["settings"], [i for i in run["iterates"] if i["converged"]]
        axis.plot([r[0] for r in run["raw"]], [r[2] for r in run["raw"]], color=RAW, linewidth=0.8, label="sharpness")
        bars = [i["error"] for i in iterates]
        steps, values = [i["step"] for i in iterates], [i["phi"] for i in iterates]
        axis.errorbar(steps, values, bars, fmt="o-", color=FULL, markersize=2.5, linewidth=0.9, label="full GFS")
        for _, step in violations(iterates):
            axis.plot(step, values[steps.index(step)], "x", color=LIMIT, markersize=6)
        if settings["optimizer"] != "adam":
            threshold = run["raw"][-1][4]
            if threshold < 3 * max(max(values), max(r[2] for r in run["raw"])):
                axis.axhline(threshold, color=LIMIT, linestyle="--", linewidth=0.8, label="threshold")
        axis.set(title=settings["title"], xlabel="step")
        if settings["cutoff"] is not None:
            axis.set(yscale="log", title=f"{settings['title']}, loss {settings['cutoff']:g}")
    axes[0].legend()
    return figure


def horizon(data: Any) -> Figure:
    figure, axes = _axes(1, 3, width=3.8, height=3.4)
    for number, (name, found) in enumerate(data.items()):
        style: dict[str, Any] = {
            "color": f"C{number}",
            "linewidth": 1,
            "marker": ".",
            "linestyle": "-" if number < 5 else ":",
        }
        rows = found["rows"]
        for axis, key in zip(axes, ("distance", "levels", "changes"), strict=True):
            axis.plot(
                [max(r["k"], 0.25) for r in rows],
                [np.nan if r[key] is None else r[key] for r in rows],
                label=name,
                **style,
            )
    axes[0].set(yscale="log", title="median distance from the full GFS")
    axes[1].set(title="rank correlation over the iterates", ylim=(-1.05, 1.05))
    axes[2].set(title="rank correlation of the changes", ylim=(-1.05, 1.05))
    for axis in axes:
        axis.set(xscale="log", xlim=(0.2, 6e3), xlabel="k (first point: raw sharpness)")
    axes[2].legend(fontsize=6)
    return figure


DRAWN: dict[str, Callable[[Any], Figure]] = {
    "scalar": scalar,
    "map": map_of_rises,
    "convergence": convergence,
    "bifurcation": bifurcation,
    "regression": regression,
    "networks": networks,
    "beyond": networks,
    "horizon": horizon,
}
