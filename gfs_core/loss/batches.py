"""Batches as nested containers of tensors: cutting them to size, keeping them."""

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
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((n for item in items if (n := batch_size(item)) is not None), None)


def first_examples(batch: Any, count: int) -> Any:
    """The first ``count`` examples: whatever has one entry for each example is cut, the rest kept."""
    size = batch_size(batch)
    if size is None or size <= count:
        return batch
    return _rows(batch, size, 0, count)


def rotating_part(batch: Any, parts: int, turn: int) -> Any:
    """One of ``parts`` runs of examples, another at each ``turn``; at least two examples, and all of less than four."""
    size = batch_size(batch)
    if size is None or (parts := min(parts, size // 2)) < 2:
        return batch
    low, high = (size * (turn % parts + i) // parts for i in (0, 1))
    return _rows(batch, size, low, high)


def all_parts(batches: Sequence[Any], parts: int) -> list[tuple[Any, float]]:
    """All that :func:`rotating_part` gives of each batch, each with its share of the mean over the batches.

    Where it would cut none of them, as none has four examples, each example is a part.
    """
    out: list[tuple[Any, float]] = []
    for batch in batches:
        size = batch_size(batch) or 1
        found = [rotating_part(batch, parts, turn) for turn in range(max(min(parts, size // 2), 1))]
        out += [(part, (batch_size(part) or 1) / size / len(batches)) for part in found]
    return out if len(out) > len(batches) else pieces(batches, 1)


def pieces(batches: Sequence[Any], count: int | None) -> list[tuple[Any, float]]:
    """The batches cut into runs of at most ``count`` examples, each with its share of the mean over the batches."""
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
    """The first ``count`` examples of several batches together; ``None``: all of them."""
    out: list[Any] = []
    for batch in batches:
        if count is None:
            out.append(batch)
        elif count > 0:
            out.append(first_examples(batch, count))
            count -= batch_size(batch) or count
    return out


def examples_of(batches: Sequence[Any]) -> int | None:
    """The examples of several batches together; ``None`` where they cannot be counted."""
    return sum(batch_size(b) or 0 for b in batches) or None


def fraction_of(part: Any, batches: Sequence[Any]) -> float:
    """The examples of ``part`` over those of ``batches`` together; 1 where they cannot be counted."""
    all_of_them = examples_of(batches)
    return min((batch_size(part) or all_of_them) / all_of_them, 1.0) if all_of_them else 1.0


def copied(batch: Any, shared: Iterable[Any] = ()) -> Any:
    """The batch copied throughout, its tensors detached: nothing that is done to the copy is seen in the batch.

    Args:
        batch: containers, tensors, and objects of any class. Of an object that cannot be copied, such as one that
            holds a lock, the attributes are; what has none is the same object in the copy.
        shared: objects that the copy refers to as the batch does, such as the modules of a model.

    Raises:
        MeasurementError: the batch is or holds an iterator: whoever takes from it takes from training.
    """
    memo = {} if is_plain(batch) else {id(item): item for item in shared}
    return _copy(batch, memo)


def _copy(item: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, but what cannot be copied does not keep all else from being."""
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
        for key in list(memo)[known:]:  # half of a copy
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
    """``copy.deepcopy`` of a tensor copies that tensor alone: not the storage that it is a view of, nor its graph."""

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
    """Whether it is of tensors and Python's own types alone, so that it can be saved and loaded as data."""
    if type(batch) in (list, tuple, dict):
        return all(map(is_plain, (*batch, *batch.values()) if isinstance(batch, dict) else batch))
    return batch is None or type(batch) in (Tensor, bool, int, float, str)


def _rows(batch: Any, size: int, low: int, high: int) -> Any:
    return changed(batch, lambda item: item[low:high], lambda item: _by_example(item, size))


def _by_example(item: Any, size: int) -> bool:
    """Whether it has one entry for each example: a tensor or an array, or a list of texts, names or numbers."""
    if type(item) in (list, tuple):
        return len(item) == size and not any(isinstance(entry, (Tensor, Mapping, list, tuple)) for entry in item)
    shape = getattr(item, "shape", ())  # of NumPy's arrays too
    return isinstance(shape, tuple) and len(shape) > 0 and shape[0] == size


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def changed(batch: Any, change: Callable[[Any], Any], which: Callable[[Any], bool] = _is_tensor) -> Any:
    """The batch with everything in it of which ``which`` is true replaced by ``change`` of it; tensors by default."""
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
