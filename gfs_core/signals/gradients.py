"""Free signals: norms of the gradient, the weights and the update, and the gradient over its usual size.

Nothing is evaluated: what training has computed is read, by multi-tensor calls. The numbers are read on the host once
they have arrived, so that no step waits for them. Each quantity is known for the whole model and for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from gfs_core.linalg.transfer import Transfer, mark, norms_of
from gfs_core.linalg.vectors import bunches, local
from gfs_core.optimizers.updates import factors_of, has_moved, known, parts_of
from gfs_core.signals.base import Key, Reading

GRAD_NORM = Key("grad_norm", "norm of the gradient of a step, before clipping where that can be had", per_layer=True)
NONFINITE = Key("nonfinite", "share of the gradient's entries that are not finite", per_layer=True)
WEIGHT_NORM = Key("weight_norm", "norm of the trained weights", per_layer=True)
UPDATE_RATIO = Key("update_ratio", "norm of the last update / norm of the weights", per_layer=True)
RMS_RATIO = Key(
    "rms_ratio",
    "root mean square of the gradient over the root of its second moment, of Adam's kind of optimizers: about 1, and "
    "more where the second moment lags behind a growing gradient",
    per_layer=True,
)
KEYS = (GRAD_NORM, NONFINITE, WEIGHT_NORM, UPDATE_RATIO, RMS_RATIO)
SUMMED = ("gradient", "bad", "weights", "update", "moved", "normalised")  # sums that differ between shards

Sums: TypeAlias = dict[str, list[float]]  # a number for each layer, by what was summed over its entries


@dataclass(frozen=True)
class Layout:
    """The trained weights, and the layer that each belongs to.

    Attributes:
        params: the weights.
        layers: the names of the layers.
        places: of each weight, the index of its layer.
        shares: of each weight, one over the number of processes that hold the same part of it.
    """

    params: Sequence[Tensor]
    layers: Sequence[str]
    places: Sequence[int]
    shares: Sequence[float]

    @staticmethod
    def of(params: Sequence[Tensor], layers: Sequence[str], shares: Sequence[float] | None = None) -> Layout:
        """The layout of weights whose layers have these names."""
        names = list(dict.fromkeys(layers))
        index = {name: i for i, name in enumerate(names)}
        return Layout(params, names, [index[name] for name in layers], shares or [1.0] * len(params))

    def squares(self, weights: Iterable[int], norms: Iterable[float], factor: float = 1.0) -> list[float]:
        """The sum of the squares of norms, times ``factor`` each, over the weights of every layer."""
        return self.sums(weights, (factor * norm * factor * norm for norm in norms))

    def sums(self, weights: Iterable[int], numbers: Iterable[float], shared: bool = True) -> list[float]:
        """The sum of numbers over the weights of every layer, of each weight this process's share of it."""
        found = [0.0] * len(self.layers)
        for i, number in zip(weights, numbers, strict=True):
            found[self.places[i]] += number * self.shares[i] if shared else number
        return found


class GradientSample:
    """Norms of the gradient and of the weights, before a step; on the way to the host.

    Args:
        step: optimizer steps taken so far.
        layout: the weights, whose ``grad`` is read.
        scale: the gradient is this factor times the loss's, as with gradient scaling.
        count: count the entries that are not finite on an accelerator too, with two calls for each weight. On the CPU
            they are counted in any case, where there are any.
        clipped_at: the norm to which the gradient has been clipped, if its was larger; ``None``: it was not clipped.

    Attributes:
        transfer: brings the numbers; :meth:`sums` waits for it.
    """

    def __init__(
        self,
        step: int,
        layout: Layout,
        scale: Tensor | float = 1.0,
        count: bool = False,
        clipped_at: float | None = None,
    ) -> None:
        self.step, self.layout, self.clipped_at = step, layout, clipped_at
        self._held = [i for i, p in enumerate(layout.params) if p.grad is not None]
        grads = [_entries(layout.params[i].grad) for i in self._held]
        since = mark(grads)
        norms = norms_of(grads)
        weights = norms_of([local(p) for p in layout.params])
        counts = [_not_finite(g) for g in grads] if count else []
        self.transfer = Transfer([scale, *weights, *norms, *counts], since)
        self._counts: list[float] | None = None
        if grads and all(g.device.type == "cpu" for g in grads):
            broken = [not math.isfinite(norm) for norm in self._norms()]
            self._counts = [float(_not_finite(g)) if b else 0.0 for g, b in zip(grads, broken, strict=True)]

    def sums(self) -> Sums:
        """The sums over each layer; NaN for a number of entries that was not counted."""
        layout, values = self.layout, self.transfer.values()
        every, norms = range(len(layout.params)), self._norms()
        counts = self._counts
        if counts is None:
            counted = values[1 + len(every) + len(norms) :]
            counts = counted or [0.0 if math.isfinite(norm) else math.nan for norm in norms]
        return {
            "gradient": layout.squares(self._held, norms, 1 / values[0] if values[0] else math.nan),
            "entries": layout.sums(self._held, (float(layout.params[i].numel()) for i in self._held), shared=False),
            "bad": layout.sums(self._held, counts),
            "weights": layout.squares(every, values[1 : 1 + len(every)]),
        }

    def _norms(self) -> list[float]:
        first = 1 + len(self.layout.params)
        return self.transfer.values()[first : first + len(self._held)]


