"""A running estimate of the sharpness: one product now and then, each on another part of the data.

Stochastic power iteration. Each call turns the direction v a little towards H_B·v on its own part B of the data and
takes one Rayleigh quotient vᵀH_B·v; both are averaged over calls. To solve for the largest eigenvalue of a small part
would find the part's own noise instead, which lies above the sharpness of the whole. The direction starts at the
gradient, which lies mostly along large curvature. The first products turn it further, and give no value yet. Then it
stays on the largest eigenvalue λ₁ while the most negative one is above −3λ₁: without noise, each turn multiplies the
component along an eigenvalue λ by ½ + ½λ/λ₁. A product never leads out of a block of the Hessian (of an ensemble, of
embeddings that a part does not touch), so a little of the part's gradient and of a random vector is mixed in: an
eigenvalue that overtakes is found.

A part with a larger loss mostly has a larger curvature. The mean loss of training is known from every step for nothing,
so a quotient is multiplied by (mean loss / loss of the part)^γ: a control variate. γ, between 0 and 1, is fitted to the
quotients themselves, from 1 on (cross-entropy comes out near 1, squared loss lower). Where the losses are not known, or
not positive, nothing is corrected.

How much the curvature differs from batch to batch is told by pairs: two products p, q at *one* direction v, on two
parts. E‖p − q‖²/2 = E‖(H_B − H)·v‖² whatever v is. ‖p‖² − (vᵀp)² holds how far v is from an eigenvector besides, which
is more than the noise on a healthy transformer: a bound, by which a control goes. The variance falls with the size of a
part, so that of the whole batch follows. It decides how noisy steps stay stable
(:mod:`gfs_core.optimizers.thresholds`). Where a step's batch is measured as one there are no pairs: the spread is then
that of the quotients along v, from one batch to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gfs_core.linalg.inner import WHOLE, InnerProduct
from gfs_core.linalg.operator import Operator
from gfs_core.linalg.vectors import Vector, clone, combine, random_like, scale

TURN = 0.5  # weight of the new product in the direction
_VALUE_MEMORY = 0.85  # weight of the past in the value
_SPREAD_MEMORY = 0.8  # weight of the past in the two moments of the spread; they are plain means at first
_FIRST_PAIRS = 3  # the first products at a direction are so many pairs
_PAIR_EVERY = 4  # later one in so many products is one of a pair
_FIT_MEMORY = 0.99  # weight of the past in the fit of γ
_FIT_PRIOR = 10.0  # γ = 1 counts as much as this sum of squares of log(relative loss)
_SETTLE = 8  # products that turn the direction before a value is taken …
_SETTLE_TURN = 0.75  # … with this weight
_GRADIENT_MIX = 0.15  # length of the gradient that each turn mixes into the direction
_COMPUTE_EVERY = 5  # a gradient that is not free is computed and mixed in once in so many turns
_RANDOM_MIX = 0.03  # length of the random vector that each turn mixes in
_ABOVE = 2.0  # a quotient above the value by this factor may belong to another eigenvalue
_PATIENCE = 3  # so many of them in a row do: the value starts again from their mean


@dataclass(frozen=True)
class Sample:
    """The curvature of one part of the data, as an estimate is turned by it.

    Attributes:
        operator: v ↦ H_B·v on the part.
        like: tensors with the shapes of a vector.
        other: the same on another part, for a pair of products; ``None``: there is none.
        gradient: ``gradient(compute)``, the gradient of the part, a new vector; ``gradient(False)`` is ``None`` where
            it is not free. ``None``: nothing is mixed into the direction.
        inner: the inner product, which knows how vectors are spread over processes.
        turn: weight of the product in the direction, once it has settled; less follows slower, and averages more noise.
        along: ``operator`` of the vector that a function returns, which is not held meanwhile; ``None``: there is none.
    """

    operator: Operator
    like: Sequence[Tensor]
    other: Operator | None = None
    gradient: Callable[[bool], Vector | None] | None = None
    inner: InnerProduct = WHOLE
    turn: float = TURN
    along: Callable[[Callable[[], Vector]], Vector] | None = None

    def without_holding(self, make: Callable[[], Vector]) -> Vector:
        """H_B·v of the vector that ``make`` returns."""
        return self.operator(make()) if self.along is None else self.along(make)


class RunningSharpness:
    """The estimate and all it needs from one call to the next.

    Attributes:
        value: the present estimate; ``None`` while the direction settles.
        vector: the present direction, of norm 1 but for what has been mixed in: a copy of the weights.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.vector: Vector | None = None
        self._squares = 0.0
        self._products = 0.0
        self._moments: list[float] = []  # means of ‖p − q‖²/2 and (vᵀp)(vᵀq) over the pairs
        self._pairs = 0  # pairs so far
        self._since = 0  # products since the last pair
        self._along: list[float] = []  # means of half the squared difference of two quotients in a row, and product
        self._last: float | None = None  # the latest quotient
        self._taken = 0  # quotients taken into the value
        self._lagging: list[float] = []  # means of |vᵀH_B·v| and ‖H_B·v‖² over the parts
        self._seen = 0  # parts so far
        self._turns = 0
        self._above: list[float] = []  # the latest quotients, where they are far above the value

    def noisy(self, weight: float) -> float | None:
        """λ + weight·σ²/λ: the present estimate together with the spread of the curvature from part to part.

        Args:
            weight: of the variance σ² of H_B·v over the parts, ≥ 0.

        Returns:
            The value, ≥ the present estimate: σ²/λ² is that of the latest pairs; where there are none, that of the
            latest quotients. ``None`` before it is known, and where the estimate is not positive.
        """
        if self.value is None or self.value <= 0:
            return None
        if not self._moments and self._taken < _FIRST_PAIRS:
            return None
        # The product of few pairs may be near 0 by chance; the value, an average of many, is then the better known.
        spread, square = self._moments or self._along
        return self.value * (1 + weight * spread / max(square, self.value**2))

    def bound(self, weight: float) -> float | None:
        """λ + weight·σ²/λ from single products, σ² = E‖H_B·v‖² − λ²: a direction that lags counts as noise.

        A control goes by this bound. With :meth:`noisy` in its place, at the same margin, it lost runs with momentum.
        """
        if not self._lagging or self._lagging[0] <= 0:
            return None
        mean, square = self._lagging
        return mean + weight * max(square - mean * mean, 0.0) / mean

    @property
    def wants_pair(self) -> bool:
        """Whether the next product is to be one of a pair."""
        return self.settled and (self._pairs < _FIRST_PAIRS or self._since >= _PAIR_EVERY - 1)

    @property
    def settled(self) -> bool:
        """Whether the direction has been turned often enough for a value."""
        return self._turns >= _SETTLE

    @property
    def elasticity(self) -> float:
        """γ: by what power the curvature of a part grows with its loss; 0 to 1."""
        return min(max((self._products + _FIT_PRIOR) / (self._squares + _FIT_PRIOR), 0.0), 1.0)

    def update(self, sample: Sample) -> float:
        """Turn the direction by one product, or a pair.

        Returns:
            The Rayleigh quotient of this part, or the mean of both, to be taken in by :meth:`average`.

        """
        if self.vector is None:
            self.vector = _start(sample)
        dots, mix_in = sample.inner.dots, sample.inner.mix_in
        product = sample.operator(self.vector)
        self._since += 1
        if sample.other is None:
            one, quotient, square = dots([(self.vector, self.vector), (self.vector, product), (product, product)])
            one = one or 1.0
            quotient, square = quotient / one, square / one
            if self.settled:
                self._lag_over(quotient, square)
        else:
            v, p, q = self.vector, product, sample.other(self.vector)
            one, *rest = dots([(v, v), (v, p), (v, q), (p, p), (q, q), (p, q)])
            one = one or 1.0
            vp, vq, pp, qq, pq = (x / one for x in rest)
            self._spread_over((pp + qq - 2 * pq) / 2, vp * vq)
            combine(0.5, q, 0.5, p)
            quotient, square = (vp + vq) / 2, (pp + qq + 2 * pq) / 4
            self._lag_over(vp, pp)
            self._lag_over(vq, qq)
        if math.isfinite(square) and square > 0.0:
            self._turn_to(product, quotient, square, math.sqrt(one), sample.turn)
        del product  # its memory is needed
        self._turns += 1
        if sample.gradient is not None and self.settled:
            mix_in(sample.gradient(square == 0.0 or self._turns % _COMPUTE_EVERY == 1), _GRADIENT_MIX, self.vector)
            mix_in(random_like(self.vector, torch.Generator().manual_seed(self._turns)), _RANDOM_MIX, self.vector)
        return quotient

    def _turn_to(self, product: Vector, quotient: float, square: float, length: float, turn: float) -> None:
        """Turn the direction towards ``product``; every norm follows from the inner products, without another transfer.

        With v of norm 1 and p = H_B·v + s·v, the shift s being 0, or 2‖H_B·v‖ where vᵀH_B·v is negative (so that the
        turn is towards the largest eigenvalue, not the largest in magnitude): v ← ½v + ½p/‖p‖, and back to norm 1.
        While the direction settles, p has ¾ of the weight.
        """
        assert self.vector is not None
        by = turn if self.settled else _SETTLE_TURN
        shift = 2 * math.sqrt(square) if quotient < 0 else 0.0
        along = quotient + shift
        size = math.sqrt(square + 2 * shift * quotient + shift * shift)
        turned = math.sqrt((1 - by) ** 2 + by**2 + 2 * by * (1 - by) * along / size)
        stay, go = (1 - by + by * shift / size) / turned, by / (size * turned)
        combine(go / length, product, stay / length, self.vector)

    def _spread_over(self, spread: float, square: float) -> None:
        """Take in one pair: ‖p − q‖²/2 and (vᵀp)(vᵀq)."""
        if not (math.isfinite(spread) and math.isfinite(square)):
            return
        new = [max(spread, 0.0), square]
        self._pairs, self._since = self._pairs + 1, 0
        keep = min(_SPREAD_MEMORY, 1 - 1 / self._pairs)
        self._moments = [keep * m + (1 - keep) * n for m, n in zip(self._moments or new, new, strict=True)]

    def _lag_over(self, quotient: float, square: float) -> None:
        """Take in one part: |vᵀH_B·v| and ‖H_B·v‖²."""
        if not (math.isfinite(quotient) and math.isfinite(square)):
            return
        new = [abs(quotient), square]
        self._seen += 1
        keep = min(_SPREAD_MEMORY, 1 - 1 / self._seen)
        self._lagging = [keep * m + (1 - keep) * n for m, n in zip(self._lagging or new, new, strict=True)]

    def average(self, quotient: float, relative_loss: float | None = None, stands_for: float = 1.0) -> float | None:
        """Take one quotient into the estimate.

        Args:
            quotient: of one part; one that is not finite is passed over.
            relative_loss: loss on the part / mean loss of training, > 0; ``None``: not known.
            stands_for: usual intervals between two calls since the last one.

        Returns:
            The new estimate; ``None`` while it is not positive.
        """
        if math.isfinite(quotient):
            if quotient > 0 and relative_loss is not None:
                apart = math.log(relative_loss)
                if self.value is not None and self.value > 0:
                    self._squares = _FIT_MEMORY * self._squares + apart * apart
                    self._products = _FIT_MEMORY * self._products + apart * math.log(quotient / self.value)
                quotient *= math.exp(-self.elasticity * apart)
            self._take(quotient, _VALUE_MEMORY**stands_for)
        return self.value if self.value is not None and self.value > 0 else None

    def _take(self, quotient: float, keep: float) -> None:
        self._taken += 1
        if self._last is not None:
            new = [(quotient - self._last) ** 2 / 2, quotient * self._last]
            known = min(_SPREAD_MEMORY, 1 - 1 / max(self._taken - 1, 1))
            self._along = [known * m + (1 - known) * n for m, n in zip(self._along or new, new, strict=True)]
        self._last = quotient
        if self.value is None:
            self.value = quotient
            return
        keep = min(keep, 1 - 1 / self._taken)  # a plain mean at first
        above = quotient > _ABOVE * self.value > 0
        self._above = [*self._above, quotient] if above else []
        self.value = keep * self.value + (1 - keep) * quotient
        if len(self._above) == _PATIENCE:
            self.value, self._above = math.fsum(self._above) / _PATIENCE, []

    def state_dict(self) -> dict[str, Any]:
        """Everything, loadable with ``weights_only=True``."""
        held = None if self.vector is None else clone(self.vector)
        return {
            "value": self.value,
            "vector": held,
            "squares": self._squares,
            "products": self._products,
            "moments": list(self._moments),
            "pairs": [self._pairs, self._since],
            "along": [list(self._along), self._last, self._taken],
            "lagging": list(self._lagging),
            "seen": self._seen,
            "turns": self._turns,
            "above": list(self._above),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.value, self.vector = None if state["value"] is None else float(state["value"]), state["vector"]
        self._squares, self._products = float(state["squares"]), float(state["products"])
        self._moments, self._lagging = ([float(m) for m in state[n]] for n in ("moments", "lagging"))
        along, last, taken = state["along"]
        self._along = [float(m) for m in along]
        self._last, self._taken = None if last is None else float(last), int(taken)
        self._pairs, self._since = (int(n) for n in state["pairs"])
        self._seen = int(state["seen"])
        if {len(self._moments), len(self._lagging), len(self._along)} - {0, 2} or min(self._pairs, self._seen) < 0:
            raise ValueError("it holds no spread and square")
        self._turns, self._above = int(state["turns"]), [float(q) for q in state["above"]]


def _start(sample: Sample) -> Vector:
    """The gradient, of norm 1; a random vector where it is zero."""
    start = None if sample.gradient is None else sample.gradient(True)
    length = 0.0 if start is None else sample.inner.norm(start)
    if start is None or not 0.0 < length < math.inf:
        start = random_like(sample.like, torch.Generator().manual_seed(0))
        length = sample.inner.norm(start)
    scale(1 / length, start)
    return start
