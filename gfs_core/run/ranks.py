"""Several processes: what they tell each other, so that all of them decide the same at the same step.

A measurement that one process skips, or one whose solver takes one product more, would leave the others waiting for it
forever. So every exchange begins with a *word*: a few numbers of fixed size, summed over the processes, one of which
says how many have failed. A process that fails anywhere says so with the next word that the others are about to send,
whatever that word is about, and all of them give up this measurement. Words go through a gloo group of their own with a
time limit: a process that does not answer costs the others that long, once, and ends measuring for them, not training.
Vectors, as long as the weights, follow only after a word has found everybody well, over the group that training uses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from gfs_core.errors import MeasurementError, NoLoss
from gfs_core.linalg.inner import WHOLE, InnerProduct, Sharding
from gfs_core.linalg.vectors import Vector
from gfs_core.run.record import Measurement

TIMEOUT = 60.0  # seconds within which every process answers; between two words lies one gradient
_WORD = 32  # numbers
_MOST_NAMED = 16  # ranks that a word can name; of more, by the remainder
# How a rank failed: a reason of ours, the user's loss, no memory, a batch that training skips.
_OURS, _FOREIGN, _MEMORY, _SKIPPED = 1.0, 2.0, 3.0, 4.0
_BUCKET = 1 << 23  # elements that travel together: few calls, and little memory beside the vector


class OtherRankFailed(MeasurementError):
    """Another process could not go on with the measurement.

    Attributes:
        foreign: whether it was the user's loss that failed there.
        memory: whether one ran out of memory.
        skipped: whether training skips the batch there, and nothing has failed.
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
    """The processes of this training. Made by all of them at the same place.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        lost: whether one of them did not answer in time; nothing is exchanged any more.

    Raises:
        RanksLost: another process does not come here.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.lost = False
        try:
            self._words = distributed.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
        except RuntimeError as error:
            raise RanksLost(f"{_silent(error)}. Make the callback, or the monitor, on every process") from None
        # One for all exchanges, alive until the group is gone: where gloo's thread drops the last reference to a tensor
        # it waits for the interpreter's lock, and the group that is given back waits for the thread (torch 2.6).
        with torch.inference_mode(False):
            self._word = torch.zeros(_WORD + min(self.size, _MOST_NAMED), dtype=torch.float64, device="cpu")

    @staticmethod
    def here() -> Ranks | None:
        """The processes of the default process group; ``None``: there is only this one."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
            return None
        if not distributed.is_gloo_available():
            raise MeasurementError("several processes, and this torch has no gloo, through which they agree")
        return Ranks()

    def close(self) -> None:
        """Give the group back."""
        if self._words is not None and distributed.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                distributed.destroy_process_group(self._words)
        self._words = None

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes.

        Raises:
            OtherRankFailed: one of them has failed since the last exchange.
            RanksLost: one does not answer.
        """
        found = self._exchange([0.0] * min(self.size, _MOST_NAMED), values)
        return found[: len(values)]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return self.total([value])[0] / self.size

    def mean_of_known(self, value: float | None) -> float | None:
        """The mean over the processes that know the number; ``None``: none does."""
        total, known = self.total([value or 0.0, float(value is not None)])
        return total / known if known else None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.total([float(flag)])[0] > 0

    def mean_of(self, value: float, vector: Vector) -> float:
        """The mean of a number, and, in place, of a vector."""
        buckets = list(_buckets(vector))
        room = [torch.cat([t.reshape(-1) for t in bucket]) for bucket in buckets]  # before the word: this may fail
        value = self.mean(value)
        for bucket, flat in zip(buckets, room, strict=True):
            distributed.all_reduce(flat)
            flat.div_(self.size)
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return value

    def same(self, measurement: Measurement | None) -> Measurement:
        """The measurement of rank 0, on all of them; its texts are each process's own."""
        numbers = [f.name for f in fields(Measurement) if "help" in f.metadata]
        own = [math.nan if (v := getattr(measurement, n, None)) is None else float(v) for n in numbers]
        found = self.total([v if self.rank == 0 else 0.0 for v in own])
        whole = ("alarm", "hvps", "grad_evals")
        values: dict[str, Any] = {
            name: None if math.isnan(v) else int(v) if name in whole else v
            for name, v in zip(numbers, found, strict=True)
        }
        return replace(measurement or Measurement(0), **values)

    def inner_product(self, params: Sequence[Tensor]) -> InnerProduct:
        """The inner product of vectors over ``params``: a sum over the processes where those are sharded.

        Raises:
            MeasurementError: they are sharded in a way that is not known here.
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
        """Around what all of them do, or none: a failure on one ends it on all."""
        if self.lost:
            raise RanksLost("another process does not answer")
        try:
            yield
            self.total([])  # nobody has failed after the last exchange
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
    """Tensors of one dtype and device at a time, a few million elements together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in vector:
        held = kinds.setdefault((tensor.dtype, tensor.device), [])
        if held and sum(t.numel() for t in held) + tensor.numel() > _BUCKET:
            yield held
            held = kinds[tensor.dtype, tensor.device] = []
        held.append(tensor)
    yield from (held for held in kinds.values() if held)
