"""The figure: ratios over rates, levels over the speed of the ramp, and best rates over onsets."""

from __future__ import annotations

from typing import Any

from benchmarks.lib import plots
from benchmarks.own_edge.fits import curve_of, smooth
from benchmarks.own_edge.rows import NAME, SEEDS, SLOW, SLOWER, SPEEDS, Found, found_in

COLOURS = {"SGD": "C0", "momentum": "C1", "Adam": "C4", "AdamW": "C2", "RMSprop": "C3"}
SHOWN = 10  # every so many ratios are drawn


def draw(results: dict[str, Any]) -> None:
    """Write the figure, where matplotlib is installed."""
    figure = plots.figure(13, 4.2)
    if figure is None:
        return
    curves, levels, rates = figure.subplots(1, 3)
    found = found_in(results)
    for f in found:
        _curve(curves, f)
        _level(levels, f)
        _best(rates, f)
    for axis in (curves, rates):
        axis.set_xscale("log")
        axis.set_yscale("log")
    curves.set_ylim(1e-4, 10)
    curves.set_xlim(1e-3, 1e3)
    curves.axhline(1, color="grey", lw=0.8)
    curves.set_title("1 % a step, seed 0", fontsize=10)
    curves.set_xlabel("rate / onset")
    curves.set_ylabel("running stability ratio")
    levels.set_xscale("log")
    levels.set_yscale("log")
    levels.set_xticks([100 * (g - 1) for g in (SLOWER, *SPEEDS)], [f"{100 * (g - 1):.2g} %" for g in (SLOWER, *SPEEDS)])
    levels.minorticks_off()
    levels.set_title("the level over the speed (dashed: (1 − β)/(1 + β))", fontsize=10)
    levels.set_xlabel("rise of the rate in a step")
    levels.set_ylabel("level, solved, seed 0")
    levels.axhline(1, color="grey", lw=0.8)
    levels.axhline((1 - 0.9) / (1 + 0.9), color="grey", lw=0.8, ls="--")
    low, high = rates.get_xlim()
    line = (max(low, 1e-4), high)
    for factor, style in ((1, "-"), (10, ":")):
        rates.plot(line, [factor * x for x in line], color="grey", lw=0.8, ls=style)
    rates.set_title("best rate over onset (lines: 1, 10 times)", fontsize=10)
    rates.set_xlabel("onset")
    rates.set_ylabel("best rate, warm-up and cosine")
    handles = [rates.plot([], [], "o", color=colour)[0] for colour in COLOURS.values()]
    handles += [rates.plot([], [], mark, color="black", mfc="none")[0] for mark in ("o", "s", "^")]
    labels = [*COLOURS, "batch ≤ 64", "batch ≥ 256", "BatchNorm"]
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=9)
    plots.save(figure, NAME)


def _curve(axis: Any, f: Found) -> None:
    row = f.ramp()
    if row["onset"] is None:
        return
    rates, ratios, _ = curve_of(f, SLOW, 0)
    even = smooth(ratios)[::SHOWN]
    axis.plot([r / row["onset"] for r in rates[::SHOWN]], even, lw=0.7, alpha=0.8, color=COLOURS[f.of.optimizer])


def _level(axis: Any, f: Found) -> None:
    known = [(100 * (g - 1), level) for g in (SLOWER, *SPEEDS) if (level := f.level(g)) is not None]
    if len(known) > 1:
        axis.plot(*zip(*known, strict=True), ".-", lw=0.7, alpha=0.8, color=COLOURS[f.of.optimizer])


def _best(axis: Any, f: Found) -> None:
    mark = "^" if f.normalised else "s" if f.large else "o"
    for seed in SEEDS:
        onset, best = f.ramp(SLOW, seed)["onset"], f.best(seed)
        if onset is not None and best is not None:
            axis.plot(onset, best, mark, color=COLOURS[f.of.optimizer], mfc="none", ms=6)
