"""The optimizer's side of stability: its learning rate, preconditioner and threshold.

The threshold is the value of the largest eigenvalue of S·(H + shift)·S at which the optimizer, with its present state,
stops being stable on a quadratic. Each row follows from the step's characteristic polynomial at z = −1 (the
period-two oscillation of the edge of stability; Cohen et al. 2021 for SGD and momentum, Cohen et al. 2022 for
Adam); tests run the real optimizer just below and just above it.

==================================  ==========================================
SGD, momentum β, dampening τ        (2 + 2β) / (η(1 − τ)), τ = 0 where β = 0
SGD, Nesterov β                     (2 + 2β) / (η(1 + 2β))
Adam, SparseAdam                    (2 + 2β₁) / ((1 − β₁)η)
AdamW, decoupled weight decay λ     (2 − ηλ)(1 + β₁) / ((1 − β₁)η)
NAdam, decay λ if decoupled         (2 − ηλ) / (η(1 − μ + μ′(1 − β₁)/(1 + β₁)))
RAdam, decay λ if decoupled         (2 − ηλ)(1 + β₁) / ((1 − β₁)η)
RMSprop, momentum β                 (2 + 2β) / η
Adagrad                             2 / η_t
==================================  ==========================================

μ and μ′ are NAdam's momenta of the coming step and the one after. η_t is Adagrad's decayed rate. Coefficients that
still move in the first steps (β₁^t, NAdam's product of momenta) are taken at their limits.

Preconditioner. S = P^-1/2, with

- P = √v̂ + ε for Adam, AdamW and NAdam (v̂ bias-corrected),
- P = √v + ε for RMSprop, and for Adagrad with v its sum of squares,
- P = (√v + ε)/√(1 − β₂^t) for SparseAdam,
- P = (√v + ε)/(r√(1 − β₂^t)) for RAdam with its rectification r, and P = 1 while it does not rectify,
- P = 1 for SGD.

An entry whose second moment is zero (a token not seen yet, a unit that is off) has had no gradient so far. The
optimizer has not moved it, and its P is about to change by orders of magnitude. So its entry of S is 0. Adagrad's sum
exists before its first step, at an initial value that the user chooses. That first step divides by the root of this
value plus g², so the value alone does not give P. So Adagrad has no ratio at step 0; neither has Adam.

SparseAdam steps a row only with the batches that hold it. Its threshold is exact for rows that are in every batch. For
rarer rows it applies to the steps that they take, with the curvature of a batch that holds them.

Coupled weight decay adds λ to the diagonal of H. Parameter groups with different rates become one operator: S is scaled
by √(threshold of the reference group / threshold of the group), and the reference is the group with the lowest
threshold. That is exact where all groups have the same momentum, and an approximation otherwise.

Noise. On mini-batches the curvature h along a direction changes from step to step, with mean λ and variance σ². Heavy
ball on such a quadratic, with independent batches, is stable in the mean square if and only if

    λ + f·σ²/λ  <  threshold,    f = (1 + β)/(1 − β),

which for β = 0 is the known condition of SGD, η < 2λ/(λ² + σ²) (Wu, Ma and E 2018). It follows from the response r_k of
the mean recursion to an impulse: the step is stable while η²σ²·Σ r_k² < 1, and
Σ r_k² = (1 + β)/((1 − β)·ηλ·(2 + 2β − ηλ)).

Momentum raises the threshold of the mean, but not that of the noise. f is the threshold over that of gradient descent
at the same long-run rate, and is computed so for every optimizer. It is exact for heavy ball and, with P held, for
Adam's exponential mean; for Nesterov it is the limit of small ηλ. That a *vector* recursion follows the same rule with
σ² = E‖(H_B − H)v‖² is not a theorem. :mod:`gfs_core.linalg.power` estimates σ² from pairs of products at one v. It also
gives an upper bound from single products, which a control uses. `benchmarks/noise.md` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from gfs_core.linalg.vectors import Vector, dense, local, on_host
from gfs_core.optimizers.preconditioner import Diagonal

Group: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class _Rule:
    """How the threshold of one class of optimizer is computed."""

    threshold: Callable[[Any, Group], float]
    preconditioner: Callable[[Any, Group, Vector], Vector] | None = None  # of some parameters of a group
    decoupled: bool = False
    gain: Callable[[Group], float] = lambda group: 1.0


def register_optimizer(
    optimizer: type[Optimizer],
    threshold: Callable[[Any, Group], float],
    preconditioner: Callable[[Any, Group, Tensor], Tensor] | None = None,
    *,
    decoupled_weight_decay: bool = False,
    gain: Callable[[Group], float] = lambda group: 1.0,
) -> None:
    """Make the threshold of a class of optimizers known; without it the stability ratio is empirical.

    Args:
        optimizer: the class itself; its subclasses have to be registered separately.
        threshold: ``threshold(optimizer, group)``, the largest eigenvalue of S·(H + shift)·S at which a step on a
            quadratic stops being stable at the group's present rate; infinite where the group does not move.
        preconditioner: ``preconditioner(optimizer, group, parameter)``, the diagonal P of S = P^-1/2: a new tensor of
            the parameter's shape (for a complex parameter, that of its real view), > 0, and infinite where the weight
            has had no gradient so far. It is called only for parameters that ``optimizer.state`` holds something of.
            ``None``: no preconditioner.
        decoupled_weight_decay: whether the group's ``weight_decay`` stays out of the gradient; otherwise it is added
            to the diagonal of H.
        gain: ``gain(group)``, the long-run length of the steps for a constant gradient, in units of rate × gradient:
            1/(1 − β) for momentum β, 1 for an exponential mean.

    Raises:
        TypeError: ``optimizer`` is not a class of ``torch.optim.Optimizer``.

    Example:
        >>> import torch, gfs_core as gfs
        >>> class HalfSGD(torch.optim.SGD):  # a step half as long: twice as much curvature is stable
        ...     pass
        >>> gfs.register_optimizer(HalfSGD, threshold=lambda optimizer, group: 4 / group["lr"])
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> gfs.stability_of(HalfSGD([weight], lr=0.5), [weight]).threshold
        8.0
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"expected a class of torch.optim.Optimizer, got {optimizer!r}")
    together = None if preconditioner is None else _each(preconditioner)
    _OPTIMIZERS[optimizer] = _Rule(threshold, together, decoupled_weight_decay, gain)


