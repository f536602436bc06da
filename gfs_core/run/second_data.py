"""A second data set: the curvature of its loss is measured while other data is trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gfs_core.errors import ConfigError, MeasurementError, own_fault
from gfs_core.loss.batches import changed, copied, examples_of, is_plain
from gfs_core.loss.python_state import PythonState
from gfs_core.loss.streams import RandomState, rewinder

REMARK = "measured on the second data set of `probe=`, not on the data that is trained on"
_WRAPPED = ("base_dataloader", "_dataloader")  # where Accelerate's and Fabric's loaders hold the DataLoader


class SecondData:
    """The first batches of a loader, taken once and kept.

    Taking them leaves the loader, and every random stream, as they were. A ``DataLoader`` is read in this process,
    whatever its ``num_workers``.

    Args:
        loader: the batches: a ``DataLoader``, a list, or any other iterable that begins anew with each ``iter``.
        prepare: makes of a batch what the loss gets; ``None``: its tensors are moved to the device of the weights.
        training: returns the loaders that training takes its batches from, as far as they are known.

    Attributes:
        batches: the batches; empty before :meth:`take`.

    Raises:
        ConfigError: ``loader`` is no such iterable.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        prepare: Callable[[Any], Any] | None = None,
        training: Callable[[], Iterable[Any]] = tuple,
    ) -> None:
        if problem := _no_loader(loader):
            raise ConfigError(f"`probe` must be 'batch', 'fixed', or a loader of batches; {problem}")
        self.loader, self.prepare, self.training = loader, prepare, training
        self.batches: list[Any] = []

    def take(self, size: int | None, model: nn.Module, weights: Sequence[Tensor]) -> None:
        """Take the first batches.

        Args:
            size: the number of examples that the batches must reach together; ``None``: one batch is enough.
            model: the module that is trained; what ``prepare`` changes of it is put back.
            weights: its trained weights; the random streams of their devices are put back.

        Raises:
            MeasurementError: the loader is empty or fails, training takes from it, or a batch cannot be prepared.
        """
        loader = _unwrapped(self.loader)
        if any(_shared(loader, _unwrapped(other)) for other in self.training()):
            raise MeasurementError(
                "the loader of `probe=` is the one that training takes its batches from: measuring would take them "
                "from it; give another loader, or use probe='batch' or 'fixed'"
            )
        random, state = RandomState(weights), PythonState([("model", model), *_drawing(loader)], weights)
        random.lend()
        try:
            taken = _first(_without_workers(loader), size)
            self.batches = [self._prepared(batch, weights[0].device) for batch in taken]
        except (MeasurementError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if own_fault(error):
                raise
            text = f"no batches could be taken from the loader of `probe=`: {type(error).__name__}: {error}"
            raise MeasurementError(text) from error
        finally:
            state.restore()
            random.put_back()
        if not self.batches:
            raise MeasurementError("the loader of `probe=` is empty: nothing is measured; give one that holds batches")

    def _prepared(self, batch: Any, device: torch.device) -> Any:
        own = copied(batch)
        return changed(own, lambda t: t.to(device)) if self.prepare is None else self.prepare(own)

    def move(self, device: torch.device | None) -> None:
        """Move the tensors of the batches to a device."""
        self.batches = [changed(b, lambda t: t.to(device)) for b in self.batches]

    def state_dict(self) -> dict[str, Any]:
        """The batches, where they are plain data; whether there were any."""
        return {"batches": self.batches if is_plain(self.batches) else None, "taken": len(self.batches) > 0}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None) -> bool:
        """Restore what :meth:`state_dict` returned; returns whether batches that were taken could not be saved."""
        self.batches = list(state["batches"] or [])
        self.move(device)
        return bool(state["taken"]) and not self.batches


def split_off(options: dict[str, Any]) -> Any:
    """Take a loader out of options by name, where ``probe`` is one; ``None``: it is not there, or a plain option.

    Raises:
        ConfigError: ``probe`` holds data, but is no loader of batches.
    """
    value = options.get("probe")
    if isinstance(value, str) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        return None
    SecondData(options.pop("probe"))
    return value


def _no_loader(value: Any) -> str:
    """Why a value is no loader, and what to give in its place; empty: it is one."""
    kind = type(value).__name__
    if isinstance(value, Dataset):
        return f"got a data set, a {kind}: give a `DataLoader` of it"
    if isinstance(value, (Tensor, Mapping, tuple)):
        return f"got a single batch, a {kind}: give a list of batches, `[batch]`"
    if hasattr(type(value), "__next__"):
        return f"got a {kind}, which is used up once it was read: give what it was made from"
    if isinstance(value, (str, nn.Module)) or not hasattr(value, "__iter__"):
        return f"got {value!r}"
    return ""


def _unwrapped(loader: Any) -> Any:
    """The ``DataLoader`` inside the loaders of other libraries, which count each pass through them."""
    for name in _WRAPPED:
        inner = getattr(loader, "__dict__", {}).get(name)
        if isinstance(inner, DataLoader):
            return inner
    return loader


def _shared(a: Any, b: Any) -> bool:
    """Whether two loaders take from the same position."""
    data = getattr(a, "dataset", None)
    return a is b or (isinstance(data, IterableDataset) and data is getattr(b, "dataset", None))


def _without_workers(loader: Any) -> Any:
    """A shallow copy of a ``DataLoader`` that starts no processes, and that has no part in the passes of its user."""
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    vars(own).update(num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0, pin_memory=False)
    vars(own).update(_iterator=None)  # that of persistent workers
    return own


def _drawing(loader: Any) -> list[tuple[str, Any]]:
    """The loader, and the random streams that its data sets hold, with their names."""
    found, data = [("probe", loader)], getattr(loader, "dataset", None)
    while isinstance(data, Dataset):
        held = vars(data)
        found += [(f"{type(data).__name__}.{name}", value) for name, value in held.items() if rewinder(value)]
        data = held.get("dataset")
    return found


def _first(loader: Iterable[Any], size: int | None) -> Iterator[Any]:
    """The first batches, until they hold ``size`` examples; one, where their examples cannot be counted."""
    held = 0
    for batch in loader:
        yield batch
        examples = examples_of([batch])
        held += examples or 0
        if size is None or examples is None or held >= size:
            return
