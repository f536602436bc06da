"""Other ways to find the knee, tried on the ratios of the same ramps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.own_edge.combinations import Combination
from benchmarks.own_edge.rows import FAST, SEEDS, SLOW, SPEEDS, Found, controls_in, found_in, quotients, spread
from gfs_core.search.ramp import knee_of

WINDOW = 30.0  # times below the largest ratio: what is fitted, as in find_rate
SMOOTH = 5  # ratios, of which the median is taken
ROOM = 2.0  # between the knee and the rate at which the loss was lost
NEAR = 0.7  # of the level: where the other way has its onset
CHOSEN = {
    *(("digits, MLP", optimizer, "64") for optimizer in ("SGD", "momentum", "AdamW", "RMSprop")),
    *(("digits, CNN", optimizer, "64") for optimizer in ("SGD", "momentum", "AdamW")),
    ("digits, MLP", "SGD", "all"),
}  # the first that were made: the ways were thought of with their ratios before the eyes
Curve = tuple[list[float], list[float], float | None]  # rates, ratios, the rate at which the loss was lost
Fit = Callable[[Curve], float | None]


def smooth(values: Sequence[float]) -> list[float]:
    """Running medians."""
    half = SMOOTH // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _window(curve: Curve, values: Sequence[float]) -> float | None:
    """The knee of what lies above the last value that is so far below the largest one."""
    rates, ratios, _ = curve
    last = max((i for i, v in enumerate(values) if v < max(values) / WINDOW), default=-1) + 1
    if len(ratios) - last < 12:
        return None
    knee = knee_of(rates[last:], ratios[last:])
    return None if knee is None else knee.rate


def by_largest(curve: Curve) -> float | None:
    """As in find_rate."""
    return _window(curve, curve[1])


def by_medians(curve: Curve) -> float | None:
    """The window by running medians: one ratio that shoots up as the loss is lost does not move it."""
    return _window(curve, smooth(curve[1]))


def with_room(curve: Curve) -> float | None:
    """The same up to half a factor of two below the rate at which the loss was lost, and a knee well below that."""
    rates, ratios, end = curve
    if end is None:
        return by_medians(curve)
    kept = sum(r <= end / math.sqrt(ROOM) for r in rates)
    onset = by_medians((rates[:kept], ratios[:kept], end)) if kept >= 12 else None
    return onset if onset is not None and onset <= end / ROOM else None


def by_level(curve: Curve) -> float | None:
    """The level first: the median over the last decade below half the rate that was lost; then where it is reached."""
    rates, ratios, end = curve
    top = (end or ROOM * rates[-1]) / ROOM
    last = [(r, v) for r, v in zip(rates, ratios, strict=True) if top / 10 <= r <= top]
    if len(last) < 6:
        return None
    level = median(v for _, v in last)
    even = smooth(ratios)
    onset = next((r for r, v in zip(rates, even, strict=True) if v >= NEAR * level), None)
    if onset is None or onset > top / ROOM:
        return None
    behind = [(math.log(r), math.log(v)) for r, v in zip(rates, ratios, strict=True) if onset <= r <= top]
    slope = float(np.polyfit(*zip(*behind, strict=True), 1)[0])
    return onset if abs(slope) < 0.5 else None


def lines_then_level(curve: Curve) -> float | None:
    """Whether there is a knee, by lines; the median behind it is the level, and the onset where it is reached."""
    rates, ratios, end = curve
    knee = with_room(curve)
    if knee is None:
        return None
    top = (end or ROOM * rates[-1]) / ROOM
    level = median(v for r, v in zip(rates, ratios, strict=True) if r >= knee and (r <= top or r == knee))
    return next((r for r, v in zip(rates, smooth(ratios), strict=True) if v >= NEAR * level), None)


FITS: dict[str, Fit] = {
    "as in `find_rate`": by_largest,
    "window by running medians": by_medians,
    "… and room to the loss": with_room,
    "… and the onset where 0.7 of the level is reached": lines_then_level,
    "the level first, then where 0.7 of it is reached": by_level,
}


def curve_of(f: Found, growth: float, seed: int, begins: float = 0.01) -> Curve:
    """The ratios of a ramp."""
    row = f.ramp(growth, seed, begins)
    rates = f.rates(growth, begins, len(row["ratios"]))
    known = [(r, v) for r, v in zip(rates, row["ratios"], strict=True) if v is not None and v > 0]
    return [r for r, _ in known], [v for _, v in known], row["end"]


def _made(f: Found) -> list[tuple[Combination, float, int]]:
    return [(f.of, growth, seed) for growth in SPEEDS for seed in SEEDS if f.ramp(growth, seed)]


def compared(results: dict[str, Any], chosen: bool) -> dict[str, list[str]]:
    """A row of the table for each way, on the combinations on which the ways were chosen, or on the others."""
    found, controls = [f for f in found_in(results) if (f.of.key in CHOSEN) == chosen], controls_in(results)
    rows = {}
    for name, fit in FITS.items():
        onsets = {key: fit(curve_of(f, *key[1:])) for f in found for key in _made(f)}
        shares = [[onset is not None for (_, g, _), onset in onsets.items() if g == growth] for growth in SPEEDS]
        apart = quotients((onsets[f.of, SLOW, 1], onsets[f.of, SLOW, 0]) for f in found)
        fast = quotients((onsets[f.of, FAST, s], onsets[f.of, SLOW, s]) for f in found for s in SEEDS)
        best = quotients((f.best(s), onsets[f.of, SLOW, s]) for f in found for s in SEEDS)
        wrong = [fit(curve_of(f, *key[1:])) is not None for f in controls for key in _made(f)]
        rows[name] = [
            *(f"{sum(share)} of {len(share)}" for share in shares), f"{spread(apart):.2f}",
            f"{median(fast):.2f} ± {spread(fast):.2f}", f"{median(best):.2g}", f"{spread(best):.2f}",
            f"{sum(wrong)} of {len(wrong)}",
        ]  # fmt: skip
    return rows
