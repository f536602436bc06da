"""Everything that a training changes, put back as often as is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gfs_core.errors import ConfigError
from gfs_core.linalg.vectors import local
from gfs_core.loss.python_state import PythonState
from gfs_core.loss.streams import RandomState
from gfs_core.run.rollback import Snapshot, Stateful


class Kept:
    """A training as it is before its start: weights, buffers, optimizer, random streams, Python state.

    Weights and the optimizer's state are kept on the host.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, if it is there already.
        beside: what else has a state: schedulers, a gradient scaler.
        data: loaders and data sets; of data sets, the random streams alone are put back.
        roots: names and objects whose Python state is put back too.
        functions: names and functions that the training calls.
        skip: what is left alone, such as the examples of a data set.

    Raises:
        ConfigError: a weight has no shape yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        beside: Sequence[Stateful] = (),
        data: Iterable[Any] = (),
        roots: Iterable[tuple[str, Any]] = (),
        functions: Iterable[tuple[str, Any]] = (),
        skip: Iterable[Any] = (),
    ) -> None:
        groups = [] if optimizer is None else optimizer.param_groups
        own = [p for group in groups for p in group["params"]]
        self._params: list[Tensor] = list({id(p): p for p in [*model.parameters(), *own]}.values())
        if any(is_lazy(p) for p in self._params):
            raise ConfigError("the model has weights without a shape yet: give it one batch first")
        self._was = [(p.data, p.grad, p.requires_grad) for p in self._params]
        self._values = [_on_host(p) for p in self._params]
        self._optimizer, self._beside = optimizer, list(beside)
        self._keys = [set(group) for group in groups]
        self._snapshot = None if optimizer is None else Snapshot(0, {}, optimizer, self._beside)
        self._random = RandomState(self._params)
        loaders = [d for d in data if d is not None and not isinstance(d, (list, tuple))]
        self._workers = [(d, d._iterator) for d in loaders if isinstance(d, DataLoader)]
        self._python = PythonState(
            [*((name or "model", m) for name, m in model.named_modules()), *roots, *(("data", d) for d in loaders)],
            [*self._params, *skip],
            [*functions, *(("data", d) for loader in loaders for d in _sets(loader))],
        )
        self.put_back()

    def put_back(self) -> None:
        """Put everything back for the next training: there are no gradients yet."""
        self._python.restore()
        for p, (data, _, requires_grad), values in zip(self._params, self._was, self._values, strict=True):
            if p.data_ptr() != data.data_ptr() or p.dtype != data.dtype:
                p.data = data
            local(p.data).copy_(values)
            p.grad = None
            p.requires_grad_(requires_grad)
        if self._optimizer is not None and self._snapshot is not None:
            self._snapshot.restore({}, self._optimizer, self._beside, rates=True)
            for group, keys in zip(self._optimizer.param_groups, self._keys, strict=True):
                for key in group.keys() - keys:
                    del group[key]
        for loader, workers in self._workers:
            loader._iterator = workers
        self._random.restore()

    def close(self) -> None:
        """Put everything back as it was found."""
        self.put_back()
        for p, (_, grad, _) in zip(self._params, self._was, strict=True):
            p.grad = grad


def _on_host(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).to("cpu", copy=True)


def _sets(loader: Any) -> Iterator[Any]:
    """A loader's data set, and the one that this is a part of, and so on."""
    while (loader := getattr(loader, "dataset", None)) is not None:
        yield loader


def parts_of(run: Any, packages: Collection[str], but: tuple[type, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The attributes of an object of a framework, and of all of the framework's objects that it leads to.

    :class:`Kept` does not enter these by itself; as its ``roots`` they are put back.

    Args:
        run: such as a trainer.
        packages: top-level packages of the framework.
        but: classes of it that are not entered.

    Returns:
        Names and attribute dictionaries.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    todo: list[Any] = [run]
    seen: set[int] = set()
    while todo:
        node = todo.pop()
        if id(node) in seen or isinstance(node, (nn.Module, type, *but)):
            continue
        seen.add(id(node))
        if isinstance(node, (list, tuple)):
            todo += node
        elif isinstance(node, dict):
            todo += node.values()
        held = getattr(node, "__dict__", None)
        if isinstance(held, dict) and (node is run or _packages(node) & set(packages)):
            found.append((type(node).__name__, held))
            todo += held.values()
    return found


def _packages(node: Any) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(node).__mro__}
