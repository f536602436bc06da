"""The state of the Python objects that a loss can reach, copied and put back bitwise.

The search starts at the model and the loss. It enters attributes of modules and of objects of the user's classes, and
items of containers. It enters the functions that it meets (the loss, hooks, methods, others of the user's): the
variables that they close over, and the global variables that they name. It does not enter objects of libraries that
refer to the whole run (trainers, optimizers), or objects that other threads share. Of a data loader it enters the
generator and the samplers alone. Of class attributes only random streams, iterators and modules are put back.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.loss.streams import is_iterator, rewinder, stand_in
from gfs_core.loss.writes import BeforeWrites

# These attributes of nn.Module change when a forward pass adds a submodule, a weight or a hook.
_REGISTRIES = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
# nn.Module's own attributes. `training` and `_buffers` are treated like the user's.
_MACHINERY = frozenset(nn.Module().__dict__) - {"training", "_buffers"}
# Objects of these packages, and of classes derived from theirs, refer to the whole run and are not entered.
_RUNS = frozenset(
    {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "transformers", "accelerate"}
    | {"gfs_core", "lightning_gfs", "hf_gfs"}
)
_FOREIGN = frozenset({"torch", "numpy", "pandas", "logging", "threading", "builtins"})
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, BuiltinFunctionType, ModuleType)
_SHARED = (threading.Thread, threading.Event, threading.Condition, type(threading.Lock()), type(threading.RLock()))
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MAX_NODES = 200_000
_MAX_TENSOR = 1 << 20  # elements; a larger plain tensor attribute (a data set, say) is copied only before a write
_MISSING = object()

_Put = Callable[[Any], object]


class PythonState:
    """Shallow copies of every container, attribute, tensor, array and random stream that the roots lead to.

    An object that is reached only through a function or a class may record evaluations on purpose. Of such objects,
    modules, random streams and iterators are put back, and nothing else. Forward hooks are the exception: a measurement
    must not show that they fired, so everything that they lead to is put back.

    Args:
        roots: names and objects to start from.
        skip: objects that are neither copied nor entered.
        functions: names and functions to start from as well.
    """

    def __init__(
        self, roots: Iterable[tuple[str, Any]], skip: Iterable[Any], functions: Iterable[tuple[str, Any]] = ()
    ) -> None:
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.sequences: list[tuple[Any, list[Any]]] = []
        self.places: list[tuple[_Put, Any]] = []  # cells of closures, global variables, slots
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.bindings: list[tuple[Tensor, Tensor]] = []  # tensors with their data: `tensor.data = …` replaces it
        self.arrays: list[tuple[Any, Any]] = []
        self.streams: list[Callable[[], object]] = []
        self.iterators: list[tuple[str, Any, _Put]] = []
        self.watched: list[tuple[str, Tensor, int]] = []
        self._todo = deque((name, root, True) for name, root in roots)  # breadth first: the modules come first
        self._todo.extend((name, function, False) for name, function in functions)
        self._seen: dict[int, bool] = {}  # by id: whether all of the object is put back
        for held in skip:
            self._seen[id(held)] = True
            if isinstance(held, Tensor) and held.__dict__ and not hasattr(held, "to_local"):
                self._add_dict("weight", held.__dict__, whole=True)
        while self._todo and len(self._seen) < _MAX_NODES:
            name, node, whole = self._todo.popleft()
            if self._seen.get(id(node)) not in (True, whole):
                self._seen[id(node)] = whole
                self._add(name, node, whole)
        del self._seen, self._todo

    def _add(self, name: str, node: Any, whole: bool) -> None:
        if isinstance(node, nn.Module):
            self._seen[id(node)] = True
            self._add_module(name, node)
        elif isinstance(node, Tensor):
            if whole:
                self._add_tensor(name, node)
        elif isinstance(node, dict):
            self._add_dict(name, node, whole)
        elif isinstance(node, (list, deque, set)):
            if whole:
                self.sequences.append((node, list(node)))
            self._follow(((f"{name}[{i}]", item, i) for i, item in enumerate(node)), whole, node)
        elif isinstance(node, (tuple, frozenset)):
            self._follow(((name, item, None) for item in node), whole)
        elif isinstance(node, FunctionType):
            self._add_function(name, node, whole=False)
        elif isinstance(node, MethodType):
            self._follow([(name, node.__self__, None)], whole)
            self._follow([(name, node.__func__, None)], whole)
        elif isinstance(node, functools.partial):
            self._follow(((name, item, None) for item in (node.func, *node.args, *node.keywords.values())), False)
        elif (rewind := rewinder(node)) is not None:
            self.streams.append(rewind)
        elif _is_array(node):
            if whole and node.flags.writeable and node.size <= _MAX_TENSOR and not node.dtype.hasobject:
                self.arrays.append((node, node.copy()))
        elif not isinstance(node, _ATOMS):
            self._add_object(name, node, whole)

    def _follow(self, found: Iterable[tuple[str, Any, Any]], whole: bool, holder: Any = None) -> None:
        """Queue what was found: names, values, and the keys under which ``holder`` holds them."""
        for name, value, key in found:
            if isinstance(value, _ATOMS):
                continue
            takes = is_iterator(value) or (isinstance(value, tuple) and any(map(is_iterator, value)))
            if takes and isinstance(holder, (dict, list, deque)):
                self.iterators.append((name, value, functools.partial(holder.__setitem__, key)))
            if not is_iterator(value):
                self._todo.append((name, value, whole))

    def _add_module(self, name: str, node: nn.Module) -> None:
        self._add_dict(name, node.__dict__, True, ignore=_MACHINERY)
        self._follow(((f"{name}.{k}", m, k) for k, m in node._modules.items()), True)
        gathered = any(hasattr(p, "to_local") for p in node._parameters.values())  # FSDP swaps the entries itself
        for registry in () if gathered else _REGISTRIES:
            held = node.__dict__.get(registry)
            if isinstance(held, dict):
                self.dicts.append((held, dict(held)))
        for hook in (*node._forward_hooks.values(), *node._forward_pre_hooks.values()):
            if isinstance(hook, FunctionType):
                self._add_function("a forward hook", hook, whole=True)
            else:
                self._todo.append(("a forward hook", hook, True))
        self._follow([(f"{name}.forward", type(node).forward, None)], False)
        self._add_classes(node)
        self._seen[id(node._buffers)] = True
        self.dicts.append((node._buffers, dict(node._buffers)))
        for buffer in node._buffers.values():  # always copied, however large
            if buffer is not None and id(buffer) not in self._seen:
                self._seen[id(buffer)] = True
                self.tensors.append((buffer, buffer.detach().clone()))

    def _add_dict(self, name: str, node: dict[Any, Any], whole: bool, ignore: frozenset[str] = frozenset()) -> None:
        held = {k: v for k, v in node.items() if k not in ignore}
        if whole:
            self.dicts.append((node, {**dict.fromkeys(ignore, _MISSING), **held} if ignore else held))
        self._follow(((f"{name}.{k}", v, k) for k, v in held.items()), whole, node)

    def _add_function(self, name: str, function: FunctionType, whole: bool) -> None:
        if _package(function) == "torch":
            return
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                self._add_place(variable, cell.cell_contents, functools.partial(setattr, cell, "cell_contents"), whole)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._follow(((name, value, None) for value in defaults), whole)
        if is_of_the_user(function):
            variables = function.__globals__
            for variable in set(_names(function.__code__)) & variables.keys():
                put = functools.partial(variables.__setitem__, variable)
                self._add_place(variable, variables[variable], put, whole)

    def _add_object(self, name: str, node: Any, whole: bool) -> None:
        kind = type(node)
        if kind.__module__.startswith("torch.utils.data"):  # what draws examples, not the examples
            drawing = ("generator", "sampler", "batch_sampler")
            self._follow(((f"{name}.{k}", getattr(node, k, None), None) for k in drawing), whole)
            return
        of_a_run = isinstance(node, torch.optim.Optimizer) or any(_package(cls) in _RUNS for cls in kind.__mro__)
        if of_a_run or (_package(kind) in _FOREIGN and kind.__module__ != "torch.quasirandom"):
            return
        held = getattr(node, "__dict__", {})
        if not isinstance(held, dict) or any(isinstance(value, _SHARED) for value in held.values()):
            return
        self._add_dict(name, held, whole)
        self._add_classes(node)
        for slot in (s for cls in kind.__mro__ for s in _slots(cls) if hasattr(node, s)):
            put = functools.partial(setattr, node, slot)
            self._add_place(f"{name}.{slot}", getattr(node, slot), put, whole)

    def _add_classes(self, node: Any) -> None:
        """Add the user's classes among the classes of an object: their attributes, and what their methods lead to."""
        for cls in type(node).__mro__:
            if id(cls) in self._seen or not is_of_the_user(cls):
                continue
            self._seen[id(cls)] = True
            for key, value in list(vars(cls).items()):
                function = getattr(value, "__func__", getattr(value, "fget", value))  # a static method, a property
                self._add_place(f"{cls.__name__}.{key}", function, functools.partial(setattr, cls, key), False)

    def _add_place(self, name: str, value: Any, put: _Put, whole: bool) -> None:
        if whole:
            self.places.append((put, value))
        if is_iterator(value):
            self.iterators.append((name, value, put))
        else:
            self._follow([(name, value, None)], whole)

    def _add_tensor(self, name: str, node: Tensor) -> None:
        if node.requires_grad and not node.is_leaf:
            return  # a stored output of an earlier graph: rebinding the attribute is enough
        if node.layout is torch.strided and not hasattr(node, "to_local"):
            self.bindings.append((node, node.data))
        if node.numel() > _MAX_TENSOR:
            if not node.is_inference():  # no version, and no writes outside inference mode
                self.watched.append((name, node, node._version))
        else:
            self.tensors.append((node, node.detach().clone()))

    def guard(self) -> None:
        """Put a copy, or a :class:`Guard`, in the place of every iterator, until :meth:`restore`."""
        copies: dict[int, Any] = {}
        for name, iterator, put in self.iterators:
            if id(iterator) not in copies:
                copies[id(iterator)] = stand_in(iterator, name)
            put(copies[id(iterator)])

    def restore(self) -> None:
        """Put back everything that has changed."""
        for node, held in self.dicts:
            for key in [k for k in node if k not in held]:
                del node[key]
            for key, value in held.items():
                if value is not _MISSING and node.get(key, _MISSING) is not value:
                    node[key] = value
        for sequence, items in self.sequences:
            if len(sequence) != len(items) or any(a is not b for a, b in zip(sequence, items, strict=False)):
                sequence.clear()
                if isinstance(sequence, set):
                    sequence.update(items)
                else:
                    sequence.extend(items)
        for put, value in self.places:
            put(value)
        for _, iterator, put in self.iterators:
            with contextlib.suppress(IndexError):  # the list is not put back, and has become shorter
                put(iterator)
        for tensor, data in self.bindings:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        for tensor, value in self.tensors:
            if tensor.shape == value.shape:
                tensor.data.copy_(value)  # .data: keeps the version counter, which a kept autograd graph checks
            else:
                tensor.data = value.clone()
        for array, values in self.arrays:
            array[...] = values
        for rewind in self.streams:
            rewind()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context of one evaluation: a large tensor is copied before it is written to, and put back too."""
        if not self.watched:
            yield
            return
        with BeforeWrites([tensor for _, tensor, _ in self.watched], self._keep):
            yield

    def _keep(self, tensor: Tensor) -> None:
        self.tensors.append((tensor, tensor.detach().clone()))
        self.watched = [watched for watched in self.watched if watched[1] is not tensor]

    def leaks(self) -> list[str]:
        """Names of large tensors that changed in place outside :meth:`watching`, as in a backward pass."""
        return [name for name, tensor, version in self.watched if tensor._version != version]


def _package(of: Any) -> str:
    return (of.__module__ or "").partition(".")[0]


def is_of_the_user(of: FunctionType | type) -> bool:
    """Whether a function or a class belongs to the user's code, and not to a library or to this package."""
    if isinstance(of, FunctionType):
        file = of.__code__.co_filename
    else:  # a script or a notebook may have no file
        module = sys.modules.get(of.__module__)
        file = getattr(module, "__file__", None) or ("" if of.__module__ == "__main__" else sys.prefix)
        if of.__module__ == "builtins":
            return False
    return _package(of) not in _RUNS and not file.startswith(_LIBRARIES) and "-packages" not in file


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function may look up, including those in the functions defined inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _slots(cls: type) -> tuple[str, ...]:
    slots: Any = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__") and not n.startswith("__"))


def _is_array(node: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(node, numpy.ndarray)
