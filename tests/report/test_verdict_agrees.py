"""No sentence of a verdict contradicts another one, whatever a run's loss, ratios and warnings look like."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from gfs_report.ratios import lower_rate
from gfs_report.runs import Curve, Mark, Run
from gfs_report.verdict import Verdict, judge

_STEPS = 200


def _curve(values: Any, first: int = 0) -> Curve:
    values = np.asarray(values, np.float64)
    return Curve(np.arange(first, first + len(values)), values)


def _at(**values: float) -> Curve:
    """A ratio that was measured at a few steps, ``s120=1.4``."""
    return Curve(np.array([int(step[1:]) for step in values]), np.array(list(values.values())))


_FALLING = 2.3 * np.exp(-np.arange(_STEPS) / 60)
_LOSSES = {
    "falling": _curve(_FALLING),
    "falling a little": _curve(np.linspace(2.5, 2.35, _STEPS)),
    "flat": _curve(2.3 + 0.05 * np.sin(np.arange(_STEPS))),
    "lost": _curve([*_FALLING[:150], *np.full(50, 2.3)]),
    "not finite": _curve([*_FALLING[:150], *np.full(50, math.nan)]),
    "rising slowly": _curve(0.7 + np.linspace(0, 1.5, _STEPS) + 0.05 * np.random.default_rng(0).standard_normal(200)),
    "stalled": _curve([2.3, 2.0, 1.5, *np.full(_STEPS - 3, 1.2)]),
    "three values": _curve([2.3, 1.0, 2.2]),
    "none": None,
}
_RATIOS = {
    "none": None,
    **{f"always {value}": _curve(np.full(_STEPS, value)) for value in (0.05, 0.5, 1.0, 2.0)},
    "past once, at the end": _at(s20=0.2, s60=0.2, s120=0.2, s190=2.0),
    "past, long ago": _at(s20=1.9, s25=2.0),
    "far, long ago": _at(s0=0.05),
    "one": _at(s199=0.05),
}
_NOISY = {
    "none": None,
    "one, past": _at(s95=1.3, s140=0.93, s150=0.6, s190=1.43),
    "past": _curve(np.full(_STEPS, 2.0)),
    "below": _curve(np.full(_STEPS, 0.1)),
}
_WARNINGS: dict[str, tuple[list[int], float | None]] = {
    "off": ([], None),
    "quiet": ([], 0),
    "came back": ([100], 0),
    "on": ([190], 2),
}


def _runs() -> list[Any]:
    found = []
    for names in itertools.product(_LOSSES, _RATIOS, _NOISY, _WARNINGS):
        loss, ratio, noisy, warned = names
        marks, alarm = _WARNINGS[warned]
        gfs = {"running_stability_ratio": _RATIOS[ratio], "mean_square_stability_ratio": _NOISY[noisy]}
        held = {key: c for key, c in gfs.items() if c is not None}
        held["learning_rate"] = _curve(np.full(_STEPS, 0.1))
        if alarm is not None:
            held["alarm"] = _curve([*np.zeros(190), *np.full(10, alarm)])
        curve = _LOSSES[loss]
        logged = {} if curve is None else {"loss": curve}
        found.append((names, Run("r", gfs=held, logged=logged, marks=[Mark(s, 2, "it rose") for s in marks])))
    return found


def _contradictions(v: Verdict, ringing: bool) -> list[str]:
    """What is wrong with a verdict, in words."""
    found = []
    advises_less = v.do.startswith(("Lower the", "Start again"))
    says_past = "past the edge" in v.summary or "past their edge" in v.do
    now = "are past the edge" in v.summary or "are past their edge" in v.do
    if says_past and v.standing in ("far", "near", "edge"):
        found.append("its steps are past the edge, and it ended below it")
    if now and v.standing != "past":
        found.append("its steps are past the edge now, and where it stood is not known")
    if now and "when last measured" in v.where:
        found.append("its steps are past the edge now, by one measurement")
    if v.standing == "past" and not advises_less:
        found.append("past the edge, and nothing is advised against it")
    calm = v.do.startswith(("Nothing has to be done", "Nothing follows"))
    if v.do.startswith("Nothing has to be done") and not v.summary.startswith(
        ("This run went well", "This run recovered", "The loss of this run fell")
    ):
        found.append("nothing has to be done of a run that is not called well")
    if v.summary.startswith(("This run went well", "This run recovered")) and (ringing or says_past or v.failed):
        found.append("well in spite of its warning or its ratio")
    if calm and (ringing or v.failed):
        found.append("calm in spite of the warning or the loss")
    if v.failed != v.summary.startswith("This run is destroyed") or v.failed != v.do.startswith("Start again"):
        found.append("destroyed in one sentence alone")
    if "may be lower than it need be" in v.do and v.standing != "far":
        found.append("room for the rate, and not far below the edge")
    if v.do.startswith("Lower the") and "no verdict rests on it" in v.where:
        found.append("no verdict rests on the ratio in the mean square, and one does")
    return found


def test_no_sentence_contradicts_another() -> None:
    wrong = []
    for names, run in _runs():
        verdict = judge(run)
        ringing = _WARNINGS[names[3]][1] == 2
        wrong += [(names, what, verdict.sentences) for what in _contradictions(verdict, ringing)]
    assert wrong == []


@pytest.mark.parametrize("ratio", ["always 0.05", "always 0.5", "one", "far, long ago"])
@pytest.mark.parametrize("noisy", ["one, past", "past"])
def test_the_ratio_in_the_mean_square_alone_makes_no_verdict(ratio: str, noisy: str) -> None:
    found = {
        key: judge(next(r for n, r in _runs() if n == ("falling", ratio, key, "quiet"))) for key in (noisy, "none")
    }
    assert found[noisy].summary == found["none"].summary == "This run went well: its loss went from 2.3 to 0.0977."
    assert found[noisy].standing == found["none"].standing
    assert "past" not in found[noisy].do
    said = "above 1 in healthy runs too, so no verdict rests on it" in found[noisy].where
    assert said == (noisy == "past" and ratio != "far, long ago")  # four measurements are too few to be spoken of


def test_few_measurements_in_the_mean_square_leave_the_rate_to_the_plain_ratio() -> None:
    gfs = {
        "running_stability_ratio": _curve(np.full(_STEPS, 2.0)),
        "mean_square_stability_ratio": _at(s190=40.0),
        "learning_rate": _curve(np.full(_STEPS, 0.1)),
    }
    found = lower_rate(Run("r", gfs=gfs, logged={"loss": _curve(_FALLING)}))
    assert found.rate == pytest.approx(0.025)
    assert found.name == "running stability ratio"
    gfs["mean_square_stability_ratio"] = _curve(np.full(_STEPS, 4.0))
    assert lower_rate(Run("r", gfs=gfs)).rate == pytest.approx(0.0125)


def test_a_standing_by_one_measurement_says_so() -> None:
    gfs = {"running_stability_ratio": _at(s20=0.2, s60=0.2, s120=0.2, s190=2.0)}
    found = judge(Run("r", gfs=gfs, logged={"loss": _curve(_FALLING)}))
    assert "its running stability ratio was 2.00 when last measured, at step 190" in found.where
    assert found.summary.endswith("its steps were, when last measured, past the edge.")
    assert "the steps were past their edge when that was last measured" in found.do
