"""Vector algebra over lists of tensors.

A *vector* here is a list of tensors with the shapes of the parameters: nothing is ever flattened into
one long tensor, so a vector costs exactly one copy of the weights. Everything goes through
``torch._foreach_*``, and inner products come back to the host together, in one transfer. Of half-precision weights
a vector is in float32. Of complex weights it holds real and imaginary parts side by side, as torch's optimizers do; of
sparse gradients it is dense.

Where the weights are sharded over processes, a vector holds this process's shards alone: it is never gathered, and
inner products are summed over the processes (:func:`sharded`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
HALVES = (torch.float16, torch.bfloat16)
_BUNCH = 1 << 23  # elements whose inner product is one call on an accelerator


@dataclass(frozen=True)
class Sharding:
    """How a vector is spread over processes.

    Attributes:
        shares: of each tensor, one over the number of processes that hold the same part of it.
        total: sums numbers over the processes, up to ``most`` at once.
        most: how many.
    """

    shares: list[float]
    total: Callable[[Sequence[float]], list[float]]
    most: int


_sharding: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


@contextlib.contextmanager
def sharded(how: Sharding | None) -> Iterator[None]:
    """Vectors are spread like this while the context lasts."""
    token = _sharding.set(how)
    try:
        yield
    finally:
        _sharding.reset(token)


def local(tensor: Tensor) -> Tensor:
    """The tensor detached, of a DTensor this process's shard, of a complex one its real view: in the same memory."""
    tensor = tensor.detach()
    return _real(tensor.to_local() if hasattr(tensor, "to_local") else tensor)


