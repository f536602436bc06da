"""The base rate off by a factor: every method at multiples of one base rate, at equal cost."""

from __future__ import annotations

import functools
import itertools
import math
from statistics import median
from typing import Any

from benchmarks.control.rows import GOAL, MULTIPLES, Groups, best_baseline, cell, grouped, times, values
from benchmarks.control.training import EVERY, METHODS, OURS, PLATEAU, STEPS, Method, row_of, train
from benchmarks.control.workloads import IMAGES, WORKLOADS, Workload
from benchmarks.lib import plots
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from gfs_core.actions.rate import PROFILE

SEEDS = 5
EXPECTED = len(WORKLOADS) * len(MULTIPLES) * len(METHODS) * SEEDS  # runs
FREE = PROFILE.free  # measurements that no budget holds back
RATES = f"""## The base rate off by a factor

Every method at multiples of one base rate, {SEEDS} seeds: median (smallest–largest). *Plateau* halves the rate
when the mean loss of {PLATEAU} steps has not fallen for three times; *schedule-free* has a warm-up of 5 %, as
*warm-up + cosine* has; the cosines under *cap* and *follow* have none. Control has its defaults: measured every {EVERY}
steps, within the budget of 5 % of wall time.

![Validation over multiples of the base rate](control.svg)

The total cost is the same: control takes time, so controlled runs have fewer steps: as many as take the time of
{STEPS} without control. Runs are so short that the budget counts little beside the first {FREE} measurements, which
are free of it, and the models so small that much of a measurement is Python's: counted in gradients, a product on a
sixteenth of the batch every {EVERY} steps adds {200 / (16 * EVERY):.1f} %.
"""
BEHIND = """### Behind the best tuned baseline

Points of accuracy by which the median lies behind the best median of all methods without control at all multiples;
negative: ahead of it.
"""
GOALS = f"""### The goals

Within {100 * GOAL:.0f} point of that baseline at every multiple; no divergence; at ×1 not worse than warm-up + cosine
by more than its seeds differ.
"""


def fraction(workload: Workload, method: Method) -> Row:
    """The time that control adds, as a fraction of that of the same run without it, and the steps that leaves.

    The free measurements weigh more in a shorter run: the steps are those that take as long as all of them without
    control, counted in a run that is long enough.
    """
    train(workload, method, workload.rate, 0, STEPS, taken=20)  # the first calls are slow
    found = []
    for _ in range(3):
        run = train(workload, method, workload.rate, 0, STEPS)
        allowed = STEPS * run.rest / len(run.losses)
        steps = next((i for i, spent in enumerate(itertools.accumulate(run.times), 1) if spent >= allowed), STEPS)
        found.append((steps, run.rest / len(run.losses)))
    steps, each = sorted(found)[1]
    return {"fraction": round(STEPS / steps - 1, 3), "step_ms": round(1e3 * each, 3), "steps": steps}


def run(store: Store) -> None:
    for name, workload in WORKLOADS.items():
        store.add("cost", (name, "running"), functools.partial(fraction, workload, OURS["cap, cosine"]))
        store.add("cost", (name, "cdat"), functools.partial(fraction, workload, METHODS["CDAT"]))
    for seed, (name, workload) in itertools.product(range(SEEDS), WORKLOADS.items()):
        for multiple, (key, method) in itertools.product(MULTIPLES, METHODS.items()):
            steps = STEPS
            if method.options is not None:
                kind = "cdat" if method.options["control"] == "cdat" else "running"
                steps = store.results["cost"][f"{name} | {kind}"]["steps"]
            rate = multiple * workload.rate
            make = functools.partial(row_of, workload, method, rate, seed, steps)
            store.add("rates", (name, key, multiple, seed), make)


def render(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["rates"])
    prices = []
    for name in WORKLOADS:
        running, cdat = (results["cost"][f"{name} | {kind}"] for kind in ("running", "cdat"))
        added = [told for r in (running, cdat) for told in (f"{100 * r['fraction']:.0f} %", r["steps"])]
        prices.append([name, f"{running['step_ms']:.1f}", *added])
    head = ["workload", "step, ms", "running: added", "steps", "CDAT: added", "steps"]
    out = [RATES, *table(head, prices), ""]
    for name, workload in WORKLOADS.items():
        what = "accuracy in validation" if workload.accuracy else "loss in validation (smaller is better)"
        best, key, multiple = best_baseline(groups, name)
        out += [
            f"**{name}**, base rate {workload.rate:g}: {what}. Best tuned baseline: {key}, ×{multiple:g}, {best:.3f}."
        ]
        cells = [
            [key, *(cell(groups.get((name, key, str(m))), workload.accuracy) for m in MULTIPLES)] for key in METHODS
        ]
        out += ["", *table(["method", *times(MULTIPLES)], cells), ""]
    return out + losses_of_accuracy(groups) + goals(groups)


