"""How a loss went: where it began, whether it diverged, how often it spiked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gfs_report.runs import Curve, Run

Values = NDArray[np.float64]
_END = 0.1  # the part of the steps over which a run is judged as diverged or not
_START = 3.0  # robust spreads above the usual loss of the start: single losses there scatter
_WINDOW, _FEWEST = 50, 20  # trailing losses that a spike is judged by, and the fewest
_SPIKE = 6.0  # robust spreads above their median
_TINY = 1e-3  # smallest spread, relative to the median: losses that hardly vary are not judged by their last digits
_INFINITE = ("the loss is nan", "the loss is inf", "the loss is -inf")  # what the early warning says of such a loss


def start_of(values: Values) -> float:
    """The largest loss that still counts as one of the start: the median of its losses and 3 robust spreads.

    A robust spread is 1.4826 times the median distance to the median. Infinite where no loss is finite.
    """
    first = values[np.isfinite(values)]
    if not len(first):
        return math.inf
    usual = float(np.median(first))
    return usual + _START * 1.4826 * float(np.median(np.abs(first - usual)))


def diverged(run: Run, loss: Curve | None, start: float) -> bool:
    """Whether the loss ended non-finite, or with a median above ``start``."""
    if loss is None:
        return False
    if run.loss_key() is None and any(m.reason in _INFINITE for m in run.marks):
        return True  # a history holds finite values only
    norm = run.logged.get("grad_norm", run.logged.get("train/grad_norm"))
    if norm is not None and not math.isfinite(norm.last):
        return True  # the Hugging Face Trainer then logs a loss of 0
    end = loss.tail(_END)
    return not np.isfinite(end).all() or float(np.median(end)) > start


def count_spikes(values: Values) -> int | None:
    """How often a loss rose above the median of its 50 values before by 6 robust spreads; consecutive ones are one.

    A robust spread is 1.4826 times the median distance to the median. A value that is not finite counts as risen.

    Returns:
        ``None`` where there are too few values to say.
    """
    finite = np.isfinite(values)
    v = values[finite]
    if len(v) <= _FEWEST:
        return None
    risen = np.zeros(len(v), np.bool_)
    for i in range(_FEWEST, min(_WINDOW, len(v))):
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
