"""Hessian-vector products of an :class:`~gfs_core.loss.objective.Objective`.

Two ways, and a choice between them:

- *exact*: one forward and one backward with ``create_graph=True``, then one more backward per product
  (Pearlmutter 1994). The graph is kept while the weights stay where they are.
- *from gradients*: their differences (:mod:`gfs_core.loss.differences`), which need first derivatives only.

``"auto"`` tries exact, then exact with attention in its plain (math) kernel and compiled code run eagerly,
then goes over to gradients. Fused attention and compiled code have no second derivative. Others are infinite at single
points, as that of a norm at zero: there a product is not finite, and differences reach over the point. Of a loss that
rounds its weights the exact product is that at the rounded weights, and differences tell nothing
(:mod:`gfs_core.loss.rounding`).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfs_core.errors import MeasurementError
from gfs_core.linalg.vectors import Vector, axpy, clone, copy, dense, owned, scale, zeros_like
from gfs_core.loss.differences import ROUGH, Differences
from gfs_core.loss.learned import HvpMethod, Learned
from gfs_core.loss.objective import Objective, finite
from gfs_core.loss.rounding import steps

# How far uᵀJv and vᵀJu may be apart, in units of uᵀu, before the curvature counts as not symmetric. Models with a
# symmetric one were below 0.001 with u = Jv and below 0.04 with u = Jv minus the exact product, those that hold
# something back mostly above 0.4. tests/core/test_symmetry.py has others.
_ASYMMETRIC = 0.1
_NO_SLOPE = 0.2  # of what the gradient says, how far a difference of losses may be off
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


class _SilentlyWrong(RuntimeError):
    pass


class _NotFinite(RuntimeError):
    pass


class _OnAnotherRank(RuntimeError):
    pass


_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|does not currently support double backward|use_reentrant=True"
    r"|not compatible with \.grad\(\)|once_differentiable|Trying to backward through the graph a second time"
    r"|don't support automatic differentiation|donated buffers",
    re.DOTALL,
)


class _Graph(NamedTuple):
    """A differentiable gradient: its tensors that depend on the weights, their places, and all of them; the loss."""

    live: list[Tensor]
    places: list[int]
    gradient: Sequence[Tensor | None]
    loss: float


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
        reason: what is to be known about the products; empty where they are exact, and those of the loss itself.
        resting: that some weights are left out of the space; empty where none are.
        loss: the loss at the last product.

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
        self.hvps = 0
        self.loss = 0.0
        self.reason = self.resting = ""
        self._graph: _Graph | None = None
        self._differences = Differences(objective, self._learned.reach)
        self._compared = False  # whether the loss goes by comparisons of weights alone
        self._missed: Vector | None = None  # what an exact product leaves out of the first difference
        self._may_fall_back = method == "auto"
        if objective.sharded:  # the weights in the graph are gathered copies, which a second backward does not reach
            if method == "exact":
                raise MeasurementError("hvp='exact' was asked for, but the weights are sharded; use hvp='auto'")
            self.method = "gradients"
            self.reason = "products come from differences of gradients: the weights are sharded"

    def __call__(self, vector: Vector) -> Vector:
        """H·v, a new vector of the same shapes."""
        self.hvps += 1
        if not self._learned.double_backward_verified:
            self._look_for_rounding()
        check = None if self._learned.double_backward_verified or self.rounded else self._from_gradients(vector)
        while self.method != "gradients":
            try:
                if check is None:
                    product = self._exact_on_all(vector)
                else:  # in float32: the noise of half precision would hide what is sought
                    with self.objective.in_float32():
                        product = self._exact_on_all(vector)
                    if self.objective.precision.half is not None:
                        self.release()
                if not math.isfinite(self.inner.norm(product)):
                    raise _NotFinite("it is not finite at these weights, as that of the norm of a zero vector")
                if check is not None:
                    agrees = self._compare(product, check)
                    if self._compared:
                        self._check_symmetry(vector, product)
                    if not agrees:
                        self._learned.rounded, self.reason, check = True, ROUNDED, None
                elif not self._learned.double_backward_verified:
                    self._check_symmetry(vector, product)
            except RuntimeError as error:
                fused = not self._learned.plain_kernels
                self._next_method(error)
                if check is not None and fused and not isinstance(error, (_SilentlyWrong, _NotFinite)):
                    check = self._from_gradients(vector)  # other kernels draw other numbers for their dropout
            else:
                self.method, self._learned.double_backward_verified = "exact", True
                if check is not None:  # differences of other batches have an error of their own
                    self._differences = Differences(self.objective, self._differences.reach)
                return product
        product = self._from_gradients(vector) if check is None else check
        if self._differences.at_kink:
            raise MeasurementError(AT_KINK)
        if self._differences.resting:
            self.resting = RESTING.format(self._differences.resting)
        if check is not None:
            self._learned.double_backward_verified = True
            if self.symmetric and not self._is_symmetric(vector, check):
                self._learned.symmetric, self.reason = False, NOT_SYMMETRIC
        return product

    def _look_for_rounding(self) -> None:
        found = steps(self.objective)
        self._learned.rounded = not self.objective.on_all(not found.rounded)
        self._compared = not self.objective.on_all(not found.compared)
        if self._compared and self.method == "gradients":
            self._learned.rounded = self._is_no_slope()
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

    def _is_no_slope(self) -> bool:
        """Whether the loss does not fall along its gradient as that says, as one that goes by steps of the weights."""
        with self.objective.in_float32():
            weights = self.objective.weights
            _, gradient = self.objective.gradient()
            length, held = self.inner.norm(gradient), clone(weights)
            if length == 0.0:
                return False
            step = self.objective.eps ** (1 / 3) * max(1.0, self.inner.norm(weights)) / length
            try:
                axpy(step, gradient, weights)
                ahead = self.objective.loss()
                copy(held, weights)
                axpy(-step, gradient, weights)
                behind = self.objective.loss()
            finally:
                copy(held, weights)
            expected = 2 * step * length**2
            rounding = 100 * self.objective.eps * (abs(ahead) + abs(behind))
            return bool(abs(ahead - behind - expected) > _NO_SLOPE * expected + rounding)

    def _is_symmetric(self, vector: Vector, product: Vector) -> bool:
        """Whether uᵀJv = vᵀJu, by one more difference; taken for true where differences are too rough to tell.

        u is Jv; where an exact product differs, it is Jv minus that, and what both have in common drops out.
        """
        other = product if self._missed is None else self._missed
        self._missed = None
        [square] = self.inner.dots([(other, other)])
        if square == 0.0 or self.error > ROUGH:
            return True
        there, back = self.inner.dots([(other, product), (vector, self._from_gradients(other))])
        return abs(there - back) <= max(_ASYMMETRIC, 3 * self.error) * square

    def _check_symmetry(self, vector: Vector, product: Vector) -> None:
        """Where differences cannot tell whether a double backward is complete: one that leaves out a part is lopsided.

        Of a loss that is linear in some weight it may not be known; that is taken for a part that is left out.
        """
        back = self._exact_on_all(product)
        square, there = self.inner.dots([(product, product), (vector, back)])
        if not self.objective.on_all(not self._cut and abs(square - there) <= _ASYMMETRIC * square):
            raise _SilentlyWrong("a double backward leaves out part of the model without an error")

    @property
    def _cut(self) -> bool:
        """Whether the gradient of some weight has no graph, as where a layer drops out of a double backward."""
        return self._graph is not None and any(g is not None and not g.requires_grad for g in self._graph.gradient)

    def _compare(self, product: Vector, check: Vector) -> bool:
        """Whether an exact product is that of differences; ``False``: it is not, for those go by steps of the weights.

        Where kinks leave differences uncertain, that is taken for steps too, if the loss compares weights.
        """
        missed = clone(check)
        axpy(-1.0, product, missed)
        apart, exact, size = (x**0.5 for x in self.inner.dots([(missed, missed), (product, product), (check, check)]))
        # Differences of gradients are noisy in low precision and at kinks; where they are, they prove nothing.
        doubt = max(max(0.1, 10 * self._differences.error) * max(exact, size), self._differences.noise)
        if self._compared and not self.objective.needs_backward:
            return bool(apart <= max(0.1 * max(exact, size), self._differences.noise))
        if self.objective.needs_backward or apart > doubt:
            self._missed = None if self.objective.needs_backward else missed
            raise _SilentlyWrong("a double backward leaves out part of the model without an error")
        return True

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
        precision, reach = self.objective.precision.choice, self._differences.reach
        return replace(self._learned, hvp=self.method, precision=precision, reach=reach)

    def slope_along(self, vector: Vector) -> float:
        """∇L·v at the present weights; free where the graph of an exact product is kept."""
        graph = self._kept
        if graph is None:
            return self.inner.dots([(self.objective.gradient()[1], vector)])[0]
        held = [(g.detach(), v) for g, v in zip(graph.gradient, vector, strict=True) if g is not None]
        slope = self.inner.dots([([g for g, _ in held], [v for _, v in held])])[0]
        ranks = self.objective.ranks
        return slope if ranks is None else ranks.mean(slope)

    def gradient(self, dear: bool = True) -> Vector | None:
        """∇L at the present weights, a new vector: free where the graph of an exact product is kept.

        Elsewhere it is computed, or ``None`` unless ``dear``.
        """
        graph = self._kept
        if graph is None:
            return self.objective.gradient()[1] if dear else None
        gradient = owned([None if g is None else g.detach().clone() for g in graph.gradient], self.objective.weights)
        if self.objective.ranks is not None:
            self.objective.ranks.mean_of(graph.loss, gradient)
        return gradient

    @property
    def _kept(self) -> _Graph | None:
        """The graph of the last product, where all processes have kept theirs."""
        return self._graph if self.objective.on_all(self._graph is not None) else None

    def release(self) -> None:
        """Drop the kept graph; to be called before the weights move."""
        self._graph = None

    def forget_batches(self) -> None:
        """To be called before products of other batches, which may have kinks of their own."""
        self.release()
        self._differences.forget_batches()

    def _may_be_met(self, error: RuntimeError) -> bool:
        """Whether another way to the product may get around this error."""
        ours = isinstance(error, (MeasurementError, torch.OutOfMemoryError))
        return isinstance(error, _OnAnotherRank) or (not ours and bool(_NO_SECOND_DERIVATIVE.search(str(error))))

    def _next_method(self, error: RuntimeError) -> None:
        text = str(error).splitlines()[0]
        self.release()
        if isinstance(error, _NotFinite):
            self.objective.gradient()  # it may not be finite either, and says so
        if isinstance(error, (_SilentlyWrong, _NotFinite)):
            self._learned.plain_kernels = True  # no other kernel would help
        elif not self._may_be_met(error):
            raise error
        if not self._learned.plain_kernels:
            self._learned.plain_kernels = True
        elif self.rounded or (self._compared and self._is_no_slope()):
            raise MeasurementError(ONLY_ROUNDED.format(why=f"this model has none ({text})")) from error
        elif self._may_fall_back:
            self.method = "gradients"
            self.reason = f"products come from differences of gradients: no second derivative ({text})"
        else:
            raise MeasurementError(
                f"hvp='exact' was asked for, but this model has no second derivative ({text}); use hvp='auto'"
            ) from error

    def _exact_on_all(self, vector: Vector) -> Vector:
        """The exact product, its mean over the processes; where one of them cannot, none of them can."""
        ranks = self.objective.ranks
        if ranks is None:
            return self._exact(vector)
        problem = product = None
        try:
            product = self._exact(vector)
        except RuntimeError as error:
            if not self._may_be_met(error):
                raise
            problem = error
        if ranks.any(problem is not None):
            raise problem or _OnAnotherRank("there is none on another rank")
        assert product is not None
        self.loss = ranks.mean_of(self.loss, product)
        return product

    def _exact(self, vector: Vector) -> Vector:
        pieces = self.objective.pieces
        precision = self.objective.precision
        full = self.objective.in_float32() if precision.full_for_products else contextlib.nullcontext()
        lasting = precision.is_full or not (precision.full_for_products and precision.moves)
        with self._kernels(), full:
            if len(pieces) == 1:
                if self._graph is None:
                    self._graph = self._differentiate(pieces[0][0])
                self.loss = self._graph.loss
                product = self._second(self._graph, vector, keep=lasting)
                if not lasting:  # the weights that the graph leads to are copies, and gone now
                    self.release()
                return product
            total: Vector = []
            self.loss = 0.0
            for piece, share in pieces:
                graph = self._differentiate(piece)
                self.loss += share * graph.loss
                product = self._second(graph, vector, keep=False)
                if total:
                    axpy(share, product, total)
                else:
                    total = product
                    scale(share, total)
            return total

    def _differentiate(self, batch: object) -> _Graph:
        with self.objective.allowance.counted():
            loss = self.objective.forward(batch)
            value = finite(float(loss.detach()))
            grads = torch.autograd.grad(loss, self.objective.params, create_graph=True, allow_unused=True)
        self.objective.grad_evals += 1
        grads = tuple(None if g is None else dense(g) for g in grads)
        live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        return _Graph([grads[i] for i in live], live, grads, value)

    def _second(self, graph: _Graph, vector: Vector, keep: bool) -> Vector:
        grads, live, _, _ = graph
        params = self.objective.params
        if not live:  # the loss is linear in every weight
            return zeros_like(self.objective.weights)
        along = [vector[i].to(g.dtype) for i, g in zip(live, grads, strict=True)]
        product = torch.autograd.grad(grads, params, along, retain_graph=keep, allow_unused=True)
        return owned(product, self.objective.weights)

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        # Around forward *and* backward: checkpointed layers run their forward again inside the backward.
        if not self._learned.plain_kernels:
            yield
            return
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield

    def _from_gradients(self, vector: Vector) -> Vector:
        """By differences; what an exact product is held against, in the kernels that this one needs."""
        with contextlib.nullcontext() if self.method == "gradients" else self._kernels():
            product = self._differences(vector)
        self.loss = self._differences.loss
        return product
