"""Early warning: from the losses and stability ratios of a run to *quiet*, *watch* or *alarm*, with the reason.

These rules speak. But for one, each compares the run with what it did lately: a healthy ratio on mini-batches may lie
anywhere below 1.

* *rise*: the stability ratio is well above its usual value, the median of its recent measurements.
* *growth*: it grows steadily, and the fitted pace takes it to the edge of stability soon: the step is named.
* *edge*: the ratio in the mean square, of which 1 is the edge, stays past it: so a run looks that was wrong from the
  start.
* *rate*: the learning rate itself jumps. Known before the step is taken, and without a measurement. A control that
  goes by measurements decides itself how fast the rate rises; the rule is not asked then.
* *loss*: what curvature cannot see. One loss far above the others, a mean loss above them, a loss that is not finite.

A ratio also rises at the start of a healthy run, and while the learning rate warms up. So the rules wait until the
usual value is known, only watch a ratio that has long been rising, and keep quiet while the loss falls fast: so
sharpening looks when nothing is wrong. A learning rate that is restarted on purpose looks like one that jumps by
mistake, and is announced like it. The loss of a short batch, such as the rest that ends an epoch, scatters more than
the others, and is not held against them.

A state is raised against what the run did lately. It ends when the run is *back*, not when it has got used to being
broken: what the run did before the rise is kept, and the state comes down after quiet observations that are near that
too. So the losses have to come back to theirs; where they never do, it never ends. A ratio or a rate is also back at a
level that the run has stood before (schedules with restarts), and where the mean loss has been back for 100 steps: what
was feared has not come. A second rise is told of while the first lasts; both end at the better of their usual values.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from statistics import median
from typing import Any

from gfs_core.loss.batches import Sizes

_RATIOS = 15  # latest measurements that make up the usual ratio: fewer are too noisy, more lag behind a healthy drift
_FIRST = 2 * _RATIOS  # measurements before the rules for it begin: as many once more, to tell whether it has long risen
_RISEN = 2.0  # times the usual ratio before: one that has long been rising warms up or sharpens, and is only watched …
_JUMP = 2.5  # … unless it is this far above its usual value, relative to it
_FLOOR = 0.05  # a ratio below this is so far from the edge that no rise of it matters
_RISE = (0.75, 1.25)  # above the usual ratio, relative to it, for watch and alarm: in healthy runs 0.8 % and 0.3 % are
_FIT = 6  # measurements in the fit of the growth: with more it still holds the level before
_FITTED = 0.97  # correlation of log ratio with the step above which the growth counts as steady
_GROWN = (0.6, 0.95)  # … where it grows steadily besides: an average of noise makes short trends
_PACE = 1.35  # growth within the fit: progressive sharpening is slower
_FAR = 500  # steps: an edge that is crossed later than that is not mentioned
_AHEAD = (150, 100)  # steps until the edge is crossed, for watch and alarm: time to act, near enough to be believed
_FALLING = 0.15  # the mean loss this far below the median, as a fraction of it: the loss falls fast
_LOSSES = 50  # latest losses that make up the usual loss: enough for their spread, few enough to fall along with it
_FEWEST = 20  # losses before the rules for it begin
_MEMORY = 0.9  # weight of the past in the mean loss, per step
_SPIKE = (4.0, 6.0)  # one loss above the median, in spreads, for watch and alarm: healthy losses have heavy tails
_MEAN = (0.5, 0.75)  # the mean loss above the median, in spreads, for watch and alarm
_TINY = 1e-3  # smallest spread, relative to the median: losses that hardly vary are not judged by their last digits
_JUMPED = (1.2, 1.5)  # the learning rate above its median, relative to it: a linear warm-up reaches 1
_NOISY = 5  # latest mean-square ratios, whose geometric mean counts …
_SETTLED = 10  # … after so many: the second moments of adaptive optimizers are still settling before
_RETURNED = 100  # losses in a row with their mean back, after which a ratio or a rate that stays high is no matter
_PAST = (1.0, 1.5)  # that mean, for watch and alarm: healthy runs stay below 1, or pass it for a moment
_SOURCES = (  # of observations: their name, and how many quiet ones in a row take a rule down one state
    ("running stability ratios", 5),
    ("solved stability ratios", 5),
    ("losses", 20),
    ("learning rates", 20),
    ("mean-square stability ratios", 5),
)
_RUNNING, _SOLVED, _LOSS, _RATE, _MEAN_SQUARE = range(5)


class AlertLevel(IntEnum):
    """How the run looks."""

    QUIET = 0
    WATCH = 1
    ALARM = 2


@dataclass(frozen=True)
class Alert:
    """A change of the state, or a new rise while an earlier one lasts.

    Attributes:
        step: the training step at which it was seen.
        state: the state from now on.
        reason: why, in a sentence.
        rule: which rule spoke: ``rise``, ``growth``, ``edge``, ``rate``, ``spike``, ``loss``, ``not finite``, or
            ``calm`` on the way down.
    """

    step: int
    state: AlertLevel
    reason: str
    rule: str


@dataclass(frozen=True)
class _Verdict:
    state: AlertLevel
    reason: str = ""
    rule: str = "calm"
    usual: float | None = None  # that it was held against


class _Ladder:
    """Up at once, down one state after several quiet observations."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.state, self.calm = AlertLevel.QUIET, 0

    def take(self, found: AlertLevel) -> None:
        if found >= self.state:
            self.state, self.calm = found, 0
        else:
            self.calm += 1
            if self.calm >= self.patience:
                self.state, self.calm = AlertLevel(self.state - 1), 0