@dataclass(frozen=True)
class Stability:
    """The operator and the threshold with which the stability ratio of an optimizer is measured.

    Attributes:
        name: class name of the optimizer.
        learning_rate: present rate of the reference group; the largest one where the threshold is not known, and
            ``None`` where there is none.
        threshold: the eigenvalue of the operator at which the optimizer stops being stable; ``None``: not known.
        scale: diagonal of S, per parameter; ``None``: the identity.
        shift: coupled weight decay, per parameter; ``None``: none.
        noise_factor: f, the weight of σ²/λ in the mean-square stability of noisy steps; ≥ 1 with momentum.
        adaptive: whether S comes from the optimizer's second moments.
        empirical: whether no rule for the optimizer is known, so that stability is measured along its real steps.
        reason: why the threshold is not known; empty where it is.
    """

    name: str
    learning_rate: float | None
    threshold: float | None
    scale: Diagonal | None = None
    shift: list[float] | None = None
    noise_factor: float = 1.0
    adaptive: bool = False
    empirical: bool = False
    reason: str = ""

    @property
    def known(self) -> bool:
        """Whether a ratio can be measured now: not before an adaptive optimizer's first step, nor at rate 0."""
        return self.threshold is not None or self.empirical

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


def named_in_full(optimizer: Any) -> str:
    """The name of the optimizer's class: with its module, unless it is one of torch's own."""
    kind = type(unwrap(optimizer))
    known = kind.__module__.split(".")[:2] == ["torch", "optim"]
    return kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The trainable parameters that the optimizer holds, each once."""
    params = [p for group in unwrap(optimizer).param_groups for p in group["params"] if p.requires_grad]
    return list({id(p): p for p in params}.values())


def stability_of(optimizer: Any, params: Sequence[Tensor]) -> Stability:
    """Learning rate, operator and threshold of ``optimizer`` in its present state.

    Args:
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, SparseAdam, RMSprop or Adagrad, one that was made known with
            :func:`register_optimizer`, or a wrapper of one. The threshold of any other is not known.
        params: the parameters measured, in order.

    Raises:
        TypeError: ``optimizer`` is neither an optimizer nor a wrapper of one.
    """
    inner = unwrap(optimizer)
    name = type(inner).__name__
    groups = [g for g in inner.param_groups if any(p.requires_grad for p in g["params"])]
    rates = [float(g["lr"]) for g in groups if "lr" in g]
    rate = max(rates, default=None)
    rule = _OPTIMIZERS.get(type(inner))
    problem = _problem(groups, rates)
    if problem:
        return Stability(name, rate, None, reason=problem)
    if rule is None:
        named = named_in_full(inner)
        reason = f"the threshold of {named} is not known; its stability ratio is empirical, along the steps it takes"
        return Stability(name, rate, None, empirical=True, reason=reason)
    adaptive = rule.preconditioner is not None
    if adaptive and not any(_has_moments(inner, p) for p in params):
        reason = f"{name} has no second moments yet: they come with its first step"
        return Stability(name, rate, None, adaptive=True, reason=reason)
    thresholds = [rule.threshold(inner, g) if float(g["lr"]) else math.inf for g in groups]
    reference = min(thresholds)
    if not math.isfinite(reference):
        return Stability(name, rate, None, adaptive=adaptive, reason="the learning rate is 0: no step, no threshold")
    where = {id(p): (g, t) for g, t in zip(groups, thresholds, strict=True) for p in g["params"]}
    entries: list[tuple[Tensor, float]] = []
    shift: list[float] = []
    for p in params:
        group, threshold = where[id(p)]
        entries.append((p, math.sqrt(reference / threshold)))
        shift.append(0.0 if _decoupled(rule, group) else float(group.get("weight_decay", 0.0)))
    identity = not adaptive and all(relative == 1.0 for _, relative in entries)

    def moments(of: Sequence[Tensor]) -> list[Tensor | None]:
        assert rule is not None
        assert rule.preconditioner is not None
        found: list[Tensor | None] = [None] * len(of)
        for group in groups:
            own = [i for i, p in enumerate(of) if where[id(p)][0] is group and _has_moments(inner, p)]
            if own:
                made = rule.preconditioner(inner, group, [of[i] for i in own])
                for i, diagonal in zip(own, made, strict=True):
                    found[i] = diagonal
        return found

    scale = None if identity else Diagonal(entries, moments if adaptive else None)
    leader = groups[thresholds.index(reference)]
    lead = float(leader["lr"])
    noise_factor = reference * lead * rule.gain(leader) / 2
    return Stability(name, lead, reference, scale, shift if any(shift) else None, noise_factor, adaptive=adaptive)


def _has_moments(inner: Optimizer, p: Tensor) -> bool:
    """Whether the state of ``p`` holds second moments of gradients. Adagrad's exists before its first step."""
    state = inner.state.get(p)
    if not state:
        return False
    return not (type(inner) is Adagrad and float(state["step"]) == 0)


