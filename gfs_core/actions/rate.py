"""The learning rate held at the edge: policies.

A policy is a *scale* on the rate that the user's own scheduler sets. What it goes by is the stability ratio in the mean
square where the running estimate is on (the running ratio where that could not be had), otherwise the solved or the
empirical ratio: with ratio r at rate η, the rate ``margin``·η/r is the one to stay below. That *limit*
falls at once and grows by 2 % per step, with adaptive optimizers by 5 %.

==============  ======================================================================================================
``observe``     nothing is changed
``cap``         rate ≤ limit
``follow``      rate = limit (of the ratio's exponential mean), times the user's rate over its largest so far: the
                schedule keeps its shape, but not its height; a warm-up in it is replaced by one that is measured
``warmup``      ``cap`` until it has had nothing to hold back for 100 steps
``step_down``   halved by every alarm, held for 100 steps, then let up as the limit is
``cdat``        as ``follow``, with the critical rate along the last step in place of the ratio: margin ½ is σ = 1 of
                Roulet et al. 2024, arXiv 2407.06183, and 1 the edge
==============  ======================================================================================================

Curvature at the first weights says little of what comes after a few steps, and nothing yet of its spread: the first
four measurements are taken at a hundredth of the rate, and the limit starts at three tenths of what they allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gfs_core.config import Policy
from gfs_core.run.record import Measurement


def guiding_ratio(measurement: Measurement, noisy: bool) -> float | None:
    """The stability ratio that a policy goes by: that in the mean square, otherwise the running or the solved one.

    Args:
        measurement: what was measured.
        noisy: whether an earlier measurement of the run had a ratio in the mean square. A solved ratio knows nothing of
            the noise of batches, and does not take turns with one that does.
    """
    ratio = _mean_square(measurement)
    if ratio is not None:
        return ratio
    if noisy:
        return measurement.running_stability_ratio
    # The first part of a running estimate has no spread yet.
    return measurement.stability_ratio if measurement.running_stability_ratio is None else None


@dataclass(frozen=True)
class ControlProfile:
    """The numbers of a control, each with what it was chosen by; tables are those of ``benchmarks/control.md``.

    Attributes:
        margin: stability ratio to stay below, for optimizers without second moments. Table "What it is that works": at
            0.75 runs with momentum are lost (mean accuracy 0.825 instead of 0.900).
        margin_adaptive: the same with second moments, as AdamW has them. Same table: 0.5 to 1 are within a point.
        growth: factor by which the limit may grow per step, without second moments. Same table: at 1.05 runs are lost.
        growth_adaptive: the same with second moments. Same table: 1.02 to 1.1 are within a point, 1.005 loses three.
        ratio: the ratio that a measurement gives the policy. Same table, the lines "by …".
        memory: weight of the past in what ``follow`` and ``cdat`` go by, in the logarithm. Not varied in a table.
        first: measurements before the limit is trusted. This and the next two replace a warm-up: table "The start", in
            which none was varied alone.
        first_scale: scale until then.
        first_share: part of the limit to start from after that.
        free: measurements that no budget holds back, as the curvature changes fastest at the start. Table "The price"
            counts them.
        largest: largest scale of ``follow`` and ``cdat``: a base rate that is further off is a mistake, and a curvature
            that vanishes is no reason. Not varied in a table.
        patience: steps without the first measurements after which the rate is given free: a scale so low that nothing
            moves would never end. Not varied in a table.
        settled: steps with nothing to hold back after which ``warmup`` is over. Not varied in a table.
        down: factor of ``step_down`` at an alarm. Not varied in a table.
        hold: steps for which ``step_down`` keeps a lowered rate. Not varied in a table.
    """

    margin: float = 0.5
    margin_adaptive: float = 0.75
    growth: float = 1.02
    growth_adaptive: float = 1.05
    ratio: Callable[[Measurement, bool], float | None] = guiding_ratio
    memory: float = 0.8
    first: int = 4
    first_scale: float = 0.01
    first_share: float = 0.3
    free: int = 20
    largest: float = 100.0
    patience: int = 50
    settled: int = 100
    down: float = 0.5
    hold: int = 100

    def margin_of(self, adaptive: bool) -> float:
        """The margin for an optimizer with second moments, or without."""
        return self.margin_adaptive if adaptive else self.margin

    def growth_of(self, adaptive: bool) -> float:
        """The growth for an optimizer with second moments, or without."""
        return self.growth_adaptive if adaptive else self.growth


PROFILE = ControlProfile()
FIRST, PATIENCE = PROFILE.first, PROFILE.patience  # named by the monitor's warning

# What a control is given, and does not learn: it is no part of its state.
_GIVEN = ("policy", "profile", "_given_margin", "_adaptive")


class Control:
    """What a policy makes of the measurements: the scale of each step.

    Args:
        policy: see the module's table.
        margin: stability ratio to stay below, in (0, 1]; ``None``: ½, and ¾ for adaptive optimizers, but for ``cdat``.
        adaptive: whether the optimizer divides by second moments, as Adam does.
        profile: the numbers that the policies are made of.

    Attributes:
        policy: the policy; may be changed to ``"observe"`` at any time.
        profile: as given; another may be put there before the first step.
        last: the scale of the last step taken.
        lost: whether a policy that needs measurements has had too few for too long; the scale is 1 until they come.
    """

    def __init__(
        self,
        policy: Policy,
        margin: float | None = None,
        adaptive: bool = False,
        profile: ControlProfile = PROFILE,
    ) -> None:
        self.policy, self.profile = policy, profile
        self._given_margin, self._adaptive = margin, adaptive
        self.lost = False
        self.last = 1.0
        self._seen = 0  # measurements
        self._steps = 0  # that have waited for the first measurements
        self._target: float | None = None  # rate to stay below by the measurements …
        self._limit: float | None = None  # … and with the growth limited
        self._peak = 0.0  # largest rate of the user's so far
        self._noisy = False  # whether there has been a ratio in the mean square
        self._quiet = 0  # steps without anything to hold back, or since the last alarm
        self._down = 1.0
        self._moments = (0.0, 0.0)  # of cdat: means of uᵀHu·(critical rate) and |uᵀHu|

    @property
    def margin(self) -> float:
        """The stability ratio to stay below."""
        if self._given_margin is not None:
            return self._given_margin
        return self.profile.margin_of(self._adaptive and self.policy != "cdat")

    @property
    def growth(self) -> float:
        """Factor by which the limit may grow per step."""
        return self.profile.growth_of(self._adaptive)

    @property
    def measures(self) -> bool:
        """Whether the policy goes by measurements."""
        return self.policy not in ("observe", "step_down")

    @property
    def seen(self) -> int:
        """The measurements so far that held what the policy goes by."""
        return self._seen

    @property
    def waiting(self) -> bool:
        """Whether the policy needs a measurement before this step: its first ones are still to come."""
        return self.measures and self._seen < self.profile.first and not self.lost

    @property
    def starting(self) -> bool:
        """Whether the curvature may still be changing so fast that measurements should not wait for a budget."""
        return self.measures and self._seen < self.profile.free and not self.lost

    @property
    def holding(self) -> bool:
        """Whether measurements decide the rate now: it does not jump then, whatever the user's rate does."""
        return self.measures and not self.lost and not self._finished()

    def measured(self, rate: float, measurement: Measurement) -> None:
        """Take in a measurement made while the user's rate was ``rate``, without the scale."""
        critical = self._critical(rate, measurement) if self.measures else None
        if critical is None:
            return
        target = self.margin * critical
        if self._target is None or self.policy != "follow":
            self._target = target
        else:
            keep = self.profile.memory
            mixed = keep * math.log(self._target) + (1 - keep) * math.log(target)
            self._target = math.exp(mixed)
        self._seen += 1
        if self._seen == self.profile.first:
            self._target, self._limit = target, self.profile.first_share * target
            self._steps, self.lost = 0, False

    def renew(self) -> None:
        """Start again with the first measurements: weights are trained whose curvature has not been measured."""
        self._seen, self._noisy = 0, False
        self._target, self._limit, self._moments = None, None, (0.0, 0.0)

    def alarmed(self) -> None:
        """Take in an alarm."""
        if self.policy == "step_down":
            self._down, self._quiet = self._down * self.profile.down, 0

    def scale(self, rate: float) -> float:
        """The scale for a step at the user's rate ``rate``, > 0; nothing is changed."""
        if self.policy == "step_down":
            return min(self._down * (self.growth if self._quiet >= self.profile.hold else 1.0), 1.0)
        if not self.holding:
            return 1.0
        limit = self._next_limit()
        if limit is None:
            return self.profile.first_scale
        if self.policy in ("cap", "warmup"):
            return min(1.0, limit / rate) if rate > 0 else 1.0
        peak = max(self._peak, rate)
        return min(limit / peak, self.profile.largest) if peak > 0 else 1.0

    def step(self, rate: float) -> float:
        """The scale for a step that is taken now; one at rate 0 moves nothing, and does not count."""
        scale = self.scale(rate)
        if not rate > 0:
            return scale
        self._peak = max(self._peak, rate)
        self._limit = self._next_limit()
        if self.policy == "step_down":
            self._down, self._quiet = scale, self._quiet + 1
        elif self.policy == "warmup" and not self._finished():
            self._quiet = self._quiet + 1 if scale == 1.0 and self._seen >= self.profile.first else 0
        if self.waiting:
            self._steps += 1
            self.lost = self._steps >= self.profile.patience
        self.last = scale
        return scale

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {name: value for name, value in vars(self).items() if name not in _GIVEN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off; the policy and its margin stay those of this object."""
        for name, fresh in Control(self.policy).state_dict().items():
            value = state.get(name, getattr(self, name))
            if name == "_moments":
                descent, bend = value
                value = float(descent), float(bend)
            elif value is not None or fresh is not None:
                value = (float if fresh is None else type(fresh))(value)
            if name in ("_target", "_limit", "last") and value is not None and not value > 0:
                raise ValueError(f"{name.strip('_')} is {value}, not > 0")
            setattr(self, name, value)

    def _finished(self) -> bool:
        return self.policy == "warmup" and self._quiet >= self.profile.settled

    def _next_limit(self) -> float | None:
        if self._limit is None or self._target is None:
            return None
        return min(self._limit * self.growth, self._target)

    def _critical(self, rate: float, measurement: Measurement) -> float | None:
        """The user's rate at which the ratio would be 1."""
        if self.policy == "cdat":
            return self._critical_along(measurement)
        ratio = self.profile.ratio(measurement, self._noisy)
        self._noisy = self._noisy or _mean_square(measurement) is not None
        return rate / ratio if ratio is not None and ratio > 0 and rate > 0 else None

    def _critical_along(self, measurement: Measurement) -> float | None:
        curvature, critical = measurement.directional_sharpness, measurement.critical_lr
        if curvature is None or critical is None:
            return None
        keep = self.profile.memory if self._seen else 0.0
        new = (abs(curvature) * critical, abs(curvature))
        descent, bend = (keep * m + (1 - keep) * n for m, n in zip(self._moments, new, strict=True))
        self._moments = (descent, bend)
        return descent / bend if bend > 0 and descent > 0 else None


def _mean_square(measurement: Measurement) -> float | None:
    bound = measurement.mean_square_bound
    return measurement.mean_square_stability_ratio if bound is None else bound


def at_scale(measurement: Measurement, factor: float) -> Measurement:
    """The measurement as it were with all rates multiplied by ``factor``, but for what lies along a step taken."""

    def times(value: float | None, by: float) -> float | None:
        return None if value is None else value * by

    ratios = (
        "stability_ratio",
        "running_stability_ratio",
        "mean_square_stability_ratio",
        "mean_square_bound",
        "gfs_stability_ratio",
    )
    changed: dict[str, Any] = {name: times(getattr(measurement, name), factor) for name in ratios}
    return replace(
        measurement,
        **changed,
        threshold=times(measurement.threshold, 1 / factor),
        learning_rate=times(measurement.learning_rate, factor),
    )