class _Source:
    """What one stream of observations says.

    Attributes:
        lately: the state beside what the run did lately; where it rises, something new is told.
        shown: the state until the run is back.
        usual: the usual value that it was raised from, while it is up and there is one.
        stood: the highest usual value while all was quiet; 0 before there is one.
    """

    def __init__(self, patience: int) -> None:
        self.lately, self.shown = _Ladder(patience), _Ladder(patience)
        self.usual: float | None = None
        self.stood = 0.0

    def take(self, found: AlertLevel, back: bool, usual: float | None) -> bool:
        """Take in what an observation says, and whether it is back; say whether this is a rise from a quiet state."""
        was_quiet = self.lately.state is AlertLevel.QUIET
        self.lately.take(found)
        rises = was_quiet and self.lately.state is not AlertLevel.QUIET
        if rises and usual is not None:
            self.usual = usual if self.usual is None else min(self.usual, usual)
        self.shown.take(found if back else max(found, self.shown.state))
        if self.shown.state is AlertLevel.QUIET:
            self.usual = None
        return rises

    def saved(self) -> list[Any]:
        return [*(int(v) for a in (self.lately, self.shown) for v in (a.state, a.calm)), self.usual, self.stood]

    def load(self, level: int, calm: int, shown: int | None = None, shown_calm: int = 0, *levels: Any) -> None:
        """Go on where ``saved`` left off; a state of the first release says how it looks lately, and no more."""
        self.lately.state, self.lately.calm = AlertLevel(level), int(calm)
        held = (level, calm) if shown is None else (shown, shown_calm)
        self.shown.state, self.shown.calm = AlertLevel(held[0]), int(held[1])
        usual, stood = levels or (None, 0.0)
        self.usual, self.stood = None if usual is None else _positive(usual), float(stood)


