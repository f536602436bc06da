"""A training whose rate rises from step to step, and what it brackets: the onset of the run's own edge, and the end.

Below some rate the stability ratio follows the rate. Above it, the training pushes the curvature down as fast as the
rate goes up, and the ratio stays at a level of the run's own. The rate between the two is the *onset*. It is found as
the knee of two lines through the logarithms of ratio and rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FIRST = 1e-2  # of the user's rate: where a ramp begins
DECADES = 5.0  # that it rises at most
_SHARE = 0.2  # of the training's steps, in which it rises over …
_USUAL = 4.0  # … so many decades
_SLOWEST = 1.03  # per step; a slower one costs more, and tells no more
_FASTEST = 1.12
_LOOK = 5  # steps, over whose losses a median is taken
_GAIN = 0.05  # of the first loss; who has not gained so much has nothing to lose
_KEPT = 0.25  # of what was gained; who keeps less is lost
_RISEN = 1.3  # times the first loss
_BEYOND = 4.0  # times the usual difference of two losses in a row: the batches alone do not raise it so far
_FEWEST = 6  # ratios on each side of a knee
_WITHIN = 30.0  # the largest ratio is at most so many times those that are looked at
_FOLLOWS = 0.8  # least slope before the knee, of ratio over rate in logarithms; 1: the curvature does not change
_STAYS = 0.6  # largest slope behind it …
_BENT = 0.5  # … and of that before it
_BETTER = 0.8  # squared error of two lines over that of one, at the most


class Point(NamedTuple):
    """One step of a ramp.

    Attributes:
        rate: the largest learning rate, that the step was taken at.
        loss: of the training batch.
        gradient: norm of its gradient, before it was clipped; ``None``: not known.
        ratio: the running stability ratio; ``None``: not measured at this step.
    """

    rate: float
    loss: float
    gradient: float | None = None
    ratio: float | None = None


class Knee(NamedTuple):
    """Two lines through ratios over rates, in logarithms.

    Attributes:
        rate: at which they meet.
        ratio: there.
        slopes: before it and after it.
    """

    rate: float
    ratio: float
    slopes: tuple[float, float]


@dataclass(frozen=True)
class Ramp:
    """What a ramp has shown.

    Attributes:
        points: its steps.
        knee: where the ratio stops following the rate; ``None``: not seen.
        end: the rate at which the loss was lost; ``None``: it was not, up to the last rate.
        why: why there is no knee, in words; empty where there is one.
    """

    points: tuple[Point, ...]
    knee: Knee | None
    end: float | None
    why: str = ""

    @staticmethod
    def of(points: Sequence[Point]) -> Ramp:
        """What these steps show."""
        losses = [p.loss for p in points]
        end = points[-1].rate if is_lost(losses) else None
        measured = [(p.rate, p.ratio) for p in points if p.ratio is not None and 0 < p.ratio < math.inf]
        if len(measured) < 2 * _FEWEST:
            return Ramp(tuple(points), None, end, f"only {len(measured)} ratios were measured")
        last = max((i for i, (_, v) in enumerate(measured) if v < max(v for _, v in measured) / _WITHIN), default=-1)
        knee = knee_of([r for r, _ in measured[last + 1 :]], [v for _, v in measured[last + 1 :]])
        why = "" if knee else "no rate from which on the ratio stopped following the rate"
        return Ramp(tuple(points), knee, end, why)

    @property
    def start(self) -> float:
        """A rate for the first pilot: half a decade above the onset, and below the end by a factor of five."""
        last = self.end or self.points[-1].rate
        return last / 5 if self.knee is None else min(math.sqrt(10) * self.knee.rate, last / 5)


def growth_of(steps: int) -> float:
    """Factor on the rate from one step of a ramp to the next, for a training of so many steps."""
    return min(max(10 ** (_USUAL / (_SHARE * steps)), _SLOWEST), _FASTEST)


def is_lost(losses: Sequence[float]) -> bool:
    """Whether a training, by its losses so far, has lost what it had learnt.

    A single bad batch does not count, nor does what is within the scatter of batches.
    """
    if losses and not math.isfinite(losses[-1]):
        return True
    if len(losses) < 2 * _LOOK:
        return False
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(np.asarray(losses), _LOOK), axis=1)
    first, least, now = float(smooth[0]), float(smooth.min()), float(smooth[-1])
    gained = first - least
    if now - least < _BEYOND * float(np.median(np.abs(np.diff(losses)))):
        return False
    if gained > _GAIN * abs(first):
        return now > least + (1 - _KEPT) * gained
    return now > first + (_RISEN - 1) * abs(first)


def knee_of(rates: Sequence[float], ratios: Sequence[float]) -> Knee | None:
    """The two lines with the least squares, the second one flatter; ``None``: one line fits about as well.

    Args:
        rates: > 0, rising.
        ratios: > 0, one for each rate.
    """
    x, y = np.log(np.asarray(rates)), np.log(np.asarray(ratios))
    ones = np.ones_like(x)
    found: tuple[float, Knee] | None = None
    for knee in x[_FEWEST:-_FEWEST]:
        sides = np.stack([ones, np.minimum(x - knee, 0.0), np.maximum(x - knee, 0.0)], axis=1)
        (level, before, after), *_ = np.linalg.lstsq(sides, y, rcond=None)
        if before < _FOLLOWS or after > _BENT * before:
            continue
        error = float(np.square(y - sides @ (level, before, after)).sum())
        if found is None or error < found[0]:
            found = error, Knee(math.exp(knee), math.exp(level), (float(before), float(after)))
    line = np.stack([ones, x], axis=1)
    single = float(np.square(y - line @ np.linalg.lstsq(line, y, rcond=None)[0]).sum())
    return found[1] if found is not None and found[0] < _BETTER * single else None
