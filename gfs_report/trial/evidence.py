"""What the runs of a pilot show, in numbers: harm and who told of it, the edge, how two signals agree, the price."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gfs_report.losses import course
from gfs_report.runs import Curve, Run

Floats = NDArray[np.float64]

NEAR = 0.9  # smoothed ratio from which on the edge counts as reached: with full batches medians there are 0.9–1.1
# Median ratio within which it counts as held: twice as wide as full batches stay within (benchmarks/edge.md), for a
# pilot sees a few hundred steps, mostly on mini-batches.
HOLD = (0.7, 1.4)
# What is left out at the start of a run: of solved values one part in twenty; while second moments are settling (the
# preconditioned sharpness falls tenfold or more then) and the running estimate has not forgotten what came before them,
# a third of the run, but no more than 100 steps.
_SETTLING = 0.05
_FORGETTING, _FORGOTTEN = 1 / 3, 100
_HARM_AHEAD = 150  # steps before the harm within which a warning is about it: the horizon of the early warning
# A run is harmed where its loss is twice the mean of the 50 before and nine in ten of all later ones are as high,
# or where the report calls it destroyed. A spike from which it comes back by itself
# belongs to the edge and is only counted.
_DOUBLED, _BEFORE, _STAYS, _FEWEST = 2.0, 50, 0.9, 20
_LASTS = 10  # losses that have to follow before anything can be said to stay
_SAME = 0.01  # relative change of a solved value that its tolerance explains
_RESAMPLES = 1000


class Interval(NamedTuple):
    """A value with its 95 % interval, by a bootstrap over blocks of neighbouring measurements."""

    value: float
    low: float
    high: float


Kind = Literal["not finite", "doubled", "worse", "lost", "blown up", "behind"]


class Harm(NamedTuple):
    """What went wrong in a run, and who said so before."""

    step: int
    kind: Kind
    alarm_lead: int | None  # steps from the early warning to the harm; None: there was none before
    ratio_before: float | None  # largest stability ratio of the last measurements before


class Edge(NamedTuple):
    """Where the run stood against the edge."""

    reached: int | None  # step; None: never
    band: Interval | None  # median with the 5 % and 95 % quantiles, from there on
    largest: float  # smoothed
    standing: Literal["below", "held", "left", "past"]


class Agreement(NamedTuple):
    """How a cheap value follows a dear one at the same steps."""

    pairs: int
    correlation: Interval  # Spearman's, of ranks
    quotient: Interval  # median of cheap / dear
    spread: float  # largest / smallest of the dear one: where it hardly moves there is nothing to follow
    largest: float = math.inf  # of both


class Steadiness(NamedTuple):
    """How steadily a value falls."""

    points: int
    swing: float  # mean |change of the logarithm| from one measurement to the next
    rises: float  # fraction of the changes that go up by more than the solver's tolerance
    trend: float  # Spearman's correlation with the step


@dataclass(frozen=True)
class Price:
    """What measuring took.

    Attributes:
        step: seconds of a training step without measuring.
        tiers: seconds that each tier adds, by name.
        share: fraction of the run's time spent measuring.
    """

    step: float
    tiers: dict[str, float]
    share: float

    def measurement(self) -> dict[str, float]:
        """Seconds of one measurement of each tier, with all that belongs to it."""
        gfs = {"gfs": self.tiers["gfs"] + self.tiers["sharpness"]} if {"gfs", "sharpness"} <= self.tiers.keys() else {}
        return self.tiers | gfs


def main_ratio(run: Run, full_batch: bool) -> Curve | None:
    """The ratio to judge by: solved on full batches, running on mini-batches, where a solved one finds their noise."""
    names = ("stability_ratio", "running_stability_ratio")
    found = [run.gfs[name] for name in (names if full_batch else names[::-1]) if name in run.gfs]
    return found[0] if found else None


def settled(steps: int, slow: bool) -> int:
    """The step from which on values count.

    Args:
        steps: length of the run.
        slow: whether second moments or a running estimate have to settle.
    """
    return min(_FORGOTTEN, int(_FORGETTING * steps)) if slow else int(_SETTLING * steps)


def edge(ratio: Curve, harmed: bool, start: int = 0) -> Edge | None:
    """Where a ratio stood against 1 from step ``start`` on; ``None`` where too little was measured."""
    keep = ratio.steps >= start
    steps, values = ratio.steps[keep], ratio.values[keep]
    if len(values) < 3:
        return None
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, 3), axis=1)
    near = np.flatnonzero(smooth >= NEAR)
    if len(near) == 0:
        return Edge(None, None, float(smooth.max()), "below")
    first = near[0] + 1  # the middle of the first three
    after = values[first:]
    low, middle, high = (float(q) for q in np.quantile(after, (0.05, 0.5, 0.95)))
    standing: Any = "past" if middle > HOLD[1] or harmed else "left" if middle < HOLD[0] else "held"
    return Edge(int(steps[first]), Interval(middle, low, high), float(smooth.max()), standing)


def harm(run: Run, loss: Curve) -> Harm | None:
    """The first harm of the run; ``None``: there was none."""
    found = _harm(loss)
    if found is None:
        return None
    step, kind = found
    told = [step - m.step for m in run.marks if m.state > 0 and 0 < step - m.step <= _HARM_AHEAD]
    ratios = [
        float(c.values[before[-1]])
        for key in ("stability_ratio", "running_stability_ratio", "mean_square_stability_ratio")
        if (c := run.gfs.get(key)) is not None and len(before := np.flatnonzero(c.steps < step))
    ]
    return Harm(step, kind, max(told, default=None), max(ratios, default=None))


def _harm(loss: Curve) -> tuple[int, Kind] | None:
    steps, values = loss.steps, loss.values
    for i in range(len(values)):
        if not np.isfinite(values[i]):
            return int(steps[i]), "not finite"
        if i < _FEWEST:
            continue
        high = ~(values[i:] <= _DOUBLED * values[max(0, i - _BEFORE) : i].mean())
        if high[0] and high.mean() >= _STAYS and len(high) >= _LASTS:
            return int(steps[i]), "doubled"
    went = course(loss)
    if len(values) <= _FEWEST or went.fate not in ("worse", "lost", "blown up"):
        return None
    return int(steps[0]) if went.since is None else went.since, went.fate


def common(a: Curve, b: Curve) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Steps at which both were measured, and both values there; positive ones only."""
    steps, i, j = np.intersect1d(a.steps, b.steps, return_indices=True)
    x, y = a.values[i], b.values[j]
    keep = (x > 0) & (y > 0)
    return steps[keep], x[keep], y[keep]


