"""Communication between processes, so that all of them decide the same at the same step.

If one process skips a measurement, or its solver takes one more product, the others would wait for it forever. So every
exchange begins with a *word*: a fixed number of numbers, summed over the processes. The last numbers of a word say
which ranks have failed. A process that fails says so in the next word, whatever that word is about, and all processes
give up the measurement. Words use a gloo group of their own, with a time limit. A process that does not answer costs
the others that time once, and then ends their measuring, but not their training. Vectors, which are as long as the
weights, use training's own group. They follow only after a word in which no process has failed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from gfs_core.errors import MeasurementError, NoLoss
from gfs_core.linalg.inner import WHOLE, InnerProduct, Sharding
from gfs_core.linalg.vectors import Vector
from gfs_core.run.record import KEYS, Measurement

TIMEOUT = 60.0  # seconds within which every process must answer; one gradient is computed between two words
_WORD = 32  # numbers in a word, beside those that name failed ranks
_MOST_NAMED = 16  # failed ranks that a word can name; with more processes, ranks are named modulo 16
# How a rank failed: a `MeasurementError`, any other error, no memory, a batch that training skips.
_OURS, _FOREIGN, _MEMORY, _SKIPPED = 1.0, 2.0, 3.0, 4.0
_BUCKET = 1 << 23  # elements that are reduced together: few calls, and little memory beside the vector


class OtherRankFailed(MeasurementError):
    """Another process could not go on with the measurement.

    Attributes:
        foreign: whether a rank failed by something else than a ``MeasurementError``, such as an error of the user's
            loss.
        memory: whether a rank ran out of memory.
        skipped: whether nothing has failed, and training skips the batch on that rank.
    """

    def __init__(self, said: dict[int, float]) -> None:
        where = ", ".join(map(str, said))
        super().__init__(f"the measurement failed on rank {where}, and is skipped on all of them")
        self.foreign, self.memory = (kind in said.values() for kind in (_FOREIGN, _MEMORY))
        self.skipped = set(said.values()) == {_SKIPPED}


class RanksLost(MeasurementError):
    """A process does not answer."""


def _silent(error: RuntimeError) -> str:
    return f"another process does not answer within {TIMEOUT:g} s ({str(error).splitlines()[0]})"


class Ranks:
    """The processes of this training. All of them must create this object at the same place.

    Attributes:
        rank: rank of this process, from 0.
        size: number of processes.
        lost: whether this process has stopped exchanging, after another one did not answer or a failure of its own.

    Raises:
        RanksLost: another process does not create it in time.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.lost = False
        try:
            self._words = distributed.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
        except RuntimeError as error:
            raise RanksLost(f"{_silent(error)}. Make the callback, or the monitor, on every process") from None
        # One tensor serves all exchanges and lives longer than the group. A gloo thread that drops the last reference
        # to a tensor waits for the interpreter's lock, while the group's destruction waits for the thread (torch 2.6).
        with torch.inference_mode(False):
            self._word = torch.zeros(_WORD + min(self.size, _MOST_NAMED), dtype=torch.float64, device="cpu")

    @staticmethod
    def here() -> Ranks | None:
        """The processes of the default process group; ``None``: there is only this one.

        Raises:
            MeasurementError: torch has no gloo backend.
            RanksLost: another process does not come here in time.
        """
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
            return None
        if not distributed.is_gloo_available():
            raise MeasurementError("several processes, and this torch has no gloo, through which they agree")
        return Ranks()

    def close(self) -> None:
        """Destroy the group."""
        if self._words is not None and distributed.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                distributed.destroy_process_group(self._words)
        self._words = None

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes; at most 32 values.

        Raises:
            OtherRankFailed: another process has failed since the last exchange.
            RanksLost: another process does not answer.
        """
        found = self._exchange([0.0] * min(self.size, _MOST_NAMED), values)
        return found[: len(values)]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return self.total([value])[0] / self.size

    def mean_of_known(self, value: float | None) -> float | None:
        """The mean over the processes whose value is not ``None``; ``None`` if there are none."""
        total, known = self.total([value or 0.0, float(value is not None)])
        return total / known if known else None

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        return self.total([float(flag)])[0] > 0

    def least(self, count: int) -> int:
        """The smallest ``count``, an integer ≥ 0, of all processes; it takes that many exchanges and one more."""
        least = 0
        while not self.any(count <= least):
            least += 1
        return least

    def mean_of(self, value: float, vector: Vector) -> float:
        """The means over the processes of a number, which is returned, and of a vector, in place."""
        buckets = list(_buckets(vector))
        room = [torch.cat([t.reshape(-1) for t in bucket]) for bucket in buckets]  # may fail, so before the word
        value = self.mean(value)
        for bucket, flat in zip(buckets, room, strict=True):
            distributed.all_reduce(flat)
            flat.div_(self.size)
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return value

    def same(self, measurement: Measurement) -> Measurement:
        """The measurement with the values of rank 0, the same on all processes.

        The values of layers, which only rank 0 writes, and the reasons stay this process's own.
        """
        own = measurement.values()
        told = [own.get(name, math.nan) if self.rank == 0 else 0.0 for name in KEYS]
        found = [v for i in range(0, len(told), _WORD) for v in self.total(told[i : i + _WORD])]
        values = zip(KEYS.values(), found, strict=True)
        known = {key.name: int(v) if key.whole else v for key, v in values if not math.isnan(v)}
        same = Measurement.of(measurement.step, measurement.optimizer_name, measurement.reasons, **known)
        return same.also(reading for reading in measurement.readings if reading.layer)

    def inner_product(self, params: Sequence[Tensor]) -> InnerProduct:
        """The inner product of vectors over ``params``: a sum over the processes if those are sharded.

        Raises:
            MeasurementError: they are sharded in a way that is not supported.
        """
        if not any(hasattr(p, "to_local") for p in params):
            return WHOLE
        return InnerProduct(Sharding([self._share(p) for p in params], self.total, _WORD))

    def _share(self, param: Any) -> float:
        if not hasattr(param, "to_local"):
            return 1 / self.size
        mesh, placements = param.device_mesh, param.placements
        if mesh.size() != self.size or any(p.is_partial() for p in placements):
            raise MeasurementError(f"weights laid out as {placements} over {mesh.size()} of {self.size} processes")
        copies: int = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_replicate())
        return 1 / copies

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context that all processes run together: a failure on one ends it on all.

        Raises:
            OtherRankFailed: another process has failed.
            RanksLost: another process does not answer.
        """
        if self.lost:
            raise RanksLost("another process does not answer")
        try:
            yield
            self.total([])  # raises if a process has failed after the last exchange
        except (OtherRankFailed, RanksLost):
            raise
        except BaseException as error:
            kind = _OURS if isinstance(error, MeasurementError) else _FOREIGN
            if isinstance(error, NoLoss):
                kind = _SKIPPED
            failed = [0.0] * min(self.size, _MOST_NAMED)
            failed[self.rank % len(failed)] = _MEMORY if isinstance(error, torch.OutOfMemoryError) else kind
            with contextlib.suppress(MeasurementError):
                self._exchange(failed, [])
            raise

    def _exchange(self, failed: list[float], values: Sequence[float]) -> list[float]:
        if self.lost or self._words is None:
            raise RanksLost("another process does not answer")
        word = self._word
        word.copy_(torch.tensor([*values, *[0.0] * (_WORD - len(values)), *failed], dtype=torch.float64, device="cpu"))
        try:
            distributed.all_reduce(word, group=self._words)
        except RuntimeError as error:
            self.lost = True
            raise RanksLost(_silent(error)) from None
        numbers = [float(v) for v in word.tolist()]
        bad = {rank: said for rank, said in enumerate(numbers[_WORD:]) if said > 0}
        if bad and not any(failed):
            raise OtherRankFailed(bad)
        return numbers


def _buckets(vector: Vector) -> Iterator[list[Tensor]]:
    """Groups of tensors of one dtype and device, of a few million elements each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in vector:
        held = kinds.setdefault((tensor.dtype, tensor.device), [])
        if held and sum(t.numel() for t in held) + tensor.numel() > _BUCKET:
            yield held
            held = kinds[tensor.dtype, tensor.device] = []
        held.append(tensor)
    yield from (held for held in kinds.values() if held)
