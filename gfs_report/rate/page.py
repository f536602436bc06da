"""The page of a search: the rate with its range, the pilots with their parabola, the ramp, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gfs_core.search.found import FoundRate
from gfs_core.search.pilots import Pilot
from gfs_report.page import Notes, Section, Table, of_job, write_found
from gfs_report.plots import BLUE, COLOURS, ORANGE, Line, Picture
from gfs_report.rate.search import FoundForJob
from gfs_report.runs import Curve


def write_rate(found: FoundForJob, out: Path) -> Path:
    """Write the page, ``index.html``, and ``rate.json`` beside it; the path of the page.

    Raises:
        OSError: ``out`` cannot be written.
    """
    return write_found(out, "rate", found, title=f"A learning rate for {found.target}", sections=_sections(found))


def _sections(found: FoundForJob) -> list[Section]:
    rate = found.rate
    return [
        Notes("What it is unsure of", rate.unsure),
        _pilots(rate),
        Table(
            "The pilots",
            "The job in small: a part of its steps, over as large a part of its data where that can be had, with its "
            "schedule in its shape. In their order, with the same seed.",
            ("largest rate", "steps", "data", f"loss on {rate.judged_on} data"),
            [_row(p) for p in rate.pilots],
        ),
        *_ramp(rate),
        of_job(found.facts),
    ]


def _row(pilot: Pilot) -> tuple[str, str, str, str]:
    steps = f"{pilot.taken}" if pilot.taken == pilot.steps else f"{pilot.taken} of {pilot.steps}"
    loss = f"{pilot.loss:.4g}" if math.isfinite(pilot.loss) else "lost"
    return f"{pilot.rate:.3g}", steps, f"{pilot.share:.0%}", loss


def _pilots(found: FoundRate) -> Picture:
    lines = []
    for colour, share in zip(COLOURS, sorted({p.share for p in found.pilots}, reverse=True), strict=False):
        held = sorted((p.rate, p.loss) for p in found.pilots if p.share == share and math.isfinite(p.loss))
        name = "pilots" if share < 1 else "pilots on all data"
        lines.append(Line(name, _curve([r for r, _ in held], [v for _, v in held]), colour, "points"))
    if found.choice.parabola is not None and all(p.loss > 0 for p in found.pilots):
        curvature, at, least = found.choice.parabola
        x = np.linspace(at - math.log(5), at + math.log(5), 60)
        lines.append(
            Line("parabola", _curve(np.exp(x), np.exp(least + curvature * np.square(x - at))), ORANGE, "dashed")
        )
    low, high = found.range
    return Picture(
        "Pilots",
        f"Loss at the end over the largest rate of the schedule; the parabola is through the logarithms of the best "
        f"pilot and its neighbours. Recommended for all steps: {found.rate:.2g}, range {low:.2g} to {high:.2g}.",
        "loss",
        lines,
        log=all(p.loss > 0 for p in found.pilots),
        linked=False,
        rates=True,
    )


def _ramp(found: FoundRate) -> list[Section]:
    points = found.ramp.points
    knee = found.ramp.knee
    seen = (
        found.ramp.why if knee is None else f"it stops following it at {knee.rate:.2g}, at a ratio of {knee.ratio:.2g}"
    )
    end = "it was not lost" if found.ramp.end is None else f"it was lost at {found.ramp.end:.2g}"
    ratios = [(p.rate, p.ratio) for p in points if p.ratio is not None]
    norms = [(p.rate, p.gradient) for p in points if p.gradient is not None]
    follows = f"One run whose rate rises from step to step. Far below its own edge the ratio follows the rate; {seen}."
    return [
        _rising("stability ratio", follows, ratios),
        _rising("loss", f"Of the same run; {end}.", [(p.rate, p.loss) for p in points]),
        _rising("gradient norm", "Of the same run, before clipping where that can be had.", norms),
    ]


def _rising(what: str, caption: str, points: Sequence[tuple[float, float]]) -> Picture:
    curve = _curve([rate for rate, _ in points], [value for _, value in points])
    return Picture(f"Ramp: {what}", caption, what, [Line(what, curve, BLUE)], log=True, linked=False, rates=True)


def _curve(rates: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Curve:
    return Curve(np.asarray(rates, dtype=np.float64), np.asarray(values, dtype=np.float64))