def agreement(cheap: Curve, dear: Curve, start: int = 0) -> Agreement | None:
    """How the cheap one follows the dear one from step ``start`` on; ``None`` with fewer than eight pairs."""
    steps, x, y = common(cheap, dear)
    x, y = x[steps >= start], y[steps >= start]
    if len(x) < 8:
        return None
    correlation = _bootstrap(x, y, lambda a, b: _rank_correlation(a, b))
    quotient = _bootstrap(x, y, lambda a, b: np.median(a / b, axis=-1))
    return Agreement(len(x), correlation, quotient, float(y.max() / y.min()), float(max(x.max(), y.max())))


def _rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman's correlation along the last axis; 0 where one of them does not vary."""
    a, b = (stats.rankdata(v, axis=-1) for v in (x, y))
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray((a * b).sum(-1) / np.where(size > 0, size, np.inf))


def _bootstrap(x: Floats, y: Floats, statistic: Callable[[Floats, Floats], Any]) -> Interval:
    """The statistic, and its interval from resampled blocks: neighbours in time are alike."""
    n = len(x)
    block = max(2, round(n ** (1 / 3)))
    starts = np.random.default_rng(0).integers(0, n - block + 1, (_RESAMPLES, -(-n // block)))
    pick = (starts[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :n]
    low, high = np.quantile(statistic(x[pick], y[pick]), (0.025, 0.975))
    return Interval(float(statistic(x, y)), float(low), float(high))


def steadiness(curve: Curve, at: NDArray[np.int64]) -> Steadiness:
    """How steadily a positive value falls over the steps ``at``, at which it was measured."""
    values = curve.values[np.isin(curve.steps, at)]
    changes = np.diff(np.log(values))
    trend = _rank_correlation(np.arange(len(values), dtype=np.float64), values)
    rises = float((changes > _SAME).mean())
    return Steadiness(len(values), float(np.abs(changes).mean()), rises, float(trend))


def steadier(run: Run, start: int = 0) -> tuple[Steadiness, Steadiness] | None:
    """Raw sharpness and GFS_k at the same steps, from ``start`` on; ``None`` with fewer than six."""
    raw = run.gfs.get("preconditioned_sharpness", run.gfs.get("sharpness"))
    flow = run.gfs.get("gfs_sharpness")
    if raw is None or flow is None:
        return None
    steps, _, _ = common(raw, flow)
    steps = steps[steps >= start]
    return (steadiness(raw, steps), steadiness(flow, steps)) if len(steps) >= 6 else None


def price(run: Run, cadence: dict[str, int]) -> Price | None:
    """What each tier took, from the steps at which it was measured; ``None`` where that cannot be told.

    Args:
        run: with the seconds of each step under ``seconds``, counted from the start.
        cadence: steps between measurements of each tier, cheapest first; each a multiple of the one before.
    """
    clock, spent = run.logged.get("seconds"), run.gfs.get("seconds")
    if clock is None or spent is None or len(clock.steps) < 3:
        return None
    durations, at = np.diff(clock.values), clock.steps[1:]
    free = durations[~np.isin(at, spent.steps)]
    if len(free) == 0:
        return None
    tiers: dict[str, float] = {}
    so_far = 0.0
    names = list(cadence)
    warm = spent.steps > 0  # the first one is cold
    for i, name in enumerate(names):
        mine = warm & (spent.steps % cadence[name] == 0)
        for dearer in names[i + 1 :]:
            mine &= spent.steps % cadence[dearer] != 0
        if not mine.any():
            return None
        total = float(np.median(spent.values[mine]))
        tiers[name] = max(total - so_far, 0.0)
        so_far = total
    share = float(spent.values[warm].sum() / max(durations.sum(), 1e-9))
    return Price(float(np.median(free)), tiers, min(share, 1.0))
