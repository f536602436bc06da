"""Snapshots of a training on the host, and the way back to one.

A snapshot holds, bitwise: the trained weights, all buffers, the optimizer's state and the values of its groups, and the
states of what was handed in beside (schedulers, a gradient scaler). Weights that are not trained are not copied. Random
streams and the data loader go on, as the batches in between are not to come again.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gfs_core.linalg.vectors import local
from gfs_core.optimizers.thresholds import unwrap

KEPT = 3  # snapshots: the trouble may have begun before the newest, and a way back may lead to the same trouble again


class Stateful(Protocol):
    """Something whose state a snapshot holds, such as a scheduler or a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore what :meth:`state_dict` returned."""


class Snapshot:
    """A training at one step.

    Args:
        step: optimizer steps taken so far.
        weights: weights and buffers, by name.
        optimizer: the torch optimizer.
        beside: what else has a state.
        used: a snapshot that is no longer needed, whose memory is used again.

    Attributes:
        step: optimizer steps taken before it.
        known: what else is to be remembered with it.
    """

    def __init__(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        beside: list[Stateful],
        used: Snapshot | None = None,
    ) -> None:
        self.step, self.known = step, dict[str, Any]()
        self._weights: dict[str, Tensor] = {}
        for name, t in weights.items():
            self._weights[name] = _on_host(t, None if used is None else used._weights.get(name))
        old: dict[Any, Any] = {} if used is None else used._state
        # By the parameter itself: a snapshot of a parameter that was replaced is of no use.
        self._state: dict[Any, Any] = {p: _copied(held, old.get(p)) for p, held in optimizer.state.items()}
        self._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._beside = [_copied(of.state_dict()) for of in beside]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in _tensors([self._weights, list(self._state.values()), self._groups, self._beside]))

    def fits(self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Whether the same weights are trained now."""
        same = weights.keys() == self._weights.keys() and len(optimizer.param_groups) == len(self._groups)
        return same and all(local(t).shape == self._weights[name].shape for name, t in weights.items())

    def moved(self, weights: dict[str, Tensor]) -> float:
        """How far the trained weights have moved since, relative to their length then; infinite: no finite way."""
        length = far = 0.0  # squared
        for name, then in self._weights.items():
            if name.startswith("weight"):
                length += float(then.double().square().sum())
                far += float((local(weights[name]).cpu().double() - then.double()).square().sum())
        return math.sqrt(far / length) if length > 0 and math.isfinite(far) else math.inf

    def restore(
        self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, beside: list[Stateful], rates: bool
    ) -> None:
        """Put everything back, in place where there is a place.

        Args:
            weights: weights and buffers now, by name.
            optimizer: the torch optimizer.
            beside: what else has a state, in the order in which it was given for the snapshot.
            rates: whether the learning rates are put back too.
        """
        with torch.no_grad():
            for name, t in weights.items():
                local(t).copy_(self._weights[name])
            for p in [p for p in optimizer.state if p not in self._state]:
                del optimizer.state[p]  # it had none yet
            for p, held in self._state.items():
                optimizer.state[p] = _put_back(optimizer.state.get(p), held)
            for of, state in zip(beside, self._beside, strict=True):
                of.load_state_dict(_put_back(None, state))  # a copy: some keep what they are given
            for group, values in zip(optimizer.param_groups, self._groups, strict=True):
                for name, value in values.items():
                    if name != "lr" or rates:
                        group[name] = _put_back(group.get(name), value)


