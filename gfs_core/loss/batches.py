"""Batches as nested containers of tensors: counted, cut and copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gfs_core.errors import MeasurementError
from gfs_core.loss.streams import is_iterator


def batch_size(batch: Any) -> int | None:
    """Length of the first dimension of the first tensor found; ``None`` where there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    items = batch if isinstance(batch, (list, tuple)) else batch.values() if isinstance(batch, Mapping) else ()
    for item in items:  # called at every step: a generator would be slower
        if (size := batch_size(item)) is not None:
            return size
    return None


def first_examples(batch: Any, count: int) -> Any:
    """The first ``count`` examples: every item with one entry per example is cut, all others are kept whole."""
    size = batch_size(batch)
    if size is None or size <= count:
        return batch
    return _rows(batch, size, 0, count)


def is_cut(batch: Any, parts: int) -> bool:
    """Whether :func:`rotating_part` cuts the batch: into two parts or more of at least two examples each."""
    return min(parts, (batch_size(batch) or 0) // 2) >= 2


def rotating_part(batch: Any, parts: int, turn: int) -> Any:
    """Run number ``turn`` (modulo their count) of the ``parts`` runs of examples that the batch is cut into.

    A run has at least two examples, so there may be fewer of them. A batch of less than four examples is not cut.
    """
    size = batch_size(batch)
    if size is None or not is_cut(batch, parts):
        return batch
    parts = min(parts, size // 2)
    low, high = (size * (turn % parts + i) // parts for i in (0, 1))
    return _rows(batch, size, low, high)


def all_parts(batches: Sequence[Any], parts: int) -> list[tuple[Any, float]]:
    """All parts that :func:`rotating_part` gives of each batch, each with its weight in the mean over the batches.

    Where no batch has the four examples that it cuts, each example is a part.
    """
    out: list[tuple[Any, float]] = []
    for batch in batches:
        size = batch_size(batch) or 1
        found = [rotating_part(batch, parts, turn) for turn in range(max(min(parts, size // 2), 1))]
        out += [(part, (batch_size(part) or 1) / size / len(batches)) for part in found]
    return out if len(out) > len(batches) else pieces(batches, 1)


def pieces(batches: Sequence[Any], count: int | None) -> list[tuple[Any, float]]:
    """The batches cut into runs of at most ``count`` examples, each with its weight in the mean over the batches."""
    out: list[tuple[Any, float]] = []
    for batch in batches:
        size = batch_size(batch)
        if count is None or size is None or size <= count:
            out.append((batch, 1 / len(batches)))
            continue
        for low in range(0, size, count):
            high = min(low + count, size)
            out.append((_rows(batch, size, low, high), (high - low) / size / len(batches)))
    return out


def first_of_all(batches: Sequence[Any], count: int | None) -> list[Any]:
    """The first ``count`` examples of a sequence of batches, counted across them; ``None``: all examples."""
    out: list[Any] = []
    for batch in batches:
        if count is None:
            out.append(batch)
        elif count > 0:
            out.append(first_examples(batch, count))
            count -= batch_size(batch) or count
    return out


def examples_of(batches: Sequence[Any]) -> int | None:
    """How many examples the batches hold together; ``None`` where they cannot be counted."""
    count = 0
    for batch in batches:
        count += batch_size(batch) or 0
    return count or None


def fraction_of(part: Any, batches: Sequence[Any]) -> float:
    """How many of the examples of ``batches`` ``part`` holds, from 0 to 1; 1 where they cannot be counted."""
    all_of_them = examples_of(batches)
    return min((batch_size(part) or all_of_them) / all_of_them, 1.0) if all_of_them else 1.0


def copied(batch: Any, shared: Iterable[Any] = ()) -> Any:
    """A deep copy of the batch, with detached tensors: a change to the copy does not change the batch.

    Args:
        batch: containers, tensors, and objects of any class. An object that cannot be copied deeply, such as one that
            holds a lock, is copied attribute by attribute. One that has no attributes either is shared.
        shared: objects that are never copied, such as the modules of a model.

    Raises:
        MeasurementError: the batch is or holds an iterator: taking from it would take from training.
    """
    memo = {} if is_plain(batch) else {id(item): item for item in shared}
    return _copy(batch, memo)


def _copy(item: Any, memo: dict[int, Any]) -> Any:
    """Like ``copy.deepcopy``, but one item that cannot be copied does not stop the copy of the others."""
    if id(item) in memo:
        return memo[id(item)]
    if isinstance(item, Tensor):
        out: Any = _copy_of_tensor(item)
    elif type(item) is dict:
        out = memo[id(item)] = {}
        out.update((key, _copy(value, memo)) for key, value in item.items())
    elif type(item) is list:
        out = memo[id(item)] = []
        out.extend(_copy(value, memo) for value in item)
    elif type(item) is tuple:
        out = tuple(_copy(value, memo) for value in item)
    elif is_iterator(item):
        raise MeasurementError(
            f"the batch is or holds an iterator, a {type(item).__name__}: measuring would take from it what training "
            "is to see; hand over a batch, or measure with a `loss_fn=` of its own"
        )
    else:
        out = _copy_of_object(item, memo)
    memo[id(item)] = out
    return out


def _copy_of_object(item: Any, memo: dict[int, Any]) -> Any:
    known = len(memo)
    try:
        with _DetachedCopies():
            return copy.deepcopy(item, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        for key in list(memo)[known:]:  # entries of the unfinished copy
            del memo[key]
    if not isinstance(getattr(item, "__dict__", None), dict):
        return item
    try:
        out = copy.copy(item)
    except Exception:
        return item
    memo[id(item)] = out
    vars(out).update((key, _copy(value, memo)) for key, value in vars(item).items())
    return out


class _DetachedCopies(TorchFunctionMode):
    """Makes ``copy.deepcopy`` copy a tensor alone, without the rest of a storage that it views, and detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return _copy_of_tensor(args[0])
        return func(*args, **(kwargs or {}))


def _copy_of_tensor(tensor: Tensor) -> Tensor:
    out = tensor.detach().clone()
    if tensor.requires_grad:
        out.requires_grad_()
    if tensor.is_leaf and tensor.grad is not None:
        out.grad = tensor.grad.detach().clone()
    for name, value in vars(tensor).items():
        vars(out).setdefault(name, value)
    return out


def is_plain(batch: Any) -> bool:
    """Whether the batch holds nothing but tensors and plain Python types, so that it can be saved as data."""
    if type(batch) in (list, tuple, dict):
        return all(map(is_plain, (*batch, *batch.values()) if isinstance(batch, dict) else batch))
    return batch is None or type(batch) in (Tensor, bool, int, float, str)


def _rows(batch: Any, size: int, low: int, high: int) -> Any:
    return changed(batch, lambda item: item[low:high], lambda item: _by_example(item, size))


def _by_example(item: Any, size: int) -> bool:
    """Whether an item has one entry per example: a tensor, an array, or a list of texts, names or numbers."""
    if type(item) in (list, tuple):
        return len(item) == size and not any(isinstance(entry, (Tensor, Mapping, list, tuple)) for entry in item)
    shape = getattr(item, "shape", ())  # NumPy arrays have one too
    return isinstance(shape, tuple) and len(shape) > 0 and shape[0] == size


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def changed(batch: Any, change: Callable[[Any], Any], which: Callable[[Any], bool] = _is_tensor) -> Any:
    """The batch, with each item that ``which`` selects (by default every tensor) replaced by ``change(item)``."""
    if which(batch):
        return change(batch)
    if isinstance(batch, dict) or (isinstance(batch, Mapping) and hasattr(batch, "copy")):
        out = batch.copy()
        for key, value in batch.items():
            out[key] = changed(value, change, which)
        return out
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(changed(item, change, which) for item in batch))
    if type(batch) in (list, tuple):
        return type(batch)(changed(item, change, which) for item in batch)
    return batch
