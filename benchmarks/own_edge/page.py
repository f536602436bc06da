"""The page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from benchmarks.own_edge.rows import (
    BEGINS,
    CLOSELY,
    FAST,
    FASTEST,
    LATER,
    NEAR,
    SEEDS,
    SLOW,
    SLOWER,
    SPEEDS,
    THEORIES,
    Found,
    controls_in,
    found_in,
    quotients,
    spread,
    typical,
)
from benchmarks.own_edge.text import (
    AFTER,
    ALARMS,
    FIT,
    HEAD,
    HELD,
    HOW,
    LEVELS,
    RATES,
    REPEATABLE,
    SPEED,
    THEORY,
    WARMUP,
)

WITHIN = (0.75, 1.25)
WARM = [(length, interval) for length in (50, 100, 200) for interval in ("2", "10", "default")]


def render(results: dict[str, Any]) -> str:
    """The page."""
    found = found_in(results)
    minutes = sum(results["seconds"].values()) / 60
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = [
        HEAD.format(combinations=len(found)),
        *_brief(found), "", HOW, *_levels(found), "", LEVELS,
        *_theories(found), "", THEORY, *_by_theory(found), "", AFTER,
        SPEED, *_speeds(found), "",
        HELD, *_held(found), "",
        REPEATABLE, *_repeatable(found), "",
        FIT, *_fits(found, results), "",
        RATES, *_rates(found), "",
        WARMUP, *_warmups(found), "",
        ALARMS, *_alarms(results["alarms"]), "",
        f"Environment: {environment}; {minutes:.0f} minutes of one core in all.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _alarms(rows: dict[str, Row]) -> list[str]:
    cells = [
        [name, r["false"], r["learnt, healthy"], f"{r['warned']:.2f}", f"{r['lead']:g}", r["learnt, danger"]]
        for name, r in rows.items()
    ]
    steps = next(iter(rows.values()))["steps"]
    head = ["", f"false alarms in {steps:,} steps", "learnt in, of 14", "warned", "lead, median", "learnt in, of 66"]
    return table(head, cells)


def _brief(found: list[Found]) -> list[str]:
    slow = [f.ramp(SLOW, seed) for f in found for seed in SEEDS]
    knees = [r for r in slow if r["onset"] is not None]
    lost = [r["end"] / r["onset"] for r in knees if r["end"]]
    slopes = [round(median(r["slopes"][i] for r in knees), 1) + 0.0 for i in (0, 1)]  # no -0.0
    steep = {
        name: [v for f in found if (f.of.optimizer in kinds) and (v := f.slope()) is not None]
        for name, kinds in {"SGD and RMSprop": ("SGD", "RMSprop"), "the others": ("momentum", "Adam", "AdamW")}.items()
    }
    best = quotients((f.best(s), f.ramp(SLOW, s)["onset"]) for f in found for s in SEEDS)
    fast = quotients((f.ramp(FAST, s).get("level"), f.ramp(SLOW, s)["level"]) for f in found for s in SEEDS)
    fastest = quotients((f.ramp(FASTEST, s).get("level"), f.ramp(SLOW, s)["level"]) for f in found for s in SEEDS)
    seeds = quotients((f.ramp(SLOW, 1)["level"], f.ramp(SLOW, 0)["level"]) for f in found)
    solved = ", ".join(f"{median(v):.2f} with {name}" for name, v in steep.items() if v)
    between = quotients(
        (f.best(s), math.sqrt(r["onset"] * r["end"]))
        for f in found
        for s in SEEDS
        if (r := f.ramp(SLOW, s))["onset"] and r["end"]
    )
    itself = spread([v for f in found for s in SEEDS if (v := f.best(s)) and f.ramp(SLOW, s)["onset"]])
    return [
        f"- At 1 % a step {len(knees)} of {len(slow)} ramps have a knee. The running ratio rises with the rate to the",
        f"  power {slopes[0]:.1f} before it and {slopes[1]:.1f} behind it (medians), and the loss is lost at",
        f"  {median(lost):.0f} times the onset ({min(lost):.1f} to {max(lost):.0f}).",
        f"- The level that is solved for is less flat: it rises with the rate to the power {solved}.",
        f"- Two seeds have the same level to a factor of {typical(seeds):.2f} in the median. But it is no property of",
        f"  the training alone: at 3 % a step it is {median(fast):.1f} times that at 1 %, at 10 %",
        f"  {median(fastest):.1f} times.",
        "- λη is near 2 with SGD and RMSprop. With momentum and Adam it is near the threshold for small batches at the",
        "  beginning of the level where batches are small, and rises from there. No theory tells all levels to 25 %.",
        f"- The best rate is {median(best):.1f} times the onset in the median, with a spread of {spread(best):.2f}",
        f"  decades, and {median(between):.1f} times the geometric mean of the onset and the rate that was lost, with",
        f"  one of {spread(between):.2f}; that of the best rates themselves is {itself:.2f}.",
        "- A linear warm-up of 100 steps has a knee if the ratio is measured at every second step, and none with the",
        "  defaults. The ratios at its end tell the level without a knee.",
    ]


def number(value: float | None) -> str:
    """Two digits; a dash where there is none."""
    return "–" if value is None else f"{value:.2g}"


def _both(values: Iterable[float | None]) -> str:
    return ", ".join(map(number, values))


def _name(f: Found) -> list[str]:
    return [*f.of.key]


def _levels(found: list[Found]) -> list[str]:
    rows = []
    for f in found:
        slow = [f.ramp(SLOW, seed) for seed in SEEDS]
        lost = [r["end"] / r["onset"] if r["end"] and r["onset"] else None for r in slow]
        running = [p.running / p.ratio for p in f.solved() if p.ratio > 0]
        solved = [[p.ratio for p in f.solved(*where)] for where in ((NEAR,), (math.inf, NEAR))]
        rows.append(
            [
                *_name(f),
                _both(r["onset"] for r in slow),
                _both(lost),
                _both(r["slopes"][0] if r["slopes"] else None for r in slow),
                _both(r["level"] for r in slow),
                *(number(median(values) if values else None) for values in solved),
                number(median(running) if running else None),
                _both(r["slopes"][1] if r["slopes"] else None for r in slow),
                number(f.slope()),
            ]
        )
    head = ["problem", "optimizer", "batch", "onset η", "lost at / onset", "slope before", "level, running"]
    head += ["solved, to 3 × onset", "solved, beyond", "running / solved", "slope behind, running", "solved"]
    return table(head, rows)


def _theories(found: list[Found]) -> list[str]:
    rows = []
    for f in found:
        values = f.theories()
        if values:
            distinct = list(THEORIES) if f.of.kind.beta else [n for n in THEORIES if "−" not in n and n != "2/η"]
            rows.append([*_name(f), *(number(values.get(n)) if n in distinct else "" for n in THEORIES)])
    return table(["problem", "optimizer", "batch", *THEORIES], rows)


GROUPS: dict[str, Callable[[Found], bool]] = {
    "SGD, batch ≤ 64": lambda f: f.of.optimizer == "SGD" and not f.large,
    "SGD, batch ≥ 256": lambda f: f.of.optimizer == "SGD" and f.large,
    "momentum, batch ≤ 64": lambda f: f.of.optimizer == "momentum" and not f.large,
    "momentum, batch ≥ 256": lambda f: f.of.optimizer == "momentum" and f.large,
    "Adam, AdamW, batch ≤ 64": lambda f: f.of.optimizer.startswith("Adam") and not f.large,
    "Adam, AdamW, batch ≥ 256": lambda f: f.of.optimizer.startswith("Adam") and f.large,
    "RMSprop": lambda f: f.of.optimizer == "RMSprop",
}


def _by_theory(found: list[Found]) -> list[str]:
    rows = []
    for place, upto in (("up to 3 × onset", NEAR), ("up to half the lost rate", math.inf)):
        for name, belongs in GROUPS.items():
            some = [values for f in found if belongs(f) and (values := f.theories(upto))]
            cells = []
            for theory in THEORIES:
                values = [v[theory] for v in some if theory in v]
                hits = sum(WITHIN[0] <= v <= WITHIN[1] for v in values)
                cells.append(f"{median(values):.2g} ({hits} of {len(values)})" if values else "–")
            rows.append([place, name, *cells])
    return table(["", "", *THEORIES], rows)


def _speeds(found: list[Found]) -> list[str]:
    rows = []
    for f in found:
        if f.of.key in CLOSELY:
            speeds = (SLOWER, *SPEEDS)
            rows.append([*_name(f), *(_both([f.level(g), f.ramp(g).get("level")]) for g in speeds)])
    return table(["problem", "optimizer", "batch", *(f"{100 * (g - 1):.2g} % a step" for g in (SLOWER, *SPEEDS))], rows)


def _held(found: list[Found]) -> list[str]:
    rows = []
    for f in found:
        row = f.row("held")
        if row is not None:
            level = f.ramp(SLOW, 0)["level"]
            cells = ["lost"] * 4 if row["lost"] else [number(row[k]) for k in ("first", "last", "solved", "batch")]
            rows.append([*_name(f), number(level), *cells])
    head = ["problem", "optimizer", "batch", "level in the ramp", "steps 1 to 100", "steps 201 to 300"]
    return table([*head, "solved there", "batch sharpness / threshold there"], rows)


def _repeatable(found: list[Found]) -> list[str]:
    def pairs(what: str, one: Callable[[Found], Any], other: Callable[[Found], Any]) -> list[float]:
        return quotients((one(f).get(what), other(f).get(what)) for f in found)

    compared: dict[str, tuple[Callable[[Found], Any], Callable[[Found], Any]]] = {}
    for growth in SPEEDS:
        label = f"{growth - 1:.0%} a step: second seed / first"
        compared[label] = (lambda f, g=growth: f.ramp(g, 1)), (lambda f, g=growth: f.ramp(g, 0))  # type: ignore[misc]
    for growth in (FAST, FASTEST):
        for seed in SEEDS:
            label = f"{growth - 1:.0%} a step / 1 %, seed {seed}"
            compared[label] = (
                (lambda f, g=growth, s=seed: f.ramp(g, s)),  # type: ignore[misc]
                (lambda f, s=seed: f.ramp(SLOW, s)),  # type: ignore[misc]
            )
    for begins in BEGINS[1:]:
        label = f"3 % a step, begun at {begins:g} of the base rate / at 0.01"
        compared[label] = (lambda f, b=begins: f.ramp(FAST, 0, b)), (lambda f: f.ramp(FAST, 0))  # type: ignore[misc]
    rows = []
    for label, (one, other) in compared.items():
        onsets, levels = pairs("onset", one, other), pairs("level", one, other)
        cells = [str(len(onsets))]
        for factors in (onsets, levels):
            cells += (
                [f"{median(factors):.2f}", f"{typical(factors):.2f}", f"{spread(factors):.2f}"]
                if factors
                else ["–"] * 3
            )  # type: ignore[list-item]
        rows.append([label, *cells])
    head = ["", "both found", "onset: median factor", "off by, median", "spread, decades"]
    return table([*head, "level: median factor", "off by, median", "spread, decades"], rows)


def _three(factors: list[float]) -> list[str]:
    if len(factors) < 2:
        return ["–"] * 3
    return [f"{median(factors):.2f}", f"{typical(factors):.2f}", f"{spread(factors):.2f}"]


def _fits(found: list[Found], results: dict[str, Any]) -> list[str]:
    rows = [
        [where, name, *row]
        for where in ("others", "chosen on")
        for name, row in results.get(f"fits: {where}", {}).items()
    ]
    head = ["", "fit", *(f"found, {g - 1:.0%}" for g in SPEEDS), "seeds apart, decades", "3 % / 1 %"]
    lines = table([*head, "best / onset: median", "its spread, decades", "found where there is no knee"], rows)
    controls = [
        [*_name(f), _both(f.ramp(SLOW, s)["onset"] for s in SEEDS), _both(f.ramp(SLOW, s)["end"] for s in SEEDS)]
        for f in controls_in(results)
    ]
    return [*lines, "", *table(["no knee to be found", "optimizer", "batch", "knee", "lost at"], controls)]


RATE_GROUPS: dict[str, Callable[[Found], bool]] = {
    "all": lambda f: True,
    "the first 24 combinations": lambda f: f.of.key not in LATER,
    "those that came after": lambda f: f.of.key in LATER,
    "SGD": lambda f: f.of.optimizer == "SGD",
    "momentum": lambda f: f.of.optimizer == "momentum",
    "Adam, AdamW, RMSprop": lambda f: f.of.optimizer not in ("SGD", "momentum"),
    "BatchNorm": lambda f: f.normalised,
    "no BatchNorm": lambda f: not f.normalised,
    "batch ≤ 64": lambda f: not f.large,
    "batch ≥ 256": lambda f: f.large,
}


def _rates(found: list[Found]) -> list[str]:
    rows = []
    for name, belongs in RATE_GROUPS.items():
        known = [(f, s) for f in found if belongs(f) for s in SEEDS if f.ramp(SLOW, s)["onset"] and f.best(s)]
        both = [(f, s) for f, s in known if f.ramp(SLOW, s)["end"]]
        onset = quotients((f.best(s), f.ramp(SLOW, s)["onset"]) for f, s in known)
        lost = quotients((f.best(s), f.ramp(SLOW, s)["end"]) for f, s in both)
        near = quotients((f.best(s), f.ramp(SLOW, s)["onset"]) for f, s in both)
        between = [math.sqrt(a * b) for a, b in zip(near, lost, strict=True)]
        best = [b for f, s in known if (b := f.best(s)) is not None]
        if len(both) > 1:
            reached = f"{sum(v >= 1 for v in onset)} of {len(onset)}"
            cells = [f"{number(median(v))}, {spread(v):.2f}" for v in (onset, lost, between)]
            extremes = f"{min(onset):.2g} to {max(onset):.2g}"
            rows.append([name, len(known), cells[0], extremes, reached, *cells[1:], f"{spread(best):.2f}"])
    head = ["", "trainings", "best / onset: median, spread", "range", "best ≥ onset", "best / lost"]
    return table([*head, "best / √(onset · lost)", "spread of the best rate itself"], rows)


def _warmups(found: list[Found]) -> list[str]:
    rows = []
    for length, interval in WARM:
        expected, others, onsets, levels, counts = [0, 0], [0, 0], [], [], []
        for f in found:
            row, ramp = f.row("warm-up"), f.ramp(SLOW, 0)
            if row is None or ramp["onset"] is None:
                continue
            count, onset, _, last, _ = row[f"{length} {interval}"]
            counts.append(count)
            cell = expected if row["rate"] >= 2 * ramp["onset"] else others
            cell[0] += onset is not None
            cell[1] += 1
            if row["rate"] >= 2 * ramp["onset"]:
                onsets += quotients([(onset, ramp["onset"])])
                levels += quotients([(last, ramp["level"])])
        if counts:
            rows.append(
                [
                    length, interval, f"{median(counts):.0f}", "{} of {}".format(*expected), "{} of {}".format(*others),
                    _factor(onsets), _factor(levels),
                ]
            )  # fmt: skip
    head = ["steps of the warm-up", "every", "ratios, median", "knee found, rate ≥ 2 × onset", "rate < 2 × onset"]
    return table([*head, "knee / onset of the ramp", "last quarter's ratio / level of the ramp"], rows)


def _factor(factors: list[float]) -> str:
    return f"{median(factors):.2f} (± {spread(factors):.2f} decades, {len(factors)})" if len(factors) > 1 else "–"
