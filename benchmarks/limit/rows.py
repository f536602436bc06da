"""The stored runs, grouped, and what a table says of a group."""

from __future__ import annotations

import math
from statistics import median

from benchmarks.lib.store import Row
from benchmarks.lib.tables import shown

MULTIPLES = (0.1, 1.0, 3.0, 10.0, 30.0)  # of the base rate
Groups = dict[tuple[str, ...], list[Row]]  # runs that differ in nothing but their seed, by the rest of their name


def grouped(rows: dict[str, Row]) -> Groups:
    """The runs that differ in nothing but their seed."""
    found: Groups = {}
    for name, row in rows.items():
        found.setdefault(tuple(name.split(" | ")[:-1]), []).append(row)
    return found


def values(rows: list[Row], accuracy: bool) -> list[float]:
    """What the runs came to in validation; a diverged run counts for what it came to, infinite where it has no loss."""
    return [(0.0 if accuracy else math.inf) if r["value"] is None else r["value"] for r in rows]


def cell(rows: list[Row] | None, accuracy: bool) -> str:
    """Median, smallest and largest value, with the number of diverged runs."""
    if not rows:
        return "–"
    found = values(rows, accuracy)
    digits_ = 3 if accuracy else 2
    low, mid, high = (shown(v, digits_) for v in (min(found), median(found), max(found)))
    diverged = sum(r["diverged"] for r in rows)
    return f"{mid} ({low}–{high})" + (f" †{diverged}" if diverged else "")


def times(multiples: tuple[float, ...]) -> list[str]:
    return [f"×{m:g}" for m in multiples]
