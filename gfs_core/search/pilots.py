"""Short runs of the whole training in small at rates half a decade apart, and the rate that they point to.

A pilot has a tenth of the steps, over a tenth of the data: it sees each example as often as the training will, and so
it overfits where the training will. The first is where the ramp points. Others follow, down and up, until the best one
has a worse or a lost one on either side. A parabola through the logarithms of their losses has its lowest point at the
best rate of pilots. Where the next rate up was lost there is a cliff and no parabola: the best rate is then lowered by
a margin. Longer trainings want lower rates (arXiv 2409.19913): the rate for all of the steps is lower by a power of
the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

APART = math.sqrt(10)  # from one rate to the next
MARGIN = 0.5  # on the best rate, below one that was lost
DRIFT = 0.15  # the best rate falls with this power of the steps
_SHARE = 10  # a pilot has this part of the training's steps …
_SHORTEST = 40  # … and so many at least
_FEWEST, _AT_MOST = 3, 8  # rates
_LEARNT = 0.05  # of the first loss; a pilot that has gained less has learnt nothing
_FLAT = 0.02  # relative difference of losses, below which they are alike …
_NOISY = 0.1  # … and below which they are where batches differ as much
_LIKE = 0.05  # the same, of a rate within the range of the recommended one
_BEHIND = 0.5  # of what the best pilot gained; who gained less counts as lost
_HALF = 10**0.2  # a range is at least this factor to either side: no finer than the pilots tell


@dataclass(frozen=True)
class Pilot:
    """A short run.

    Attributes:
        rate: the largest learning rate of its schedule.
        steps: that it was to have.
        taken: that it had; fewer where it was lost.
        first: loss at its start, on what it is judged on if that is known there, or else of its first batch.
        losses: of each batch on which it was judged; the same ones in all pilots of a search. Empty: it was lost.
        share: of the training data that it sees, each example as often as the training would; 1: all of them.
    """

    rate: float
    steps: int
    taken: int
    first: float
    losses: tuple[float, ...]
    share: float = 1.0

    @staticmethod
    def of(
        rate: float,
        steps: int,
        losses: Sequence[float],
        judged: Sequence[float],
        start: float | None = None,
        share: float = 1.0,
    ) -> Pilot:
        """The pilot of a run.

        Args:
            rate: the largest of its schedule.
            steps: that it was to have.
            losses: of the steps that it had.
            judged: on which it is judged; empty: it was lost.
            start: mean loss at its start, on what it is judged on. Who ends no lower has lost what was there, as a
                pretrained model can without a high loss.
            share: of the training data.
        """
        if start is None:
            return Pilot(rate, steps, len(losses), losses[0], tuple(judged), share)
        learnt = bool(judged) and fmean(judged) < start
        return Pilot(rate, steps, len(losses), start, tuple(judged) if learnt else (), share)

    @property
    def loss(self) -> float:
        """The mean loss on which it was judged; infinite where it was lost."""
        return fmean(self.losses) if self.losses and all(map(math.isfinite, self.losses)) else math.inf

    @property
    def learnt(self) -> bool:
        """Whether its loss has fallen."""
        return self.first - self.loss > _LEARNT * abs(self.first)


@dataclass(frozen=True)
class Choice:
    """What pilots of one length point to.

    Attributes:
        rate: recommended.
        low: of the range of rates that are about as good by the same pilots …
        high: … and its upper end.
        cliff: the lowest rate above that was lost; ``None``: none was.
        flat: whether the losses at the best rates are too alike to tell which is best.
        parabola: its curvature, the logarithm of the rate at its lowest point, and the value there; ``None``: the
            pilots hold none.
    """

    rate: float
    low: float
    high: float
    cliff: float | None
    flat: bool
    parabola: tuple[float, float, float] | None


def steps_of(steps: int) -> int:
    """Steps of a pilot, of a training of so many."""
    return min(max(steps // _SHARE, _SHORTEST), steps)


def search(
    run: Callable[[float, int, float], Pilot], start: float, steps: int, afford: Callable[[int], bool]
) -> list[Pilot]:
    """Run pilots until the best is between two worse ones.

    Args:
        run: runs a pilot at a rate, for so many steps, over a share of the data.
        start: rate of the first.
        steps: of the training.
        afford: whether so many steps more may be spent; asked before all pilots but the first few.

    Returns:
        All pilots, in the order in which they were run: with the same share of the data; or, where a part of them
        taught nothing of the rest, as of ratings of other users, all with that and then all with the whole.
    """
    length = steps_of(steps)
    pilots = enclosed(lambda rate: run(rate, length, length / steps), start, lambda: afford(length))
    if any(p.learnt for p in pilots):
        return pilots
    return pilots + enclosed(lambda rate: run(rate, length, 1.0), start, lambda: afford(length))


def enclosed(run: Callable[[float], Pilot], start: float, afford: Callable[[], bool]) -> list[Pilot]:
    """Pilots until the best has one on either side, or no more may be spent."""
    pilots = [run(start)]
    while len(pilots) < _AT_MOST:
        own = held(pilots)
        best = min(own, key=lambda p: p.loss)
        down, up = best.rate / APART, best.rate * APART
        wanted = [down] if best.loss == math.inf else [down, up] if best.learnt else [up]
        missing = [r for r in wanted if not any(math.isclose(r, p.rate, rel_tol=0.1) for p in own)]
        if best.loss == math.inf and not missing:
            missing = [own[0].rate / APART]
        if not missing or (len(pilots) >= _FEWEST and not afford()):
            break
        pilots.append(run(missing[0]))
    return pilots


def held(pilots: Sequence[Pilot]) -> list[Pilot]:
    """The pilots by their rates; those that gained less than half of what the best one did count as lost."""
    best = max((p.first - p.loss for p in pilots), default=0.0)
    fell = [p.first - p.loss < _BEHIND * best for p in pilots]
    lowest = min((p.rate for p in pilots if p.loss == min(q.loss for q in pilots)), default=0.0)
    # Below the best rate a pilot has learnt little because it was slow.
    out = [replace(p, losses=()) if behind and p.rate > lowest else p for p, behind in zip(pilots, fell, strict=True)]
    return sorted(out, key=lambda p: p.rate)


def choose(pilots: Sequence[Pilot], steps: int) -> Choice | None:
    """The rate of a training of so many steps that these pilots, of one length, point to; ``None``: all were lost."""
    ordered = held(pilots)
    good = [p for p in ordered if p.loss < math.inf]
    if not good:
        return None
    best = min(good, key=lambda p: p.loss)
    lower = (best.steps / steps) ** DRIFT
    cliff = min((p.rate for p in ordered if p.loss == math.inf and p.rate > best.rate), default=None)
    near = [p for p in good if p is not best and max(p.rate, best.rate) / min(p.rate, best.rate) < 1.1 * APART]
    flat = any(_alike(p, best) for p in near)
    above = [p for p in near if p.rate > best.rate]
    below = [p for p in near if p.rate < best.rate]
    if not above or not below:
        rate = MARGIN * best.rate if cliff is not None and cliff < 1.1 * APART * best.rate else best.rate
        low = min([rate / _HALF, *(p.rate for p in below if _worse(p, best) < _LIKE)])
        high = best.rate if rate < best.rate else rate * _HALF
        return Choice(lower * rate, lower * low, lower * high, cliff, flat, None)
    parabola = _parabola([below[-1], best, above[0]])
    curvature, at, _ = parabola
    reach = max(math.sqrt(_LIKE / curvature), math.log(_HALF)) if curvature > 0 else math.log(APART)
    low, high = max(at - reach, math.log(below[-1].rate)), min(at + reach, math.log(above[0].rate))
    rate, low, high = (lower * math.exp(x) for x in (at, low, high))
    return Choice(rate, low, high, cliff, flat, parabola)


def _parabola(three: Sequence[Pilot]) -> tuple[float, float, float]:
    """Curvature, place and value of the lowest point of the parabola through three pilots, the middle one the best."""
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(p.rate), _scaled(p.loss, three)) for p in three)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    at = x1 if curvature <= 0 else (x0 + x1) / 2 - left / (2 * curvature)
    return curvature, at, y1 - curvature * (x1 - at) ** 2


def _scaled(loss: float, among: Sequence[Pilot]) -> float:
    """The logarithm of a loss; its distance to the best in units of what was gained, where not all are positive."""
    best = min(p.loss for p in among)
    if best > 0:
        return math.log(loss)
    return (loss - best) / max(max(p.first for p in among) - best, 1e-30)


def _worse(pilot: Pilot, best: Pilot) -> float:
    """By how much the loss of a pilot lies above that of the best, relative to it."""
    return _scaled(pilot.loss, [pilot, best]) - _scaled(best.loss, [pilot, best])


def _alike(pilot: Pilot, best: Pilot) -> bool:
    """Whether the difference of two pilots is small, or within twice its error over the batches they share."""
    worse = _worse(pilot, best)
    if not _FLAT < worse < _NOISY:
        return worse <= _FLAT
    apart = [a - b for a, b in zip(pilot.losses, best.losses, strict=False)]
    return len(apart) > 2 and fmean(apart) < 2 * stdev(apart) / math.sqrt(len(apart))
