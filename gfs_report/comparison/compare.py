"""Two or more sets of runs, compared: the difference of what they end with, and how sure it is.

How the intervals are made, and how often they hold the true difference, is in docs/compare.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from gfs_core import ConfigError
from gfs_report.comparison.outcomes import Result, SetResult, judge_set, metric_of
from gfs_report.comparison.sets import read_sets
from gfs_report.losses import Values

Outcome = Literal["better", "worse", "same", "within the margin", "no difference shown", "too few runs"]
ERROR = 0.05  # probability, over all comparisons together, that an interval misses the true difference
_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A difference of means, the compared set minus the baseline, and where the true one lies.

    Attributes:
        difference: of the means.
        ends: lower and upper end of the interval; ``None`` where one run or pair is all there is.
        confidence: probability with which such an interval holds the true difference, of values that scatter evenly.
    """

    difference: float
    ends: tuple[float, float] | None = None
    confidence: float = 0.0

    @property
    def largest(self) -> float:
        """The larger end, without its sign; infinite where there is no interval."""
        return math.inf if self.ends is None else max(map(abs, self.ends))


@dataclass(frozen=True)
class Difference:
    """A set against the baseline.

    Attributes:
        name: of the set.
        outcome: what the interval says.
        paired_by: how runs of the two were put together; ``None`` where they were not.
        pairs: name, final metric of the baseline and of the set, for each pair that has both.
        counts: runs of the baseline and of the set that the difference rests on.
        needed: how many there have to be of each for a verdict.
        left_out: runs that are not in the difference, each with the reason; with a pair's one goes the other.
        metric: the difference; ``None`` where no run is left.
        relative: the same as a fraction of the baseline's mean; ``None`` where that is 0 or its values change sign.
        overhead: difference of the fraction of wall time spent measuring; ``None`` where one of the sets logs none.
        seconds: difference of the wall time; ``None`` where one of the sets logs none.
    """

    name: str
    outcome: Outcome
    paired_by: Literal["name", "order"] | None
    pairs: tuple[tuple[str, float, float], ...]
    counts: tuple[int, int]
    needed: int
    left_out: tuple[str, ...]
    metric: Interval | None
    relative: Interval | None
    overhead: Interval | None
    seconds: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Sets of runs, and each but the first against the first.

    Attributes:
        metric: key of the value that is compared.
        higher_is_better: what counts as better.
        final: the last part of the steps, over which the mean of the metric is taken.
        margin: relative difference below which sets count as the same.
        sets: what became of the runs, the baseline first.
        differences: of the other sets from it.
        notes: what was left out while reading.
    """

    metric: str
    higher_is_better: bool
    final: float
    margin: float | None
    sets: tuple[SetResult, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def status(self) -> int:
        """Exit status: 1 where a set is worse than the baseline or fails more often, else 0."""
        often = [s.failed / len(s.results) for s in self.sets]
        return int(any(d.outcome == "worse" for d in self.differences) or max(often) > often[0])


def compare(
    sets: Sequence[str],
    *,
    metric: str | None = None,
    higher_is_better: bool = False,
    final: float = 0.1,
    margin: float | None = None,
) -> Comparison:
    """Compare sets of runs with the first of them.

    Args:
        sets: folders that hold a folder per run, globs, or paths joined by commas.
        metric: key of the value to compare, the user's own or this package's; the training loss where not given.
        higher_is_better: what counts as better.
        final: the last part of the steps, over which the mean of the metric is taken; 0: its last value.
        margin: difference, relative to the baseline's mean, below which the sets count as the same.

    Raises:
        ConfigError: fewer than two sets, runs that cannot be read, a metric that a set has nowhere, or an option
            out of its range.
    """
    if len(sets) < 2:
        raise ConfigError("give at least two sets of runs; the first is the baseline")
    if not 0 <= final <= 1:
        raise ConfigError(f"`final` must be between 0 and 1, a fraction of the steps, got {final}")
    if margin is not None and not 0 < margin < math.inf:
        raise ConfigError(f"`margin` must be > 0, a fraction of the baseline's mean (0.01 is 1 %), got {margin}")
    read = read_sets(sets)
    key = metric_of(read) if metric is None else metric
    base, *others = judged = [judge_set(one, key, final) for one in read]
    for one in judged:
        if not len(one.known("final")) and not one.failed:
            held = sorted({k for r in one.runs for k in (*r.logged, *(f"gfs/{name}" for name in r.gfs))})
            raise ConfigError(f"no run of {one.name} holds `{key}`; they hold {', '.join(held)}")
    return Comparison(
        key,
        higher_is_better,
        final,
        margin,
        tuple(judged),
        tuple(_differ(base, other, len(others), key, higher_is_better, margin) for other in others),
        tuple(note for one in read for note in one.notes),
    )


def interval(
    baseline: Values, other: Values, *, paired: bool, comparisons: int = 1, relative: bool = False
) -> Interval:
    """Difference of the means and a bootstrap interval for it: percentiles, taken further out for few runs.

    A resample of n values spreads less than n new ones would, by √((n - 1)/n), and knows nothing of Student's t; the
    percentiles are moved out by both (Hesterberg 2015, The American Statistician 69, 371). Where even all resamples
    together do not reach the confidence asked for, all of them are the interval, and its confidence is theirs. The
    same input gives the same interval.

    Args:
        baseline: one value per run.
        other: the same of the compared set; its i-th belongs to the i-th of ``baseline`` where ``paired``.
        paired: whether pairs are resampled.
        comparisons: among how many :data:`ERROR` is shared (Bonferroni).
        relative: divide by the baseline's mean.
    """

    def statistic(b: Values, a: Values, axis: int = -1) -> Values:
        gap: Values = b.mean(axis) - a.mean(axis)
        return gap / np.abs(a.mean(axis)) if relative else gap

    n, error = min(len(baseline), len(other)), ERROR / comparisons
    middle = float(statistic(other, baseline))
    if n < 2:
        return Interval(middle)
    # How often all new values lie on one side of the true mean, or all of a set above all of the other's.
    outside = 2.0 ** (1 - n) if paired else 2 / math.comb(len(baseline) + len(other), n)
    if outside >= error:
        b, a = (other, baseline) if paired else np.meshgrid(other, baseline)
        extremes = statistic(b[..., None], a[..., None])
        return Interval(middle, (float(extremes.min()), float(extremes.max())), 1 - outside)
    outer = float(stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.isf(error / 2, n - 1)))
    ends = stats.bootstrap(
        (other, baseline),
        statistic,
        paired=paired,
        n_resamples=_RESAMPLES,
        batch=1000,
        confidence_level=1 - 2 * outer,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(middle, (float(ends.low), float(ends.high)), 1 - error)


def runs_needed(comparisons: int) -> int:
    """Pairs from which on all resamples together reach the confidence asked for, or miss it narrowly.

    Example:
        >>> [runs_needed(n) for n in (1, 2, 3)]
        [5, 6, 7]
    """
    return round(1 + math.log2(comparisons / ERROR))


def _differ(
    base: SetResult, other: SetResult, comparisons: int, key: str, higher: bool, margin: float | None
) -> Difference:
    paired_by, partners = _pair(base, other)

    def values(name: str) -> tuple[Values, Values]:
        if paired_by is None:
            return base.known(name), other.known(name)
        both = [(getattr(a, name), getattr(b, name)) for a, b in partners]
        held = np.array([pair for pair in both if None not in pair], np.float64).reshape(-1, 2)
        return held[:, 0], held[:, 1]

    def between(name: str, relative: bool = False) -> Interval | None:
        a, b = values(name)
        if not len(a) or not len(b) or (relative and not ((a > 0).all() or (a < 0).all())):
            return None
        return interval(a, b, paired=paired_by is not None, comparisons=comparisons, relative=relative)

    a, b = values("final")
    metric, relative, needed = between("final"), between("final", relative=True), runs_needed(comparisons)
    if margin is not None and metric is not None and relative is None:
        raise ConfigError(f"`margin` is relative, but `{key}` of {base.name} is 0 or of both signs; leave it out")
    outcome: Outcome
    if paired_by is not None and len(a) and (a == b).all():
        outcome = "same"
    elif metric is None or metric.ends is None or min(len(a), len(b)) < needed:
        outcome = "too few runs"
    elif margin is not None and relative is not None and relative.largest <= margin:
        outcome = "within the margin"
    elif metric.ends[0] <= 0 <= metric.ends[1]:
        outcome = "no difference shown"
    else:
        outcome = "better" if (metric.difference > 0) == higher else "worse"
    names = [_pair_name(p, q) for p, q in partners if p.final is not None and q.final is not None]
    return Difference(
        name=other.name,
        outcome=outcome,
        paired_by=paired_by,
        pairs=tuple(zip(names, a.tolist(), b.tolist(), strict=True)) if paired_by else (),
        counts=(len(a), len(b)),
        needed=needed,
        left_out=tuple(_left_out(base, other, partners, key)),
        metric=metric,
        relative=relative,
        overhead=between("overhead"),
        seconds=between("seconds"),
    )


def _pair(base: SetResult, other: SetResult) -> tuple[Literal["name", "order"] | None, list[tuple[Result, Result]]]:
    a, b = ({r.name: r for r in s.results} for s in (base, other))
    shared = [name for name in a if name in b]
    if len(shared) == min(len(a), len(b)):
        return "name", [(a[name], b[name]) for name in shared]
    if len(a) == len(b):
        return "order", list(zip(base.results, other.results, strict=True))
    return None, []


def _pair_name(a: Result, b: Result) -> str:
    return a.name if a.name == b.name else f"{a.name} / {b.name}"


def _left_out(base: SetResult, other: SetResult, partners: list[tuple[Result, Result]], key: str) -> list[str]:
    """Runs that cannot be in the difference, and why; not those whose partner is the reason."""
    partnered = {id(r) for pair in partners for r in pair}
    out = []
    for one in (base, other):
        for r in one.results:
            if r.final is None:
                out.append(f"{r.name} of {one.name} ({'failed' if r.failed else f'holds no {key}'})")
            elif partners and id(r) not in partnered:
                out.append(f"{r.name} of {one.name} (has no partner)")
    return out