def dense(tensor: Tensor) -> Tensor:
    """The tensor dense and real, with its graph; of complex numbers the real view."""
    return _real(tensor if tensor.layout is torch.strided else tensor.to_dense())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def spread(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.size() > 1


def clone(vector: Sequence[Tensor]) -> Vector:
    """Copy of ``vector``, detached and real; of sharded weights, of this process's shards."""
    return [local(t).clone() for t in vector]


def is_half(tensor: Tensor) -> bool:
    """Whether the tensor is in half precision."""
    return tensor.dtype in HALVES


def zeros_like(vector: Sequence[Tensor]) -> Vector:
    """The zero vector."""
    return [torch.zeros_like(t, dtype=torch.float32 if is_half(t) else None) for t in vector]


def owned(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """A vector that may be changed in place, from what autograd returned; ``None`` counts as zero.

    Autograd hands out expanded tensors, and one tensor for several parameters; those are copied.
    """
    out: Vector = []
    storages: set[int] = set()
    for part, model in zip(parts, like, strict=True):
        if part is None:
            out += zeros_like([model])
            continue
        tensor = dense(part.detach())
        if is_half(tensor):
            out.append(tensor.float())
            continue
        expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        place = tensor.untyped_storage().data_ptr()
        if expanded or place in storages:
            tensor = tensor.contiguous() if expanded else tensor.clone()
        storages.add(place)
        out.append(tensor)
    return out


def random_like(vector: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Standard normal vector with the shapes, dtypes (float32 for half precision) and devices of ``vector``.

    Drawn where the tensors are, by a generator seeded from ``generator``, which is on the CPU: a billion numbers take
    milliseconds on a GPU and seconds on a CPU. Repeatable on one kind of device; the global random state is not
    touched. The numbers are float32's, the same in every precision.
    """
    dtypes = [torch.float32 if is_half(t) else t.dtype for t in vector]
    sources = {torch.device("cpu"): generator}
    for device in {t.device: None for t in vector if t.device.type != "cpu"}:
        seed = int(torch.randint(2**62, (), generator=generator))
        sources[device] = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(t.shape, generator=sources[t.device], dtype=torch.float32, device=t.device).to(d)
        for t, d in zip(vector, dtypes, strict=True)
    ]


def axpy(a: float, x: Vector, y: Vector) -> None:
    """``y += a * x``, in place."""
    torch._foreach_add_(y, x, alpha=a)


def scale(a: float, x: Vector) -> None:
    """``x *= a``, in place."""
    torch._foreach_mul_(x, a)


def combine(a: float, x: Vector, b: float, y: Vector) -> None:
    """``y = a * x + b * y``, in place."""
    torch._foreach_mul_(y, b)
    torch._foreach_add_(y, x, alpha=a)


def mix_in(other: Vector | None, length: float, vector: Vector) -> None:
    """``vector += ±length * other / ‖other‖``, in place; nothing for zero or ``None``.

    The sign makes their inner product grow in magnitude: which way an eigenvector points is rounding's choice, and
    ``-vector`` becomes minus the same.
    """
    if other is None:
        return
    square, along = dots([(other, other), (other, vector)])
    if 0.0 < square < math.inf:
        axpy(math.copysign(length / math.sqrt(square), along), other, vector)


def copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """``target[:] = source``, in place."""
    torch._foreach_copy_(list(target), list(source))


def dots(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[float]:
    """Inner products of several pairs of vectors of one shape, on the host with a single transfer from each device.

    Each tensor's own product is accumulated in its dtype (float32 for half precision), the sum over tensors in
    float64. There is no ``torch._foreach_*`` for inner products: on the CPU one call for each tensor; elsewhere, where
    starting a call takes longer than a small product, tensors are strung together, at most 32 MiB of float32 at a time.
    """
    if not pairs:
        return []
    how = _sharding.get()
    if how is None and pairs[0][0][0].device.type != "cpu":
        values = _on_host([d for places in _bunches(pairs[0][0]) for d in _dots_of_bunch(pairs, places)])
        return [math.fsum(values[i :: len(pairs)]) for i in range(len(pairs))]
    arrived = iter(_on_host([_dot(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)]))
    if how is None:
        return [math.fsum(itertools.islice(arrived, len(x))) for x, _ in pairs]
    own = [
        math.fsum(s * v for s, v in zip(how.shares, itertools.islice(arrived, len(x)), strict=True)) for x, _ in pairs
    ]
    return [t for i in range(0, len(own), how.most) for t in how.total(own[i : i + how.most])]


def _bunches(vector: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of neighbouring tensors on one device, a few million elements together."""
    held: list[int] = []
    size = 0
    for i, tensor in enumerate(vector):
        if held and (size + tensor.numel() > _BUNCH or tensor.device != vector[held[0]].device):
            yield held
            held, size = [], 0
        held.append(i)
        size += tensor.numel()
    if held:
        yield held


def _dots_of_bunch(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], places: list[int]) -> list[Tensor]:
    strung: dict[int, Tensor] = {}

    def string(vector: Sequence[Tensor]) -> Tensor:
        if id(vector) not in strung:
            parts = [vector[i].float() if is_half(vector[i]) else vector[i] for i in places]
            strung[id(vector)] = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([p.reshape(-1) for p in parts])
        return strung[id(vector)]

    return [torch.dot(string(x), string(y)) for x, y in pairs]


def nonzero(vector: Vector) -> list[bool]:
    """For each tensor, whether it holds anything but zeros."""
    return [size != 0.0 for size in _on_host(list(torch._foreach_norm(vector, math.inf)))]


def undivided() -> bool:
    """Whether a vector's tensors are whole on this process: inner products of some of them alone may be taken."""
    return _sharding.get() is None


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """Inner product of two vectors."""
    return dots([(x, y)])[0]


def norm(x: Sequence[Tensor]) -> float:
    """Euclidean norm of a vector."""
    return float(dot(x, x) ** 0.5)


def _on_host(scalars: list[Tensor]) -> list[float]:
    places: dict[torch.device, list[int]] = {}
    for i, scalar in enumerate(scalars):
        places.setdefault(scalar.device, []).append(i)
    values = [0.0] * len(scalars)
    for where in places.values():
        for i, value in zip(where, torch.stack([scalars[i] for i in where]).double().tolist(), strict=True):
            values[i] = value
    return values


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if is_half(a) or is_half(b):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))
