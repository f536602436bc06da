"""Runge–Kutta–Chebyshev steps of second order: an explicit method for stiff systems dw/dt = f(w).

RKC2: Sommeijer, Shampine and Verwer, "RKC: an explicit solver for parabolic PDEs", J. Comput. Appl. Math. 88, 1998.
An explicit method of fixed order is held to steps of about 2.8/ρ with the spectral radius ρ of −∂f/∂w, however smooth
the path is. RKC2 spends s evaluations of f for a step of about 0.65·s²/ρ.

How long a step may be, and which is accepted, is left to whoever knows f (:mod:`gfs_core.loss.flow`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from gfs_core.linalg.inner import WHOLE, InnerProduct
from gfs_core.linalg.vectors import Vector, axpy, copy, scale

_DAMPING = 2 / 13


class Stages(NamedTuple):
    """Coefficients of an s-stage RKC2 step; index j of each tuple belongs to stage j."""

    mu: tuple[float, ...]
    nu: tuple[float, ...]
    mu_tilde: tuple[float, ...]
    gamma_tilde: tuple[float, ...]


@lru_cache(maxsize=512)
def stages(s: int) -> Stages:
    """RKC2 coefficients for ``s ≥ 2`` stages (Sommeijer et al. 1998, eqs. 2.2–2.8)."""
    w0 = 1 + _DAMPING / s**2
    t, dt, ddt = [1.0, w0], [0.0, 1.0], [0.0, 0.0]
    for _ in range(2, s + 1):
        ddt.append(4 * dt[-1] + 2 * w0 * ddt[-1] - ddt[-2])
        dt.append(2 * t[-1] + 2 * w0 * dt[-1] - dt[-2])
        t.append(2 * w0 * t[-1] - t[-2])
    w1 = dt[s] / ddt[s]
    b = [0.0, 0.0] + [ddt[j] / dt[j] ** 2 for j in range(2, s + 1)]
    b[0] = b[1] = b[2]
    a = [1 - b[j] * t[j] for j in range(s + 1)]
    mu, nu, mu_tilde, gamma_tilde = [0.0, 0.0], [0.0, 0.0], [0.0, b[1] * w1], [0.0, 0.0]
    for j in range(2, s + 1):
        mu.append(2 * b[j] * w0 / b[j - 1])
        nu.append(-b[j] / b[j - 2])
        mu_tilde.append(2 * b[j] * w1 / b[j - 1])
        gamma_tilde.append(-a[j - 1] * mu_tilde[j])
    return Stages(tuple(mu), tuple(nu), tuple(mu_tilde), tuple(gamma_tilde))


def stability_interval(s: int) -> float:
    """β(s): a step h is stable on the negative real axis while h·ρ ≤ β(s) (eq. 2.9)."""
    return 2 / 3 * (s**2 - 1) * (1 - 2 / 15 * _DAMPING)


def stages_needed(h_rho: float) -> int:
    """The least number of stages, at least 2, whose stability interval holds h·ρ."""
    return max(2, math.ceil(math.sqrt(1 + h_rho / stability_interval(2) * 3)))


class Step(NamedTuple):
    """A step from y0 to y1.

    Attributes:
        value: what came with the field at y1.
        field: f(y1), a new vector: the first stage of the next step.
        moved: ‖y1 − y0‖.
        error: the estimate of the step's error, a norm.
    """

    value: float
    field: Vector
    moved: float
    error: float


def step(
    evaluate: Callable[[], tuple[float, Vector]],
    weights: Vector,
    start: tuple[Vector, Vector],
    room: tuple[Vector, Vector],
    h: float,
    s: int,
    inner: InnerProduct = WHOLE,
) -> Step:
    """One RKC2 step of length ``h`` with ``s`` stages; the weights go from y0 to y1.

    Args:
        evaluate: some value and f, a new vector, at the weights in place.
        weights: are moved.
        start: y0, which is where the weights are, and f(y0); both are left alone.
        room: two vectors to work in; whatever they hold is lost.
        h: length, > 0.
        s: stages, ≥ 2; each is an evaluation.
        inner: of the norms.
    """
    c = stages(s)
    y0, f0 = start
    now, older = room  # d_j = y_j − y0 of two stages
    torch._foreach_zero_(older)  # may hold what is not finite from a step that was far too long
    copy(f0, now)
    scale(h * c.mu_tilde[1], now)
    for j in range(2, s + 1):
        move(weights, y0, now)
        field = evaluate()[1]
        scale(c.nu[j], older)
        axpy(c.mu[j], now, older)
        axpy(h * c.mu_tilde[j], field, older)
        axpy(h * c.gamma_tilde[j], f0, older)
        del field
        now, older = older, now
    move(weights, y0, now)
    value, f1 = evaluate()
    moved = inner.norm(now)
    scale(-0.8, now)  # 0.8 (y0 − y1) + 0.4 h (F0 + F1)
    axpy(0.4 * h, f0, now)
    axpy(0.4 * h, f1, now)
    return Step(value, f1, moved, inner.norm(now))


def move(weights: Vector, start: Vector, by: Vector, factor: float = 1.0) -> None:
    """``weights = start + factor * by``, in place."""
    copy(start, weights)
    axpy(factor, by, weights)
