"""The verdict on a comparison, in sentences: what the metric says, what went wrong, what measuring cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from gfs_report.comparison.compare import ERROR, Comparison, Difference, Interval
from gfs_report.comparison.outcomes import SetResult

_EARLY = 0.9  # of the steps of the longest run: one with fewer is said to have ended early
_NAMED = 5  # runs in a sentence
_ALIKE = 1.5  # ratio of the steps between logged losses up to which spikes are compared


def verdict(c: Comparison) -> list[str]:
    """Three sentences on each set: the metric, failures and spikes, cost; one more where there are several."""
    each = [
        [_of_metric(c, d), _of_trouble(c, s, d), _of_cost(c.sets[0], s, d)]
        for s, d in zip(c.sets[1:], c.differences, strict=True)
    ]
    if len(each) == 1:
        return each[0]
    shared = (
        f"The {len(each)} comparisons with {c.sets[0].name} share an error of {percent(ERROR)}: each interval is "
        f"widened to {percent(1 - ERROR / len(each))} (Bonferroni)."
    )
    return [*(" ".join(sentences) for sentences in each), shared]


def _of_metric(c: Comparison, d: Difference) -> str:
    base, what, gap, (a, b) = c.sets[0].name, f"final {c.metric}", d.metric, d.counts
    if d.paired_by is None:
        over = f"{a} runs of {base} and {b} of {d.name}, not paired"
    else:
        over = f"{a} pair{'s' if a != 1 else ''} of runs" + (" put together in order" if d.paired_by == "order" else "")
    if gap is None:
        return f"Nothing can be said of the {what} of {d.name} against {base}: there are no runs of both that have one."
    if d.outcome == "same":
        return f"No difference between {d.name} and {base}: {over} with exactly the same {what}."
    mean, sure = _both(gap.difference, d.relative.difference if d.relative else None), percent(gap.confidence)
    if d.outcome == "too few runs":
        several = f" for {len(c.differences)} comparisons" if len(c.differences) > 1 else ""
        width = f"the {sure} interval is {np.ptp(gap.ends):.3g} wide" if gap.ends else "there is no interval"
        return (
            f"Too few seeds to tell {d.name} from {base}: {over}, and {d.needed} are needed{several}; so far the "
            f"{what} differs by {mean}, and {width}."
        )
    found = f"{what} differs by {mean} on average over {over} ({_span(gap, d.relative)})"
    if d.outcome == "within the margin":
        return f"No difference larger than {percent(c.margin or 0)} between {d.name} and {base}: the {found}."
    if d.outcome == "no difference shown":
        most = _both(gap.largest, d.relative.largest if d.relative else None, sign="")
        unmet = f", which is not within the margin of {percent(c.margin)}" if c.margin is not None else ""
        return (
            f"No difference shown between {d.name} and {base}: the {found}; if there is any, it is smaller than {most} "
            f"with {sure} confidence{unmet}."
        )
    better = "higher" if c.higher_is_better else "lower"
    return f"{d.name} is {d.outcome} than {base}: its {found}; {better} is better."


def _of_trouble(c: Comparison, s: SetResult, d: Difference) -> str:
    base = c.sets[0]
    n, m = len(s.results), len(base.results)
    parts = [f"{s.name} failed in {s.failed} of {n} runs, {base.name} in {base.failed} of {m}"]
    if s.failed * m != base.failed * n:
        table = [[s.failed, n - s.failed], [base.failed, m - base.failed]]
        parts[0] += f" (Fisher's exact test: p = {float(stats.fisher_exact(table).pvalue):.2g})"
    if d.left_out:
        partners = ", with their partners" if d.paired_by else ""
        parts.append(f"left out of the difference{partners}: {_listed(d.left_out)}")
    if len(s.known("spikes")) and len(base.known("spikes")):
        every = _spacing(s), _spacing(base)
        parts.append(
            f"their losses spiked {s.known('spikes').sum():.0f} and {base.known('spikes').sum():.0f} times"
            if max(every) < _ALIKE * min(every)
            else f"spikes cannot be compared, for the loss was logged every {every[0]:.3g} and {every[1]:.3g} steps"
        )
    most = max(r.steps for one in c.sets for r in one.results)
    early = [
        f"{r.name} of {one.name} at step {r.steps}" for one in (base, s) for r in one.results if r.steps < _EARLY * most
    ]
    if early:
        parts.append(f"ended early, where others reached step {most}: {_listed(early)}")
    return "; ".join(parts) + "."


def _of_cost(base: SetResult, s: SetResult, d: Difference) -> str:
    took = [(one.name, part) for one in (s, base) if (part := one.median("overhead")) is not None]
    parts = [
        "measuring took " + " and ".join(f"{percent(part)} of the wall time of {name} (median)" for name, part in took)
        if took
        else "what measuring cost was not logged"
    ]
    if d.seconds is not None:
        median = [f"{one.median('seconds') or 0:.3g} s" for one in (s, base)]
        parts.append(f"a run of {s.name} took {median[0]}, one of {base.name} {median[1]}")
        parts[-1] += f" (median; mean difference {d.seconds.difference:+.3g} s, {_span(d.seconds)})"
    alarms = [f"{one.known('alarms').sum():.0f} in {one.name}" for one in (s, base) if len(one.known("alarms"))]
    parts += [f"alarms: {', '.join(alarms)}"] if alarms else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _span(gap: Interval, relative: Interval | None = None) -> str:
    if gap.ends is None:
        return "no interval"
    text = f"{percent(gap.confidence)} interval {gap.ends[0]:+.3g} to {gap.ends[1]:+.3g}"
    if relative is not None and relative.ends is not None:
        text += f", {percent(relative.ends[0], '+')} to {percent(relative.ends[1], '+')}"
    return text


def _both(value: float, relative: float | None, sign: str = "+") -> str:
    return f"{value:{sign}.3g}" + (f" ({percent(relative, sign)})" if relative is not None else "")


def percent(value: float, sign: str = "") -> str:
    """A fraction in words."""
    return f"{100 * value:{sign}.3g} %"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _spacing(s: SetResult) -> float:
    """Steps between logged losses, the median over the runs."""
    losses = [loss for run in s.runs if (loss := run.loss()) is not None and len(loss.steps) > 1]
    return float(np.median([(x.steps[-1] - x.steps[0]) / (len(x.steps) - 1) for x in losses]))
