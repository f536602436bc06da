"""A comparison as a page, as lines in the terminal, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from gfs_report.comparison.compare import Comparison
from gfs_report.comparison.outcomes import SetResult, curve_of
from gfs_report.comparison.verdict import percent, verdict
from gfs_report.page import Notes, Section, Table, write_page
from gfs_report.plots import COLOURS, Line, Picture, thinned
from gfs_report.runs import Curve

_POINTS = 20_000  # of all lines of a picture together
_HIGH = 10.0  # times the highest loss of the runs that did not fail: what is above is not drawn
_RULES = (
    "Final value: mean over the last part of the steps at which the metric was logged; a failed run has none.",
    "Failed: the loss, the gradient norm or the metric ended non-finite, or the report calls the run destroyed: its "
    "loss ended above its start, back at its start after a blow-up, or above its best by a quarter of its progress.",
    "Spike: a logged loss above the median of the 50 before it (20 at the start) by six robust spreads, 1.4826 times "
    "the median distance to the median; consecutive ones are one.",
    "Interval: 9,999 bootstrap resamples of the pairs (of the runs of both sets where they are not paired), "
    "percentiles, taken further out for few runs; of five pairs, the whole range of their differences. It holds the "
    "true difference about as often as said if runs scatter evenly about their mean, less often if a few lie far off.",
    "That no difference is shown does not prove that there is none: more seeds make the interval narrower.",
)


def write_comparison(c: Comparison, path: Path) -> None:
    """Write the page: the verdict, the losses, what is compared, the numbers.

    Raises:
        OSError: ``path`` cannot be written.
    """
    base = c.sets[0].name
    sections: list[Section] = [*_pictures(c), _sets_table(c), _differences_table(c)]
    for d in c.differences:
        rows = [[name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.3g}"] for name, a, b in d.pairs]
        if rows:
            caption = f"Final {c.metric}, by seed." if d.paired_by == "name" else "Put together in order."
            sections.append(Table(f"Pairs: {base} and {d.name}", caption, ("run", base, d.name, "difference"), rows))
    sections += [_runs_table(c), Notes("How this was judged", _RULES)]
    if c.notes:
        sections.append(Notes("Left out while reading", c.notes))
    names = " and ".join(s.name for s in c.sets[1:])
    write_page(path, title=f"{names} against {base}", lead=verdict(c), sections=sections)


def tell(c: Comparison, console: Console) -> None:
    """Print a table of the sets, the verdict, and what was left out."""
    table = _sets_table(c)
    grid = Grid()
    for i, name in enumerate(table.head):
        grid.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
    for sentence in [*verdict(c), *c.notes]:
        console.print(Text(sentence))


def as_dict(c: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for programs."""
    return {
        "status": c.status,
        "verdict": verdict(c),
        "metric": c.metric,
        "higher_is_better": c.higher_is_better,
        "final": c.final,
        "margin": c.margin,
        "sets": [
            {
                "name": s.name,
                "median": s.median("final"),
                "failed": s.failed,
                "runs": [asdict(r) for r in s.results],
            }
            for s in c.sets
        ],
        "differences": [asdict(d) for d in c.differences],
        "notes": list(c.notes),
    }


def _pictures(c: Comparison) -> list[Picture]:
    """The loss of every run, and the end of the metric with the means that are compared."""
    runs = [(i, r, run) for i, s in enumerate(c.sets) for r, run in zip(s.results, s.runs, strict=True)]
    most = max(100, _POINTS // (2 * len(runs)))
    losses = [(i, r, loss) for i, r, run in runs if (loss := run.loss()) is not None]
    healthy = [x.values[np.isfinite(x.values)] for _, r, x in losses if not r.failed]
    highest = max((float(v.max()) for v in healthy if len(v)), default=0.0)
    top = _HIGH * highest if highest > 0 else np.inf
    cut = any((x.values > top).any() for _, _, x in losses)
    lines = [
        _line(c, i, thinned(Curve(x.steps[x.values <= top], x.values[x.values <= top]), most), 0.7)
        for i, _, x in losses
    ]
    faint, full = [], []
    for i, r, run in runs:
        metric = curve_of(run, c.metric)
        if metric is not None and r.final is not None:
            n = len(metric.tail(c.final))
            last = Curve(metric.steps[-n:], metric.values[-n:])
            faint.append(_line(c, i, thinned(last, most), 0.3))
            ends = last.steps[[0, -1]] if n > 1 else last.steps
            full.append(_line(c, i, Curve(ends, np.full(len(ends), r.final)), 1.0))
    return [
        Picture(
            "Training loss",
            "All runs, one colour per set." + (f" What is above {top:.3g} is not drawn." if cut else ""),
            "loss",
            lines,
            log=all((line.curve.values > 0).all() for line in lines),
        ),
        Picture(
            f"Final {c.metric}",
            "Faint: the last part of each run. Full: its mean, which is what is compared.",
            c.metric,
            faint + full,
            linked=False,
        ),
    ]


def _line(c: Comparison, i: int, curve: Curve, alpha: float) -> Line:
    return Line(c.sets[i].name, curve, COLOURS[i % len(COLOURS)], "line" if len(curve.steps) > 1 else "points", alpha)


def _sets_table(c: Comparison) -> Table:
    rows = [
        [
            s.name,
            str(len(s.results)),
            _or_dash(s.median("final"), ".4g"),
            str(s.failed),
            f"{s.known('spikes').sum():.0f}" if len(s.known("spikes")) else "–",
            _range(s),
            _or_dash(s.median("overhead"), "%"),
            f"{s.known('alarms').sum():.0f}" if len(s.known("alarms")) else "–",
        ]
        for s in c.sets
    ]
    head = ("set", "runs", f"median final {c.metric}", "failed", "spikes", "last step", "measuring", "alarms")
    return Table("The sets", "The first is the baseline. Measuring: median fraction of the wall time.", head, rows)


def _differences_table(c: Comparison) -> Table:
    rows = []
    for d in c.differences:
        for name, gap in (
            (f"final {c.metric}", d.metric),
            ("relative", d.relative),
            ("measuring", d.overhead),
            ("seconds", d.seconds),
        ):
            if gap is not None:
                ends = (
                    ("–", "–", "–") if gap.ends is None else (*(f"{e:+.4g}" for e in gap.ends), percent(gap.confidence))
                )
                rows.append([d.name, d.outcome if gap is d.metric else "", name, f"{gap.difference:+.4g}", *ends])
    head = ("set", "outcome", "of", "mean difference", "from", "to", "confidence")
    return Table(f"Differences from {c.sets[0].name}", "Relative: as a fraction of the baseline's mean.", head, rows)


def _runs_table(c: Comparison) -> Table:
    rows = [
        [
            s.name,
            r.name,
            str(r.steps),
            _or_dash(r.final, ".4g"),
            "yes" if r.failed else "no",
            _or_dash(r.spikes, ""),
            _or_dash(r.overhead, "%"),
            _or_dash(r.alarms, ""),
        ]
        for s in c.sets
        for r in s.results
    ]
    return Table(
        "The runs",
        "",
        ("set", "run", "last step", f"final {c.metric}", "failed", "spikes", "measuring", "alarms"),
        rows,
    )


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else percent(value) if form == "%" else format(value, form)


def _range(s: SetResult) -> str:
    first, last = min(r.steps for r in s.results), max(r.steps for r in s.results)
    return str(last) if first == last else f"{first} to {last}"
