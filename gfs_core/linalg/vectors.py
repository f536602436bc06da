"""Vector algebra over lists of tensors.

A *vector* here is a list of tensors with the shapes of the parameters: nothing is ever flattened into
one long tensor, so a vector costs exactly one copy of the weights. Everything goes through
``torch._foreach_*``. Of half-precision weights a vector is in float32. Of complex weights it holds real and imaginary
parts side by side, as torch's optimizers do; of sparse gradients it is dense.

Where the weights are sharded over processes, a vector holds this process's shards alone: it is never gathered. Lengths
and angles are an :class:`~gfs_core.linalg.inner.InnerProduct`'s, which knows how a vector is spread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
HALVES = (torch.float16, torch.bfloat16)
# Elements that are worked on together.
_BUNCH, _BUNCH_ON_CPU = 1 << 23, 1 << 16


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


def fitted(vector: Vector | None, params: Sequence[Tensor]) -> Vector | None:
    """A copy of ``vector`` where ``params`` are, in the precision of a vector; ``None``: its shapes are others."""
    weights = [local(p) for p in params]
    if vector is None or [t.shape for t in vector] != [w.shape for w in weights]:
        return None
    dtypes = [torch.float32 if is_half(w) else w.dtype for w in weights]
    return [t.to(device=w.device, dtype=dtype, copy=True) for t, w, dtype in zip(vector, weights, dtypes, strict=True)]


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


def bunches(vector: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors that are worked on together: a few million elements, on the CPU as many as its cache holds.

    Starting a call takes an accelerator longer than a small tensor does.
    """
    held: list[int] = []
    size = 0
    for i, tensor in enumerate(vector):
        most = _BUNCH_ON_CPU if tensor.device.type == "cpu" else _BUNCH
        if held and (size + tensor.numel() > most or tensor.device != vector[held[0]].device):
            yield held
            held, size = [], 0
        held.append(i)
        size += tensor.numel()
    if held:
        yield held


def multiply(factors: Iterable[Tensor | float], vector: Vector) -> None:
    """Multiply each tensor by its factor, in place; only the factors that are worked on together are held at once."""
    rest = iter(factors)
    for places in bunches(vector):
        by, own = list(itertools.islice(rest, len(places))), [vector[i] for i in places]
        if len(by) < len(places):
            raise ValueError(f"{len(vector)} tensors, and fewer factors")
        tensors = [factor for factor in by if isinstance(factor, Tensor)]
        if len(tensors) == len(by):
            torch._foreach_mul_(own, tensors)
        else:
            for tensor, factor in zip(own, by, strict=True):
                tensor.mul_(factor)


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


def copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """``target[:] = source``, in place."""
    torch._foreach_copy_(list(target), list(source))


def nonzero(vector: Vector) -> list[bool]:
    """For each tensor, whether it holds anything but zeros."""
    return [size != 0.0 for size in on_host(list(torch._foreach_norm(vector, math.inf)))]


def on_host(scalars: Sequence[Tensor]) -> list[float]:
    """Numbers that lie on devices, with a single transfer from each."""
    places: dict[torch.device, list[int]] = {}
    for i, scalar in enumerate(scalars):
        places.setdefault(scalar.device, []).append(i)
    values = [0.0] * len(scalars)
    for where in places.values():
        for i, value in zip(where, torch.stack([scalars[i] for i in where]).double().tolist(), strict=True):
            values[i] = value
    return values
