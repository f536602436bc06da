"""Everything that a measurement could disturb, put back afterwards.

:class:`StateSnapshot` is a context manager around one measurement. On exit (also through an exception) it puts back,
bitwise: parameters and buffers, the ``.grad`` fields (the same tensor objects), ``requires_grad`` and train/eval
flags, the random states of Python, NumPy and torch, and the state of the Python objects that the model leads to:
counters, lists, metric states, generators (:mod:`gfs_core.loss.python_state`).

During the measurement:

- Hooks of the backward pass do not fire (:mod:`gfs_core.loss.hooks`).
- cuDNN is off where a recurrent layer has dropout. cuDNN draws from a random stream of its own, which cannot be put
  back; torch's own kernel draws from one that can.
- Compiled code runs eagerly. A probe of another shape would trigger a recompilation, and a captured CUDA graph must
  stay as training left it.

:meth:`StateSnapshot.rewind` puts back everything but the measured weights before each evaluation of the loss. So every
evaluation is the same function: same dropout mask, same buffers, same teacher.

It cannot put back files written, output printed, plain values in class attributes, large NumPy arrays, and objects
that the model does not lead to.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.linalg.vectors import local
from gfs_core.loss.hooks import SilencedHooks
from gfs_core.loss.python_state import PythonState
from gfs_core.loss.streams import RandomState


class StateSnapshot:
    """Snapshot of everything a measurement could disturb, restored on exit.

    Args:
        model: the module whose state is kept, with all that its attributes refer to.
        parameters: further parameters that the measurement moves; those of ``model`` are always included.
        loss_fn: the loss. Modules, random streams and iterators that it closes over, or that it names as global
            variables, are put back too.

    Extra memory: one copy of the parameters and buffers.

    Raises:
        MeasurementError: on entering, where a torch function or dispatch mode is active that would record the
            measurement.
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[Tensor] = (), loss_fn: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.parameters = list({id(p): p for p in [*model.parameters(), *parameters]}.values())

    def __enter__(self) -> StateSnapshot:
        self._hooks = SilencedHooks(self.model, self.parameters)
        self._weights = [local(p).clone() for p in self.parameters]
        self._grads = [p.grad for p in self.parameters]
        self._bindable = [t for t in [*self.parameters, *self.model.buffers()] if _has_place(t)]
        self._requires_grad = [p.requires_grad for p in self.parameters]
        roots: list[tuple[str, Any]] = [(name or "model", m) for name, m in self.model.named_modules()]
        self._state = PythonState(roots, self.parameters, [("loss_fn", self.loss_fn)])
        self._rng = RandomState(self.parameters)
        self._evaluated = False
        self._bound: list[Tensor] = []  # the data of weights and buffers before an evaluation
        # Weights and buffers to which an evaluation gave other data: the tensor, its old data, the address of the new.
        self._rebound: list[tuple[Tensor, Tensor, int]] = []
        self._driven: list[int] | None = None  # parameters that the loss itself moves; not known yet
        self._modes = contextlib.ExitStack()
        if "torch._dynamo" in sys.modules:
            self._modes.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) and m.dropout > 0 for m in self.model.modules()):
            self._modes.enter_context(_no_cudnn())
        try:
            self._rng.lend()
            self._hooks.silence()
            for p in self.parameters:
                p.grad = None
            self._state.guard()
        except BaseException:
            self.__exit__()
            raise
        return self

    def rewind(self, measured: Collection[Tensor] | None = None) -> None:
        """Put back everything but the measured weights: the next evaluation starts from the same state.

        Args:
            measured: the parameters that stay where they are; ``None``: all of them do.
        """
        if self._evaluated:
            self._rebind()
            self._state.restore()
            self._state.guard()
            self._rng.restore()
            self._restore_flags()
            if measured is not None:
                self._restore_driven({id(p) for p in measured})
        self._evaluated = True
        self._bound = [t.data for t in self._bindable]

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Context of one evaluation: a large tensor is copied just before the loss writes to it."""
        return self._state.watching()

    def evaluated(self) -> None:
        """Note the tensors to which the loss has given other data (``weight.data = …``).

        The old data is bound back later: the backward pass needs the weights as the loss has left them.
        """
        for t, data in zip(self._bindable, self._bound, strict=True):
            if t.data_ptr() != data.data_ptr() and t.shape == data.shape and t.dtype == data.dtype:
                self._rebound.append((t, data, t.data_ptr()))
        self._bound = []

    def _rebind(self) -> None:
        held, self._rebound = self._rebound, []
        for t, data, place in held:
            if t.data_ptr() == place:
                t.data = data
            else:  # it is a float32 copy at the moment: try again later
                self._rebound.append((t, data, place))

    def shift(self, count: int) -> None:
        """Set another random state, a different one for each ``count`` > 0: the next evaluation draws other numbers."""
        self._rng.shift(count)

    def _restore_flags(self) -> None:
        for p, requires_grad in zip(self.parameters, self._requires_grad, strict=True):
            if p.grad is not None:
                p.grad = None
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)

    def _restore_driven(self, measured: set[int]) -> None:
        """Put back weights that the loss itself moves, such as a teacher's; the first evaluation shows which."""
        if self._driven is None:
            held = enumerate(zip(self.parameters, self._weights, strict=True))
            others = ((i, local(p), w) for i, (p, w) in held if id(p) not in measured)
            self._driven = [i for i, p, w in others if not torch.equal(p, w.to(p.dtype))]  # float32 copies of halves
        for i in self._driven:  # .data: keeps the version counter, which a kept autograd graph checks
            local(self.parameters[i].data).copy_(self._weights[i])

    def __exit__(self, *exc: object) -> None:
        try:
            self._put_back()
        except BaseException:  # interrupted half-way, as by Ctrl-C: once more, from the start
            self._put_back()
            raise
        finally:
            self._modes.close()
            del self._weights, self._grads, self._state, self._bindable, self._rebound

    def _put_back(self) -> None:
        if self._bound:  # the loss was interrupted
            self.evaluated()
        self._rebind()
        self._state.restore()
        self.restore_weights()
        for p, grad, requires_grad in zip(self.parameters, self._grads, self._requires_grad, strict=True):
            p.grad = grad
            p.requires_grad_(requires_grad)
        self._hooks.restore()
        self._rng.put_back()

    def restore_weights(self) -> None:
        """Put the parameters back to where the measurement found them."""
        with torch.no_grad():
            torch._foreach_copy_([local(p) for p in self.parameters], self._weights)

    @property
    def leaks(self) -> list[str]:
        """Names of large attributes that changed in place without being copied first, so cannot be put back."""
        return self._state.leaks()


@contextlib.contextmanager
def _no_cudnn() -> Iterator[None]:
    held, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = held


def _has_place(tensor: Tensor) -> bool:
    """Whether the address of its data tells whether it was given other data. FSDP moves sharded weights itself."""
    return tensor.layout is torch.strided and not hasattr(tensor, "to_local") and tensor.numel() > 0
