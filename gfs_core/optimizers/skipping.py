"""Lets an optimizer leave out a step, so that nothing of the step is left anywhere.

A hook cannot keep ``optimizer.step`` from running. Replacing the method can, but learning-rate schedulers, accelerate
and Lightning replace it too, and gradient scaling takes a step that never came for an overflow, and halves its scale.
But torch's optimizers leave a parameter without a gradient alone: its weight, moments, step count and weight decay. So
the gradients are taken away once everybody else has looked at them (gradient scaling for infinite ones, clipping for
the norm), and are given back after the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gfs_core.linalg.transfer import norms_of
from gfs_core.optimizers.closures import closure_of, with_closure
from gfs_core.optimizers.thresholds import unwrap


class SkipHook:
    """Takes the gradients away from the optimizer during a step that is to be skipped.

    A step that gradient scaling leaves out itself does not come here.

    Args:
        optimizer: a torch optimizer or a wrapper of one.
        finite_only: a step whose gradient is not finite is skipped too, though nobody asked. Reading it waits for an
            accelerator. Several processes would have to agree, so it is for one.

    Attributes:
        asked: whether the coming step is to be skipped. Whoever sets it sets it anew before each step.
        seen: whether a step of the optimizer has come here yet.
        not_finite: whether the last step was skipped because its gradient was not finite.
    """

    def __init__(self, optimizer: Any, finite_only: bool = False) -> None:
        self.optimizer = unwrap(optimizer)
        self.asked = self.seen = self.not_finite = False
        self._finite_only = finite_only
        self._taken: list[tuple[Tensor, Tensor]] = []  # weights and their gradients while a step is skipped
        self._counters: list[tuple[dict[str, Any], dict[str, Any]]] = []  # groups and their values
        # A compiled step would treat the decision of its first call as a constant.
        before, after = (torch.compiler.disable(hook) for hook in (self._before, self._after))  # type: ignore[no-untyped-call]
        self._handles: list[Any] = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        self._give_back()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._taken, self._counters = [], []  # the last step may have failed half-way
        closure = closure_of(args, kwargs)
        if closure is None:
            self._take_away()
            return None

        def without_gradients() -> Any:
            loss = closure()  # computes the gradients, and may decide whether they are used
            self._take_away()
            return loss

        return with_closure(args, kwargs, without_gradients)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._give_back()

    def _take_away(self) -> None:
        self.seen = True
        self.not_finite = not self.asked and self._finite_only and not self._is_finite()
        if not (self.asked or self.not_finite):
            return
        self.asked = False
        for group in self.optimizer.param_groups:
            # Some optimizers count steps in the group. The rate belongs to whoever schedules or scales it.
            self._counters.append((group, {k: v for k, v in group.items() if k not in ("params", "lr")}))
            for p in group["params"]:
                if p.grad is not None:
                    self._taken.append((p, p.grad))
                    p.grad = None

    def _is_finite(self) -> bool:
        held: dict[torch.device, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.numel():
                    values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                    held.setdefault(values.device, []).append(values)
        return all(_are_finite(grads) for grads in held.values())

    def _give_back(self) -> None:
        for p, grad in self._taken:
            p.grad = grad
        for group, values in self._counters:
            group.update(values)
        self._taken, self._counters = [], []


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries are. Euclidean norms are cheap and may overflow; then the largest entries decide."""

    def all_of(norms: Sequence[Tensor]) -> bool:
        return bool(torch.stack([norm.isfinite() for norm in norms]).all())

    return all_of(norms_of(tensors)) or all_of(torch._foreach_norm(tensors, math.inf))
