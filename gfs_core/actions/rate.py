"""Policies that hold the learning rate near the edge of stability.

A policy multiplies the rate that the user's own scheduler sets by a *scale*. It goes by a stability ratio r, measured
at rate η: it aims to stay below the rate ``margin``·η/r. Where the running estimate is on, r is the ratio in the mean
square, or the running ratio at measurements without one. Otherwise r is the solved or the empirical ratio. The *limit*
follows that rate down at once, and up by at most 2 % per step (5 % with adaptive optimizers).

==============  ======================================================================================================
``observe``     the rate is not changed
``cap``         rate ≤ limit
``follow``      rate = limit · (user's rate / its largest so far), with a limit from an exponential mean of the
                measurements: the schedule keeps its shape, but not its height, and measurements replace its warm-up
``warmup``      ``cap``, until it has not lowered the rate for 100 steps
``cdat``        ``follow``, with the critical rate along the last step in place of η/r; margin ½ is σ = 1 of Roulet et
                al. 2024, arXiv 2407.06183, and margin 1 is the edge
==============  ======================================================================================================

The curvature at the first weights says little about the curvature a few steps later, and nothing about its spread over
batches. So the first four measurements are taken at a hundredth of the user's rate, and the limit then starts at three
tenths of the rate that they allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gfs_core.config import Policy


def guiding_ratio(values: Mapping[str, float], noisy: bool) -> float | None:
    """The stability ratio that a policy goes by: the one in the mean square, otherwise the running or the solved one.

    Args:
        values: the values of a measurement, by key.
        noisy: whether an earlier measurement of the run had a ratio in the mean square. Then the solved ratio is not
            used, as it does not include the noise of batches.

    Returns:
        The ratio; ``None``: the measurement has none that may be used.
    """
    ratio = _mean_square(values)
    if ratio is not None:
        return ratio
    if noisy:
        return values.get("running_stability_ratio")
    # A running ratio without one in the mean square comes from the first part, which has no spread yet: it is not used.
    return values.get("stability_ratio") if values.get("running_stability_ratio") is None else None


@dataclass(frozen=True)
class ControlProfile:
    """The numbers of a control, and how each was chosen. The tables are those of ``benchmarks/limit.md``.

    Attributes:
        margin: stability ratio to stay below, for optimizers without second moments. Table "What it is that works": at
            0.75 runs with momentum are lost (mean accuracy 0.825 instead of 0.900).
        margin_adaptive: the same with second moments, as in AdamW. Same table: 0.5 to 1 are within a point.
        growth: factor by which the limit may grow per step, without second moments. Same table: at 1.05 runs are lost.
        growth_adaptive: the same with second moments. Same table: 1.02 to 1.1 are within a point, 1.005 loses three.
        ratio: the ratio of a measurement that the policy goes by. Same table, the lines "by …".
        memory: weight of the past in the exponential means of ``follow`` (of the logarithm of the rate to stay below)
            and ``cdat`` (of its two moments). Not varied in a table.
        first: measurements before the limit is trusted. This and the next two replace a warm-up: table "The start", in
            which none was varied alone.
        first_scale: scale until then.
        first_share: fraction of the measured rate at which the limit then starts.
        free: measurements that do not wait for the budget, as the curvature changes fastest at the start. Table "The
            price" counts them.
        largest: largest scale of ``follow`` and ``cdat``. A base rate that needs a larger one is a mistake, and a
            curvature near zero does not justify one. Not varied in a table.
        patience: steps to wait for the first measurements before the scale becomes 1. A scale so low that the weights
            do not move would otherwise never end. Not varied in a table.
        settled: steps at a scale of 1 after which ``warmup`` ends. Not varied in a table.
    """

    margin: float = 0.5
    margin_adaptive: float = 0.75
    growth: float = 1.02
    growth_adaptive: float = 1.05
    ratio: Callable[[Mapping[str, float], bool], float | None] = guiding_ratio
    memory: float = 0.8
    first: int = 4
    first_scale: float = 0.01
    first_share: float = 0.3
    free: int = 20
    largest: float = 100.0
    patience: int = 50
    settled: int = 100

    def margin_of(self, adaptive: bool) -> float:
        """The margin for an optimizer with second moments (``adaptive``), or without."""
        return self.margin_adaptive if adaptive else self.margin

    def growth_of(self, adaptive: bool) -> float:
        """The growth per step for an optimizer with second moments (``adaptive``), or without."""
        return self.growth_adaptive if adaptive else self.growth


PROFILE = ControlProfile()

# Arguments of a control, which are not part of its state.
_GIVEN = ("policy", "profile", "_given_margin", "_adaptive")


class Control:
    """Decides the scale of each step from the measurements, by a policy.

    Args:
        policy: see the module's table.
        margin: stability ratio to stay below, in (0, 1]; ``None``: ¾ for adaptive optimizers, except with ``cdat``,
            and ½ otherwise.
        adaptive: whether the optimizer divides by second moments, as Adam does.
        profile: the numbers of the policies.

    Attributes:
        policy: the policy; it may be changed to ``"observe"`` at any time.
        profile: the numbers of the policies; it may be replaced before the first step.
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
        self._seen = 0  # measurements with a value for the policy
        self._steps = 0  # steps that have waited for the first measurements
        self._target: float | None = None  # rate to stay below, by the measurements
        self._limit: float | None = None  # the same, with limited growth
        self._peak = 0.0  # the user's largest rate so far
        self._noisy = False  # whether there has been a ratio in the mean square
        self._quiet = 0  # warmup: steps at a scale of 1
        self._moments = (0.0, 0.0)  # cdat: means of |κ|·(critical rate) and |κ|, κ = uᵀHu/‖u‖² along the last step u

    @property
    def margin(self) -> float:
        """The stability ratio to stay below."""
        if self._given_margin is not None:
            return self._given_margin
        return self.profile.margin_of(self._adaptive and self.policy != "cdat")

    @property
    def growth(self) -> float:
        """Factor by which the limit may grow per step, > 1."""
        return self.profile.growth_of(self._adaptive)

    @property
    def measures(self) -> bool:
        """Whether the policy goes by measurements."""
        return self.policy != "observe"

    @property
    def seen(self) -> int:
        """The measurements so far that had a value for the policy."""
        return self._seen

    @property
    def only_lowers(self) -> bool:
        """Whether the policy goes by measurements and never raises the rate above the user's."""
        return self.policy in ("cap", "warmup")

    @property
    def waiting(self) -> bool:
        """Whether the policy needs a measurement before this step, as it has not had its first ones yet."""
        return self.measures and self._seen < self.profile.first and not self.lost

    @property
    def starting(self) -> bool:
        """Whether measurements should not wait for the budget, as the curvature may still be changing fast."""
        return self.measures and self._seen < self.profile.free and not self.lost

    @property
    def holding(self) -> bool:
        """Whether measurements decide the rate now."""
        return self.measures and not self.lost and not self._finished()

    def measured(self, rate: float, values: Mapping[str, float]) -> None:
        """Record a measurement.

        Args:
            rate: the learning rate that the values belong to: the user's rate times the scale at the measurement.
            values: the values, by key.
        """
        critical = self._critical(rate, values) if self.measures else None
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
        """Wait for first measurements again: other weights are trained now, and their curvature is not known."""
        self._seen, self._noisy = 0, False
        self._target, self._limit, self._moments = None, None, (0.0, 0.0)

    def scale(self, rate: float) -> float:
        """The scale, > 0, for a step at the user's rate ``rate``; the state is not changed."""
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
        """The scale for a step at the user's rate ``rate`` that is taken now.

        The step is counted, unless its rate is 0, as it then does not move the weights.
        """
        scale = self.scale(rate)
        if not rate > 0:
            return scale
        self._peak = max(self._peak, rate)
        self._limit = self._next_limit()
        if self.policy == "warmup" and not self._finished():
            self._quiet = self._quiet + 1 if scale == 1.0 and self._seen >= self.profile.first else 0
        if self.waiting:
            self._steps += 1
            self.lost = self._steps >= self.profile.patience
        self.last = scale
        return scale

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as numbers."""
        return {name: value for name, value in vars(self).items() if name not in _GIVEN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The policy and its margin stay those of this object.

        Raises:
            ValueError: a rate or scale in the state is not > 0.
        """
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

    def _critical(self, rate: float, values: Mapping[str, float]) -> float | None:
        """The learning rate at which the ratio would be 1."""
        if self.policy == "cdat":
            return self._critical_along(values)
        ratio = self.profile.ratio(values, self._noisy)
        self._noisy = self._noisy or _mean_square(values) is not None
        return rate / ratio if ratio is not None and ratio > 0 and rate > 0 else None

    def _critical_along(self, values: Mapping[str, float]) -> float | None:
        curvature, critical = values.get("directional_sharpness"), values.get("critical_lr")
        if curvature is None or critical is None:
            return None
        keep = self.profile.memory if self._seen else 0.0
        new = (abs(curvature) * critical, abs(curvature))
        descent, bend = (keep * m + (1 - keep) * n for m, n in zip(self._moments, new, strict=True))
        self._moments = (descent, bend)
        return descent / bend if bend > 0 and descent > 0 else None


def _mean_square(values: Mapping[str, float]) -> float | None:
    bound = values.get("mean_square_bound")
    return values.get("mean_square_stability_ratio") if bound is None else bound