class Alarm:
    """Watches a run by its losses and its stability ratios.

    Attributes:
        state: the present state, the gravest of what the losses, ratios and rates say: until the run is back.
        reason: why the state last changed; empty before it first does.

    Example:
        >>> alarm = Alarm()
        >>> for step in range(100):
        ...     _ = alarm.saw_ratio(step, 0.2, solved=False)
        >>> event = alarm.saw_ratio(100, 0.9, solved=False)
        >>> print(event.state.name, "–", event.reason)
        ALARM – the stability ratio rose to 0.9, 4.5 times its usual 0.2
    """

    _strictness = 1.0  # scales every threshold; benchmarks/alarm.py compares rules at equal rates of false alarms

    def __init__(self) -> None:
        self.state, self.reason = AlertLevel.QUIET, ""
        self._ratios: list[deque[tuple[int, float]]] = [deque(maxlen=_FIRST + 1), deque(maxlen=_FIRST + 1)]
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._sizes = Sizes()
        self._mean: float | None = None
        self._rates: deque[float] = deque(maxlen=_LOSSES)
        self._rated = -1  # step of the last of them
        self._noisy: deque[float] = deque(maxlen=_NOISY)
        self._noisy_seen = 0
        self._sources = [_Source(patience) for _, patience in _SOURCES]
        # Before the state rose, while it is up: usual loss, spread, and mean, which of skewed losses is no median.
        self._before: tuple[float, float, float] | None = None
        self._returned = 0  # losses in a row with their mean back at it

    def saw_loss(self, step: int, loss: float, examples: int | None = None) -> Alert | None:
        """Take in the loss of a training step.

        Args:
            step: the training step, from 0.
            loss: the mean over its batch; any number, also not finite.
            examples: those of its batch, if known: of one with less than half the usual, a finite loss is passed over.

        Returns:
            The change of state that follows; ``None`` where there is none.
        """
        short = self._sizes.short(examples)
        if not math.isfinite(loss):
            self._returned = 0
            return self._changed(step, _LOSS, _Verdict(AlertLevel.ALARM, f"the loss is {loss}", "not finite"))
        if short:
            return None
        rising = self._mean is None or loss >= self._mean
        self._mean = loss if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * loss
        verdict, back = self._judge_loss(loss, self._mean), True
        if self._before is not None:
            usual, spread, usual_mean = self._before
            by_spike, _ = self._above(loss, self._mean, usual, spread)
            _, by_mean = self._above(loss, self._mean, max(usual, usual_mean), spread)
            back = by_spike is by_mean is AlertLevel.QUIET
            self._returned = self._returned + 1 if by_mean is AlertLevel.QUIET else 0
        event = self._changed(step, _LOSS, verdict, back, rising)
        self._losses.append(loss)
        return event

    def saw_rate(self, step: int, rate: float) -> Alert | None:
        """Take in the learning rate that a step is about to use; it needs no measurement.

        Args:
            step: the training step; told twice of one, the second time is passed over.
            rate: > 0; another number is passed over.

        Returns:
            The change of state that follows; ``None`` where there is none.
        """
        if step == self._rated or not (math.isfinite(rate) and rate > 0):
            return None
        self._rated = step
        verdict = self._judge_rate(rate)
        self._rates.append(rate)
        event = self._changed(step, _RATE, verdict, self._is_back(_RATE, rate, _JUMPED))
        if len(self._rates) >= _FEWEST:
            self._stands(_RATE, min(itertools.islice(reversed(self._rates), _FEWEST)))
        return event

    def saw_mean_square(self, step: int, ratio: float) -> Alert | None:
        """Take in a stability ratio in the mean square, for which 1 is the edge whatever the batch size.

        Args:
            step: the training step at which it was measured.
            ratio: > 0; another number is passed over.

        Returns:
            The change of state that follows; ``None`` where there is none.
        """
        if not (math.isfinite(ratio) and ratio > 0):
            return None
        self._noisy.append(ratio)
        self._noisy_seen += 1
        mean = math.exp(sum(map(math.log, self._noisy)) / len(self._noisy))
        found = self._passed(mean, _PAST) if self._noisy_seen > _SETTLED else AlertLevel.QUIET
        reason = f"noisy steps are past the edge: the stability ratio in the mean square is {mean:.2g}, not < 1"
        return self._changed(step, _MEAN_SQUARE, _Verdict(found, reason, "edge"))

    def saw_ratio(self, step: int, ratio: float, solved: bool) -> Alert | None:
        """Take in a measured stability ratio.

        Args:
            step: the training step at which it was measured.
            ratio: > 0; another number, or one that is not finite, is a failed measurement and passed over.
            solved: whether it comes from a solved eigenvalue, and not from the running estimate. Each of the two has
                its own usual value.

        Returns:
            The change of state that follows; ``None`` where there is none.
        """
        if not (math.isfinite(ratio) and ratio > 0):
            return None
        held, source = self._ratios[solved], _SOLVED if solved else _RUNNING
        held.append((step, ratio))
        verdict = self._judge_ratio([*held], 2 if solved else 1)
        event = self._changed(step, source, verdict, ratio < _FLOOR or self._is_back(source, ratio, _RISE))
        if len(held) >= _RATIOS:
            self._stands(source, median(r for _, r in itertools.islice(reversed(held), _RATIOS)))
        return event

    def forget_ratios(self, step: int) -> Alert | None:
        """Drop the stability ratios seen so far, and what they said: others are to come, of other weights.

        Returns:
            The change of state that follows; ``None`` where there is none.
        """
        for held in self._ratios:
            held.clear()
        self._noisy.clear()
        self._noisy_seen = 0
        for i in (_RUNNING, _SOLVED, _MEAN_SQUARE):
            self._sources[i] = _Source(_SOURCES[i][1])
        return self._shown(step, "other weights are trained now, whose usual stability ratio is not known yet")

    def _judge_rate(self, rate: float) -> _Verdict:
        if len(self._rates) < _FEWEST:
            return _Verdict(AlertLevel.QUIET)
        if self._passed(rate / min(self._rates) - 1, _JUMPED) is AlertLevel.QUIET:  # the median is no lower, and dearer
            return _Verdict(AlertLevel.QUIET)
        usual = median(self._rates)
        known = max((held[-1][1] for held in self._ratios if held), default=None)
        if known is not None and known * rate / usual < _FLOOR:
            return _Verdict(AlertLevel.QUIET)
        reason = f"the learning rate rose to {rate:.3g}, {rate / usual:.1f} times its usual {usual:.3g}"
        return _Verdict(self._passed(rate / usual - 1, _JUMPED), reason, "rate", usual)

    def _judge_loss(self, loss: float, mean: float) -> _Verdict:
        known = self._usual_loss()
        if known is None:
            return _Verdict(AlertLevel.QUIET)
        usual, spread, high = known
        by_spike, by_mean = self._above(loss, mean, usual, spread)
        if by_spike >= by_mean:
            far = (loss - usual) / spread
            reason = f"the loss is {loss:.3g}, {far:.1f} times as far above its median {usual:.3g} as nine in ten are"
            return _Verdict(by_spike, reason, "spike")
        reason = f"the mean loss rose to {mean:.3g}, from a median of {usual:.3g}; nine in ten were below {high:.3g}"
        return _Verdict(by_mean, reason, "loss")

    def _usual_loss(self) -> tuple[float, float, float] | None:
        """Median of the losses lately, their spread, and what nine in ten are below; ``None``: too few of them."""
        if len(self._losses) < _FEWEST:
            return None
        ordered = sorted(self._losses)
        usual, high = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
        # The upper tenth tells how far healthy batches reach; a deviation would take their tail for a normal one.
        return usual, max(high - usual, _TINY * abs(usual), 1e-12), high

    def _above(self, loss: float, mean: float, usual: float, spread: float) -> tuple[AlertLevel, AlertLevel]:
        """What a loss, and their mean, say beside a usual loss and its spread."""
        return self._passed((loss - usual) / spread, _SPIKE), self._passed((mean - usual) / spread, _MEAN)

    def _judge_ratio(self, seen: list[tuple[int, float]], agreeing: int) -> _Verdict:
        # A solved eigenvalue is that of one batch: it takes two in a row, where the running estimate is an average.
        step, ratio = seen[-1][0], min(r for _, r in seen[-agreeing:])
        if len(seen) <= _FIRST or ratio < _FLOOR or self._loss_falls():
            return _Verdict(AlertLevel.QUIET)
        usual, before = median(r for _, r in seen[-1 - _RATIOS : -1]), median(r for _, r in seen[: -1 - _RATIOS])
        rise = ratio / usual
        by_rise, by_growth = self._passed(rise - 1, _RISE), AlertLevel.QUIET
        reason = f"the stability ratio rose to {ratio:.2g}, {rise:.1f} times its usual {usual:.2g}"
        ahead = _steps_to_edge(seen[-_FIT:])
        if ahead is not None:
            reason += "; at this pace it crosses the edge "
            reason += f"in about {ahead} steps (step {step + ahead})" if ahead > 0 else "now"
            soon = self._passed(1 / max(ahead, 1), (1 / _AHEAD[0], 1 / _AHEAD[1]))
            by_growth = min(soon, self._passed(rise - 1, _GROWN))
        found, rule = max(by_rise, by_growth), "growth" if by_growth > by_rise else "rise"
        if usual > _RISEN * before and rise - 1 < self._strictness * _JUMP:
            found = min(found, AlertLevel.WATCH)
        return _Verdict(found, reason, rule, usual)

    def _is_back(self, source: int, value: float, thresholds: tuple[float, float]) -> bool:
        """Whether a ratio or a rate is near what it rose from, at a level stood before, or of no matter any more."""
        usual, stood = self._sources[source].usual, self._sources[source].stood
        near = usual is None or self._passed(value / usual - 1, thresholds) is AlertLevel.QUIET
        return near or value <= stood or self._returned >= _RETURNED

    def _stands(self, source: int, level: float) -> None:
        """Take in a level that lasts."""
        held = self._sources[source]
        if held.shown.state is AlertLevel.QUIET:
            held.stood = max(held.stood, level)

    def _passed(self, value: float, thresholds: tuple[float, float]) -> AlertLevel:
        watch, alarm = thresholds
        return AlertLevel((value >= self._strictness * watch) + (value >= self._strictness * alarm))

    def _loss_falls(self) -> bool:
        if self._mean is None or len(self._losses) < _FEWEST:
            return False
        usual = median(self._losses)
        return usual - self._mean > _FALLING * abs(usual)

    def _changed(
        self, step: int, source: int, verdict: _Verdict, back: bool = True, rising: bool = True
    ) -> Alert | None:
        if verdict.state is self._sources[source].shown.state is AlertLevel.QUIET:
            return None
        lately = max(s.lately.state for s in self._sources)
        if self._sources[source].take(verdict.state, back, verdict.usual):
            self._keep_loss()
        # On the way back a mean lags behind its median, which is no rise.
        new = verdict.state > self.state or (verdict.state == self.state and rising)
        if new and max(s.lately.state for s in self._sources) > lately:
            self.state, self.reason = verdict.state, verdict.reason
            return Alert(step, verdict.state, verdict.reason, verdict.rule)
        name, seen = _SOURCES[source]
        return self._shown(step, f"the last {seen} {name} were nearer to their usual values")

    def _shown(self, step: int, reason: str) -> Alert | None:
        """The state that the sources show together, where it has come down."""
        state = max(s.shown.state for s in self._sources)
        if state is AlertLevel.QUIET:
            self._before, self._returned = None, 0
        if state == self.state:
            return None
        self.state, self.reason = state, reason
        return Alert(step, state, reason, "calm")

    def _keep_loss(self) -> None:
        """Keep what the losses were like before a rise; of several rises, the lowest."""
        known = self._usual_loss()
        if known is not None and (self._before is None or known[0] < self._before[0]):
            count = len(self._losses)
            self._before = (*known[:2], sum(loss / count for loss in self._losses))
        self._returned = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything the next event depends on: numbers, strings and lists."""
        return {
            "state": int(self.state),
            "reason": self.reason,
            "ratios": [[list(pair) for pair in held] for held in self._ratios],
            "losses": list(self._losses),
            "sizes": list(self._sizes.seen),
            "mean": self._mean,
            "rates": [self._rated, list(self._rates)],
            "noisy": [self._noisy_seen, list(self._noisy)],
            "sources": [s.saved() for s in self._sources],
            "before": None if self._before is None else list(self._before),
            "returned": self._returned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.state, self.reason = AlertLevel(state["state"]), str(state["reason"])
        for held, saved in zip(self._ratios, state["ratios"], strict=True):
            held.clear()
            held.extend((int(step), _positive(ratio)) for step, ratio in saved)
        self._losses.clear()
        self._losses.extend(map(float, state["losses"]))
        self._sizes = Sizes(state["sizes"])
        self._mean = None if state["mean"] is None else float(state["mean"])
        (rated, rates), (seen, noisy) = state["rates"], state["noisy"]
        self._rated, self._noisy_seen = int(rated), int(seen)
        self._rates = deque(map(_positive, rates), maxlen=_LOSSES)
        self._noisy = deque(map(_positive, noisy), maxlen=_NOISY)
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.load(*saved)
        before = state.get("before")  # as in a state of the first release
        self._before = None
        if before is not None:
            usual, spread, *mean = before
            self._before = (float(usual), _positive(spread), float(mean[0] if mean else usual))
        self._returned = int(state.get("returned", 0))


def _positive(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{value} is no positive number")
    return float(value)


def _steps_to_edge(points: list[tuple[int, float]]) -> int | None:
    """Steps until a line through the log ratios reaches the edge, 0 where it has; ``None``: it does not soon."""
    steps = [step - points[-1][0] for step, _ in points]
    logs = [math.log(ratio) for _, ratio in points]
    middle, level = sum(steps) / len(steps), sum(logs) / len(logs)
    across = sum((s - middle) ** 2 for s in steps)
    along = sum((s - middle) * (g - level) for s, g in zip(steps, logs, strict=True))
    up = sum((g - level) ** 2 for g in logs)
    if not along > 0 or along < _FITTED * math.sqrt(across * up):
        return None
    slope = along / across
    ahead = -(level - slope * middle) / slope
    if ahead > _FAR or -slope * steps[0] < math.log(_PACE):
        return None
    return max(math.ceil(ahead), 0)
