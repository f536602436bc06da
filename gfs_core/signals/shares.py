"""Where the curvature sits: the share of an eigenvector in each layer, ‖v_layer‖² / ‖v‖²."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gfs_core.linalg.inner import InnerProduct
from gfs_core.linalg.vectors import Vector
from gfs_core.signals.base import Key, Reading

CURVATURE_SHARE = Key(
    "curvature_share",
    "share of the squared length of the top eigenvector, of the preconditioned one where there is one, that lies in a "
    "layer; loggers get three layers",
    per_layer=True,
    only_layers=True,
)
RUNNING_CURVATURE_SHARE = Key(
    "running_curvature_share",
    "the same of the running estimate's direction",
    per_layer=True,
    only_layers=True,
)
SHOWN = 3  # layers that loggers get
_CLEARLY = 2.0  # factor by which another layer's share has to be larger before loggers get it instead


class LayerShares:
    """Readings of the shares of a vector in the layers.

    The history gets every layer. Loggers get three, each under its own name, so that a chart is of one layer. Those are
    the largest at first, and they stay: a layer takes the place of the smallest of them once its share is twice as
    large. Otherwise two layers with about the same share would alternate, and each would get a chart with gaps.

    Args:
        key: of the readings.

    Attributes:
        shown: the layers that loggers get.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.shown: list[str] = []

    def readings(self, step: int, vector: Vector, layers: Sequence[str], inner: InnerProduct) -> list[Reading]:
        """Readings of all layers; none if the vector has no length. With sharded vectors all processes call it.

        Args:
            step: optimizer steps taken so far.
            vector: a vector over the trained weights.
            layers: the layer of each weight.
            inner: the inner product of such vectors.
        """
        shares = _shares(vector, layers, inner)
        self._choose(shares)
        return [
            Reading(self.key if layer in self.shown else self.key.unlogged, step, share, layer)
            for layer, share in shares.items()
        ]

    def _choose(self, shares: Mapping[str, float]) -> None:
        self.shown = [layer for layer in self.shown if layer in shares]
        for layer, share in sorted(shares.items(), key=lambda item: -item[1]):
            if layer in self.shown:
                continue
            if len(self.shown) < SHOWN:
                self.shown.append(layer)
                continue
            least = min(self.shown, key=lambda shown: shares[shown])
            if share > _CLEARLY * shares[least]:
                self.shown[self.shown.index(least)] = layer

    def state(self) -> list[str]:
        """The layers that loggers get."""
        return list(self.shown)

    def load(self, state: Any) -> None:
        """Go on where :meth:`state` left off."""
        self.shown = [str(layer) for layer in state]


def _shares(vector: Vector, layers: Sequence[str], inner: InnerProduct) -> dict[str, float]:
    """The share of the vector's squared length in each layer, in the order of the layers; empty for a zero vector."""
    names = list(dict.fromkeys(layers))
    index = {name: place for place, name in enumerate(names)}
    squares = inner.squares(vector, [index[layer] for layer in layers], len(names))
    whole = math.fsum(squares)
    return {name: square / whole for name, square in zip(names, squares, strict=True)} if 0 < whole < math.inf else {}
