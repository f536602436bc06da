"""Copies of the weights of the latest steps, for signals that look back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gfs_core.linalg.vectors import Vector, clone, fitted


class Iterates:
    """The weights w_s before the optimizer steps s that were kept last.

    With several processes a step is noted even if one of them has no memory for the copy, as the steps must be the same
    on all of them.
    """

    def __init__(self) -> None:
        self._held: dict[int, Vector | None] = {}  # by the number of optimizer steps taken; the latest is the last

    def note(self, step: int) -> None:
        """Note the step without a copy."""
        self._held[step] = None

    def keep(self, step: int, weights: Sequence[Tensor]) -> None:
        """Copy the weights before the optimizer step that is taken at ``step``.

        Raises:
            torch.OutOfMemoryError: there is no memory for the copy.
        """
        self._held.pop(step, None)
        self._held[step] = clone(weights)

    def back_from(self, step: int) -> int:
        """How many steps in a row were kept or noted, counted back from the one that led to ``step``."""
        count = 0
        while step - 1 - count in self._held:
            count += 1
        return count

    def before(self, step: int) -> list[Vector]:
        """The weights before the last step, before the one before it, and so on as far as they are there."""
        found: list[Vector] = []
        while (weights := self._held.get(step - 1 - len(found))) is not None:
            found.append(weights)
        return found

    def drop_older_than(self, step: int) -> None:
        """Free the copies of earlier steps."""
        self._held = {s: weights for s, weights in self._held.items() if s >= step}

    def drop(self) -> None:
        """Free all copies."""
        self._held = {}

    def state_dict(self) -> list[Any]:
        """Pairs of a step and its weights."""
        return [[step, weights] for step, weights in self._held.items()]

    def load_state_dict(self, state: list[Any], params: Sequence[Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; weights that do not fit ``params`` are dropped."""
        self._held = {int(step): fitted(weights, params) for step, weights in state}
