"""Measuring leaves no trace.

:class:`Isolation` is a context manager around one measurement. On exit (also through an exception) it puts
back, bitwise: parameters and buffers, the ``.grad`` fields (the same tensor objects), ``requires_grad`` and
train/eval flags, gradient hooks on parameters, the random states of Python, NumPy and torch, and the plain
Python state of the modules (counters, lists, dictionaries, metric states, objects of the user's own
classes). Compiled code runs eagerly meanwhile: a probe of another shape would have it compiled again, and a
CUDA graph that it has captured is left to training. :meth:`Isolation.rewind` puts back everything but the
parameters before each evaluation of the loss, so that every evaluation is the same function: same dropout
mask, same buffers.

What it cannot put back: files written, output printed, objects that no module refers to.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.vectors import local

# Attributes of nn.Module's own machinery hold no state of the user's, except the training flag and the buffers
# (torchmetrics keeps its states beside them, as plain attributes).
_MACHINERY = frozenset(nn.Module().__dict__) - {"training", "_buffers"}
# Objects of these packages refer to the whole world (trainer, loaders); what they hold is not the module's state.
_FOREIGN = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"})
_FOREIGN_STATE = _FOREIGN | {"transformers", "accelerate", "numpy", "pandas", "logging", "threading", "builtins"}
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, FunctionType, MethodType, BuiltinFunctionType)
_MAX_NODES = 200_000
_MAX_TENSOR = 1 << 20  # elements; a larger plain tensor attribute (a data set, say) is watched, not copied
_MISSING = object()


class Isolation:
    """Snapshot of everything a measurement could disturb, restored on exit.

    Args:
        model: the module whose state is kept, with all that its attributes refer to.
        parameters: further parameters that are moved during the measurement (those of ``model`` are included).

    Extra memory: one copy of the parameters and buffers.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
        self.model = model
        self.parameters = list({id(p): p for p in [*model.parameters(), *parameters]}.values())

    def __enter__(self) -> Isolation:
        self._weights = [local(p).clone() for p in self.parameters]
        self._grads = [p.grad for p in self.parameters]
        self._requires_grad = [p.requires_grad for p in self.parameters]
        self._hooks = [p._backward_hooks for p in self.parameters]
        named = [(name or "model", m) for name, m in self.model.named_modules()]
        self._state = PythonState(named, skip=self.parameters)
        self._rng = RandomState(self.parameters)
        self._evaluated = False
        self._eager = contextlib.ExitStack()
        if "torch._dynamo" in sys.modules:
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        for p in self.parameters:
            p.grad = None
            if p._backward_hooks:
                p._backward_hooks = None  # a hook that rescales gradients would make the products another function's
        return self

    def rewind(self) -> None:
        """Put back everything but the parameters: the next evaluation starts from the same state."""
        if self._evaluated:
            self._state.restore()
            self._rng.restore()
        self._evaluated = True

    def shift(self, count: int) -> None:
        """Go on from another random state, another for each ``count`` > 0: the next evaluation draws other numbers."""
        self._rng.shift(count)

    def __exit__(self, *exc: object) -> None:
        try:
            self._put_back()
        except BaseException:  # Ctrl-C in the middle of it: once more, from the start
            self._put_back()
            raise
        finally:
            self._eager.close()
            del self._weights, self._grads, self._state

    def _put_back(self) -> None:
        self._state.restore()
        self.restore_weights()
        for p, grad, requires_grad, hooks in zip(
            self.parameters, self._grads, self._requires_grad, self._hooks, strict=True
        ):
            p.grad = grad
            p.requires_grad_(requires_grad)
            if hooks:
                p._backward_hooks = hooks
        self._rng.restore()

    def restore_weights(self) -> None:
        """Put the parameters back to where the measurement found them."""
        with torch.no_grad():
            torch._foreach_copy_([local(p) for p in self.parameters], self._weights)

    @property
    def leaks(self) -> list[str]:
        """Attributes too large to copy that the evaluation has changed in place, by name."""
        return self._state.leaks()


class RandomState:
    """The random states of Python, NumPy (if it is loaded) and torch on the devices of ``tensors``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = numpy.random.get_state() if numpy is not None else None
        self.cpu = torch.get_rng_state()
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in devices}

    def restore(self) -> None:
        """Put the random states back."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def shift(self, count: int) -> None:
        """Go over to other random states, which follow from these and ``count``."""
        chosen = random.Random(f"{hash(self.python)} {count}")
        random.seed(chosen.getrandbits(32))
        if self.numpy is not None:
            sys.modules["numpy"].random.seed(chosen.getrandbits(32))
        torch.default_generator.manual_seed(chosen.getrandbits(32))
        for device in self.cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(chosen.getrandbits(32))


class PythonState:
    """Shallow copies of every dictionary, list, set and tensor that the roots lead to.

    Args:
        roots: names and objects to start from.
        skip: objects that are neither copied nor entered.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]], skip: Iterable[Any]) -> None:
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.sequences: list[tuple[Any, list[Any]]] = []
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.watched: list[tuple[str, Tensor, int]] = []
        seen = {id(p) for p in skip}
        todo = list(roots)
        while todo and len(seen) < _MAX_NODES:
            name, node = todo.pop()
            if isinstance(node, _ATOMS) or id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, Tensor):
                self._add_tensor(name, node)
            elif isinstance(node, nn.Module):
                self._add_dict(name, node.__dict__, todo, ignore=_MACHINERY)
                todo += [(f"{name}.{k}", m) for k, m in node._modules.items()]
                seen.add(id(node._buffers))
                self.dicts.append((node._buffers, dict(node._buffers)))
                for buffer in node._buffers.values():  # always copied, however large
                    if buffer is not None and id(buffer) not in seen:
                        seen.add(id(buffer))
                        self.tensors.append((buffer, buffer.detach().clone()))
            elif isinstance(node, dict):
                self._add_dict(name, node, todo)
            elif isinstance(node, (list, deque, set)):
                self.sequences.append((node, list(node)))
                todo += [(name, item) for item in node]
            elif isinstance(node, (tuple, frozenset)):
                todo += [(name, item) for item in node]
            elif not isinstance(node, ModuleType) and _package(node) not in _FOREIGN_STATE:
                held = getattr(node, "__dict__", None)
                if isinstance(held, dict):
                    self._add_dict(name, held, todo)

    def _add_dict(
        self, name: str, node: dict[Any, Any], todo: list[tuple[str, Any]], ignore: frozenset[str] = frozenset()
    ) -> None:
        held = {k: v for k, v in node.items() if k not in ignore} if ignore else dict(node)
        self.dicts.append((node, held if not ignore else {**dict.fromkeys(ignore, _MISSING), **held}))
        todo += [(f"{name}.{k}", v) for k, v in held.items()]

    def _add_tensor(self, name: str, node: Tensor) -> None:
        if node.requires_grad and not node.is_leaf:
            return  # a stored output of an earlier graph: rebinding the attribute is enough
        if node.numel() > _MAX_TENSOR:
            if not node.is_inference():  # those have no version, and cannot be changed outside of inference mode
                self.watched.append((name, node, node._version))
        else:
            self.tensors.append((node, node.detach().clone()))

    def restore(self) -> None:
        """Put everything back that has changed."""
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
        for tensor, value in self.tensors:
            tensor.data.copy_(value)  # .data: a kept autograd graph must not see a new version of a buffer

    def leaks(self) -> list[str]:
        """Tensors too large to copy that have changed in place, by name."""
        return [name for name, tensor, version in self.watched if tensor._version != version]


def _package(node: object) -> str:
    return (type(node).__module__ or "").partition(".")[0]
