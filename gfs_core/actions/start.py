"""The first part of a training: the learning rate rises, as far as the run bears it, to the user's own at the most.

A *limit* on the rate begins at a hundredth of the user's, and grows by a constant factor with each step. The rate that
is used is the user's, times the limit over the user's highest rate so far, never more than 1. So it is never above the
user's rate, and a warm-up of the user's own goes on inside. Where the loss is lost on the way, the run goes back to a
snapshot, and the limit is fixed for good at a tenth of the rate at which the loss was lost. So the schedule keeps its
shape, under that limit. Where nothing is lost, the rate is the user's to the bit once the limit has passed it, and the
start is over when it was used for so many steps without being lost and no longer rises.

A tenth, as the rates that train best lie about so far below the rate at which a ramp of this steepness loses the loss:
``benchmarks/start.md``, with the trainings on which that was chosen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

# Chosen in benchmarks/start.md.
FIRST = 0.01  # of the user's rate: the limit at the first step
GROWTH = 1.12  # of the limit, per step
SHARE = 0.1  # of the rate at which the loss was lost
HELD = 50  # steps at the user's rate, in which the loss may still be lost

_GAIN = 0.05  # of the first loss; who has not gained so much has nothing to lose
_RISEN = 0.3  # of the first loss, that it then has to rise by
_SCATTER = 50  # losses whose differences tell the scatter of batches
# Losses over which a median is taken; the part of what was gained that is lost; and how far it has to be, in usual
# differences of two losses in a row.
_RULES = ((5, 0.75, 4.0), (20, 0.25, 1.0))


class Lost:
    """Whether a training has lost what it had learnt, by the losses of its batches. A single bad batch does not count.

    A loss is lost at once that is not finite.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=max(look for look, *_ in _RULES))
        self._differences: deque[float] = deque(maxlen=_SCATTER)
        self._first: list[float | None] = [None] * len(_RULES)  # medians
        self._least = [math.inf] * len(_RULES)

    def saw(self, loss: float) -> bool:
        """Take in the loss of a step; whether all is lost now."""
        if not math.isfinite(loss):
            return True
        if self._losses:
            self._differences.append(abs(loss - self._losses[-1]))
        self._losses.append(loss)
        return any([self._by(i, *rule) for i, rule in enumerate(_RULES)])

    def _by(self, rule: int, look: int, part: float, scatter: float) -> bool:
        if len(self._losses) < look:
            return False
        now = median(list(self._losses)[-look:])
        first = self._first[rule]
        first = self._first[rule] = now if first is None else first
        least = self._least[rule] = min(self._least[rule], now)
        if now - least < scatter * median(self._differences):
            return False
        gained = first - least
        if gained > _GAIN * abs(first):
            return now > least + part * gained
        return now > first + _RISEN * abs(first)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next answer depends on."""
        return {k: list(v) for k, v in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        for name, value in vars(self).items():
            held = [None if v is None else float(v) for v in state[name]]
            setattr(self, name, deque(held, value.maxlen) if isinstance(value, deque) else held)


class Start:
    """Decides the share of the user's rate for each step of a start, and when it ends.

    Attributes:
        last: the share of the last step taken.
        rising: whether the start lasts.
        lost: whether the loss is lost, and the start is to be ended.
        peak: the user's highest rate so far.
    """

    def __init__(self) -> None:
        self.last, self.rising, self.lost = 1.0, True, False
        self._limit = math.nan  # on the rate; not a number before the first step
        self.peak = 0.0
        self._held = 0  # steps in a row at the user's rate, while that does not rise
        self._known = 0  # losses
        self._losses = Lost()

    def share(self, rate: float) -> float:
        """The share for a step at the user's rate ``rate``, in (0, 1]; the state is not changed."""
        if math.isnan(self._limit):
            return FIRST
        peak = max(self.peak, rate)
        return self._limit / peak if self._limit < peak else 1.0

    @property
    def below(self) -> bool:
        """Whether the rate is on its way up to the user's."""
        return self.rising and not self._limit >= self.peak

    @property
    def blind(self) -> bool:
        """Whether the start goes on without knowing any loss."""
        return self.rising and self._limit > SHARE * self.peak and not self._known

    @property
    def limit(self) -> float:
        """The limit on the rate that would be kept if the start ended now."""
        return SHARE * min(self._limit / GROWTH, self.peak)

    @property
    def back(self) -> int:
        """How many steps ago the rate was about what it is to be if the start ended now."""
        return math.ceil(-math.log(SHARE) / math.log(GROWTH)) + self._held

    def saw(self, losses: Iterable[float]) -> None:
        """Take in losses that have become known."""
        for loss in losses if self.rising else ():
            self._known += 1
            self.lost = self._losses.saw(loss) or self.lost

    def step(self, rate: float) -> float:
        """The share for a step at the user's rate ``rate`` that is taken now; it is counted, unless its rate is 0."""
        share = self.share(rate)
        if not rate > 0:
            return share
        self.last = share
        if self.rising:
            self._held = self._held + 1 if share == 1.0 and rate <= self.peak else 0
            self._limit = GROWTH * (FIRST * rate if math.isnan(self._limit) else self._limit)
        self.peak = max(self.peak, rate)
        if self.rising and self._held >= HELD:
            self.end(math.inf)
        return share

    def end(self, limit: float) -> None:
        """End the start, and keep the rate below a limit from now on; infinite: the rate is the user's."""
        self._limit, self.rising, self.lost = limit, False, False

    def state_dict(self) -> dict[str, Any]:
        """The whole state: numbers and lists."""
        return vars(self) | {"_losses": self._losses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            KeyError: something is missing.
        """
        self._losses.load_state_dict(state["_losses"])
        for name, value in vars(self).items():
            if value is not self._losses:
                setattr(self, name, type(value)(state[name]))