def _problem(groups: list[Group], rates: list[float]) -> str:
    if not groups:
        return "the optimizer holds no trainable parameter"
    if any(g.get("maximize") for g in groups):
        return "maximize=True is not analysed; minimise the negative loss instead"
    if not all(math.isfinite(r) and r >= 0 for r in rates):
        return f"a learning rate is not a finite number ≥ 0: {rates}"
    return ""


def _decoupled(rule: _Rule, group: Group) -> bool:
    return rule.decoupled or bool(group.get("decoupled_weight_decay"))


def _sgd(inner: SGD, group: Group) -> float:
    rate, beta = float(group["lr"]), float(group["momentum"])
    if group["nesterov"]:
        return (2 + 2 * beta) / (rate * (1 + 2 * beta))
    dampening = float(group["dampening"]) if beta else 0.0
    return (2 + 2 * beta) / (rate * (1 - dampening)) if dampening < 1 else math.inf


def _sgd_gain(group: Group) -> float:
    beta = float(group["momentum"])
    dampening = float(group["dampening"]) if beta and not group["nesterov"] else 0.0
    return (1 - dampening) / (1 - beta) if beta < 1 else math.inf


def _rmsprop(inner: RMSprop, group: Group) -> float:
    return (2 + 2 * float(group["momentum"])) / float(group["lr"])


def _adagrad(inner: Adagrad, group: Group) -> float:
    return 2 * (1 + _steps(inner, group) * float(group["lr_decay"])) / float(group["lr"])


def _adam(inner: Adam | RAdam | SparseAdam, group: Group) -> float:
    return _shrunk(inner, group) / (_gradient_weight(float(group["betas"][0])) * float(group["lr"]))


def _nadam(inner: NAdam, group: Group) -> float:
    beta = float(group["betas"][0])
    now, later = (
        beta * (1 - 0.5 * 0.96 ** ((_steps(inner, group) + ahead) * float(group["momentum_decay"]))) for ahead in (1, 2)
    )
    weight = 1 - now + later * _gradient_weight(beta)
    return _shrunk(inner, group) / (float(weight) * float(group["lr"]))


def _gradient_weight(beta: float) -> float:
    """Weight of the gradient in a step with exponential averaging, at z = −1."""
    return (1 - beta) / (1 + beta)


def _shrunk(inner: Optimizer, group: Group) -> float:
    """2 − ηλ with decoupled weight decay λ, 2 without."""
    decoupled = _decoupled(_OPTIMIZERS[type(inner)], group)
    return 2 - (float(group["lr"]) * float(group["weight_decay"]) if decoupled else 0.0)


def _steps(inner: Optimizer, group: Group) -> float:
    """Steps taken so far by the first parameter of the group that was stepped; 0 where none was."""
    return next((float(inner.state[p]["step"]) for p in group["params"] if inner.state.get(p)), 0.0)


