"""Rules that others use, as scores: larger is more alarming. Each is described where it comes from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.zoo.rules import Alarm
from benchmarks.zoo.training import Array, Stream

_JOINED = 50  # steps; alarms that are closer are one


def _before(x: Array, length: int, of: Callable[..., Array], first: int = 20) -> Array:
    """What ``of`` makes of the ``length`` values before each one; NaN where there are fewer than ``first``."""
    padded = np.concatenate([np.full(length, np.nan), x])[:-1]
    windows = sliding_window_view(padded, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found: Array = of(windows, axis=-1)
    found[np.isfinite(windows).sum(-1) < first] = np.nan
    return found


def _finite(score: Array, x: Array) -> Array:
    """Where a value is not finite, any rule speaks; where a score is unknown, none does."""
    return np.where(np.isfinite(x), np.where(np.isnan(score), -math.inf, score), math.inf)


def over_median(key: str) -> Callable[[Stream], Array]:
    """A value over the median of the last 50."""

    def score(stream: Stream) -> Array:
        x = stream.loss if key == "loss" else stream.whole[key]
        return _finite(x / np.maximum(_before(x, 50, np.nanmedian), 1e-30), np.where(np.isnan(x), 0.0, x))

    return score


def spike_score(key: str) -> Callable[[Stream], Array]:
    """Standard deviations above the mean of the last 128, as OLMo-core's ``stability_monitor`` has it."""

    def score(stream: Stream) -> Array:
        x = stream.loss if key == "loss" else stream.whole[key]
        return _finite((x - _before(x, 128, np.nanmean)) / (_before(x, 128, np.nanstd) + 1e-12), x)

    return score


def zclip(stream: Stream) -> Array:
    """Z-score of the gradient's norm against exponential mean and variance of memory 0.97 (ZClip, arXiv 2504.02507)."""
    x = stream.whole["grad_norm"]
    out = np.full(len(x), -math.inf)
    mean, square = float(np.nanmean(x[:25])), float(np.nanvar(x[:25]))
    for i in range(25, len(x)):
        if not math.isfinite(x[i]):
            out[i] = math.inf
            continue
        out[i] = (x[i] - mean) / (math.sqrt(square) + 1e-12)
        mean = 0.97 * mean + 0.03 * x[i]
        square = 0.97 * square + 0.03 * (x[i] - mean) ** 2
    return out


def normalised(stream: Stream) -> Array:
    """RMS_t of Adam, the median of three over the median of the last 50."""
    x = stream.whole["rms_ratio"]
    if not np.isfinite(x).any():
        return np.full(len(x), -math.inf)
    now = _before(np.concatenate([x[1:], x[-1:]]), 3, np.nanmedian, 1)
    return _finite(now / _before(x, 50, np.nanmedian), stream.loss)


def cusum(stream: Stream) -> Array:
    """The sum of what losses lie above mean + half a deviation of the last 100, never below 0 (Page 1954)."""
    x = stream.loss
    z = (x - _before(x, 100, np.nanmean)) / (_before(x, 100, np.nanstd) + 1e-12)
    out, total = np.full(len(x), -math.inf), 0.0
    for i, value in enumerate(z):
        if not math.isfinite(x[i]):
            out[i] = math.inf
        elif math.isfinite(value):
            total = max(0.0, total + value - 0.5)
            out[i] = total
    return out


def running_mean(stream: Stream) -> Array:
    """A loss over the running mean of ten, as Lightning's ``SpikeDetection`` with a relative tolerance."""
    x = stream.loss
    mean = _before(x, 10, np.nanmean, 10)
    return _finite((x - mean) / np.maximum(np.abs(mean), 1e-12), x)


def guard_ratio(stream: Stream) -> Array:
    """The largest ratio of stabilityguard, as training recorded it (:class:`benchmarks.zoo.hooks.GuardRatio`)."""
    return _recorded(stream, "guard_ratio")


