"""The loss on the probe, as a function of the weights in place.

There is no functional copy of the model: hooks, tied weights, quantised layers and framework wrappers keep
working, because what is evaluated is the user's own module with its own parameters.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gfs_core.errors import MeasurementError, NoLoss
from gfs_core.linalg.inner import WHOLE
from gfs_core.linalg.vectors import Vector, axpy, clone, copy, local, owned, scale, spread
from gfs_core.loss.batches import copied, pieces
from gfs_core.loss.hooks import silent_accumulation
from gfs_core.loss.memory import NO_LIMITS, Allowance, Limits
from gfs_core.loss.precision import Precision
from gfs_core.loss.processes import Processes
from gfs_core.loss.snapshot import StateSnapshot

T = TypeVar("T")
LossFn = Callable[[nn.Module, Any], Tensor]

_NEEDS_BACKWARD = re.compile(r"use_reentrant=True|backward\(\) must be called|not compatible with \.grad\(\)")


class Objective:
    """Mean of ``loss_fn(model, batch)`` over ``batches``.

    Args:
        model: the module whose parameters the loss depends on.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor: the mean over the batch.
        batches: the probe. With several batches one graph is alive at a time.
        params: the space in which curvature is measured; those with ``requires_grad`` count, each once.
            By default all parameters of ``model``.
        isolation: rewound before every evaluation, so that all evaluations are the same function.
        precision: how the loss is computed; ``None``: as it comes.
        ranks: the processes over whose losses the mean is taken as well; each evaluation is an exchange, and all of
            them make it. ``None``: this process alone.
        limits: what an evaluation may hold at once.

    Raises:
        MeasurementError: where there is nothing to measure.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Any],
        params: Sequence[Tensor] | None = None,
        isolation: StateSnapshot | None = None,
        ranks: Processes | None = None,
        precision: Precision | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        given = list(model.parameters()) if params is None else params
        self.params: Vector = list({id(p): p for p in given if p.requires_grad}.values())
        if not self.params:
            raise MeasurementError("the model has no trainable parameter: every `requires_grad` is False")
        if not batches:
            raise MeasurementError("the probe is empty; give at least one batch")
        self.model, self.loss_fn, self.isolation, self.limits = model, loss_fn, isolation, limits
        self._not_copied: list[Any] = [*model.modules(), *model.parameters(), *model.buffers()]
        self.batches = batches
        self.ranks = ranks
        self.allowance = Allowance(limits.graph, self.params)
        self.precision = Precision("training", model, self.params) if precision is None else precision
        self.weights: Vector = [local(p) for p in self.params]  # what is moved, and the shape of every vector
        self.sharded = any(hasattr(p, "to_local") for p in self.params)
        if ranks is None and any(spread(p) for p in self.params):
            raise MeasurementError(
                "the weights are sharded over several processes: measure with a StabilityMonitor or a callback"
            )
        self.inner = WHOLE if ranks is None else ranks.inner_product(self.params)
        self.padding = [] if self.sharded else _padding_rows(model, self.params)
        self.grad_evals = 0
        self.loss_eps = 0.0  # unit roundoff of the last loss
        self.needs_backward = self.sharded  # gradients only arrive through .backward(): re-entrant checkpointing, FSDP
        self.losses: list[float] = []  # of the pieces at the last gradient, on this process
        self.draw = (
            0  # 0: every evaluation has the same random state; n > 0: the next has the n-th of a series, and n goes up
        )
        self._unused_are_unused = False

    @property
    def batches(self) -> Sequence[Any]:
        """The probe."""
        return self._batches

    @batches.setter
    def batches(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self.pieces = pieces(batches, self.limits.examples)

    def on_all(self, flag: bool) -> bool:
        """Whether it is so on all processes that measure together."""
        return flag if self.ranks is None else not self.ranks.any(not flag)

    @property
    def eps(self) -> float:
        """Unit roundoff of the precision in which the loss is computed now."""
        return self.precision.eps or torch.finfo(self.weights[0].dtype).eps

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """The loss is computed in float32 here, unless training's precision is asked for (:class:`Precision`).

        What moves half-precision weights is lost at the end, so a whole flow stays inside.
        """
        if not (self.precision.proven or self.sharded):  # a forward pass alone would leave gathered weights behind
            self._try_float32()
        with contextlib.ExitStack() as stack:
            if self.precision.moves:
                stack.callback(self._locate)
            stack.enter_context(self.precision.full())
            if self.precision.moves:
                self._locate()
            yield

    def _locate(self) -> None:
        self.weights = [local(p) for p in self.params]

    def _try_float32(self) -> None:
        """Settle, on all processes, whether the loss works in float32; where not, all is in training's precision."""
        problem: Exception | None = None
        with self.precision.full():
            try:
                self.forward(self.pieces[0][0])
            except (MeasurementError, torch.OutOfMemoryError):
                raise  # precision is not the cause
            except Exception as error:
                problem = error
        failed = problem is not None if self.ranks is None else self.ranks.any(problem is not None)
        self.precision.proven = True
        if failed:
            self.precision.choice = "training"
            text = str(problem).splitlines()[0] if problem else "on another rank"
            self.precision.reason = f"the loss fails in float32 ({text}); all is measured in training's precision"

    def forward(self, batch: Any) -> Tensor:
        """The loss on one batch, with its graph.

        Raises:
            NoLoss: it is ``None``.
            MeasurementError: the loss is not a 0-dim tensor with a graph.
        """
        if self.isolation is not None:
            self.isolation.rewind(self.params)
            if self.draw:
                self.isolation.shift(self.draw)
                self.draw += 1
        own = self.precision.of(copied(batch, self._not_copied))  # the loss may do with its batch what it likes
        watching = contextlib.nullcontext() if self.isolation is None else self.isolation.watching()
        with torch.enable_grad(), self.allowance.counted(), watching:
            loss = self.loss_fn(self.model, own)
        if self.isolation is not None:
            self.isolation.evaluated()
        if loss is None:
            raise NoLoss("the loss is None, as of a batch that training skips: nothing is measured on such a batch")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise MeasurementError(f"the loss function must return a 0-dim tensor, got {got}")
        if not loss.requires_grad:
            raise MeasurementError("the loss does not depend on any trainable parameter (no graph)")
        for p in self.params:
            if not p.requires_grad:  # the loss has frozen it for this step: not in the graph, so its gradient is zero
                p.requires_grad_(True)
        self.loss_eps = max(self.eps, torch.finfo(loss.dtype).eps)
        return loss.reshape(())

    def gradient(self) -> tuple[float, Vector]:
        """Loss and gradient at the present weights; unused parameters have gradient zero.

        Raises:
            MeasurementError: the loss or the gradient is not finite.
        """
        total = 0.0
        out: Vector = []
        self.losses = []
        for piece, share in self.pieces:
            loss, grads = self._differentiate(piece)
            self.losses.append(loss)
            total += share * loss
            if out:
                axpy(share, grads, out)
            else:
                out = grads
                if share != 1.0:
                    scale(share, out)
            del grads  # before those of the next piece
        self.grad_evals += 1
        value = total
        if self.ranks is not None:  # FSDP has exchanged the gradients of what it shards
            own = [g for g, p in zip(out, self.params, strict=True) if not hasattr(p, "to_local")]
            value = self.ranks.mean_of(value, own)
        finite(value)
        if not math.isfinite(self.inner.norm(out)):
            raise MeasurementError(self._what_is_not_finite(value, out))
        return value, out

    def _what_is_not_finite(self, loss: float, gradient: Vector) -> str:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for i, (p, g) in enumerate(zip(self.params, gradient, strict=True)):
            if bad := int((~g.isfinite()).sum()):
                name = names.get(id(p), f"parameter {i} of the optimizer")
                return (
                    f"the gradient of `{name}` is not finite in {bad} of {g.numel()} entries, while the loss is "
                    f"({loss:.4g}): a root, norm or logarithm of zero in the loss?"
                )
        return f"the gradient is too long for its precision, while the loss is finite ({loss:.4g})"

    def loss(self) -> float:
        """The loss at the present weights, without its gradient.

        Raises:
            MeasurementError: it is not finite.
        """
        try:
            value = sum(share * float(self.forward(piece).detach()) for piece, share in self.pieces)
        finally:
            if self.sharded:  # without a backward FSDP keeps gathered weights, which the next step would not change
                for module in self.model.modules():
                    reshard: Any = getattr(module, "reshard", None)
                    if reshard is not None:
                        reshard()
        return finite(value if self.ranks is None else self.ranks.mean(value))

    def on_both_sides(self, step: float, vector: Vector, evaluate: Callable[[], T]) -> tuple[T, T]:
        """What ``evaluate`` gives at the weights plus, and minus, ``step`` times ``vector``; they are put back then."""
        held = clone(self.weights)
        try:
            axpy(step, vector, self.weights)
            ahead = evaluate()
            copy(held, self.weights)
            axpy(-step, vector, self.weights)
            return ahead, evaluate()
        finally:
            copy(held, self.weights)

    def _differentiate(self, batch: Any) -> tuple[float, Vector]:
        if not self.needs_backward:
            loss = self.forward(batch)
            try:
                grads = torch.autograd.grad(loss, self.params, allow_unused=True)
            except RuntimeError as error:
                # Re-entrant checkpointing forbids torch.autograd.grad; only .backward() into .grad works there.
                if self.isolation is None or not _NEEDS_BACKWARD.search(str(error)):
                    raise
                self.needs_backward = True
            else:
                # Some layers hide their weights from torch.autograd.grad without any error. Where a weight seems
                # unused, .backward() tells, once, whether it is.
                if self._unused_are_unused or self.isolation is None or all(g is not None for g in grads):
                    return float(loss.detach()), owned(grads, self.weights)
                value, full = self._backward(batch)
                unused = [f for f, g in zip(full, grads, strict=True) if g is None]
                self.needs_backward = any(bool(f.any()) for f in unused)
                self._unused_are_unused = not self.needs_backward
                return value, full
        return self._backward(batch)

    def _backward(self, batch: Any) -> tuple[float, Vector]:
        assert self.isolation is not None
        loss = self.forward(batch)
        with silent_accumulation(self.isolation.parameters):
            loss.backward()  # type: ignore[no-untyped-call]
        held = [p.grad for p in self.params]
        for p in self.isolation.parameters:
            p.grad = None  # the isolation holds the user's own
        return float(loss.detach()), owned([None if g is None else local(g) for g in held], self.weights)


def _padding_rows(model: nn.Module, params: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Rows of embeddings that no gradient reaches: the place of the weight among ``params``, and the row."""
    places = {id(p): i for i, p in enumerate(params)}
    found = []
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            place = places.get(id(module.weight))
            if place is not None:
                found.append((place, int(module.padding_idx)))
    return found


def finite(value: float) -> float:
    """``value``, or an error where it is not finite.

    Raises:
        MeasurementError: it is infinite or not a number.
    """
    if not math.isfinite(value):
        raise MeasurementError(f"the loss on the probe is not finite ({value})")
    return value