def behind(groups: Groups, name: str, key: str, multiple: float) -> float | None:
    """By how much the median of a method lies behind the best tuned baseline; < 0: it is ahead."""
    rows = groups.get((name, key, str(multiple)))
    if not rows:
        return None
    accuracy = WORKLOADS[name].accuracy
    return (1 if accuracy else -1) * (best_baseline(groups, name)[0] - median(values(rows, accuracy)))


def losses_of_accuracy(groups: Groups) -> list[str]:
    out = [BEHIND]
    cells = []
    for name, key in itertools.product(IMAGES, METHODS):
        found = [behind(groups, name, key, m) for m in MULTIPLES]
        shown = ["–" if f is None else f"{100 * f:.1f}" for f in found]
        worst = max((f for f in found if f is not None), default=math.nan)
        cells.append([name, key, *shown, f"{100 * worst:.1f}"])
    return [*out, *table(["workload", "method", *times(MULTIPLES), "worst"], cells), ""]


def goals(groups: Groups) -> list[str]:
    """Sentences on the goals, from the numbers."""
    out = [GOALS]
    for key in METHODS:
        held: dict[str, list[float]] = {}
        lowest = min(
            (min(values(rows, True)) for k, rows in groups.items() if k[1] == key and k[0] in IMAGES), default=0.0
        )
        for name in IMAGES:
            held[name] = [f for m in MULTIPLES if (f := behind(groups, name, key, m)) is not None]
        pairs = [(f, name, m) for name in IMAGES for m in MULTIPLES if (f := behind(groups, name, key, m)) is not None]
        if not pairs:
            continue
        within = sum(f <= GOAL for f, _, _ in pairs)
        above = [f for f, _, m in pairs if m >= 1]
        all_of = sum(bool(h) and max(h) <= GOAL for h in held.values())
        worst = max(pairs)
        diverged = sum(r["diverged"] for k, rows in groups.items() if k[1] == key for r in rows)
        count = sum(len(rows) for k, rows in groups.items() if k[1] == key)
        out.append(
            f"- *{key}*: within {100 * GOAL:.0f} point in {within} of {len(pairs)} cells (from ×1 on in "
            f"{sum(f <= GOAL for f in above)} of {len(above)}), at every multiple on {all_of} of {len(IMAGES)} image "
            f"workloads; worst: {100 * worst[0]:.1f} points behind ({worst[1]}, ×{worst[2]:g}); "
            f"lowest accuracy of a single run {lowest:.3f}. "
            f"Diverged on all six workloads: {diverged} of {count} runs."
        )
    worse = []
    for name, key in itertools.product(WORKLOADS, OURS):
        accuracy = WORKLOADS[name].accuracy
        ours, theirs = (groups.get((name, k, "1.0")) for k in (key, "warm-up + cosine"))
        if ours and theirs:
            sign = 1 if accuracy else -1
            low = min(sign * v for v in values(theirs, accuracy))
            if (short := low - sign * median(values(ours, accuracy))) > 0:
                by = f"{100 * short:.1f} points" if accuracy else f"{short:.3f}"
                worse.append(f"*{key}* on {name} (by {by})")
    out.append("")
    if worse:
        out.append(
            f"At ×1 the median is worse than the worst seed of warm-up + cosine in {len(worse)} of "
            f"{len(WORKLOADS) * len(OURS)} cases: " + "; ".join(worse) + "."
        )
    else:
        out.append("At ×1 no median of a control is worse than the worst seed of warm-up + cosine.")
    return [*out, ""]


def draw(results: dict[str, Any]) -> None:
    """A picture of the part `rates`, where matplotlib is installed."""
    figure = plots.figure(11, 6.5)
    if figure is None:
        return
    groups = grouped(results["rates"])
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, workload) in zip(axes, WORKLOADS.items(), strict=True):
        ends = []
        for i, key in enumerate(METHODS):
            found = [(m, groups.get((name, key, str(m)), [])) for m in MULTIPLES]
            points = [(m, median(values(rows, workload.accuracy))) for m, rows in found if rows]
            style = "-" if key in OURS else "--"
            axis.plot(*zip(*points, strict=True), style, marker=".", color=f"C{i}", label=key)
            ends += [value for _, value in points]
        if not workload.accuracy:
            axis.set_ylim(min(ends) - 0.1, min(max(ends), min(ends) + 2.5))
        axis.set_xscale("log")
        axis.set_xticks(MULTIPLES, times(MULTIPLES))
        axis.minorticks_off()
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("accuracy" if workload.accuracy else "loss", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    plots.save(figure, "control")