class Snapshots:
    """The last snapshots of a training.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.

    Attributes:
        beside: what else has a state that is kept and put back.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, unwrap(optimizer)
        self.beside: list[Stateful] = []
        self._held: deque[Snapshot] = deque()
        self._used_up = -1  # step of the snapshot that was gone back to last, while there is none newer

    def __len__(self) -> int:
        return len(self._held)

    @property
    def bytes(self) -> int:
        """Bytes that all snapshots will take on the host, if the newest is like those to come."""
        return KEPT * self._held[-1].bytes if self._held else 0

    def drop(self) -> None:
        """Free all snapshots."""
        self._held.clear()

    def take(self, step: int) -> Snapshot | None:
        """Keep a snapshot; the oldest makes room for it. ``None``: the model has no weights yet.

        Raises:
            Exception: a state cannot be copied, or there is no memory for it; older snapshots stay, but for the oldest.
        """
        weights = self._weights()
        if any(is_lazy(t) for t in weights.values()):
            return None
        used = self._held.popleft() if len(self._held) >= KEPT else None
        self._held.append(Snapshot(step, weights, self.optimizer, self.beside, used))
        self._used_up = -1
        return self._held[-1]

    def before(self, step: int) -> Snapshot | None:
        """The newest snapshot from ``step`` or before that was not gone back to already, or else the oldest.

        ``None``: there is none of the weights that are trained now.
        """
        weights = self._weights()
        fitting = [s for s in self._held if s.fits(weights, self.optimizer)]
        early = [s for s in fitting if s.step <= step and s.step != self._used_up]
        return early[-1] if early else next(iter(fitting), None)

    def moved_since(self, snapshot: Snapshot) -> float:
        """How far the trained weights have moved since a snapshot, relative to their length then."""
        return snapshot.moved(self._weights())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, and drop those that are newer."""
        rates = bool(self.beside) or not hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        snapshot.restore(self._weights(), self.optimizer, self.beside, rates)
        while self._held[-1] is not snapshot:
            self._held.pop()
        self._used_up = snapshot.step

    def _weights(self) -> dict[str, Tensor]:
        """Trained weights and all buffers by name; the optimizer's weights that are not the model's by their place."""
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in own}
        found: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad or id(p) in trained:
                found[f"weight {name}"] = p
        known = {id(p) for p in found.values()}
        found |= {f"weight {i}": p for i, p in enumerate(own) if id(p) not in known}
        found |= {f"buffer {name}": b for name, b in self.model.named_buffers()}
        return found


def _on_host(tensor: Tensor, room: Tensor | None = None) -> Tensor:
    """A copy on the host, pinned where the tensor is on a GPU: then nothing waits for it.

    Training's later steps come after the copy on the same stream, so they cannot change what is copied.
    """
    source = local(tensor)
    pinned = source.is_cuda
    if room is None or room.shape != source.shape or room.dtype != source.dtype or room.is_pinned() != pinned:
        room = torch.empty_like(source, device="cpu", pin_memory=pinned)
    return room.copy_(source, non_blocking=pinned)


class _Copy(NamedTuple):
    """A tensor's copy on the host, and where the tensor was."""

    values: Tensor
    device: torch.device


def _copied(value: Any, room: Any = None) -> Any:
    """A copy whose tensors are on the host; ``room`` is an older copy of the same, whose memory is used."""
    if isinstance(value, Tensor):
        return _Copy(_on_host(value, room.values if isinstance(room, _Copy) else None), value.device)
    if isinstance(value, dict):
        rooms = room if isinstance(room, dict) else {}
        return {k: _copied(v, rooms.get(k)) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    return copy.deepcopy(value)


def _put_back(now: Any, held: Any) -> Any:
    """What was copied, in the place of the present value where that has one."""
    if isinstance(held, _Copy):
        if isinstance(now, Tensor) and local(now).shape == held.values.shape and local(now).dtype == held.values.dtype:
            local(now).copy_(held.values)
            return now
        return held.values.to(held.device, copy=True)
    if isinstance(held, dict):
        there = now if isinstance(now, dict) else {}
        values = {k: _put_back(there.get(k), v) for k, v in held.items()}
        there.clear()
        there.update(values)
        return there
    if type(held) in (list, tuple):
        before = now if type(now) is type(held) and len(now) == len(held) else [None] * len(held)
        return type(held)(_put_back(n, v) for n, v in zip(before, held, strict=True))
    return copy.deepcopy(held)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)
