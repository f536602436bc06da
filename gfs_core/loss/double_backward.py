"""Hessian-vector products by double backward: exact, where the loss has a second derivative.

One forward and one backward with ``create_graph=True``, then one more backward per product (Pearlmutter 1994). The
graph is kept while the weights stay where they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfs_core.errors import MeasurementError
from gfs_core.linalg.vectors import Vector, axpy, dense, owned, scale, zeros_like
from gfs_core.loss.objective import Objective, finite

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|does not currently support double backward|use_reentrant=True"
    r"|not compatible with \.grad\(\)|once_differentiable|Trying to backward through the graph a second time"
    r"|don't support automatic differentiation|donated buffers",
    re.DOTALL,
)


class NoExactProduct(RuntimeError):
    """A double backward gives no product, or a wrong one.

    Attributes:
        other_kernels: whether attention's plain kernel, and compiled code run eagerly, may give it.
    """

    def __init__(self, why: str, other_kernels: bool = False) -> None:
        super().__init__(why)
        self.other_kernels = other_kernels


class _Graph(NamedTuple):
    """A differentiable gradient: its tensors that depend on the weights, their places, and all of them; the loss."""

    live: list[Tensor]
    places: list[int]
    gradient: Sequence[Tensor | None]
    loss: float


class DoubleBackward:
    """v ↦ H·v of ``objective`` at the present weights, the mean over the processes that measure together.

    Args:
        objective: the loss on the probe.
        plain_kernels: whether attention takes its plain kernel, and compiled code runs eagerly. Fused attention and
            compiled code have no second derivative.

    Attributes:
        plain_kernels: as given; it may be changed between products.
        loss: the loss at the last product.

    Raises:
        NoExactProduct: from a product, where the loss has no second derivative, on some process.
    """

    def __init__(self, objective: Objective, plain_kernels: bool) -> None:
        self.objective, self.plain_kernels = objective, plain_kernels
        self.loss = 0.0
        self._graph: _Graph | None = None

    def __call__(self, vector: Vector) -> Vector:
        """H·v, a new vector of the same shapes."""
        problem = product = None
        try:
            product = self._product(vector)
        except RuntimeError as error:
            self.release()
            ours = isinstance(error, (MeasurementError, torch.OutOfMemoryError))
            if ours or not _NO_SECOND_DERIVATIVE.search(str(error)):
                raise
            problem = error
        if not self.objective.on_all(problem is None):
            self.release()
            why = str(problem).splitlines()[0] if problem else "there is none on another rank"
            raise NoExactProduct(why, other_kernels=True) from problem
        assert product is not None
        if self.objective.ranks is not None:
            self.loss = self.objective.ranks.mean_of(self.loss, product)
        return product

    def release(self) -> None:
        """Drop the kept graph; to be called before the weights move."""
        self._graph = None

    @property
    def kept(self) -> tuple[Sequence[Tensor | None], float] | None:
        """The gradient and the loss on this process; ``None`` where some process has not kept the graph."""
        graph = self._graph if self.objective.on_all(self._graph is not None) else None
        return None if graph is None else (graph.gradient, graph.loss)

    @property
    def is_cut(self) -> bool:
        """Whether the gradient of some weight has no graph, as where a layer drops out of a double backward."""
        return self._graph is not None and any(g is not None and not g.requires_grad for g in self._graph.gradient)

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """The kernels of the products, for what is compared with them.

        Around forward *and* backward: checkpointed layers run their forward again inside the backward.
        """
        if not self.plain_kernels:
            yield
            return
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield

    def _product(self, vector: Vector) -> Vector:
        pieces = self.objective.pieces
        precision = self.objective.precision
        full = self.objective.in_float32() if precision.full_for_products else contextlib.nullcontext()
        lasting = precision.is_full or not (precision.full_for_products and precision.moves)
        with self.kernels(), full:
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
