"""A running estimate of the sharpness: one product now and then, each on another part of the data.

Stochastic power iteration. Each call turns the direction v a little towards H_B·v on its own part B of the data and
takes one Rayleigh quotient vᵀH_B·v; both are averaged over calls. To solve for the largest eigenvalue of a small part
would find the part's own noise instead, which lies above the sharpness of the whole. The direction settles on the
largest eigenvalue λ₁ while the most negative one is above −3λ₁: its component is multiplied by ½ + ½λ/λ₁ in each turn,
without the noise. Many small products on changing
parts are worth more than few large ones: `benchmarks/tiers.md`.

A part with a larger loss mostly has a larger curvature. The mean loss of training is known from every step for nothing,
so a quotient is multiplied by (mean loss / loss of the part)^γ: a control variate. γ, between 0 and 1, is fitted to the
quotients themselves, from 1 on (cross-entropy comes out near 1, squared loss lower). Where the losses are not known, or
not positive, nothing is corrected.

The products also tell how much the curvature differs from batch to batch: E‖H_B·v‖² − λ², the spread of H_B·v over the
parts, falls with the size of a part, so that of the whole batch follows. It decides how noisy steps stay stable:
:mod:`gfs_core.stability`.
"""

from __future__ import annotations

import math
from typing import Any

from gfs_core.curvature import Operator
from gfs_core.eigen import largest_eigenvalues
from gfs_core.vectors import Vector, clone, combine, dots

_TURN = 0.5  # weight of the new product in the direction
_MEMORY = 0.85  # weight of the past in the value
_SPREAD_MEMORY = 0.8  # … in the two moments of the spread; their plain means at first
_FIT_MEMORY = 0.99  # … in the fit of γ
_FIT_PRIOR = 10.0  # γ = 1 counts as much as this sum of squares of log(relative loss)
_START_HVPS = 30
_START_BASIS = 4  # a rough start, and no more memory than the dearer tiers need in most measurements


class RunningSharpness:
    """The estimate and all it needs from one call to the next.

    Attributes:
        value: the present estimate; ``None`` before the first call.
        vector: the present direction, of norm 1: a copy of the weights.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.vector: Vector | None = None
        self._squares = 0.0
        self._products = 0.0
        self._moments: list[float] = []  # means of vᵀH_B·v and ‖H_B·v‖², …
        self._seen = 0  # … over so many parts

    def noisy(self, weight: float) -> float | None:
        """λ + weight·σ²/λ: the curvature together with its spread from part to part.

        Args:
            weight: of the variance σ² of H_B·v over the parts, ≥ 0.

        Returns:
            The value, from the means of vᵀH_B·v and ‖H_B·v‖² over the latest parts; ``None`` before the first.
        """
        if not self._moments or self._moments[0] <= 0:
            return None
        mean, square = self._moments
        return mean + weight * max(square - mean * mean, 0.0) / mean

    @property
    def elasticity(self) -> float:
        """γ: by what power the curvature of a part grows with its loss; 0 to 1."""
        return min(max((self._products + _FIT_PRIOR) / (self._squares + _FIT_PRIOR), 0.0), 1.0)

    def update(self, operator: Operator, like: Vector) -> float:
        """Turn the direction by one product; the first call solves for the eigenvalue, with up to 30.

        Args:
            operator: v ↦ H_B·v on this call's part of the data.
            like: tensors with the shapes of a vector.

        Returns:
            The Rayleigh quotient of this part, to be taken in by :meth:`average`.

        Raises:
            MeasurementError: the first products are not finite.
        """
        if self.vector is None:
            first = largest_eigenvalues(operator, like, tol=1e-1, max_hvps=_START_HVPS, basis=_START_BASIS)
            self.vector = first.vector
            return first.value
        product = operator(self.vector)
        one, quotient, square = dots([(self.vector, self.vector), (self.vector, product), (product, product)])
        quotient, square = quotient / one, square / one
        if math.isfinite(square) and square > 0.0:
            self._spread_over(quotient, square)
            self._turn_to(product, quotient, square, math.sqrt(one))
        return quotient

    def _turn_to(self, product: Vector, quotient: float, square: float, length: float) -> None:
        """Turn the direction towards ``product``; every norm follows from the inner products, without another transfer.

        With v of norm 1 and p = H_B·v + s·v, the shift s being 0, or 2‖H_B·v‖ where vᵀH_B·v is negative (so that the
        turn is towards the largest eigenvalue, not the largest in magnitude): v ← ½v + ½p/‖p‖, and back to norm 1.
        """
        assert self.vector is not None
        shift = 2 * math.sqrt(square) if quotient < 0 else 0.0
        along = quotient + shift
        size = math.sqrt(square + 2 * shift * quotient + shift * shift)
        turned = math.sqrt((1 - _TURN) ** 2 + _TURN**2 + 2 * _TURN * (1 - _TURN) * along / size)
        stay, turn = (1 - _TURN + _TURN * shift / size) / turned, _TURN / (size * turned)
        combine(turn / length, product, stay / length, self.vector)

    def _spread_over(self, quotient: float, square: float) -> None:
        """Take in one part: |vᵀH_B·v| and ‖H_B·v‖²."""
        new = [abs(quotient), square]
        self._seen += 1
        keep = min(_SPREAD_MEMORY, 1 - 1 / self._seen)
        self._moments = [keep * m + (1 - keep) * n for m, n in zip(self._moments or new, new, strict=True)]

    def average(self, quotient: float, relative_loss: float | None = None) -> float | None:
        """Take one quotient into the estimate.

        Args:
            quotient: of one part; one that is not finite is passed over.
            relative_loss: loss on the part / mean loss of training, > 0; ``None``: not known.

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
            self.value = quotient if self.value is None else _MEMORY * self.value + (1 - _MEMORY) * quotient
        return self.value if self.value is not None and self.value > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Everything, loadable with ``weights_only=True``."""
        held = None if self.vector is None else clone(self.vector)
        return {
            "value": self.value,
            "vector": held,
            "squares": self._squares,
            "products": self._products,
            "moments": list(self._moments),
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.value, self.vector = None if state["value"] is None else float(state["value"]), state["vector"]
        self._squares, self._products = float(state["squares"]), float(state["products"])
        self._moments, self._seen = [float(m) for m in state["moments"]], int(state["seen"])
        if len(self._moments) not in (0, 2) or self._seen < 0:
            raise ValueError("it holds no mean and mean square")
