"""The operator whose largest eigenvalue decides whether an optimizer is stable: S·(H + shift)·S with a diagonal S."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gfs_core.linalg.vectors import Vector, bunches, clone, local, multiply


class Curvature(Protocol):
    """The Hessian of a loss at the present weights, with the loss's gradient."""

    def __call__(self, vector: Vector, /) -> Vector:
        """H·v, a new vector."""

    def along(self, make: Callable[[], Vector]) -> Vector:
        """H·v of the vector that ``make`` returns, each time a new one."""

    def gradient(self, compute: bool = True) -> Vector | None:
        """∇L, a new vector; ``None`` where it is not free and ``compute`` is false."""


class Diagonal:
    """The diagonal of S, or a power of it: an iterable of one tensor per parameter, computed during the iteration.

    A list of the tensors would hold a copy of the weights for the whole measurement. To compute them is cheap compared
    with a gradient.

    Args:
        params: the parameters, with the relative scale of each.
        moments: a function that gives the diagonal P of S = P^-1/2 for some parameters, new tensors. It gives ``None``
            for one that the optimizer has not stepped yet; the entries of S are then 0. Without the function, S holds
            the relative scales alone.
        power: exponent of every entry.
    """

    def __init__(
        self,
        params: Sequence[tuple[Tensor, float]],
        moments: Callable[[Sequence[Tensor]], list[Tensor | None]] | None = None,
        power: int = 1,
    ) -> None:
        self.params, self.moments, self.power = params, moments, power

    def __iter__(self) -> Iterator[Tensor | float]:
        for places in bunches([local(p) for p, _ in self.params]):
            yield from self._of([self.params[i] for i in places])

    def _of(self, entries: Sequence[tuple[Tensor, float]]) -> list[Tensor | float]:
        """A few tensors of the diagonal, by calls that take them together."""
        if self.moments is None:
            return [relative**self.power for _, relative in entries]
        diagonal: list[Tensor | float] = [0.0] * len(entries)
        found = {i: local(m) for i, m in enumerate(self.moments([p for p, _ in entries])) if m is not None}
        if not found:
            return diagonal
        torch._foreach_sqrt_(list(found.values()))
        torch._foreach_reciprocal_(list(found.values()))
        roots = [root.to(local(entries[i][0]).dtype) for i, root in found.items()]
        torch._foreach_mul_(roots, [entries[i][1] for i in found])
        torch._foreach_pow_(roots, self.power)
        for i, root in zip(found, roots, strict=True):
            diagonal[i] = root
        return diagonal

    def squared(self) -> Diagonal:
        """The diagonal of S²: for S = P^-1/2 that is P⁻¹."""
        return Diagonal(self.params, self.moments, 2 * self.power)


class Preconditioned:
    """The operator S·(H + shift)·S with a diagonal S: curvature in the coordinates of the optimizer.

    Args:
        hessian: H.
        scale: the diagonal of S per parameter, a tensor of its shape or a number; ``None``: the identity.
        shift: coupled weight decay per parameter, added to the diagonal of H; ``None``: none.
    """

    def __init__(
        self, hessian: Curvature, scale: Iterable[Tensor | float] | None, shift: Sequence[float] | None = None
    ) -> None:
        self.hessian, self.scale, self.shift = hessian, scale, shift

    def __call__(self, vector: Vector) -> Vector:
        """S·(H + shift)·S·v."""
        return self.along(lambda: clone(vector))

    def along(self, make: Callable[[], Vector]) -> Vector:
        """The same of the vector that ``make`` returns, each time a new one."""

        def inner() -> Vector:
            scaled = make()
            if self.scale is not None:
                multiply(self.scale, scaled)
            return scaled

        product = self.hessian.along(inner)
        if self.shift is not None:
            for h, v, shift in zip(product, inner(), self.shift, strict=True):
                h.add_(v, alpha=shift)
        if self.scale is not None:
            multiply(self.scale, product)
        return product

    def gradient(self, compute: bool = True) -> Vector | None:
        """S·∇L, the gradient in the coordinates of the optimizer; ``None`` as in :meth:`Curvature.gradient`."""
        gradient = self.hessian.gradient(compute)
        if self.scale is not None and gradient is not None:
            multiply(self.scale, gradient)
        return gradient
