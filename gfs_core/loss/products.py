"""Hessian-vector products of an :class:`~gfs_core.loss.objective.Objective`, by the way that is right for it.

There are two ways: by double backward (:mod:`gfs_core.loss.double_backward`), and by differences of gradients
(:mod:`gfs_core.loss.differences`), which need first derivatives only. ``"auto"`` tries double backward, then double
backward with attention in its plain (math) kernel and compiled code run eagerly, then goes over to differences. The
first product settles the way, and is verified (:mod:`gfs_core.loss.verification`).

A second derivative may be infinite at single points, as that of a norm at zero. There an exact product is not finite,
and differences reach over the point. Of a loss that rounds its weights the exact product is that at the rounded
weights, and differences tell nothing (:mod:`gfs_core.loss.rounding`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from gfs_core.errors import MeasurementError
from gfs_core.linalg.vectors import Vector, owned
from gfs_core.loss.differences import Differences
from gfs_core.loss.double_backward import DoubleBackward, NoExactProduct
from gfs_core.loss.learned import HvpMethod, Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.rounding import is_stepwise, steps
from gfs_core.loss.verification import Verification

NOT_SYMMETRIC = (
    "the loss holds something back from its gradient (`detach`, a target inside the loss, gradient reversal, weights "
    "that it rescales), so the curvature is not symmetric: the sharpness is a real eigenvalue of the gradient's own "
    "Jacobian, by differences of gradients, which decides whether steps are stable; complex eigenvalues are not seen"
)
ROUNDED = (
    "the loss rounds its weights or activations and takes the gradient straight through: the sharpness is that at the "
    "rounded values, which decides whether steps are stable; there is no gradient flow to follow"
)
ONLY_ROUNDED = (
    "the loss rounds its weights or activations (quantised training), so that its gradient jumps from step to step of "
    "the rounding, and differences of gradients tell nothing; only exact products would, and {why}; nothing is measured"
)
RESTING = (
    "{} weights are zero at a kink of the loss (the norm of a zero row) and have no gradient: training does not move "
    "them, and they are left out of the space"
)
AT_KINK = (
    "the loss has a kink at the present weights (the norm of a zero row, a ReLU of exactly 0): its curvature is "
    "infinite there, or set by a tiny `eps`, and nothing is measured; measuring goes on where training has left the "
    "kink, or with a larger `eps` in the norm, or initial weights that are not zero"
)


class Hessian:
    """The Hessian of ``objective`` at the present weights, as an operator on vectors.

    Args:
        objective: the loss on the probe.
        method: ``"exact"``, ``"gradients"`` or ``"auto"``, which goes by what is learned.
        learned: what is known of the model and its loss from before, read and not changed. Unless it says that double
            backward is verified, the first exact product is compared with a difference of gradients (four gradients):
            some layers drop out of a second derivative without an error, ``once_differentiable`` functions for
            instance.

    Attributes:
        hvps: products computed so far.
        method: how products are computed now; ``"auto"`` until the first product has settled it.
        reason: how the products differ from exact ones of the loss itself; empty where they do not.
        resting: says which weights are left out of the space; empty where none are.

    Raises:
        ValueError: ``method`` is none of the three.
        MeasurementError: from a product, where ``method="exact"`` and there is no second derivative, or where products
            come from gradients and the gradient jumps at the present weights, or everywhere, as by rounding.
    """

    def __init__(self, objective: Objective, method: HvpMethod = "auto", learned: Learned | None = None) -> None:
        if method not in get_args(HvpMethod):
            raise ValueError(f"`hvp` must be 'auto', 'exact' or 'gradients', got {method!r}")
        self._learned = Learned() if learned is None else replace(learned)
        self.objective, self.inner = objective, objective.inner
        self.method: HvpMethod = self._learned.hvp_for(method)
        self._may_fall_back = method == "auto"
        self._exact = DoubleBackward(objective, self._learned.plain_kernels)
        self._differences = Differences(objective, self._learned.reach)
        self._verification = Verification(objective, self._exact, self._differences)
        self.hvps = 0
        self.reason = self.resting = ""
        if objective.sharded:  # the weights in the graph are gathered copies, which a second backward does not reach
            if method == "exact":
                raise MeasurementError("hvp='exact' was asked for, but the weights are sharded; use hvp='auto'")
            self.method = "gradients"
            self.reason = "products come from differences of gradients: the weights are sharded"

    def __call__(self, vector: Vector) -> Vector:
        """H·v, a new vector of the same shapes."""
        self.hvps += 1
        if self._learned.double_backward_verified:
            return self._known(vector)
        self._look_for_rounding()
        return self._first_of_rounded(vector) if self.rounded else self._first(vector)

    def along(self, make: Callable[[], Vector]) -> Vector:
        """H·v of the vector that ``make`` returns."""
        return self(make())

    def _known(self, vector: Vector) -> Vector:
        """A product by the way that is settled; another way where it fails."""
        while self.method != "gradients":
            try:
                product = self._finite(self._exact(vector))
            except NoExactProduct as error:
                self._next_way(error)
            else:
                self.method = "exact"
                return product
        product = self._differences(vector)
        self._look_for_kinks()
        return product

    def _first(self, vector: Vector) -> Vector:
        """The first product of a loss without rounding: that by differences tells whether an exact one is right."""
        check = self._to_compare(vector)
        while self.method != "gradients":
            try:
                return self._verified(vector, check)
            except NoExactProduct as error:
                if self._next_way(error):  # other kernels draw other numbers for their dropout
                    check = self._to_compare(vector)
        self._look_for_kinks()
        self._learned.double_backward_verified = True
        if self.symmetric and not self._verification.is_symmetric(vector, check):
            self._learned.symmetric, self.reason = False, NOT_SYMMETRIC
        return check

    def _verified(self, vector: Vector, check: Vector) -> Vector:
        """An exact product that agrees with ``check``, or differs from it because the loss goes by steps."""
        with self.objective.in_float32():  # the noise of half precision would hide what is sought
            product = self._exact(vector)
        if self.objective.precision.half is not None:
            self.release()
        agree = self._verification.agree(self._finite(product), check)
        if self._verification.compares:
            self._verification.check_symmetry(vector, product)
        self._settle_on_exact()
        if agree:  # differences of other batches have an error of their own
            self._differences = Differences(self.objective, self._differences.reach)
        else:
            self._learned.rounded, self.reason = True, ROUNDED
        return product

    def _first_of_rounded(self, vector: Vector) -> Vector:
        """The first product of a loss that rounds its weights, of which differences tell nothing."""
        while True:
            try:
                product = self._finite(self._exact(vector))
                self._verification.check_symmetry(vector, product)
            except NoExactProduct as error:
                self._next_way(error)
            else:
                self._settle_on_exact()
                return product

    def _settle_on_exact(self) -> None:
        self.method, self._learned.double_backward_verified = "exact", True

    def _to_compare(self, vector: Vector) -> Vector:
        """A product by differences; what an exact one is held against, in the kernels that this one needs."""
        with contextlib.nullcontext() if self.method == "gradients" else self._exact.kernels():
            return self._differences(vector)

    def _finite(self, product: Vector) -> Vector:
        if not math.isfinite(self.inner.norm(product)):
            self.release()
            self.objective.gradient()  # it may not be finite either, and says so
            raise NoExactProduct("it is not finite at these weights, as that of the norm of a zero vector")
        return product

    def _look_for_rounding(self) -> None:
        found = steps(self.objective)
        self._learned.rounded = not self.objective.on_all(not found.rounded)
        self._verification.compares = not self.objective.on_all(not found.compared)
        if self._verification.compares and self.method == "gradients":
            self._learned.rounded = is_stepwise(self.objective)
        if not self.rounded:
            return
        self.reason = ROUNDED
        if self.method != "gradients":
            self.objective.gradient()  # shows whether some weights hide from all but `.backward()`
            if self.objective.needs_backward:
                self.method = "gradients"
        if self.method == "gradients":
            asked = not self._may_fall_back
            raise MeasurementError(
                ONLY_ROUNDED.format(why="hvp='gradients' was asked for" if asked else "this model has none")
            )

    def _look_for_kinks(self) -> None:
        """Go by what differences have met.

        Raises:
            MeasurementError: the loss has a kink at the present weights.
        """
        if self._differences.at_kink:
            raise MeasurementError(AT_KINK)
        if self._differences.resting:
            self.resting = RESTING.format(self._differences.resting)

    def _next_way(self, error: NoExactProduct) -> bool:
        """Go on with plain kernels, and return true, or with differences."""
        self.release()
        if error.other_kernels and not self._exact.plain_kernels:
            self._exact.plain_kernels = True
            return True
        if self.rounded or (self._verification.compares and is_stepwise(self.objective)):
            raise MeasurementError(ONLY_ROUNDED.format(why=f"this model has none ({error})")) from error
        if not self._may_fall_back:
            raise MeasurementError(
                f"hvp='exact' was asked for, but this model has no second derivative ({error}); use hvp='auto'"
            ) from error
        self.method = "gradients"
        self.reason = f"products come from differences of gradients: no second derivative ({error})"
        return False

    @property
    def loss(self) -> float:
        """The loss at the last product; the mean of two where that is by differences."""
        return self._differences.loss if self.method == "gradients" else self._exact.loss

    @property
    def error(self) -> float:
        """Relative error of a product from gradients, as the difference of two step lengths; 0 where exact."""
        return 0.0 if self.method == "exact" else self._differences.error

    @property
    def symmetric(self) -> bool:
        """Whether the curvature is symmetric, as far as is known.

        Where it is not, products are those of the gradient's own Jacobian J, by differences. A double backward takes
        what is detached as constant.
        """
        return self._learned.symmetric

    @property
    def rounded(self) -> bool:
        """Whether the loss rounds its weights or activations: products are those at the rounded ones."""
        return self._learned.rounded

    @property
    def learned(self) -> Learned:
        """What is known by now, for the Hessian of the next measurement to start from."""
        return replace(
            self._learned,
            hvp=self.method,
            plain_kernels=self._exact.plain_kernels,
            reach=self._differences.reach,
            precision=self.objective.precision.choice,
        )

    def slope_along(self, vector: Vector) -> float:
        """∇L·v at the present weights; free where the graph of an exact product is kept."""
        kept = self._exact.kept
        if kept is None:
            return self.inner.dot(self.objective.gradient()[1], vector)
        held = [(g.detach(), v) for g, v in zip(kept[0], vector, strict=True) if g is not None]
        slope = self.inner.dot([g for g, _ in held], [v for _, v in held])
        ranks = self.objective.ranks
        return slope if ranks is None else ranks.mean(slope)

    def gradient(self, compute: bool = True) -> Vector | None:
        """∇L at the present weights, a new vector.

        It is free where the graph of an exact product is kept. Elsewhere it is computed if ``compute``, else ``None``.
        """
        kept = self._exact.kept
        if kept is None:
            return self.objective.gradient()[1] if compute else None
        gradient = owned([None if g is None else g.detach().clone() for g in kept[0]], self.objective.weights)
        if self.objective.ranks is not None:
            self.objective.ranks.mean_of(kept[1], gradient)
        return gradient

    def release(self) -> None:
        """Drop the kept graph; to be called before the weights move."""
        self._exact.release()

    def forget_batches(self) -> None:
        """To be called before products of other batches, which may have kinks of their own."""
        self.release()
        self._differences.forget_batches()
