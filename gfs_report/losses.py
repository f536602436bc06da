"""How a loss went: from where to where, whether the run lost what it had learnt, how often it spiked."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gfs_report.ratios import main_ratio, past
from gfs_report.runs import Curve, Run

Values = NDArray[np.float64]
Fate = Literal[
    "not finite", "worse", "lost", "blown up", "stuck", "drifted", "flat", "shaken", "stalled", "recovered", "fell",
    "unknown",
]  # fmt: skip
FAILED: tuple[Fate, ...] = ("not finite", "worse", "lost", "blown up", "stuck")

# Chosen on the first four tasks of benchmarks/verdicts.md, and reported there on the other six.
_PART = 0.1  # of the losses: those that a running median is of, and that count as the end
_BLOCKS = 1000  # a longer curve is judged by medians of so many blocks
_FEWEST = 5  # losses: fewer do not make a curve
_LOST = 0.25  # of the progress, from the first loss to the best, from which on it counts as lost again
_BACK = 0.5  # of the progress that was lost in between, of a run that has it back
_SURE = 6.0  # standard errors: a smaller difference between running medians is none
_FAR = 3.0  # scatters of single losses that an end has to lie above the start besides
_ABOVE = 0.1  # of the start: how far above it an end is worse …
_BELOW = 0.02  # … where no more than this part of the losses lies below it
_LITTLE = 0.05  # of the start: a smaller fall is none
SMALL = 0.1  # of the start: a smaller fall may be all there is to learn, or chance level
_BLOWN = 1.0  # of the start: two losses in a row that far above it, in the first part, are a blow-up
_STALLED = 0.05  # of the level in the second tenth, and of all progress: one that falls no further has stalled …
_MANY = 20  # … where there are so many losses
_SLOW = 0.5  # of a rise: one is slow where no tenth of the run holds more of it …
_MODEST = 3.0  # … and where it ends no more than this many times the start above it

_WINDOW, _BEFORE = 50, 20  # trailing losses that a spike is judged by, and the fewest
_SPIKE = 6.0  # robust spreads above their median
_TINY = 1e-3  # smallest spread, relative to the median: losses that hardly vary are not judged by their last digits
_INFINITE = ("the loss is nan", "the loss is inf", "the loss is -inf")  # what the early warning says of such a loss


class Course(NamedTuple):
    """How a loss went.

    Attributes:
        fate: what became of it. *not finite* at the end; *worse* than its start all along; *lost* what it had gained;
            *blown up* and back at its start, without a gain; *flat*; *stuck*, flat with steps past the edge; *drifted*
            above its best, as some losses do in good runs; *shaken*, blown up at first and below its start in the end;
            *stalled* soon after it had begun to fall; *recovered* what it had lost in between; *fell*; *unknown*, of
            too few losses.
        start: the first loss; NaN where there is none.
        best: the least running median.
        best_step: where that was.
        end: median of the last part.
        since: the step at which what the fate says began; ``None`` where it has no such step.
        lost: fraction of the progress, from the start to the best, that the end has lost again.
    """

    fate: Fate
    start: float = math.nan
    best: float = math.nan
    best_step: int = 0
    end: float = math.nan
    since: int | None = None
    lost: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the run is destroyed, as far as its loss tells."""
        return self.fate in FAILED


def course_of(run: Run, loss_key: str | None = None) -> Course:
    """How the training loss went: as the monitor has seen it, as it was logged, and on the probe; the gravest counts.

    Raises:
        ConfigError: there is nothing under ``loss_key``.
    """
    key, calm, seen = run.loss_key(loss_key), _calm(run), run.training_loss
    curves = [c for c in (seen, run.logged.get(key or ""), run.of_training("loss_probe")) if c is not None]
    if loss_key is not None:
        curves.sort(key=lambda c: c is not run.logged[loss_key])  # the one that was asked for first
    judged = [
        course(c, calm, run.loss_spread if c is seen else None)
        for c in curves
        if c is curves[0] or len(c.steps) >= _FEWEST
    ]
    found = next((c for c in judged if c.failed), next((c for c in judged if c.fate != "unknown"), Course("unknown")))
    if found.fate == "unknown" and judged:
        found = judged[0]
    if found.fate == "flat" and past(run):
        found = found._replace(fate="stuck")
    broken = _broken(run, key)
    if broken is not None and found.fate != "not finite":
        found = found._replace(fate="not finite", since=broken)
    return found


