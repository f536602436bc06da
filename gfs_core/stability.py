"""The optimizer's side of stability: its learning rate, preconditioner and threshold.

The threshold is the largest eigenvalue of S·(H + shift)·S at which the optimizer, with its present state, stops
being stable on a quadratic. Each row follows from the step's characteristic polynomial at z = −1 (the
period-two oscillation of the edge of stability; Cohen et al. 2021 for SGD and momentum, Cohen et al. 2022 for
Adam); tests run the real optimizer just below and just above it.

==================================  ==========================================
SGD, momentum β, dampening τ        (2 + 2β) / (η(1 − τ)), τ = 0 where β = 0
SGD, Nesterov β                     (2 + 2β) / (η(1 + 2β))
Adam                                (2 + 2β₁) / ((1 − β₁)η)
AdamW, decoupled weight decay λ     (2 − ηλ)(1 + β₁) / ((1 − β₁)η)
RMSprop, momentum β                 (2 + 2β) / η
==================================  ==========================================

S = P^-1/2 with P = √v̂ + ε for Adam and AdamW (v̂ bias-corrected), P = √v + ε for RMSprop, and 1 for SGD. An entry
whose second moment is zero (a token not seen yet, a unit that is off) has had no gradient so far: the optimizer has not
moved it, its P is about to change by orders of magnitude, and its entry of S is 0.
Coupled weight decay adds λ to the diagonal of H. Parameter groups with different rates become one operator:
S is scaled by √(threshold of the reference group / threshold of the group), the reference being the group with
the lowest threshold. With equal momentum in all groups that is exact; with different ones it is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop


class Diagonal:
    """The diagonal of S, or a power of it, one parameter at a time: the tensors are computed when they are asked for.

    As a list they would cost a copy of the weights for the whole measurement; computing them is cheap beside a
    gradient.

    Args:
        optimizer: its second moments are read; ``None``: S holds numbers only.
        params: the parameters, with the group and the relative scale of each.
        power: exponent of every entry.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        params: Sequence[tuple[Tensor, dict[str, Any], float]],
        power: int = 1,
    ) -> None:
        self.optimizer, self.params, self.power = optimizer, params, power

    def __iter__(self) -> Iterator[Tensor | float]:
        for p, group, relative in self.params:
            if self.optimizer is None:
                yield relative**self.power
            elif not self.optimizer.state.get(p):
                yield 0.0
            else:
                yield _root_preconditioner(self.optimizer, group, p).mul_(relative).pow_(self.power)

    def __len__(self) -> int:
        return len(self.params)

    def squared(self) -> Diagonal:
        """The diagonal of S²: for S = P^-1/2 that is P⁻¹."""
        return Diagonal(self.optimizer, self.params, 2 * self.power)


@dataclass(frozen=True)
class Stability:
    """What the stability ratio of an optimizer is measured with.

    Attributes:
        name: class name of the optimizer.
        learning_rate: rate of the reference group, now; ``None`` where it has none.
        threshold: the eigenvalue of the operator at which the optimizer stops being stable; ``None``: not known.
        scale: diagonal of S, per parameter; ``None``: the identity.
        shift: coupled weight decay, per parameter; ``None``: none.
        adaptive: whether S comes from the optimizer's second moments.
        reason: why the threshold is not known; empty where it is.
    """

    name: str
    learning_rate: float | None
    threshold: float | None
    scale: Diagonal | None = None
    shift: list[float] | None = None
    adaptive: bool = False
    reason: str = ""

    @property
    def plain(self) -> bool:
        """Whether the operator is the Hessian itself."""
        return self.scale is None and self.shift is None


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the frameworks' wrappers.

    Raises:
        TypeError: there is none.
    """
    seen = 0
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or seen > 10:
            if isinstance(optimizer, Optimizer):
                break
            raise TypeError(f"expected a torch.optim.Optimizer or a wrapper of one, got {type(optimizer).__name__}")
        optimizer, seen = inner, seen + 1
    return optimizer


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The trainable parameters that the optimizer holds, each once."""
    params = [p for group in unwrap(optimizer).param_groups for p in group["params"] if p.requires_grad]
    return list({id(p): p for p in params}.values())


