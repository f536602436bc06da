"""The update that an optimizer has just made, and the gradient over its root mean square, from the optimizer's state.

Right after a step, the state holds what the step was computed from. So the length of the update needs no copy of the
weights. Per parameter, with learning rate η and step count t:

==================================  ==============================================  ===========================
optimizer                           update                                          g in units of its usual size
==================================  ==============================================  ===========================
SGD                                 η·(g + λw)                                      –
SGD, momentum; Nesterov β           η·b; η·(g + λw + β·b)                           –
Adam, AdamW (amsgrad: max v)        η·m·√(1 − β₂^t) / ((1 − β₁^t)(√v + ε))          g·√(1 − β₂^t) / (√v + ε)
NAdam, RAdam                        –                                               g·√(1 − β₂^t) / (√v + ε)
RMSprop, not centred; momentum      η·g / (√v + ε); η·b                             g / (√v + ε)
==================================  ==============================================  ===========================

The root mean square of the last column over all entries is RMS_t of Wortsman et al. 2023 (arXiv 2304.13013, §3.4): it
is near 1 where the second moment keeps up with the gradient, and grows where it lags behind. Three approximations: ε is
not multiplied by √(1 − β₂^t), which matters only to entries whose √v is not far above ε; λw is that of the weights
after the step; and decoupled weight decay, η·λ·w, is left out of the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from gfs_core.linalg.vectors import Vector, dense, local
from gfs_core.optimizers.thresholds import Group, state_of


class Parts(NamedTuple):
    """What a step was computed from, for some parameters; each up to its factor in :func:`factors_of`.

    Attributes:
        update: the update; ``None``: not known of this optimizer.
        normalised: the gradient over the root of its second moment; ``None``: there is no second moment.
    """

    update: Vector | None
    normalised: Vector | None


def known(inner: Optimizer) -> bool:
    """Whether the state of this optimizer tells anything about its updates."""
    return type(inner) in _RULES


def has_moved(inner: Optimizer, group: Group, param: Any) -> bool:
    """Whether the optimizer has stepped this parameter with its present gradient."""
    if param.grad is None:
        return False
    return bool(inner.state.get(param)) or (type(inner) is SGD and not group["momentum"])


def parts_of(inner: Optimizer, group: Group, params: Vector) -> Parts:
    """The parts of the step that was just taken; new tensors, or the optimizer's own, which must not be changed.

    Args:
        inner: a torch optimizer that is :func:`known`, after its step.
        group: one of its groups.
        params: parameters of that group for which :func:`has_moved` holds.
    """
    return _RULES[type(inner)](inner, group, params)


def factors_of(kind: type[Optimizer], group: Group, rate: float, step: float) -> tuple[float, float]:
    """The factors of both parts.

    Args:
        kind: the class of the optimizer.
        group: its group, for the decay rates of the moments.
        rate: the learning rate of the step.
        step: steps that the parameter has taken, that one included; not used by optimizers without such a count.
    """
    if "betas" not in group or kind not in _RULES or step < 1:
        return rate, 1.0
    first, second = (float(beta) for beta in group["betas"])
    root = math.sqrt(1 - second**step)
    return rate * root / (1 - first**step), root


def _sgd(inner: Optimizer, group: Group, params: Vector) -> Parts:
    if group["momentum"]:
        buffers = state_of(inner, params, "momentum_buffer")
        if not group["nesterov"]:
            return Parts(buffers, None)
        return Parts(list(torch._foreach_add(_gradients(group, params), buffers, alpha=group["momentum"])), None)
    return Parts(_gradients(group, params), None)


def _adam(inner: Optimizer, group: Group, params: Vector) -> Parts:
    roots = _roots(inner, group, params, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    update = list(torch._foreach_div(state_of(inner, params, "exp_avg"), roots))
    return Parts(update, _over(_gradients(group, params, isinstance(inner, AdamW)), roots))


def _normalised_alone(inner: Optimizer, group: Group, params: Vector) -> Parts:
    return Parts(None, _over(_gradients(group, params), _roots(inner, group, params, "exp_avg_sq")))


def _rmsprop(inner: Optimizer, group: Group, params: Vector) -> Parts:
    normalised = _over(_gradients(group, params), _roots(inner, group, params, "square_avg"))
    if group["momentum"]:
        return Parts(state_of(inner, params, "momentum_buffer"), normalised)
    return Parts(None if group["centered"] else normalised, normalised)


def _gradients(group: Group, params: Vector, decoupled: bool = False) -> Vector:
    """The gradients as the rule takes them: with coupled weight decay."""
    grads = [local(dense(p.grad)) for p in params if p.grad is not None]
    if not group["weight_decay"] or decoupled or group.get("decoupled_weight_decay"):
        return grads
    sign = -1.0 if group.get("maximize") else 1.0
    return list(torch._foreach_add(grads, [local(p) for p in params], alpha=sign * group["weight_decay"]))


def _roots(inner: Optimizer, group: Group, params: Vector, name: str) -> Vector:
    """√v + ε, new tensors."""
    roots = list(torch._foreach_sqrt(state_of(inner, params, name)))
    torch._foreach_add_(roots, group["eps"])
    return roots


def _over(grads: Vector, roots: Vector) -> Vector:
    """``grads / roots``, in the memory of ``roots`` where the types agree."""
    if any(g.dtype != r.dtype for g, r in zip(grads, roots, strict=True)):
        return list(torch._foreach_div(grads, roots))
    torch._foreach_reciprocal_(roots)
    torch._foreach_mul_(roots, grads)
    return roots


_RULES: dict[type[Optimizer], Callable[[Optimizer, Group, Vector], Parts]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    NAdam: _normalised_alone,
    RAdam: _normalised_alone,
    RMSprop: _rmsprop,
}
