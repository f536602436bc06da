"""Numbers that are on their way from an accelerator to the host, without anybody waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mark(tensors: Sequence[Tensor]) -> torch.cuda.Event | None:
    """A point in the work of the CUDA device that holds the first tensor; ``None`` on other devices."""
    if not tensors or tensors[0].device.type != "cuda":
        return None
    with torch.cuda.device(tensors[0].device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
    return event


class Transfer:
    """Scalars that are read later.

    Those on a CUDA device are copied into pinned memory, behind the work that computes them; the caller goes on at
    once. Those on the CPU are read now. A scalar on any other device is read when it is asked for, which waits for it.

    Args:
        scalars: numbers, and tensors that hold one number each, on any devices. They may be changed afterwards.
        since: where the device began to compute them, from :func:`mark`.

    Attributes:
        seconds: seconds of the device from ``since`` until they had arrived; 0 before they are read, or without it.
    """

    def __init__(self, scalars: Sequence[Tensor | float], since: torch.cuda.Event | None = None) -> None:
        self.seconds, self._since = 0.0, since
        self._values = [0.0 if isinstance(s, Tensor) else float(s) for s in scalars]
        self._coming: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []
        places: dict[torch.device, list[int]] = {}
        for place, scalar in enumerate(scalars):
            if isinstance(scalar, Tensor):
                places.setdefault(scalar.device, []).append(place)
        for device, own in places.items():
            tensors = [s for s in map(scalars.__getitem__, own) if isinstance(s, Tensor)]
            together = torch.stack([t if t.dim() == 0 else t.reshape(()) for t in tensors]).detach()
            if device.type == "cuda":
                with torch.cuda.device(device):
                    there = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
                    there.copy_(together, non_blocking=True)
                    event = torch.cuda.Event(enable_timing=since is not None)  # type: ignore[no-untyped-call]
                    event.record()
                self._coming.append((own, there, event))
            elif device.type == "cpu":
                self._take(own, together)
            else:
                self._coming.append((own, together, None))

    @property
    def arrived(self) -> bool:
        """Whether all numbers can be read without waiting; true on devices where that cannot be known."""
        return all(event is None or event.query() for _, _, event in self._coming)  # type: ignore[no-untyped-call]

    def values(self) -> list[float]:
        """The numbers, in the order in which they were given; waits for those that have not arrived."""
        for own, there, event in self._coming:
            if event is not None:
                event.synchronize()
                if self._since is not None:
                    self.seconds, self._since = 1e-3 * self._since.elapsed_time(event), None
            self._take(own, there)
        self._coming = []
        return self._values

    def _take(self, places: list[int], numbers: Tensor) -> None:
        for place, value in zip(places, numbers.tolist(), strict=True):
            self._values[place] = value


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each tensor, in float32 where the tensor is in half precision; nothing is read."""
    if not tensors:
        return []
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32 if half else None))
