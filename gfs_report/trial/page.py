"""The page of a pilot: the verdict, its evidence, the pictures of each rate, what to set, and what is not proved."""

from __future__ import annotations

from pathlib import Path

from gfs_report.advice import BUDGET, interval
from gfs_report.page import Notes, Section, Table, of_job, write_found
from gfs_report.plots import BLUE, COLOURS, ORANGE, PINK, SKY, Line, Picture
from gfs_report.runs import Curve, Run
from gfs_report.trial.checks import CADENCE, Rate, band
from gfs_report.trial.pilot import Pilot
from gfs_report.units import count, duration

_SHOWN = 100  # times the first loss: of a run that diverges, the rest would hide the others


def write_pilot(found: Pilot, out: Path) -> Path:
    """Write the page, ``index.html``, and ``pilot.json`` beside it; the path of the page.

    Raises:
        OSError: ``out`` cannot be written.
    """
    return write_found(out, "pilot", found, title=f"Pilot of {found.target}", sections=_sections(found))


def _sections(found: Pilot) -> list[Section]:
    asked = [f"{c.question} {c.answer.capitalize()}. {c.evidence}" for c in found.checks]
    warnings = [
        f"×{factor:g}, step {m.step}, {m.word}: {m.reason}" for factor, run in found.runs.items() for m in run.marks
    ]
    pictures = [picture for factor, run in found.runs.items() for picture in _pictures(factor, run)]
    return [
        Notes("What was asked of the signals", asked),
        *_to_set(found),
        Table(
            "The runs",
            "The same job and the same seed, at several factors on its learning rate.",
            ("rate", "steps", "ended", "loss, start → end", "edge", "ratio from there on", "harm", "told of", "spikes"),
            [_row(r) for r in found.rates],
        ),
        _losses(found),
        *pictures,
        _flows(found),
        _prices(found),
        *([Notes("Early warnings", warnings)] if warnings else []),
        Notes("What is not proved, and what was not seen", found.limits),
        of_job(found.facts),
    ]


def _to_set(found: Pilot) -> list[Section]:
    out: list[Section] = []
    if found.advice is not None:
        entry = found.advice.yaml.splitlines()[-1].strip()
        ways = [f"Python: {found.advice.python}", f"YAML, under trainer.callbacks: {entry}"]
        out.append(Notes("What to set, in one of three ways", [*ways, f"Flags: {found.advice.flags}"]))
        reasons = list(found.advice.reasons)
        if found.margin is not None:
            reasons.append(f'With a control, control="cap": margin={found.margin[0]:g}, {found.margin[1]}.')
        out.append(Notes("Why", reasons))
    return out


def _row(r: Rate) -> tuple[str, ...]:
    reached = "" if r.edge is None or r.edge.reached is None else f", step {r.edge.reached}"
    lead = None if r.harm is None else r.harm.alarm_lead
    return (
        f"×{r.factor:g}",
        str(r.steps),
        r.ended,
        "" if r.loss is None else f"{r.loss[0]:.3g} → {r.loss[1]:.3g}",
        "" if r.edge is None else f"{r.edge.standing}{reached}",
        "" if r.edge is None or r.edge.band is None else band(r.edge.band),
        "" if r.harm is None else f"{r.harm.kind}, step {r.harm.step}",
        "" if r.harm is None else "not by the alarm" if lead is None else f"{lead} steps before",
        "" if r.spikes is None else str(r.spikes),
    )


def _flows(found: Pilot) -> Table:
    rows = [
        (f"×{r.factor:g}", name, str(s.points), f"{s.swing:.1%}", f"{s.rises:.0%}", f"{s.trend:.2f}")
        for r in found.rates
        if r.steadiness is not None
        for name, s in zip(("raw sharpness", "GFS_k"), r.steadiness, strict=True)
    ]
    return Table(
        "Does GFS_k fall more steadily than the raw sharpness?",
        "At the same steps. What falls steadily swings little, rises seldom, and has a correlation near −1."
        if rows
        else "GFS_k was not had often enough at any rate to say so.",
        ("rate", "value", "measurements", "swing from one to the next", "rises", "correlation with the step"),
        rows,
    )


def _prices(found: Pilot) -> Table:
    rows = [
        (f"×{r.factor:g}", tier, duration(s), count(s / r.price.step), str(interval(s, r.price.step)))
        for r in found.rates
        if r.price is not None
        for tier, s in r.price.measurement().items()
    ]
    every = ", ".join(f"{tier} every {steps}" for tier, steps in CADENCE.items())
    return Table(
        "What a measurement costs",
        f"Medians. The interval is the one at which the tier alone takes {BUDGET:.0%} of the training time; the pilot "
        f"measures more often on purpose ({every}).",
        ("rate", "tier", "a measurement", "in training steps", "interval"),
        rows,
    )


def _losses(found: Pilot) -> Picture:
    curves = {factor: run.logged["train_loss"] for factor, run in found.runs.items() if "train_loss" in run.logged}
    most = _SHOWN * max((float(c.values[0]) for c in curves.values()), default=0.0)
    lines = [
        Line(f"×{factor:g}", Curve(c.steps[c.values <= most], c.values[c.values <= most]), COLOURS[i % len(COLOURS)])
        for i, (factor, c) in enumerate(curves.items())
    ]
    return Picture(
        "Loss",
        f"Of each training step, logarithmic, by the factor on the rate. What is above {_SHOWN} times the first loss, "
        "or not finite, is left out.",
        "loss",
        lines,
        log=True,
    )


def _pictures(factor: float, run: Run) -> list[Picture]:
    of = run.gfs.get
    ratios = [
        ("solved", of("stability_ratio"), BLUE),
        ("running", of("running_stability_ratio"), SKY),
        ("mean square", of("mean_square_stability_ratio"), PINK),
        ("GFS_k", of("gfs_stability_ratio"), ORANGE),
    ]
    raw = of("preconditioned_sharpness", of("sharpness"))
    values = [("raw", raw, BLUE), ("GFS_k (short horizon)", of("gfs_sharpness"), ORANGE)]
    return [
        Picture(
            f"Stability ratio at ×{factor:g}",
            "1 is the edge. Solved for on the batch; as a running estimate over the training data; with the noise of "
            "the batches (mean square); after a short stretch of gradient flow (GFS_k).",
            "ratio",
            [Line(name, curve, colour) for name, curve, colour in ratios if curve is not None],
            edge=1.0,
        ),
        Picture(
            f"Raw sharpness and GFS_k at ×{factor:g}",
            "In the optimizer's own coordinates where it has some; logarithmic.",
            "sharpness",
            [Line(name, curve, colour) for name, curve, colour in values if curve is not None],
            log=True,
        ),
    ]
