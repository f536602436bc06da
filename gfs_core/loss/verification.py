"""Whether the first product of a loss is right: exact products are held against differences of gradients.

Some layers drop out of a second derivative without an error, ``once_differentiable`` functions for instance. And a loss
that holds something back from its gradient (``detach``) has a curvature that is not symmetric: a double backward takes
what is detached as constant, while differences of gradients do not.
"""

from __future__ import annotations

from gfs_core.linalg.vectors import Vector, axpy, clone
from gfs_core.loss.differences import ROUGH, Differences
from gfs_core.loss.double_backward import DoubleBackward, NoExactProduct
from gfs_core.loss.objective import Objective

# How far uᵀJv and vᵀJu may be apart, in units of uᵀu, before the curvature counts as not symmetric. Models with a
# symmetric one were below 0.001 with u = Jv and below 0.04 with u = Jv minus the exact product, those that hold
# something back mostly above 0.4. tests/core/test_symmetry.py has others.
_ASYMMETRIC = 0.1
_UNEQUAL = 0.1  # relative: an exact product this far from that of differences is another
_LEFT_OUT = "a double backward leaves out part of the model without an error"


class Verification:
    """Holds the first product of ``objective`` by double backward against that by differences.

    Attributes:
        compares: whether the loss compares weights (``w > 0``), which may round them.
    """

    def __init__(self, objective: Objective, exact: DoubleBackward, differences: Differences) -> None:
        self.objective, self.exact, self.differences = objective, exact, differences
        self.compares = False
        self._missed: Vector | None = None  # what the exact product leaves out of that by differences

    def agree(self, product: Vector, check: Vector) -> bool:
        """Whether an exact product is that of differences; ``False``: it is not, for those go by steps of the weights.

        Where kinks leave differences uncertain, that is taken for steps too, if the loss compares weights.

        Raises:
            NoExactProduct: it is not, for a double backward is incomplete.
        """
        missed = clone(check)
        axpy(-1.0, product, missed)
        pairs = [(missed, missed), (product, product), (check, check)]
        apart, exact, size = (x**0.5 for x in self.objective.inner.dots(pairs))
        hidden = self.objective.needs_backward  # some weights are hidden from all but `.backward()`
        if self.compares and not hidden:
            return bool(apart <= max(_UNEQUAL * max(exact, size), self.differences.noise))
        # Differences of gradients are noisy in low precision and at kinks; where they are, they prove nothing.
        doubt = max(max(_UNEQUAL, 10 * self.differences.error) * max(exact, size), self.differences.noise)
        if hidden or apart > doubt:
            self._missed = None if hidden else missed
            raise NoExactProduct(_LEFT_OUT)
        return True

    def check_symmetry(self, vector: Vector, product: Vector) -> None:
        """Where differences cannot tell whether a double backward is complete: one that leaves out a part is lopsided.

        Of a loss that is linear in some weight it may not be known; that is taken for a part that is left out.

        Args:
            vector: v.
            product: H·v by double backward.

        Raises:
            NoExactProduct: it is lopsided.
        """
        back = self.exact(product)
        square, there = self.objective.inner.dots([(product, product), (vector, back)])
        if not self.objective.on_all(not self.exact.is_cut and abs(square - there) <= _ASYMMETRIC * square):
            raise NoExactProduct(_LEFT_OUT)

    def is_symmetric(self, vector: Vector, product: Vector) -> bool:
        """Whether uᵀJv = vᵀJu, by one more difference; taken for true where differences are too rough to tell.

        u is Jv; where an exact product differs, it is Jv minus that, and what both have in common drops out.

        Args:
            vector: v.
            product: J·v by differences.
        """
        other = product if self._missed is None else self._missed
        self._missed = None
        square, error = self.objective.inner.dot(other, other), self.differences.error
        if square == 0.0 or error > ROUGH:
            return True
        there, back = self.objective.inner.dots([(other, product), (vector, self.differences(other))])
        return abs(there - back) <= max(_ASYMMETRIC, 3 * self.differences.error) * square
