"""A running estimate for every block of the Hessian: of an ensemble, of twin critics.

Where the loss is a sum over networks that share no weight, the Hessian has a block for each. A product never leads out
of its block, so one direction follows one network, and another network's eigenvalue may overtake it for long before
what is mixed into the direction has grown. But a single product H·v with v = (v₁, v₂, …), a direction in every block,
is (H₁·v₁, H₂·v₂, …): it turns all directions at once. So every block has its estimate
(:class:`~gfs_core.linalg.power.RunningSharpness`), for the same number of products. The largest is that of the whole.

Products show which weights share a block: a tensor belongs to it where the product of a vector in the block is not
exactly zero. For an ordinary network, whose weights all share one, a single product shows that. Now and then it is
checked whether the blocks are still apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gfs_core.linalg.operator import Operator
from gfs_core.linalg.power import RunningSharpness, Sample
from gfs_core.linalg.vectors import Vector, nonzero, random_like, zeros_like

_MOST_BLOCKS = 8  # the last of them takes in what is left over
_START_TURNS = 4  # turns of the directions when blocks are found: only the first direction comes from a solver
_LOOK_EVERY = 50  # calls between two checks that the blocks are still apart


def uncoupled(sample: Sample, most: int = _MOST_BLOCKS) -> list[list[int]]:
    """The blocks of the Hessian, as places of the tensors in each, by products with vectors in a few of them.

    Args:
        sample: has the products, and tensors with the shapes of a vector.
        most: blocks to look for at most, > 0.

    Returns:
        At least one block; each place in exactly one, that of the largest tensor with curvature first. Tensors without
        any are in one of them.
    """
    like = sample.like

    def reached(places: set[int]) -> set[int]:
        def drawn() -> Vector:
            vector = zeros_like(like)
            for i in places:
                (vector[i],) = random_like([vector[i]], torch.Generator().manual_seed(i))
            return vector

        return _reached(sample, drawn)

    left, blocks, still = set(range(len(like))), list[set[int]](), set[int]()
    while left and len(blocks) < most:
        block, new = set[int](), {max(left, key=lambda i: (like[i].numel(), -i))}
        while new and block | new != left:
            block |= new
            new = (found := reached(block) & left) - block
            if not found:  # no curvature along this tensor: of the others, only those that have any are looked at
                curved = reached(left) - block
                still |= left - curved
                left &= curved
                block, new = set(), set()
        if block | new:
            blocks.append(block | new)
            left -= blocks[-1]
    if not blocks:
        return [list(range(len(like)))]
    blocks[-1 if left else 0] |= left | still
    return [sorted(block) for block in blocks]


def _reached(sample: Sample, make: Callable[[], Vector]) -> set[int]:
    """The places of the tensors in which the product is not exactly zero."""
    return {i for i, some in enumerate(nonzero(sample.without_holding(make))) if some}


def _only(block: Sequence[int], vector: Vector) -> Vector:
    """The vector in one block, and zero elsewhere."""
    held = zeros_like(vector)
    for i in block:
        held[i] = vector[i]
    return held


class RunningBlocks:
    """The estimates of all blocks, and all they need from one call to the next.

    Attributes:
        blocks: the places of the tensors of each; ``None`` before they have been looked for.
    """

    def __init__(self) -> None:
        self.blocks: list[list[int]] | None = None
        self._estimates = [RunningSharpness()]
        self._calls = 0

    @property
    def value(self) -> float | None:
        """The largest of the present estimates; ``None`` before the first call."""
        return max((e.value for e in self._estimates if e.value is not None), default=None)

    @property
    def vector(self) -> Vector | None:
        """The present directions together, in the order of the weights: the tensors themselves."""
        return self._joined([e.vector for e in self._estimates])

    def _joined(self, parts: Sequence[Vector | None]) -> Vector | None:
        """The vector that is made of one for each block."""
        if self.blocks is None or len(self.blocks) == 1:
            return parts[0]
        held: dict[int, Tensor] = {}
        for block, part in zip(self.blocks, parts, strict=True):
            assert part is not None
            held |= dict(zip(block, part, strict=True))
        return [held[i] for i in range(len(held))]

    def restart(self) -> None:
        """Forget everything."""
        self.blocks, self._estimates, self._calls = None, [RunningSharpness()], 0

    @property
    def complete(self) -> bool:
        """Whether there is an estimate for each block; not so where an update broke off between two of them."""
        return len(self._estimates) == len(self.blocks or [0])

    @property
    def settled(self) -> bool:
        """Whether all directions have been turned often enough for a value."""
        return all(e.settled for e in self._estimates)

    @property
    def wants_pair(self) -> bool:
        """Whether the next product is to be one of a pair."""
        return any(e.wants_pair for e in self._estimates)

    def noisy(self, weight: float) -> float | None:
        """The largest of the blocks' :meth:`~gfs_core.linalg.power.RunningSharpness.noisy`: each is a system alone."""
        return max((n for e in self._estimates if (n := e.noisy(weight)) is not None), default=None)

    def bound(self, weight: float) -> float | None:
        """The largest of the blocks' :meth:`gfs_core.linalg.power.RunningSharpness.bound`."""
        return max((b for e in self._estimates if (b := e.bound(weight)) is not None), default=None)

    def update(self, sample: Sample) -> list[float]:
        """Turn all directions by one product; see :meth:`gfs_core.linalg.power.RunningSharpness.update`.

        The second call looks for the blocks.

        Returns:
            A Rayleigh quotient for each block, to be taken in by :meth:`average`.
        """
        self._calls += 1
        if self._calls == 2 and len(sample.like) > 1 and sample.inner.whole:
            self._divide(sample)
        elif self.blocks is not None and len(self.blocks) > 1 and self._calls % _LOOK_EVERY == 0:
            self._look_again(sample)
        if self.blocks is None or len(self.blocks) == 1:
            return [self._estimates[0].update(sample)]
        return self._turn(self.blocks, sample)

    def average(
        self, quotients: Sequence[float], relative_loss: float | None = None, stands_for: float = 1.0
    ) -> float | None:
        """Take in the quotients of one :meth:`update`.

        Returns:
            The new estimate; ``None`` while a direction settles, or the estimate is not positive.
        """
        if not self.settled:
            return None
        values = [e.average(q, relative_loss, stands_for) for e, q in zip(self._estimates, quotients, strict=True)]
        return max((v for v in values if v is not None), default=None)

    def _turn(self, blocks: list[list[int]], sample: Sample) -> list[float]:
        """Turn the direction of every block by one product of all of them together, or a pair."""
        vector = self.vector
        assert vector is not None
        product = sample.operator(vector)
        second = None if sample.other is None else sample.other(vector)
        drawn: dict[bool, Vector | None] = {}

        def gradient_in(block: list[int]) -> Callable[[bool], Vector | None] | None:
            def part(compute: bool) -> Vector | None:
                assert sample.gradient is not None
                if compute not in drawn:
                    drawn[compute] = sample.gradient(compute)
                whole = drawn[compute]
                return None if whole is None else [whole[i] for i in block]

            return None if sample.gradient is None else part

        def within(whole: Vector, block: list[int]) -> Operator:
            return lambda _: [whole[i] for i in block]

        return [
            estimate.update(
                replace(
                    sample,
                    operator=within(product, block),
                    like=[sample.like[i] for i in block],
                    other=None if second is None else within(second, block),
                    gradient=gradient_in(block),
                )
            )
            for block, estimate in zip(blocks, self._estimates, strict=True)
        ]

    def _divide(self, sample: Sample) -> None:
        """Look for blocks; the first direction goes on in the one that holds most of it, the others start."""
        self.blocks = uncoupled(sample)
        if len(self.blocks) == 1:
            return
        (first,) = self._estimates
        whole = first.vector
        assert whole is not None
        sizes = [sample.inner.norm([whole[i] for i in block]) for block in self.blocks]
        noise = random_like(whole, torch.Generator().manual_seed(1))
        self._estimates = []
        for block, size in zip(self.blocks, sizes, strict=True):
            estimate = first if size == max(sizes) else RunningSharpness()
            estimate.vector = [whole[i] if estimate is first else noise[i] for i in block]
            self._estimates.append(estimate)
        for _ in range(_START_TURNS):
            quotients = self._turn(self.blocks, replace(sample, other=None))
        for estimate, quotient in zip(self._estimates, quotients, strict=True):
            if estimate is not first:
                estimate.value = quotient

    def _look_again(self, sample: Sample) -> None:
        """One product with the direction of one block, each block in its turn: what it reaches belongs to it."""
        assert self.blocks is not None
        assert self.vector is not None
        block, vector = self.blocks[self._calls // _LOOK_EVERY % len(self.blocks)], self.vector
        if _reached(sample, lambda: _only(block, vector)) <= set(block):
            return
        largest = max(range(len(self.blocks)), key=lambda k: self._estimates[k].value or 0.0)
        estimate = self._estimates[largest]
        estimate.vector = _only(self.blocks[largest], vector)
        self.blocks, self._estimates = [list(range(len(vector)))], [estimate]

    def state_dict(self) -> dict[str, Any]:
        """Everything, loadable with ``weights_only=True``."""
        states = [e.state_dict() for e in self._estimates]
        vector = self._joined([s.pop("vector") for s in states])
        return {"vector": vector, "blocks": self.blocks, "calls": self._calls, "estimates": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            ValueError: the blocks do not hold each tensor of the vector once.
        """
        blocks, vector = state["blocks"], state["vector"]
        places = list(range(len(vector)))
        if sorted(i for block in blocks or [places] for i in block) != places:
            raise ValueError("its blocks do not hold every weight once")
        estimates = []
        for block, held in zip(blocks or [places], state["estimates"], strict=True):
            estimate = RunningSharpness()
            estimate.load_state_dict({**held, "vector": [vector[i] for i in block]})
            estimates.append(estimate)
        self.blocks = None if blocks is None else [[int(i) for i in block] for block in blocks]
        self._calls, self._estimates = int(state["calls"]), estimates