def course(loss: Curve, calm: bool = False, spread: Curve | None = None) -> Course:
    """How one curve went: the end against the start and the best, in units of the progress that was made.

    The scatter of mini-batches is no measure of harm, for a run at chance scatters little. It only tells which
    differences are none.

    Args:
        loss: the curve.
        calm: whether it was measured that the run was stable; then a slow rise counts for no harm.
        spread: scatter of single losses, where the values are means of several; the first value is a single loss.
    """
    finite = np.isfinite(loss.values)
    steps, values = loss.steps[finite], loss.values[finite]
    if not len(values):
        return Course("not finite", since=int(loss.steps[0]))
    start = float(values[0])
    smooth, at, width = _smoothed(values)
    lowest = int(smooth.argmin())
    best, end = float(smooth[lowest]), float(smooth[-1])
    found = Course("unknown", start, best, int(steps[at[lowest]]), end)
    if not finite[-1] or finite[-max(1, round(_PART * len(finite))) :].mean() < 0.5:
        broken = loss.steps[~finite][-1] if finite[-1] else loss.steps[np.flatnonzero(finite)[-1] + 1]
        return found._replace(fate="not finite", since=int(broken))
    well = min(int(at[lowest]) + max(8, round(_PART * len(values))), len(values))  # as long as the run went well
    noise = _noise(values[:well])
    sure = _SURE * noise * math.sqrt(2 / width)
    single = _single(values[:well], steps[0], steps[well - 1], spread)
    progress = max(start - best, _SURE * single)  # a first loss that is low by chance makes it no smaller
    lost = (end - best) / progress if end - best > sure and progress > 0 else 0.0
    found = found._replace(lost=lost)
    late = max(0, len(values) - max(8, len(values) // 3))
    if _worse(values, end, _single(values[late:], steps[late], steps[-1], spread)):
        found = found._replace(fate="worse", since=int(steps[np.flatnonzero(values > start)[0]]))
    elif len(values) < _FEWEST:
        return found
    elif lost >= _LOST and best >= start:
        found = found._replace(fate="worse", since=int(steps[np.flatnonzero(values > start)[0]]))
    elif lost >= _LOST:
        gone = int(at[lowest + np.flatnonzero(smooth[lowest:] > best + max(_LOST * progress, sure))[0]])
        found = found._replace(fate="lost", since=int(steps[gone - (width - 1) // 2]))  # a median is half a window late
    elif end > start - max(_LITTLE * abs(start), _FAR * _noise(values[late:]) / math.sqrt(width)):
        high = _blow_up(values, single)
        return found._replace(fate="flat") if high is None else found._replace(fate="blown up", since=int(steps[high]))
    else:
        risen = smooth - np.minimum.accumulate(smooth)
        top = int(risen.argmax())
        if (high := _blow_up(values, single)) is not None:
            found = found._replace(fate="shaken", since=int(steps[high]))
        elif risen[top] > max(_BACK * progress, sure):
            found = found._replace(fate="recovered", since=int(steps[at[top]]))
        elif len(values) >= _MANY and _stalls(smooth, start):
            found = found._replace(fate="stalled", since=int(steps[at[len(smooth) // 9]]))
        else:
            found = found._replace(fate="fell")
        return found
    if calm and end - start < _MODEST * abs(start) and _drifts(smooth, lowest):
        found = found._replace(fate="drifted")
    return found


def _worse(values: Values, end: float, scatter: float) -> bool:
    """Whether the end is far above the first loss, and that was no low one by chance: next to none was below it."""
    start = float(values[0])
    if len(values) < 2 or (values[1:] <= start).mean() > _BELOW:
        return False
    return end > start + max(_FAR * scatter, _ABOVE * abs(start))


def _blow_up(values: Values, noise: float) -> int | None:
    """Where a loss that ends as it began blew up; ``None``: nowhere, or in the midst of the run, as a spike does."""
    start = float(values[0])
    usual = float(values[len(values) // 2 :].max()) - start  # how far single losses reach when all is over
    level = start + max(_BLOWN * abs(start), _SURE * noise, 2 * usual)
    high = np.flatnonzero(np.minimum(values[:-1], values[1:]) > level)
    return int(high[0]) if len(high) and high[0] <= _PART * len(values) else None


def _stalls(smooth: Values, start: float) -> bool:
    """Whether next to nothing was learnt after the second tenth of the run: at the floor of the loss, or at chance."""
    early, best = float(smooth[len(smooth) // 9]), float(smooth.min())
    return early - best < _STALLED * min(abs(early), start - best)


def _smoothed(values: Values) -> tuple[Values, NDArray[np.int64], int]:
    """Running medians, the place of the last value in each, and the number of values in one."""
    each = -(-len(values) // _BLOCKS)
    ends = np.arange(len(values) % each, len(values), each) + each - 1
    blocks = np.median(values[len(values) % each :].reshape(-1, each), axis=1)
    width = max(1, round(_PART * len(blocks)))
    return np.median(sliding_window_view(blocks, width), axis=1), ends[width - 1 :], width * each


def _noise(values: Values) -> float:
    """How far single values scatter about a trend: their second differences hold it √6 times, and no straight line."""
    changes = np.diff(values, 2)
    return 1.4826 * float(np.median(np.abs(changes))) / math.sqrt(6) if len(changes) else 0.0


def _single(values: Values, first: int, last: int, spread: Curve | None) -> float:
    """How far single losses scatter, of which the values are means where there is a spread."""
    if spread is not None:
        there = spread.values[(spread.steps >= first) & (spread.steps <= last)]
        if len(there):
            return float(np.median(there))
    return _noise(values)


def _drifts(smooth: Values, lowest: int) -> bool:
    """Whether the rise from the best to the end took its time, or the loss had risen as far before and come back."""
    rise = float(smooth[-1] - smooth[lowest])
    before = smooth[: lowest + 1]
    if float((before - np.minimum.accumulate(before)).max()) >= rise:
        return True
    span, rising = round(_PART * len(smooth)), smooth[lowest:]
    if span < 1 or len(rising) < 2 * span + 1:
        return False
    return float((rising[span:] - rising[:-span]).max()) <= _SLOW * rise


def _calm(run: Run) -> bool:
    """Whether it was measured, lately, that the run was below the edge."""
    found = main_ratio(run)
    return found is not None and found.lately and float(np.median(found.curve.tail(_PART))) < 1


def _broken(run: Run, key: str | None) -> int | None:
    """The step from which on the loss was not finite, where its own curve does not show it; ``None``: it was finite."""
    told = [m for m in run.marks if m.reason in _INFINITE]
    if key is None and told:  # a history says when the loss was not finite, or has finite values only
        held = (
            [c for name, c in run.gfs.items() if name != "alarm"] if run.training_loss is None else [run.training_loss]
        )
        later = [c.steps[-1] for c in held]
        return told[-1].step if max(later, default=-1) <= told[-1].step else None
    norm = run.logged.get("grad_norm", run.logged.get("train/grad_norm"))
    if norm is not None and not math.isfinite(norm.last):  # the Hugging Face Trainer then logs a loss of 0
        finite = np.flatnonzero(np.isfinite(norm.values))
        return int(norm.steps[finite[-1] + 1 if len(finite) else 0])
    return None


def count_spikes(values: Values) -> int | None:
    """How often a loss rose above the median of its 50 values before by 6 robust spreads; consecutive ones are one.

    A robust spread is 1.4826 times the median distance to the median. A value that is not finite counts as risen.

    Returns:
        ``None`` where there are too few values to say.
    """
    finite = np.isfinite(values)
    v = values[finite]
    if len(v) <= _BEFORE:
        return None
    risen = np.zeros(len(v), np.bool_)
    for i in range(_BEFORE, min(_WINDOW, len(v))):
        risen[i] = v[i] > _limit(v[:i])
    if len(v) > _WINDOW:
        risen[_WINDOW:] = v[_WINDOW:] > _limit(sliding_window_view(v[:-1], _WINDOW))
    high = ~finite
    high[finite] = risen
    return int((high & ~np.append(False, high[:-1])).sum())


def _limit(before: Values) -> Any:
    usual = np.median(before, axis=-1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(before - usual), axis=-1)
    usual = usual[..., 0]
    return usual + _SPIKE * np.maximum(spread, _TINY * np.abs(usual))
