"""The page of the comparison."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.control.methods import (
    FINDER,
    GUARD,
    LAZY,
    LIMITS,
    METHODS,
    OURS,
    PEERS,
    PLATEAU,
    REFERENCE,
    SEARCH,
    START,
)
from benchmarks.control.price import MEASURED
from benchmarks.control.rows import LEAST, Cell, cell, cells, middle, percent
from benchmarks.control.runs import SEEDS, SHIFTS, rate_at, stored_best
from benchmarks.control.training import WARMUP
from benchmarks.control.workloads import LANGUAGE, LENGTH, SHORT, STEPS, WORKLOADS
from benchmarks.lib import plots
from benchmarks.lib.tables import table

FREE = ("schedule-free", "Prodigy + cosine", "GeN", "calibrated NadamW", FINDER)  # that are to need no rate
HIGH = (2, 3)  # half decades: ×10 and ×30
HEAD = f"""# Control of the learning rate

    OMP_NUM_THREADS=1 python -m benchmarks.control

{len(WORKLOADS)} trainings of {STEPS} steps on which no constant of the package was chosen. The *tuned* rate is the best
of rates half a decade apart under a warm-up of {WARMUP:.0%} and a cosine, of this workload and seed, chosen on the
validation data themselves. Each method then begins from that rate times 0.1, 1, 10 and 30 (10^1.5 = 31.6). *Excess*:
of the validation loss at the end over that of the tuned reference. A run is lost (†) where that loss is not finite, or
less than {LEAST:.0%} of what the reference gained was gained; it counts as an infinite excess.

