"""What came first before an alarm: which signal of which layer left its own past, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gfs_core import AlarmRecord
from gfs_core.run.record import KEYS
from gfs_report.page import Notes, Section, Table
from gfs_report.plots import COLOURS, Line, Picture
from gfs_report.runs import Curve
from gfs_report.units import in_digits

# Chosen on the first trainings of benchmarks/first.md, and reported there on the others.
_FAR = 5.0  # spreads from the median of its own past at which a value has left it …
_YOUNG = 10  # … times 1 + this over their number: the spread of few values is small by chance
_FEWEST, _PAST = 5, 40  # values that make a past, and of more the latest: what drifts keeps a small spread
_FLAT = 0.05  # least spread of a logarithm, and relative one of a value that may be ≤ 0: what hardly moves has none
_GAP = 3  # values in a row near its past after which it is back
_LATELY = 10  # steps before the alarm: what was back earlier has to do with something else
_ROWS, _LINES = 8, 5
_WORDS = {
    "grad_norm": "gradient norm",
    "weight_norm": "norm of the weights",
    "update_ratio": "update / weights",
    "rms_ratio": "gradient / its usual size (RMS_t)",
    "nonfinite": "entries of the gradient that are not finite",
    "step_rate": "learning rate",
}
# Of a step, in the order in which they come about: what is not named lies between the last two.
_ORDER = ("step_rate", "weight_norm", "loss", "nonfinite", "grad_norm", "", "update_ratio")
_NO_SIGNALS = ("overhead", "seconds", "precision_error")


class Departure(NamedTuple):
    """A signal that left its own past.

    Attributes:
        key: its log key, without ``gfs/``.
        layer: of which layer; empty for the whole model.
        step: the first step at which it was away.
        times: its value there over its usual one; infinite from a usual value of 0; not finite as the value.
        usual: the median of its past.
        curve: its values in the record.
    """

    key: str
    layer: str
    step: int
    times: float
    usual: float
    curve: Curve

    @property
    def factor(self) -> float:
        """By which factor it has grown or fallen, ≥ 1; infinite where there is none."""
        times = abs(self.times)
        return max(times, 1 / times) if 0 < times < math.inf else math.inf

    @property
    def name(self) -> str:
        """The signal in words."""
        return _WORDS.get(self.key, self.key.replace("_", " "))


def departures(record: AlarmRecord) -> list[Departure]:
    """The signals that left their own past before the alarm or right after it, the earliest first.

    Those that leave at the same step come in the order in which a step brings them about: rate, weights, loss,
    gradient, curvature, update. Of the layers of one signal the one that changed by the largest factor comes first.
    """
    found = [
        departure
        for (key, layer), curve in curves_of(record).items()
        if (departure := _departure(key, layer, curve, record.step)) is not None
    ]
    return sorted(found, key=lambda d: (d.step, _place(d.key), d.key, -d.factor, d.layer))


def _place(key: str) -> int:
    return _ORDER.index(key if key in _ORDER else "")


def curves_of(record: AlarmRecord) -> dict[tuple[str, str], Curve]:
    """The values of each signal that can be compared with its past, by key and layer; counts are left out."""
    points: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for measurement in record.measurements:
        for reading in measurement.readings:
            name = reading.key.name
            if reading.value is None or name in _NO_SIGNALS or (name in KEYS and KEYS[name].whole):
                continue
            steps, values = points.setdefault((name, reading.layer), ([], []))
            steps.append(reading.step)
            values.append(reading.value)
    return {at: Curve(np.array(s, np.int64), np.array(v, np.float64)) for at, (s, v) in points.items()}


def _departure(key: str, layer: str, curve: Curve, alarm: int) -> Departure | None:
    """Where the curve last left its own past up to the alarm, or else after it; not if it was back well before it."""
    logarithmic = bool((curve.values[np.isfinite(curve.values)] > 0).all())
    past: list[float] = []  # without values that were away from it
    since: tuple[int, float] | None = None  # the first place and the usual value of an absence …
    last, above = 0, False  # … its last place, and whether it is one upwards
    for place, value in enumerate(curve.values.tolist()):
        scaled = math.log(value) if logarithmic and math.isfinite(value) else value
        usual, spread = _usual(past, _FLAT if logarithmic else 0.0)
        if len(past) < _FEWEST or abs(scaled - usual) <= _FAR * (1 + _YOUNG / len(past)) * spread:
            if math.isfinite(scaled):
                past = [*past, scaled][-_PAST:]
            continue
        if since is not None and (place - last > _GAP or above != (scaled > usual)):
            if curve.steps[last] >= alarm - _LATELY and curve.steps[place] > alarm:
                break  # what follows came of the alarm
            since = None
        since, last, above = since or (place, usual), place, scaled > usual
    if since is None or curve.steps[last] < alarm - _LATELY:
        return None
    place, usual = since
    usual = math.exp(usual) if logarithmic else usual
    value = float(curve.values[place])
    return Departure(key, layer, int(curve.steps[place]), value / usual if usual else math.inf, usual, curve)


def _usual(past: Sequence[float], least: float) -> tuple[float, float]:
    """Median and robust spread of values; the spread is at least ``least``, or where that is 0 a part of the median."""
    ordered, count = sorted(past), len(past)
    if count < _FEWEST:
        return math.nan, math.nan
    usual = ordered[count // 2]
    spread = (ordered[3 * count // 4] - ordered[count // 4]) / 1.349  # the standard deviation of a normal distribution
    return usual, max(spread, least or _FLAT * abs(usual))


def came_first(record: AlarmRecord) -> list[Section]:
    """The sections of a report on one alarm: a table, and a picture of the earliest signals."""
    heading = f"What came first before the alarm at step {record.step}"
    found = departures(record)
    if not found:
        return [Notes(heading, [_nothing(record)])]
    rows = [
        [d.name, d.layer or "(whole model)", str(d.step), _before(record.step - d.step), _times(d.times)]
        for d in found[:_ROWS]
    ]
    left = len(found) - len(rows)
    more = f" {left} more left it later, or at the same step." if left else ""
    table = Table(
        heading,
        f"Signals that left their own past, the earliest first: further than {_FAR:g} robust spreads (more where values"
        f" are few) from the median of their last {_PAST} usual values, in logarithms, and not back well before the"
        " alarm. First is what was read first: a signal that scatters much, or that is read at some steps only, is seen"
        f" later than another.{more}",
        ("signal", "layer", "step", "steps before the alarm", "times its usual value"),
        rows,
    )
    lines = [
        Line(f"{d.name}, {d.layer}" if d.layer else d.name, Curve(d.curve.steps, d.curve.values / d.usual), colour)
        for d, colour in zip([d for d in found if d.usual > 0][:_LINES], COLOURS, strict=False)
    ]
    picture = Picture(
        f"The earliest of these, around step {record.step}",
        "Each over its usual value, the median of its past (dashed); logarithmic. The vertical line is the alarm.",
        "times its usual value",
        lines,
        log=True,
        edge=1.0,
        step=record.step,
        linked=False,
    )
    return [table, *([picture] if lines else [])]


def summary(record: AlarmRecord) -> dict[str, Any]:
    """What came first, as plain values."""
    signals = [
        {
            "signal": d.key,
            "layer": d.layer,
            "step": d.step,
            "times": d.times if math.isfinite(d.times) else None,
        }
        for d in departures(record)[:_ROWS]
    ]
    return {"alarm": record.step, "signals": signals}


def _nothing(record: AlarmRecord) -> str:
    longest = max((len(c.values) for c in curves_of(record).values()), default=0)
    if longest <= _FEWEST:
        return "The record holds too few values to say: a signal is compared with its own earlier ones."
    return (
        f"No signal left its own past: none was further than {_FAR:g} robust spreads from the median of its usual "
        "values. The alarm went by something that was read at too few steps, or that grew slowly."
    )


def _before(steps: int) -> str:
    return str(steps) if steps >= 0 else f"{-steps} after it"


def _times(times: float) -> str:
    if math.isnan(times):
        return "not finite"
    return "from 0" if math.isinf(times) else in_digits(times)
