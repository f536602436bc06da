"""The stability ratio that a run is judged by, and the learning rate that its measurements carry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gfs_report.runs import Curve, Run

_NAMES = {  # the best one that was measured lately is the one to judge by
    "stability_ratio": "stability ratio",
    "running_stability_ratio": "running stability ratio",
    "midpoint_stability_ratio": "midpoint stability ratio",
    "gfs_stability_ratio": "GFS_k stability ratio",
}
_NOISY = "mean_square_stability_ratio"
_LATELY = 0.8  # of the steps of the run: an earlier measurement does not say how it ended
_SETTLED = 0.5  # of the steps: what was measured later is taken for the settled state
_ENOUGH = 10  # measurements of the settled state that a number may rest on
_ALIKE = 2.0  # quotient of the quartiles up to which they agree
_AIM = 0.5  # stability ratio that a lower rate aims at
_END = 0.1  # of the steps that were measured: their end
PAST = 1.15  # of the ratio: with full batches its median at the edge stays within 0.9–1.1 (benchmarks/edge.md)
_ROOM = 0.3  # a ratio that stays below it leaves room for a higher rate


class Ratio(NamedTuple):
    """A stability ratio, its name in words, and whether it was measured lately."""

    name: str
    curve: Curve
    lately: bool


class LowerRate(NamedTuple):
    """A learning rate with the range of nine in ten measurements; without a rate, why there is none."""

    rate: float | None
    low: float = 0.0
    high: float = 0.0
    measurements: int = 0
    name: str = ""
    why_not: str = ""


def main_ratio(run: Run) -> Ratio | None:
    """The stability ratio to judge by; ``None`` where none was logged of the data that was trained on."""
    held = [(name, curve) for key, name in _NAMES.items() if (curve := run.of_training(key)) is not None]
    if not held:
        return None
    for name, curve in held:
        if _lately(run, curve):
            return Ratio(name, curve, True)
    name, curve = max(held, key=lambda item: int(item[1].steps[-1]))
    return Ratio(name, curve, False)


def at_its_end(curve: Curve) -> tuple[float, int]:
    """The median of the last tenth of the steps that were measured, and of how many measurements it is."""
    values = curve.tail(_END)
    return float(np.median(values)), len(values)


def past(run: Run) -> bool:
    """Whether the steps were past the edge when that was last measured, be it long ago.

    The ratio in the mean square makes no such verdict: late in a run it does not tell damaged runs from healthy ones
    (benchmarks/limit.md).
    """
    found = main_ratio(run)
    return found is not None and at_its_end(found.curve)[0] > PAST


def in_mean_square(run: Run) -> tuple[float, int] | None:
    """The median of the ratio in the mean square in the settled state, and of how many measurements it is.

    ``None`` where it was not measured lately, or too few times: it swings by factors from one batch to the next.
    """
    noisy = run.of_training(_NOISY)
    if noisy is None or not _lately(run, noisy) or len(held := settled(run, noisy).values) < _ENOUGH:
        return None
    return float(np.median(held)), len(held)


def _lately(run: Run, curve: Curve) -> bool:
    first, last = run.steps
    return bool(curve.steps[-1] >= first + _LATELY * (last - first))


def settled(run: Run, curve: Curve) -> Curve:
    """What was measured in the settled state; it may be nothing."""
    first, last = run.steps
    keep = curve.steps >= first + _SETTLED * (last - first)
    return Curve(curve.steps[keep], curve.values[keep])


def lower_rate(run: Run) -> LowerRate:
    """The rate at which the larger ratio, plain or in the mean square, would be ½: the threshold goes with one over it.

    It is no number where the measurements of the settled state are few, or do not agree.
    """
    rates = run.gfs.get("lr_effective", run.gfs.get("learning_rate"))
    found = main_ratio(run)
    ratios = [] if found is None else [(found.name, found.curve)]
    if _NOISY in run.gfs:
        ratios.append(("stability ratio in the mean square", run.gfs[_NOISY]))
    if rates is None or not ratios:
        return LowerRate(None, why_not="the rate was not logged")
    wanted = {name: _allowed(settled(run, curve), rates) for name, curve in ratios}
    enough = [name for name, allowed in wanted.items() if len(allowed) >= _ENOUGH]
    if not enough:
        name = ratios[0][0]
        measured = "1 measurement" if len(wanted[name]) == 1 else f"{len(wanted[name])} measurements"
        are = "is" if len(wanted[name]) == 1 else "are"
        return LowerRate(None, why_not=f"there {are} {measured} of the {name} in the last half, too few")
    name = min(enough, key=lambda n: float(np.median(wanted[n])))
    allowed = wanted[name]
    low, first, middle, third, high = np.quantile(allowed, (0.05, 0.25, 0.5, 0.75, 0.95))
    if third > _ALIKE * first:
        return LowerRate(None, why_not=f"half of the {len(allowed)} measurements of the {name} lie further apart than "
                         f"a factor of {third / first:.2g}")  # fmt: skip
    if high >= rates.last:
        return LowerRate(None, why_not=f"what the measurements of the last half ask for, {middle:.2g} ({low:.2g} to "
                         f"{high:.2g}), is not surely below the present rate")  # fmt: skip
    return LowerRate(float(middle), float(low), float(high), len(allowed), name)


def _allowed(ratio: Curve, rates: Curve) -> np.ndarray:
    _, i, j = np.intersect1d(ratio.steps, rates.steps, return_indices=True)
    ratios, used = ratio.values[i], rates.values[j]
    keep = (ratios > 0) & (used > 0)
    allowed: np.ndarray = used[keep] * _AIM / ratios[keep]
    return allowed


def has_room(run: Run) -> bool:
    """Whether every ratio of the settled state says, often enough and in agreement, that it is far below the edge."""
    found = main_ratio(run)
    if found is None or not found.lately:
        return False
    curves = [found.curve, *([run.gfs[_NOISY]] if _NOISY in run.gfs else [])]
    late = [settled(run, c).values for c in curves]
    quartiles = [np.quantile(v, (0.25, 0.75)) for v in late if len(v) >= _ENOUGH]
    return len(quartiles) == len(late) and all(
        float(v.max()) < _ROOM and third <= _ALIKE * first for v, (first, third) in zip(late, quartiles, strict=True)
    )
