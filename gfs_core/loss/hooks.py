"""The user's hooks and modes that would see a measurement, or change what it measures.

Hooks of the backward pass (on a weight, on the accumulation of its gradient, on a module) are meant for the gradients
of training: they log them, rescale them, or take the optimizer's step. None of them fires during a measurement.

Forward hooks may be part of the function (spectral norm, adapters, features that the loss reads). So they fire, and the
state that they lead to is put back (:mod:`gfs_core.loss.python_state`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gfs_core.errors import MeasurementError

_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = ("_global_backward_hooks", "_global_backward_pre_hooks")


class SilencedHooks:
    """Takes the hooks of the backward pass away, and gives them back.

    Args:
        model: the hooks of its modules are silenced, and torch's global module hooks.
        parameters: their hooks are silenced.

    Raises:
        MeasurementError: a torch function or dispatch mode is active that would record the measurement as training. A
            mode whose attribute ``sees_measurements`` is true is allowed.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        functions: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        modes = [*_get_current_dispatch_mode_stack(), *(mode for mode in functions if _is_users(mode))]
        modes = [mode for mode in modes if not getattr(mode, "sees_measurements", False)]
        if modes:
            raise MeasurementError(
                f"{type(modes[-1]).__name__} is active around the training step and would record the measurement as "
                "part of it; leave that mode before the step that measures"
            )
        parameters = list(parameters)
        held: list[tuple[Any, str, Any]] = [(p, "_backward_hooks", p._backward_hooks) for p in parameters]
        held += [(m, name, getattr(m, name)) for m in model.modules() for name in _OF_MODULES]
        self._held = [(owner, name, hooks) for owner, name, hooks in held if hooks]
        # Torch keeps references to these dictionaries, so they are emptied and not replaced.
        emptied: list[Any] = [p._post_accumulate_grad_hooks for p in parameters]
        emptied += [getattr(torch_module, name) for name in _OF_ALL_MODULES]
        self._emptied = [(hooks, dict(hooks)) for hooks in emptied if hooks]
        self._shadow = contextlib.ExitStack()

    def silence(self) -> None:
        """Stop the hooks from firing, and the user's saved-tensor hooks that are active here."""
        for owner, name, _ in self._held:
            setattr(owner, name, None if isinstance(owner, Tensor) else OrderedDict())
        for hooks, _ in self._emptied:
            hooks.clear()
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if around is not None and _is_users(around[0]):
            self._shadow.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))

    def restore(self) -> None:
        """Let them fire again."""
        self._shadow.close()
        for owner, name, hooks in self._held:
            setattr(owner, name, hooks)
        for hooks, held in self._emptied:
            hooks.update(held)


@contextlib.contextmanager
def silent_accumulation(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Silence the hooks on the graph nodes in which ``.backward()`` accumulates gradients.

    Such a node has no public list of its hooks, but the handle of a new hook refers to the dictionary of all of them.
    A node exists only while something refers to it. One that did not exist is created here, and discarded on exit.
    """
    silenced: list[tuple[dict[int, Any], dict[int, Any]]] = []
    nodes: list[Any] = []  # referred to, so that each node and its hooks stay
    for p in parameters:
        if not p.requires_grad or hasattr(p, "to_local"):
            continue
        with torch.enable_grad():
            view: Any = p.view_as(p)
        node: Any = view.grad_fn.next_functions[0][0]
        nodes.append(node)
        for register in (node.register_hook, node.register_prehook):
            handle = register(_nothing)
            hooks: dict[int, Any] = handle.hooks_dict_ref() or {}
            handle.remove()
            own = {key: hook for key, hook in hooks.items() if not _of_fsdp(hook)}
            if own:
                silenced.append((hooks, own))
                for key in own:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, own in silenced:
            hooks.update(own)


def _nothing(*_: Any) -> None:
    return None


def _is_users(of: Any) -> bool:
    module = getattr(of, "__module__", None) or type(of).__module__
    return bool(module.partition(".")[0] != "torch")


def _of_fsdp(hook: Any) -> bool:
    return ".fsdp" in (getattr(getattr(hook, "func", hook), "__module__", None) or "")
