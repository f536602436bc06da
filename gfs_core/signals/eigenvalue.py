"""The largest eigenvalues of the loss Hessian and of the optimizer's operator, on the probe."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gfs_core.errors import MeasurementError
from gfs_core.linalg.eigen import EigenResult
from gfs_core.linalg.vectors import Vector, fitted
from gfs_core.loss.one_gradient import CHANGE, OneGradient, StepLength
from gfs_core.signals.base import Cost, Key, Reading
from gfs_core.signals.context import StepContext
from gfs_core.signals.keys import PRECISION_ERROR, SHARPNESS_CHART, STABILITY_RATIO
from gfs_core.signals.lab import Lab
from gfs_core.signals.shares import CURVATURE_SHARE, LayerShares
from gfs_core.signals.training_gradient import of_the_step

SHARPNESS = Key("sharpness", "largest eigenvalue λ₁ of the loss Hessian on the probe", chart=SHARPNESS_CHART)
PRECONDITIONED_SHARPNESS = Key(
    "preconditioned_sharpness",
    "largest eigenvalue in the optimizer's own coordinates; adaptive optimizers, weight decay, several rates",
    chart=SHARPNESS_CHART,
)
RESIDUAL = Key("residual", "bound on the distance of the sharpness to an eigenvalue, relative to it", logged=False)
WORST_RESIDUAL = 0.1  # an eigenvalue that did not converge is left out if its relative error bound exceeds this
_CHANGE = 0.1  # of the gradient's length by which a difference changes it, in full precision
_DIFFERENCE_ERROR = 0.01  # of their products: a residual of three times that is not lowered any further
_MIX_FIRST, _MIX_EVERY = 3, 10  # solves 3, 13, 23 … mix other directions into the warm start


class Eigenvalue:
    """The sharpness, and the preconditioned sharpness where it differs. Each solve starts from the last eigenvector.

    Attributes:
        solved: measurements so far, failed ones included.
        raw: the eigenvector of H from which the next solve starts; ``None``: it starts at random.
        preconditioned: the same for the optimizer's operator.
        shares: of the eigenvector in each layer.
    """

    name = "sharpness"
    keys = (SHARPNESS, PRECONDITIONED_SHARPNESS, STABILITY_RATIO, RESIDUAL, PRECISION_ERROR, CURVATURE_SHARE)
    cost = Cost.SOLVE
    copies = (10, 12)
    needs = ()
    past = 0
    every = None

    def __init__(self) -> None:
        self.solved = 0
        self.length = StepLength()  # of differences, where a solve goes by them
        self.raw: Vector | None = None
        self.preconditioned: Vector | None = None
        self.shares = LayerShares(CURVATURE_SHARE)

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Solve for the eigenvalues. The first solve, and every tenth after it, checks half precision by float32.

        ``lab.top`` and ``lab.sharpest`` are set for the signals that follow.

        Raises:
            MeasurementError: an eigenvalue is not finite.
        """
        self.solved += 1
        lab.loss_on_probe()
        mix = self.solved % _MIX_EVERY == _MIX_FIRST
        products = self._differences(step, lab)
        found = self._solve(step, lab, mix, products)
        if products is not None and any(r.value is None for r in found):  # too noisy, as of kinks and few examples
            lab.facts.solve_by_gradients, products = False, None
            found = self._solve(step, lab, mix)
        if products is not None:  # that they are not exact is known
            found = [reading._replace(reason="") for reading in found]
        if products is None and lab.top is not None and self.solved % _MIX_EVERY == 1 and lab.in_half_precision():
            error = lab.precision_error(step.stability, lab.top.vector, lab.top.value)
            found.append(Reading(PRECISION_ERROR, step.step, error))
            if not lab.in_half_precision():
                found += self._solve(step, lab, mix)
        if not lab.hessian.symmetric:  # the residual is no error bound then
            found = [reading for reading in found if reading.key is not RESIDUAL]
        return found

    def _differences(self, step: StepContext, lab: Lab) -> OneGradient | None:
        """Products by one gradient each, where these take less time than exact ones; ``None``: exact ones.

        On an accelerator both are timed once. An exact product needs attention's plain kernel and a graph of the
        gradient; a gradient runs as in training. On a CPU exact products are taken, and for the first solve.
        """
        if self.raw is None:  # a random start has little curvature, and a step along it is too long to be linear
            return None
        facts, objective = lab.facts, lab.objective
        untimed = facts.solve_by_gradients is None
        if facts.solve_by_gradients is False or (untimed and objective.weights[0].device.type == "cpu"):
            return None
        change = CHANGE if objective.precision.half else _CHANGE
        products = of_the_step(step, lab, step.probe, self.length, change)
        if products is None:
            return None
        if untimed:
            along = products.gradient()
            assert along is not None
            products(along)
            products(along)  # the second is timed
            lab.hessian(along)
            began = time.perf_counter()
            objective.inner.norm(lab.hessian(along))
            exact = time.perf_counter() - began
            facts.solve_by_gradients = objective.on_all(products.seconds < exact)
            lab.hessian.release()
        products.error = _DIFFERENCE_ERROR
        return products if facts.solve_by_gradients else None

    def _solve(self, step: StepContext, lab: Lab, mix: bool, products: OneGradient | None = None) -> list[Reading]:
        stability, at = step.stability, step.step
        top = lab.eigenvalue(start=self.raw, mix=mix, products=products)
        found = [reading_of(SHARPNESS, at, top, lab)]
        usable = found[0].value is not None
        self.raw = lab.sharpest = top.vector if usable else None
        if usable:
            found.append(Reading(RESIDUAL, at, top.error_bound))
        if stability.threshold is not None and not stability.plain:
            top = lab.eigenvalue(stability, start=self.preconditioned, mix=mix, products=products)
            found.append(reading_of(PRECONDITIONED_SHARPNESS, at, top, lab))
            usable = found[-1].value is not None
            self.preconditioned = top.vector if usable else None
        if usable and stability.threshold is not None:
            found.append(Reading(STABILITY_RATIO, at, top.value / stability.threshold))
        lab.top = top if usable else None
        if lab.top is not None:
            found += self.shares.readings(at, lab.top.vector, step.layers, lab.objective.inner)
        return found

    def forget(self) -> None:
        """Start the next solve at random, and check its precision by float32."""
        self.solved, self.length = 0, StepLength()
        self.broke_off()

    def broke_off(self) -> None:
        """Start the next solve at random."""
        self.raw = self.preconditioned = None

    def state_dict(self) -> dict[str, Any]:
        """The number of measurements, and the vectors to start from."""
        return {
            "solved": self.solved,
            "raw": self.raw,
            "preconditioned": self.preconditioned,
            "length": self.length.state_dict(),
            "shares": self.shares.state(),
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore the number of measurements, and the vectors that fit ``params``."""
        self.solved = int(state["solved"])
        self.length = StepLength.from_state(state["length"])
        self.shares.load(state["shares"])
        self.raw, self.preconditioned = (fitted(state[name], params) for name in ("raw", "preconditioned"))


def reading_of(key: Key, step: int, top: EigenResult, lab: Lab, name: str = "sharpness") -> Reading:
    """A reading of an eigenvalue, which ``name`` names in words, or the reason why it is left out.

    It has a value if the solver has converged. For a symmetric operator, where the residual bounds the error, it also
    has one if that bound is at most ``WORST_RESIDUAL``.

    Raises:
        MeasurementError: the eigenvalue is not finite.
    """
    if not math.isfinite(top.value):
        raise MeasurementError("the sharpness is not finite")
    if top.converged:
        return Reading(key, step, top.value)
    symmetric = lab.hessian.symmetric
    usable = symmetric and top.error_bound <= WORST_RESIDUAL
    why = top.reason if symmetric else "no eigenvalue of a curvature that is not symmetric was found"
    reason = f"{name}{'' if usable else ' left out'} (relative residual {top.error_bound:.0e}): {why}"
    return Reading(key, step, top.value if usable else None, reason=reason)
