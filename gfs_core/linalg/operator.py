"""Linear operators on vectors, which are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gfs_core.linalg.vectors import Vector, scale

Operator: TypeAlias = Callable[[Vector], Vector]  # v ↦ A·v, a new vector of the same shapes


def negated(operator: Operator) -> Operator:
    """The operator −A: its largest eigenvalue is minus the lowest of A."""

    def product(vector: Vector) -> Vector:
        image = operator(vector)
        scale(-1.0, image)
        return image

    return product
