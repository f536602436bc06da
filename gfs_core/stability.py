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
NAdam, decay λ if decoupled         (2 − ηλ) / (η(1 − μ + μ′(1 − β₁)/(1 + β₁)))
RAdam, decay λ if decoupled         (2 − ηλ)(1 + β₁) / ((1 − β₁)η)
RMSprop, momentum β                 (2 + 2β) / η
Adagrad                             2 / η_t
==================================  ==========================================

μ and μ′ are NAdam's momenta of the coming step and the one after; η_t is Adagrad's decayed rate.
S = P^-1/2 with P = √v̂ + ε for Adam, AdamW and NAdam (v̂ bias-corrected), P = √v + ε for RMSprop and Adagrad (v its sum
of squares), P = (√v + ε)/(r√(1 − β₂^t)) for RAdam with its rectification r (1 while it does not rectify), and 1 for
SGD. Coefficients that still move in the first steps (β₁^t, NAdam's product of momenta) are taken as settled. An entry
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

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

_KNOWN = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad)
_ADAPTIVE = (Adam, NAdam, RAdam, RMSprop, Adagrad)


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
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, RMSprop or Adagrad, or a wrapper of one. Of any other the
            threshold is not known.
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
    adaptive = isinstance(inner, _ADAPTIVE)
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
    if type(inner) not in _KNOWN:
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
    if isinstance(inner, Adagrad):
        return 2 * (1 + _steps(inner, group) * float(group["lr_decay"])) / rate
    if isinstance(inner, (Adam, NAdam, RAdam)):
        beta = float(group["betas"][0])
        shrink = rate * float(group["weight_decay"]) if _decoupled(inner, group) else 0.0
        weight = (1 - beta) / (1 + beta)  # of the gradient in the step, at z = −1
        if isinstance(inner, NAdam):
            now, later = (
                beta * (1 - 0.5 * 0.96 ** ((_steps(inner, group) + ahead) * float(group["momentum_decay"])))
                for ahead in (1, 2)
            )
            weight = 1 - now + later * weight
        return (2 - shrink) / (weight * rate)
    beta = float(group["momentum"])
    if isinstance(inner, RMSprop):
        return (2 + 2 * beta) / rate
    if group["nesterov"]:
        return (2 + 2 * beta) / (rate * (1 + 2 * beta))
    dampening = float(group["dampening"]) if beta else 0.0
    return (2 + 2 * beta) / (rate * (1 - dampening)) if dampening < 1 else math.inf


def _steps(inner: Optimizer, group: dict[str, Any]) -> float:
    """Steps taken so far, of the group's first parameter that was stepped."""
    return next((float(inner.state[p]["step"]) for p in group["params"] if inner.state.get(p)), 0.0)


def _root_preconditioner(inner: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    """P^-1/2 of one parameter; 0 where there has been no gradient so far."""
    state = inner.state[p]
    if isinstance(inner, Adagrad):
        held: Tensor = state["sum"]
        root = held.sqrt()
    elif isinstance(inner, RMSprop):
        held = state["square_avg"]
        root = (held - state["grad_avg"] ** 2).clamp_(min=0).sqrt_() if group["centered"] else held.sqrt()
    else:
        held = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        second, step = float(group["betas"][1]), float(state["step"])
        if isinstance(inner, RAdam):
            rectified = _rectification(second, step)
            if rectified is None:
                return torch.ones_like(held).masked_fill_(held == 0, 0.0).to(p.dtype)
            root = held.sqrt().add_(group["eps"]).div_(rectified * math.sqrt(1 - second**step))
            return root.rsqrt_().masked_fill_(held == 0, 0.0).to(p.dtype)
        root = (held / (1 - second**step)).sqrt_()
    return root.add_(group["eps"]).rsqrt_().masked_fill_(held == 0, 0.0).to(p.dtype)


def _rectification(beta: float, step: float) -> float | None:
    """RAdam's factor (Liu et al. 2020, eq. 5); ``None`` while it does not rectify and steps like momentum SGD."""
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    if length <= 5:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
