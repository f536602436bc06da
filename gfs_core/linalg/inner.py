"""Inner products, norms and angles of vectors, which may be spread over processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gfs_core.linalg.vectors import Vector, axpy, bunches, is_half, on_host

Pair: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Sharding:
    """How a vector is spread over processes.

    Attributes:
        shares: of each tensor, one over the number of processes that hold the same part of it.
        total: sums numbers over the processes, up to ``most`` at once. Every process has to call it.
        most: how many.
    """

    shares: Sequence[float]
    total: Callable[[Sequence[float]], list[float]]
    most: int


@dataclass(frozen=True)
class InnerProduct:
    """The Euclidean inner product of vectors of one shape.

    Attributes:
        sharding: how the vectors are spread over processes; each product is then an exchange that all of them make.
            ``None``: this process holds all of their tensors.
    """

    sharding: Sharding | None = None

    @property
    def whole(self) -> bool:
        """Whether this process holds all tensors of a vector: products of some of them alone may be taken."""
        return self.sharding is None

    def dots(self, pairs: Sequence[Pair]) -> list[float]:
        """Inner products of several pairs of vectors, on the host with a single transfer from each device.

        Each tensor's own product is accumulated in its dtype (float32 for half precision), the sum over tensors in
        float64. There is no ``torch._foreach_*`` for inner products: on the CPU one call for each tensor; elsewhere,
        where starting a call takes longer than a small product, tensors are strung together, at most 32 MiB of float32
        at a time.
        """
        if not pairs:
            return []
        how = self.sharding
        if how is None and pairs[0][0][0].device.type != "cpu":
            values = on_host([d for places in bunches(pairs[0][0]) for d in _dots_of_bunch(pairs, places)])
            return [math.fsum(values[i :: len(pairs)]) for i in range(len(pairs))]
        arrived = iter(on_host([_dot(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)]))
        if how is None:
            return [math.fsum(itertools.islice(arrived, len(x))) for x, _ in pairs]
        own = [
            math.fsum(s * v for s, v in zip(how.shares, itertools.islice(arrived, len(x)), strict=True))
            for x, _ in pairs
        ]
        return [t for i in range(0, len(own), how.most) for t in how.total(own[i : i + how.most])]

    def dot(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        """Inner product of two vectors."""
        return self.dots([(x, y)])[0]

    def norm(self, x: Sequence[Tensor]) -> float:
        """Euclidean norm of a vector."""
        return float(self.dot(x, x) ** 0.5)

    def squares(self, x: Sequence[Tensor], groups: Sequence[int], count: int) -> list[float]:
        """The squared length of each group of a vector's tensors, by one multi-tensor call and a single transfer.

        Args:
            x: the vector.
            groups: the group of each tensor, < ``count``.
            count: how many groups there are.
        """
        shares = [1.0] * len(x) if self.sharding is None else self.sharding.shares
        own = [0.0] * count
        for group, share, norm in zip(groups, shares, on_host(list(torch._foreach_norm(list(x)))), strict=True):
            own[group] += share * norm * norm
        if self.sharding is None:
            return own
        most = self.sharding.most
        return [t for i in range(0, count, most) for t in self.sharding.total(own[i : i + most])]

    def mix_in(self, other: Vector | None, length: float, vector: Vector) -> None:
        """``vector += ±length * other / ‖other‖``, in place; nothing for zero or ``None``.

        The sign makes their inner product grow in magnitude: which way an eigenvector points is rounding's choice, and
        ``-vector`` becomes minus the same.
        """
        if other is None:
            return
        square, along = self.dots([(other, other), (other, vector)])
        if 0.0 < square < math.inf:
            axpy(math.copysign(length / math.sqrt(square), along), other, vector)


WHOLE = InnerProduct()  # of vectors that are not spread


def _dots_of_bunch(pairs: Sequence[Pair], places: list[int]) -> list[Tensor]:
    strung: dict[int, Tensor] = {}

    def string(vector: Sequence[Tensor]) -> Tensor:
        if id(vector) not in strung:
            parts = [vector[i].float() if is_half(vector[i]) else vector[i] for i in places]
            strung[id(vector)] = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([p.reshape(-1) for p in parts])
        return strung[id(vector)]

    return [torch.dot(string(x), string(y)) for x, y in pairs]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if is_half(a) or is_half(b):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))