def changepoint(stream: Stream, limit: float = 6.0) -> Array:
    """The cumulative sum of trainscope 1.8.1 over losses, both ways (``core/detectors/changepoint.py``), its default.

    A loss counts by its distance to the median of the last 200, in robust deviations, less 1; a sum at the limit raises
    an alarm, and both sums start again.
    """
    out, history, high, low = np.full(len(stream.loss), -math.inf), list[float](), 0.0, 0.0
    for i, loss in enumerate(stream.loss.tolist()):
        if not math.isfinite(loss):
            out[i] = math.inf
            continue
        if len(history) >= 30:
            middle, deviation = _robust(np.median, np.array(history[-200:]))
            high = max(0.0, high + (loss - middle) / deviation - 1)
            low = min(0.0, low + (loss - middle) / deviation + 1)
            out[i] = max(high, -low)
            if out[i] >= limit:
                high = low = 0.0
        history.append(loss)
    return out


def crossing(stream: Stream) -> Array:
    """Kurtosis above that of the first 40 steps, in robust deviations, three steps in a row (trainscope 1.8.1).

    That is ``first_crossing_step`` of its ``analysis.py``, over all modules and not the first alone, and at each step:
    by default it measures each fifth, counts the others as 0, and so can never find three in a row.
    """
    x = _recorded(stream, "kurtosis")
    out = np.full(len(x), -math.inf)
    if len(x) < 50 or not np.isfinite(x).any():
        return out
    middle, deviation = _robust(lambda values: np.sort(values)[len(values) // 2], x[:40])
    lowest = sliding_window_view(x[40:], 3).min(-1)  # of the last three, from the third step after the first 40
    out[42:] = (lowest - middle) / deviation
    return _finite(out, stream.loss)


def _recorded(stream: Stream, key: str) -> Array:
    return stream.whole.get(key, np.full(len(stream.loss), -math.inf))


def _robust(middle_of: Callable[[Array], float], values: Array) -> tuple[float, float]:
    """The middle of values, and the deviation of a normal distribution whose values lie as far from its own."""
    middle = float(middle_of(values))
    return middle, max(1.4826 * float(middle_of(np.abs(values - middle))), 1e-12)


RIVALS: dict[str, Callable[[Stream], Array]] = {
    "gradient / median of 50": over_median("grad_norm"), "gradient, z of 128 (OLMo)": spike_score("grad_norm"),
    "gradient, ZClip": zclip, "RMS_t / median of 50": normalised, "loss / median of 50": over_median("loss"),
    "loss, z of 128 (OLMo)": spike_score("loss"), "loss, CUSUM": cusum, "loss, Lightning": running_mean,
    "stabilityguard": guard_ratio, "stabilityguard, as it comes": guard_ratio,
    "loss, CUSUM of trainscope, as it comes": changepoint,
    "kurtosis, trainscope": crossing, "kurtosis, trainscope, as it comes": crossing,
}  # fmt: skip
# The thresholds that rules bring with them; those of all others are tuned.
AS_IT_COMES = {
    "stabilityguard, as it comes": 10.0, "loss, CUSUM of trainscope, as it comes": 6.0,
    "kurtosis, trainscope, as it comes": 3.0,
}  # fmt: skip


def alarms_of(score: Array, above: float, rule: str = "") -> list[Alarm]:
    """The stretches at which a score is above a threshold."""
    found: list[Alarm] = []
    for step in np.nonzero(score > above)[0].tolist():
        if found and step - found[-1].end < _JOINED:
            found[-1] = Alarm(found[-1].start, step + 1, rule)
        else:
            found.append(Alarm(step, step + 1, rule))
    return found


def tuned(scores: list[Array], false_alarms: float) -> float:
    """The lowest threshold with at most so many alarms on these scores."""
    values = np.concatenate([s[np.isfinite(s)] for s in scores])
    levels = np.unique(np.quantile(values, 1 - np.geomspace(1e-6, 0.2, 200))) if len(values) else np.array([math.inf])
    for level in levels:
        if sum(len(alarms_of(s, float(level))) for s in scores) <= false_alarms:
            return float(level)
    return float(levels[-1])
