"""Random streams and iterators, so that a measurement advances neither.

The state of a random stream can be read and put back. The position of an iterator cannot. So the loss is given a copy
of the iterator, or a :class:`Guard` where it cannot be copied; the iterator itself is never advanced.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import random
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gfs_core.errors import MeasurementError

_ACCELERATORS = ("cuda", "xpu", "mps")
# A copy of one of these shares nothing that advances. A copy of a `zip` or `map` would advance the iterators inside.
_COPIED: tuple[type[Any], ...] = (itertools.count, type(iter([])), type(iter(())), type(iter(range(0))))


class RandomState:
    """Random states of Python, of NumPy if it is loaded, and of torch on the CPU and on the devices of ``tensors``.

    Between :meth:`lend` and :meth:`put_back` a CUDA generator has another state object than its own. To write into its
    own makes cuDNN begin its stream anew, from which a recurrent layer of training draws its dropout.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = numpy.random.get_state() if numpy is not None else None
        self.cpu = torch.get_rng_state()
        devices = {t.device for t in tensors if t.device.type in _ACCELERATORS}
        self.devices = {d: _module(d).get_rng_state(*_where(d)) for d in devices}
        self._own = {d: _generator(d).graphsafe_get_state() for d in devices if d.type == "cuda"}

    def lend(self) -> None:
        """Give each CUDA generator another state object, in the same state: nothing is drawn from its own."""
        for device in self._own:
            _set(device, self.devices[device])

    def put_back(self) -> None:
        """Restore the random states; a CUDA generator has its own state object again."""
        self.restore()
        for device, own in self._own.items():
            _generator(device).graphsafe_set_state(own)

    def restore(self) -> None:
        """Restore the random states."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            _set(device, state)

    def shift(self, count: int) -> None:
        """Set other random states, which follow from that of Python and ``count``.

        Processes that share the random state of Python get the same ones.
        """
        chosen = random.Random(f"{zlib.crc32(repr(self.python).encode())} {count}")
        random.seed(chosen.getrandbits(32))
        if self.numpy is not None:
            sys.modules["numpy"].random.seed(chosen.getrandbits(32))
        torch.default_generator.manual_seed(chosen.getrandbits(32))
        for device in self.devices:
            _set(device, chosen.getrandbits(32))

    def as_text(self) -> str:
        """The states as text, to be saved; :meth:`from_text` reads it."""
        numpy = None if self.numpy is None else [self.numpy[0], self.numpy[1].tolist(), *self.numpy[2:]]
        devices = {str(device): bytes(state.tolist()).hex() for device, state in self.devices.items()}
        return json.dumps([self.python, numpy, bytes(self.cpu.tolist()).hex(), devices])

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def from_text(text: str) -> RandomState:
        """The states that :meth:`as_text` has written."""
        python, numpy, cpu, devices = json.loads(text)
        state = RandomState(())
        state.python = (python[0], tuple(python[1]), python[2])
        state.numpy = None if numpy is None else tuple(numpy)
        state.cpu = _bytes(cpu)
        state.devices = {torch.device(device): _bytes(held) for device, held in devices.items()}
        return state


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0]


def _set(device: torch.device, state: Tensor | int) -> None:
    """Set the random state of a device: a whole state, or that of a seed."""
    if device.type == "cuda":
        other = _generator(device).clone_state()
        other.manual_seed(state) if isinstance(state, int) else other.set_state(state)
        _generator(device).graphsafe_set_state(other)
    elif isinstance(state, int):
        with _module(device).device(device) if _where(device) else contextlib.nullcontext():
            _module(device).manual_seed(state)
    else:
        _module(device).set_rng_state(state, *_where(device))


def _where(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps takes no device


def rewinder(stream: Any) -> Callable[[], object] | None:
    """A function that puts a random stream back to its present state; ``None`` where ``stream`` is no random stream."""
    if isinstance(stream, torch.Generator):
        held = stream.get_state()
        return lambda: stream.set_state(held)
    if isinstance(stream, random.Random):
        if isinstance(stream, random.SystemRandom):  # draws from the system: no state
            return lambda: None
        state = stream.getstate()
        return lambda: stream.setstate(state)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(stream, numpy.random.RandomState):
        legacy = stream.get_state()
        return lambda: stream.set_state(legacy)
    if isinstance(stream, numpy.random.Generator):
        return rewinder(stream.bit_generator)
    if isinstance(stream, numpy.random.BitGenerator):
        bits = stream.state
        return lambda: setattr(stream, "state", bits)
    return None


def is_iterator(value: Any) -> bool:
    """Whether ``value`` is an iterator whose position cannot be read and written."""
    kind = type(value)
    if not hasattr(kind, "__next__") or hasattr(kind, "fileno"):  # a file: writes to it cannot be undone
        return False
    package = kind.__module__.partition(".")[0]
    return package == "torch" or not hasattr(value, "__dict__")  # attributes hold the position, and are put back


def stand_in(iterator: Any, name: str) -> Any:
    """A copy of ``iterator``, or a :class:`Guard`; of a tuple, a tuple with such stand-ins for its iterators."""
    if isinstance(iterator, tuple):
        items = (stand_in(item, f"{name}[{i}]") if is_iterator(item) else item for i, item in enumerate(iterator))
        return type(iterator)._make(items) if hasattr(iterator, "_make") else tuple(items)
    if isinstance(iterator, _COPIED):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 deprecates copies of `itertools`
                return copy.copy(iterator)
        except TypeError:
            pass  # Python 3.14 has removed them
    return Guard(iterator, name)


class Guard:
    """Takes the place of an iterator that cannot be copied, and raises where the loss would advance it."""

    def __init__(self, iterator: Any, name: str) -> None:
        self.__dict__.update(_iterator=iterator, _name=name)

    def __iter__(self) -> Guard:
        return self

    def __next__(self) -> NoReturn:
        self._refuse()

    def __len__(self) -> int:
        return len(self.__dict__["_iterator"])

    def __getattr__(self, attribute: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        kind = type(self.__dict__["_iterator"]).__name__
        raise MeasurementError(
            f"the loss takes from `{self.__dict__['_name']}`, a {kind}, which cannot be put back: it was left alone, "
            "and nothing is measured; measure with a `loss_fn=` that does not take from it"
        )
