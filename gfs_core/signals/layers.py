"""The layers of a model: its trained weights, grouped by module into a number that can be read in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOST = 40  # layers
_FEW = 10  # with fewer layers than this, neighbours one level deeper are taken together instead
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def names_of(model: nn.Module, params: Iterable[Tensor]) -> list[str]:
    """The name of each weight in the user's model, without the prefixes that wrappers add.

    A weight that the model does not hold is named ``parameter i``.
    """
    own = model.module if isinstance(model, DistributedDataParallel) else model
    held = {id(p): _WRAPPERS.sub("", name) for name, p in own.named_parameters()}
    return [held.get(id(p), f"parameter {place}") for place, p in enumerate(params)]


def layers_of(names: Sequence[str], most: int = MOST) -> list[str]:
    """The layer of each weight, named as the user's modules are, such as ``transformer.h.3``.

    Modules are told apart down to the same depth everywhere, the greatest depth with at most ``most`` layers. Where
    that leaves few, as in a model of many equal blocks, the depth is one greater, and neighbouring blocks are one
    layer, such as ``transformer.h.0-1``. A weight of the model itself is a layer of its own.

    Args:
        names: the weights' names, as :func:`names_of` returns them.
        most: the largest number of layers, ≥ 1.
    """
    if not names:
        return []
    modules = [name.rpartition(".")[0].split(".") if "." in name else [name] for name in names]
    deepest = max(map(len, modules), default=1)
    found: list[str] = []
    for depth in range(1, deepest + 1):
        deeper = [".".join(path[:depth]) for path in modules]
        if len(set(deeper)) > most:
            if len(set(found)) < _FEW:
                merged = _neighbours(deeper, most)
                found = merged if len(set(merged)) <= most else found
            break
        found = deeper
    return found or _runs(deeper, most)


def _neighbours(layers: list[str], most: int) -> list[str]:
    """The layers, with as many neighbours of consecutive numbers taken together as it needs."""
    numbers: dict[str, list[int]] = {}
    for layer in dict.fromkeys(layers):
        parent, _, last = layer.rpartition(".")
        if last.isdecimal():
            numbers.setdefault(parent, []).append(int(last))
    merged = layers
    for together in range(2, max(map(len, numbers.values()), default=1) + 1):
        merged = [_range(layer, numbers, together) for layer in layers]
        if len(set(merged)) <= most:
            break
    return merged


def _range(layer: str, numbers: dict[str, list[int]], together: int) -> str:
    parent, dot, last = layer.rpartition(".")
    if not last.isdecimal():
        return layer
    place = numbers[parent].index(int(last)) // together * together
    own = numbers[parent][place : place + together]
    return f"{parent}{dot}{own[0]}" + (f"-{own[-1]}" if len(own) > 1 else "")


def _runs(layers: list[str], most: int) -> list[str]:
    """The layers, in runs of equal length in their order: for a model without a hierarchy."""
    distinct = list(dict.fromkeys(layers))
    length = -(-len(distinct) // most)
    runs = [distinct[i : i + length] for i in range(0, len(distinct), length)]
    named = {layer: run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs for layer in run}
    return [named[layer] for layer in layers]