At equal time: a method that takes time beside the training itself has fewer steps, as many as take the time of {STEPS}
without it ([below](#what-they-cost)). What looks for a rate before the training has all steps; its cost is given apart.
"""
METHODS_TEXT = f"""## The methods

- *warm-up + cosine*, *constant*; *plateau*: half the rate where the mean loss of {PLATEAU} steps has not fallen three
  times (`ReduceLROnPlateau`).
- *LR finder*: `Tuner.lr_find` of Lightning as it comes, its suggestion with warm-up and cosine. It does not go by the
  base rate, nor do *Prodigy* (at its rate of 1, over a cosine) and *calibrated NadamW* (torch's, with the one
  configuration of AlgoPerf's self-tuning baseline: 1.7e-3, decay 0.08, warm-up of 2 %, cosine): they have one run of
  each seed, which counts at each multiple.
- *schedule-free*: SGD or AdamW of its package, warm-up of {WARMUP:.0%}. *GeN*: its package over the workload's own
  optimizer, every {LAZY} steps, with its linear fading. *ZClip*: its package as it comes. For ScheduleFree+ there is no
  package yet.
- *guard*: `control="guard"` over warm-up and cosine. *start*: `control="start"` (which guards, too) over a cosine
  without a warm-up of its own. *find_rate*: the rate that it recommends from the base rate on, with warm-up and
  cosine. *cap*, *follow*, *warmup*, *CDAT*: these controls over a cosine. All with every other default.
"""
COSTS = f"""## What they cost

Time that a method adds to that of the training alone, and the steps that leaves it, at the tuned rate: processor time
over {MEASURED} steps, before and after which the training is timed without it. Models this small take milliseconds a
step, most of it Python's, and so is most of what a monitor takes: the longer a step, the less it counts.
"""
REMARK = """What the guard reads within its budget depends on the clock, and so does whether it skips a step. The
training with BatchNorm at ×0.1, made six times, had a step skipped in three of them, and was the same to the bit in the
others.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    made = results["environment"]
    codes = {row["code"] for row in results.get("runs", {}).values() if row.get("code")}
    return "\n".join(
        [
            HEAD,
            *summary(results),
            *goals(results),
            METHODS_TEXT,
            *workloads(results),
            *costs(results),
            *limits(results),
            *by_workload(results),
            f"torch {made['torch']}, Python {made['python']}, one thread; trees of `gfs_core` and versions of others: "
            f"{', '.join(sorted(codes))}.",
            "",
        ]
    )


def excesses(found: dict[tuple[str, int], Cell], shifts: tuple[int, ...] = tuple(SHIFTS)) -> list[float]:
    """Medians over seeds, of all workloads at these multiples."""
    return [c.middle for (_, shift), c in found.items() if shift in shifts]


def lost(found: dict[tuple[str, int], Cell], shifts: tuple[int, ...] = tuple(SHIFTS)) -> tuple[int, int]:
    """Runs that are lost, and all."""
    own = [c for (_, shift), c in found.items() if shift in shifts]
    return sum(c.lost for c in own), sum(len(c.excesses) for c in own)


def worst(found: dict[tuple[str, int], Cell]) -> float:
    """The largest excess of a run."""
    return max((e for c in found.values() for e in c.excesses), default=math.nan)


def summary(results: dict[str, Any]) -> list[str]:
    rows = []
    for key in METHODS:
        found = cells(results, key)
        if not found:
            continue
        bad, all_ = lost(found)
        middles = excesses(found)
        within = sum(e <= 0.1 for e in middles) / len(middles)
        at = [middle(excesses(found, (shift,))) for shift in SHIFTS]
        name = f"**{key}**" if key in OURS else key
        rows.append([name, *at, middle(middles), percent(worst(found)), f"{within:.0%}", f"{bad} of {all_}"])
    head = ["method", *SHIFTS.values(), "all", "worst", "within 10 %", "lost"]
    text = """## All workloads

Median excess over the workloads, at each multiple of the tuned rate and over all of them; that of the worst run; share
of workloads and multiples within 10 % of the tuned reference; runs that are lost. Ours are in bold.
"""
    return [text, *table(head, rows), "", "![Median excess over multiples of the tuned rate](control.svg)", ""]


def goals(results: dict[str, Any]) -> list[str]:
    """Each goal with what was reached."""
    found = {key: cells(results, key) for key in METHODS}
    out = ["## The goals", ""]

    def say(goal: str, reached: bool | None, what: str) -> None:
        verdict = "not measured" if reached is None else "reached" if reached else "**missed**"
        out.append(f"- {goal}: {verdict}. {what}")

    equal, touched = healthy(results)
    count = len(equal) + len(touched)
    others = "; ".join(touched)
    say("`guard` at a healthy rate (×0.1, ×1): the same run to the bit", not touched if count else None,
        f"The weights at the end are bitwise those of the run without it in {len(equal)} of {count}"
        + (f"; not in: {others}." if touched else "."))  # fmt: skip

    def high(key: str) -> float:
        return median(excesses(found[key], HIGH) or [math.nan])

    if found[GUARD]:
        bad, all_ = lost(found[GUARD], HIGH)
        say(
            "`guard` at ×10 and ×30: no run lost", bad == 0, f"{bad} of {all_}; without it {lost_at(found[REFERENCE])}."
        )
        rivals = ("ZClip + cosine", "Prodigy + cosine")
        said = ", ".join(f"{key} {percent(high(key))}" for key in (GUARD, *rivals))
        say("better there than ZClip + cosine and Prodigy in the median",
            all(high(GUARD) < high(key) for key in rivals), said + ".")  # fmt: skip
    out += _search_goal(results, found[SEARCH], say)
    if found[START]:
        bad, all_ = lost(found[START])
        own = median(excesses(found[START]))
        say("`start` + `guard` from any base rate: median ≤ 10 %", own <= 0.1, f"{percent(own)}.")
        say("none lost", bad == 0, f"{bad} of {all_}.")
        others = {key: median(excesses(found[key])) for key in FREE if found[key]}
        said = ", ".join(f"{key} {percent(value)}" for key, value in others.items())
        say("ahead of every learning-rate-free peer in the median", all(own < v for v in others.values()), said + ".")
    else:
        say("`start` + `guard` from any base rate: median ≤ 10 %, none lost, ahead of every learning-rate-free peer",
            None, "")  # fmt: skip
    for key in (GUARD, START):
        added = {name: row["added"] for name in WORKLOADS if (row := priced(results, name, key))}
        if added:
            language = [f"{100 * added[name]:.0f} % ({name})" for name in LANGUAGE if name in added]
            said = f"{100 * min(added.values()):.0f} to {100 * max(added.values()):.0f} %"
            say(f"overhead of *{key}* ≤ 5 %", max(added.values()) <= 0.05,
                f"{said}; on the language models {', '.join(language) or 'not measured'}.")  # fmt: skip
    return [*out, "", REMARK]


def lost_at(found: dict[tuple[str, int], Cell]) -> str:
    bad, all_ = lost(found, HIGH)
    return f"{bad} of {all_}"


def _search_goal(
    results: dict[str, Any], found: dict[tuple[str, int], Cell], say: Callable[[str, bool | None, str], None]
) -> list[str]:
    if not found:
        say("`find_rate`: median ≤ 3 % over tuned, worst ≤ 15 %, none lost, for less than one training", None, "")
        return []
    (bad, all_), own, most = lost(found), median(excesses(found)), worst(found)
    costs = [row["cost"] for name, row in results["runs"].items() if f"| {SEARCH} |" in name and "cost" in row]
    say("`find_rate`: median ≤ 3 % over tuned", own <= 0.03, f"{percent(own)}.")
    over = sum(e > 0.15 for c in found.values() for e in c.excesses)
    say("worst ≤ 15 %", most <= 0.15, f"{percent(most)}; {over} of {all_} runs are above 15 %.")
    say("none lost", bad == 0, f"{bad} of {all_}.")
    say("for less than one training", max(costs) < 1,
        f"{100 * median(costs):.0f} % of its steps in the median, {100 * max(costs):.0f} % at most.")  # fmt: skip
    return []


def healthy(results: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Runs under the guard that end at the very weights of those without it, and what it did in the others."""
    equal, touched = list[str](), list[str]()
    for name, shift, seed in itertools.product(WORKLOADS, (-2, 0), range(SEEDS)):
        best = stored_best(results, name, seed)
        own = results.get("healthy", {}).get(f"{name} | {SHIFTS[shift]} | {seed}")
        plain = results["reference"].get(f"{name} | {(best or 0) + shift} | {seed}")
        if own and plain and own["weights"] == plain["weights"]:
            equal.append(name)
        elif own and plain:
            did = ", ".join(f"{own[what]} {what}" for what in ("skipped", "lowered", "rollbacks") if what in own)
            touched.append(f"{name}, {SHIFTS[shift]} ({did}; loss {percent(own['loss'] / plain['loss'] - 1)})")
    return equal, touched


def priced(results: dict[str, Any], name: str, key: str) -> dict[str, Any] | None:
    row: dict[str, Any] | None = results.get("price", {}).get(f"{name} | {key}")
    return row


def workloads(results: dict[str, Any]) -> list[str]:
    rows = []
    for name in WORKLOADS:
        bests = [(s, b) for s in range(SEEDS) if (b := stored_best(results, name, s)) is not None]
        if bests:
            losses = [results["reference"][f"{name} | {b} | {s}"]["loss"] for s, b in bests]
            rates = dict.fromkeys(f"{rate_at(name, b):.2g}" for _, b in bests)
            rows.append([name, len(bests), ", ".join(rates), ", ".join(f"{loss:.4g}" for loss in losses)])
    text = f"""## The workloads

Named by their optimizer and batch. Two networks for Fashion-MNIST; an update of rank 4 of a transformer that was
trained on the prose of Python's manual, for {SHORT} bytes at a time of Python's source; a GRU on that manual's
characters; regression to a random network, with noise; ratings as inner products of embeddings. And two language
models of 1.1 million weights, on {SHORT} words and {LENGTH} bytes of the manual at a time: they have one seed.
"""
    return [text, *table(["workload", "seeds", "tuned rate", "its loss in validation"], rows), ""]


def costs(results: dict[str, Any]) -> list[str]:
    keys = [key for key in METHODS if METHODS[key].priced]
    rows = []
    for name in WORKLOADS:
        found = [priced(results, name, key) for key in keys]
        if any(found):
            step = next(row["step_ms"] for row in found if row)
            rows.append(
                [name, f"{step:.1f}", *(f"{100 * r['added']:.0f} %, {r['steps']}" if r else "–" for r in found)]
            )
    return [COSTS, *table(["workload", "step, ms", *keys], rows), ""]


def limits(results: dict[str, Any]) -> list[str]:
    """Who is best where, and whether a control that keeps a ratio below a limit is so anywhere."""
    found = {key: cells(results, key) for key in METHODS}
    controls = [key for key in OURS if key != SEARCH]
    best, among = Counter[str](), Counter[str]()
    ahead: dict[str, list[str]] = {key: [] for key in LIMITS}
    places = [p for p in itertools.product(WORKLOADS, SHIFTS) if any(p in own for own in found.values())]
    for place in places:
        there = {key: own[place].middle for key, own in found.items() if place in own}
        held = {key: there[key] for key in controls if key in there}
        first = min(there, key=lambda key: there[key])
        best[first] += 1
        if held and min(held.values()) < math.inf:
            among[min(held, key=lambda key: held[key])] += 1
        if first in LIMITS:
            second = min(value for key, value in there.items() if key not in LIMITS)
            ahead[first].append(f"{place[0]}, {SHIFTS[place[1]]} ({percent(there[first])} beside {percent(second)})")
    text = f"""## Who is best where

Of {len(places)} workloads and multiples: how often a method has the least excess of all, and how often of the controls
alone.
"""
    rows = [[key, best[key], among[key] if key in controls else ""] for key in METHODS if found[key]]
    out = [text, *table(["method", "of all", "of the controls"], rows), ""]
    out += ["Where a control by a limit is best of all, beside the best of the others:", ""]
    out += [f"- *{key}*: " + ("; ".join(where) or "nowhere") + "." for key, where in ahead.items() if found[key]]
    return [*out, ""]


def by_workload(results: dict[str, Any]) -> list[str]:
    out = ["## By workload", "", "Median excess over the seeds.", ""]
    for name in WORKLOADS:
        rows = []
        for key in METHODS:
            own = [cell(results, name, key, shift) for shift in SHIFTS]
            if any(own):
                rows.append([key, *("–" if c is None else str(c) for c in own)])
        if rows:
            out += [f"**{name}**", "", *table(["method", *SHIFTS.values()], rows), ""]
    return out


def draw(results: dict[str, Any]) -> None:
    """A picture of the medians, where matplotlib is installed."""
    figure = plots.figure(9, 5)
    if figure is None:
        return
    axis = figure.subplots()
    for i, key in enumerate(METHODS):
        found = cells(results, key)
        middles = [(shift, median(own)) for shift in SHIFTS if (own := excesses(found, (shift,)))]
        points = [(shift, 100 * max(value, 1e-3)) for shift, value in middles if math.isfinite(value)]
        if points:
            style = "--" if key in PEERS else ":" if key in LIMITS else "-"
            axis.plot(*zip(*points, strict=True), style, marker=".", color=f"C{i % 10}", label=key)
    axis.set_yscale("log")
    axis.set_xticks(list(SHIFTS), list(SHIFTS.values()))
    axis.set_xlabel("base rate over the tuned one")
    axis.set_ylabel("median excess of the validation loss, %")
    figure.legend(loc="outside right center", fontsize=8)
    plots.save(figure, "control")