def stability_of(optimizer: Any, params: Sequence[Tensor]) -> Stability:
    """Learning rate, operator and threshold of ``optimizer`` as it stands now.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop, or a wrapper of one. Of any other the threshold is not known.
        params: the parameters measured, in order.
    """
    inner = unwrap(optimizer)
    name = type(inner).__name__
    groups = [g for g in inner.param_groups if any(p.requires_grad for p in g["params"])]
    rates = [float(g["lr"]) for g in groups if "lr" in g]
    rate = max(rates, default=None)
    problem = _problem(inner, groups, rates)
    if problem:
        return Stability(name, rate, None, reason=problem)
    adaptive = isinstance(inner, (Adam, RMSprop))
    if adaptive and not any(inner.state.get(p) for p in params):
        reason = f"{name} has no second moments yet: they come with its first step"
        return Stability(name, rate, None, adaptive=True, reason=reason)
    thresholds = [_threshold(inner, g) for g in groups]
    reference = min(thresholds)
    if not math.isfinite(reference):
        return Stability(name, rate, None, adaptive=adaptive, reason="the learning rate is 0: no step, no threshold")
    where = {id(p): (g, t) for g, t in zip(groups, thresholds, strict=True) for p in g["params"]}
    entries: list[tuple[Tensor, dict[str, Any], float]] = []
    shift: list[float] = []
    for p in params:
        group, threshold = where[id(p)]
        entries.append((p, group, math.sqrt(reference / threshold)))
        shift.append(0.0 if _decoupled(inner, group) else float(group.get("weight_decay", 0.0)))
    identity = not adaptive and all(relative == 1.0 for _, _, relative in entries)
    scale = None if identity else Diagonal(inner if adaptive else None, entries)
    lead = float(groups[thresholds.index(reference)]["lr"])
    return Stability(name, lead, reference, scale, shift if any(shift) else None, adaptive=adaptive)


def _problem(inner: Optimizer, groups: list[dict[str, Any]], rates: list[float]) -> str:
    if type(inner) not in (SGD, Adam, AdamW, RMSprop):
        return f"the threshold of {type(inner).__name__} is not known; raw sharpness is measured without it"
    if not groups:
        return "the optimizer holds no trainable parameter"
    if any(g.get("maximize") for g in groups):
        return "maximize=True is not analysed; minimise the negative loss instead"
    if not all(math.isfinite(r) and r >= 0 for r in rates):
        return f"a learning rate is not a finite number ≥ 0: {rates}"
    return ""


def _decoupled(inner: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(inner, AdamW) or bool(group.get("decoupled_weight_decay"))


def _threshold(inner: Optimizer, group: dict[str, Any]) -> float:
    rate = float(group["lr"])
    if rate == 0.0:
        return math.inf
    if isinstance(inner, Adam):
        beta = float(group["betas"][0])
        shrink = rate * float(group["weight_decay"]) if _decoupled(inner, group) else 0.0
        return (2 - shrink) * (1 + beta) / ((1 - beta) * rate)
    beta = float(group["momentum"])
    if isinstance(inner, RMSprop):
        return (2 + 2 * beta) / rate
    if group["nesterov"]:
        return (2 + 2 * beta) / (rate * (1 + 2 * beta))
    dampening = float(group["dampening"]) if beta else 0.0
    return (2 + 2 * beta) / (rate * (1 - dampening)) if dampening < 1 else math.inf


def _root_preconditioner(inner: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    """P^-1/2 of one parameter; 0 where there has been no gradient so far."""
    state = inner.state[p]
    rms = isinstance(inner, RMSprop)
    held: Tensor = state["square_avg"] if rms else state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    second: Tensor
    if not rms:
        second = held / (1 - float(group["betas"][1]) ** float(state["step"]))
    elif group["centered"]:
        second = (held - state["grad_avg"] ** 2).clamp_(min=0)
    else:
        second = held.clone()
    return second.sqrt_().add_(group["eps"]).rsqrt_().masked_fill_(held == 0, 0.0).to(p.dtype)