def _each(preconditioner: Callable[[Any, Group, Tensor], Tensor]) -> Callable[[Any, Group, Vector], Vector]:
    """The same for several parameters, one after the other."""
    return lambda inner, group, params: [preconditioner(inner, group, p) for p in params]


def _adam_preconditioner(inner: Adam, group: Group, params: Vector) -> Vector:
    held = state_of(inner, params, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    roots = list(torch._foreach_div(held, _corrections(inner, group, params)))
    torch._foreach_sqrt_(roots)
    return _with_eps(roots, held, group)


def _sparse_adam_preconditioner(inner: SparseAdam, group: Group, params: Vector) -> Vector:
    held = state_of(inner, params, "exp_avg_sq")
    roots = _with_eps(list(torch._foreach_sqrt(held)), held, group)
    torch._foreach_div_(roots, [math.sqrt(c) for c in _corrections(inner, group, params)])
    return roots


def _radam_preconditioner(inner: RAdam, group: Group, params: Vector) -> Vector:
    held = state_of(inner, params, "exp_avg_sq")
    second, steps = float(group["betas"][1]), _steps_of(inner, params)
    rectified = [_rectification(second, step) for step in steps]
    roots = _with_eps(list(torch._foreach_sqrt(held)), held, group)
    scales = [1.0 if r is None else r * math.sqrt(1 - second**step) for r, step in zip(rectified, steps, strict=True)]
    torch._foreach_div_(roots, scales)
    for root, second_moment, r in zip(roots, held, rectified, strict=True):
        if r is None:
            root.fill_(1.0).masked_fill_(second_moment == 0, math.inf)
    return roots


def _rmsprop_preconditioner(inner: RMSprop, group: Group, params: Vector) -> Vector:
    held = state_of(inner, params, "square_avg")
    if not group["centered"]:
        return _with_eps(list(torch._foreach_sqrt(held)), held, group)
    roots = list(torch._foreach_sub(held, torch._foreach_pow(state_of(inner, params, "grad_avg"), 2)))
    torch._foreach_clamp_min_(roots, 0.0)
    torch._foreach_sqrt_(roots)
    return _with_eps(roots, held, group)


def _adagrad_preconditioner(inner: Adagrad, group: Group, params: Vector) -> Vector:
    held = state_of(inner, params, "sum")
    return _with_eps(list(torch._foreach_sqrt(held)), held, group)


def state_of(inner: Optimizer, params: Vector, name: str) -> Vector:
    """Tensors of an optimizer's state, not to be changed: dense, of complex weights their real and imaginary parts."""
    return [local(dense(inner.state[p][name])) for p in params]


def _steps_of(inner: Optimizer, params: Vector) -> list[float]:
    """The steps that each parameter has taken, with one transfer: a fused optimizer counts them on the accelerator."""
    return on_host([torch.as_tensor(inner.state[p]["step"]) for p in params])


def _corrections(inner: Optimizer, group: Group, params: Vector) -> list[float]:
    """1 − β₂^t of each parameter."""
    second = float(group["betas"][1])
    return [1 - second**step for step in _steps_of(inner, params)]


def _with_eps(roots: Vector, second_moments: Vector, group: Group) -> Vector:
    """√v + ε, in place; infinite where v is 0: no gradient so far."""
    torch._foreach_add_(roots, group["eps"])
    if group["eps"] > 0 and roots[0].device.type != "cpu":
        torch._foreach_div_(roots, torch._foreach_sign(second_moments))  # by 1, or by 0: more memory, fewer calls
    else:
        for root, second_moment in zip(roots, second_moments, strict=True):
            root.masked_fill_(second_moment == 0, math.inf)
    return roots


def _rectification(beta: float, step: float) -> float | None:
    """RAdam's factor (Liu et al. 2020, eq. 5); ``None`` while it does not rectify and steps like momentum SGD."""
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    if length <= 5:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


_OPTIMIZERS: dict[type[Optimizer], _Rule] = {
    SGD: _Rule(_sgd, gain=_sgd_gain),
    Adam: _Rule(_adam, _adam_preconditioner),
    AdamW: _Rule(_adam, _adam_preconditioner, decoupled=True),
    NAdam: _Rule(_nadam, _adam_preconditioner),
    RAdam: _Rule(_adam, _radam_preconditioner),
    RMSprop: _Rule(_rmsprop, _rmsprop_preconditioner, gain=lambda group: 1 / (1 - float(group["momentum"]))),
    Adagrad: _Rule(_adagrad, _adagrad_preconditioner),
    SparseAdam: _Rule(_adam, _sparse_adam_preconditioner),
}