class UpdateSample:
    """Norms of the update and of the normalised gradient, right after a step; on the way to the host.

    Args:
        step: optimizer steps taken before that step.
        layout: the weights.
        optimizer: the torch optimizer, whose state is read.

    Attributes:
        transfer: brings the numbers; :meth:`sums` waits for it.
    """

    def __init__(self, step: int, layout: Layout, optimizer: Optimizer) -> None:
        self.step, self.layout, self.clipped_at = step, layout, None
        self._finish: list[Callable[[Sums, list[float]], None]] = []
        numbers: list[Tensor | float] = []
        since = mark(layout.params)
        index = {id(p): i for i, p in enumerate(layout.params)}
        for group in optimizer.param_groups if known(optimizer) else ():
            own = [p for p in group["params"] if id(p) in index and has_moved(optimizer, group, p)]
            for places in bunches([local(p) for p in own]):
                some = [own[i] for i in places]
                self._add(optimizer, group, some, [index[id(p)] for p in some], numbers)
        skipped = getattr(optimizer, "found_inf", None)  # set while a fused optimizer steps under gradient scaling
        self._skipped = len(numbers)
        self.transfer = Transfer([*numbers, 0.0 if skipped is None else skipped], since)

    def sums(self) -> Sums:
        """The sums over each layer; empty if gradient scaling skipped the step."""
        sums: Sums = {}
        values = self.transfer.values()
        for finish in () if values[self._skipped] else self._finish:
            finish(sums, values)
        return sums

    def _add(
        self, optimizer: Optimizer, group: dict[str, Any], params: list[Tensor], places: list[int], numbers: list[Any]
    ) -> None:
        layout, kind, betas = self.layout, type(optimizer), {k: group[k] for k in ("betas",) if k in group}
        parts = parts_of(optimizer, group, params)

        def take(scalars: Sequence[Tensor | float]) -> slice:
            numbers.extend(scalars)
            return slice(len(numbers) - len(scalars), len(numbers))

        update, normalised = (None if part is None else take(norms_of(part)) for part in parts)
        weights = take(norms_of([local(p) for p in params]))
        steps = take([optimizer.state.get(p, {}).get("step", 0.0) for p in params])
        rate = take([group["lr"]])

        def finish(sums: Sums, values: list[float]) -> None:
            factors = [factors_of(kind, betas, values[rate][0], step) for step in values[steps]]

            def put(name: str, by_weight: Iterable[float], shared: bool = True) -> None:
                new, held = layout.sums(places, by_weight, shared), sums.get(name)
                sums[name] = new if held is None else [a + b for a, b in zip(held, new, strict=True)]

            if update is not None:
                put("update", ((f * v) * (f * v) for (f, _), v in zip(factors, values[update], strict=True)))
                put("moved", (v * v for v in values[weights]))
            if normalised is not None:
                put("normalised", ((f * v) * (f * v) for (_, f), v in zip(factors, values[normalised], strict=True)))
                put("counted", (float(local(p).numel()) for p in params), shared=False)

        self._finish.append(finish)


def readings_of(step: int, layers: Sequence[str], sums: Mapping[str, Sequence[float]]) -> list[Reading]:
    """Readings of the whole model and then of each layer, of the quantities whose sums are given.

    A norm may be not finite. A number of entries that was not counted gives a reading without a value.
    """
    found: list[Reading] = []
    for key, over, under, root in _QUOTIENTS:
        tops, bottoms = sums.get(over), sums.get(under)
        if tops is None or bottoms is None:
            continue
        rows = [("", math.fsum(tops) if all(map(math.isfinite, tops)) else sum(tops), sum(bottoms))]
        rows += zip(layers, tops, bottoms, strict=True)
        for layer, top, bottom in rows:
            if not bottom:
                continue  # no gradient here, or nothing that an optimizer has moved
            value = top if key is GRAD_NORM or key is WEIGHT_NORM else top / bottom
            if key is NONFINITE and math.isnan(value):
                found.append(Reading(key, step, None, layer, _UNCOUNTED))
            else:
                found.append(Reading(key, step, math.sqrt(value) if root else value, layer))
    return found


_UNCOUNTED = "the gradient has entries that are not finite; on an accelerator they are counted from the next step on"
_QUOTIENTS = (  # sums of squares over what they are summed over, or over other squares
    (GRAD_NORM, "gradient", "entries", True),
    (NONFINITE, "bad", "entries", False),
    (WEIGHT_NORM, "weights", "weights", True),
    (UPDATE_RATIO, "update", "moved", True),
    (RMS_RATIO, "normalised", "counted", True),
)


def _entries(grad: Tensor | None) -> Tensor:
    """The entries of a gradient, this process's of a sharded one, those that are held of a sparse one."""
    assert grad is not None
    if grad.layout is torch.strided:
        return local(grad)
    return local(grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.to_dense())


def _not_finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().logical_not_().sum()
