"""Functions that measure once, without a monitor."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.config import Tier
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError
from gfs_core.linalg.eigen import EigenResult, Solver, largest_eigenvalues
from gfs_core.linalg.vectors import Vector, local
from gfs_core.loss.learned import HvpMethod, Learned, PrecisionChoice
from gfs_core.loss.objective import LossFn, Objective
from gfs_core.loss.precision import Precision
from gfs_core.loss.products import NOT_SYMMETRIC, ROUNDED
from gfs_core.loss.snapshot import StateSnapshot
from gfs_core.optimizers.thresholds import parameters_of
from gfs_core.run.record import Measurement
from gfs_core.signals.catalog import Signals
from gfs_core.signals.context import StepContext
from gfs_core.signals.flowing import Flowing, FlowResult, flow_for
from gfs_core.signals.lab import Accuracy, Lab
from gfs_core.signals.measuring import Conditions, measure
from gfs_core.signals.solution import flow_to_the_end


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Any,
    *,
    tol: float = 1e-2,
    k: int = 1,
    solver: Solver = "lanczos",
    hvp: HvpMethod = "auto",
    precision: PrecisionChoice = "auto",
    max_hvps: int = 200,
    seed: int = 0,
) -> EigenResult:
    """The ``k`` largest eigenvalues of the loss Hessian. The model is left exactly as it was.

    Args:
        model: any module; the Hessian is with respect to its parameters with ``requires_grad``.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of batches, whose mean loss is measured. Give a batch that is itself a list, as a
            DataLoader returns it, as ``[batch]``.
        tol: relative residual at which an eigenvalue counts as converged, > 0.
        k: number of eigenvalues, ≥ 1.
        solver: ``"lanczos"``, or ``"power"`` for the literature's power iteration.
        hvp: how Hessian-vector products are computed, as in :class:`~gfs_core.GFSConfig`.
        precision: as in :class:`~gfs_core.GFSConfig`, for losses with autocast and weights in half precision.
        max_hvps: Hessian-vector products allowed.
        seed: seed of the random start.

    Returns:
        The eigenvalues, largest first, with eigenvectors and residuals. Look at ``converged`` and ``reason``.

    Raises:
        MeasurementError: there is nothing to measure, the loss is not finite, or it has no second derivative with
            ``hvp="exact"``.
        ConfigError: ``batches`` is a list of several bare tensors.

    Example:
        >>> import torch, gfs_core as gfs
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[3.0]])
        >>> gfs.sharpness(model, lambda m, b: 0.5 * m(b).square().mean(), x).value  # ½(3w)²: 9
        9.0
    """
    computed = Precision(precision, model, model.parameters())
    with StateSnapshot(model, loss_fn=loss_fn) as snapshot, computed.governing(), contextlib.ExitStack() as stack:
        objective = Objective(model, loss_fn, _as_list(batches), isolation=snapshot, precision=computed)
        if computed.full_for_products:
            stack.enter_context(objective.in_float32())
        lab = Lab(objective, hvp)
        found = largest_eigenvalues(
            lab.hessian,
            objective.weights,
            k=k,
            tol=tol,
            solver=solver,
            max_hvps=max_hvps,
            inner=objective.inner,
            generator=torch.Generator().manual_seed(seed),
        )
        if not lab.hessian.symmetric:
            warnings.warn(f"gfs: {NOT_SYMMETRIC}", GFSWarning, stacklevel=2)
        if lab.hessian.rounded:
            warnings.warn(f"gfs: {ROUNDED}", GFSWarning, stacklevel=2)
        return found


def gfs_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Any,
    *,
    horizon: float = math.inf,
    learning_rate: float,
    rtol: float = 1e-2,
    tol: float = 1e-3,
    hvp: HvpMethod = "auto",
    precision: PrecisionChoice = "auto",
    max_grads: int = 100_000,
    loss_cutoff: float | None = None,
    estimate_error: bool = False,
    seed: int = 0,
) -> FlowResult:
    """Sharpness after gradient flow from the present weights. The model is left exactly as it was.

    Args:
        model: any module; its parameters with ``requires_grad`` flow.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of batches, whose mean loss is measured. Give a batch that is itself a list, as a
            DataLoader returns it, as ``[batch]``.
        horizon: flow time in units of ``learning_rate``, > 0. Infinite (the default) means the full gradient flow
            solution, the quantity of Kreisler et al. 2023. A finite horizon is *not* that quantity.
        learning_rate: unit of the horizon, > 0 and finite. For the full solution it only sets the length of the first
            stretch of flow; the end does not depend on it.
        rtol: relative error of the sharpness that the flow aims at, > 0.
        tol: relative residual of the eigenvalue, > 0.
        hvp: how Hessian-vector products are computed, as in :class:`~gfs_core.GFSConfig`.
        precision: ``"training"`` computes as training does. The other choices mean float32 here, as half precision is
            not precise enough for a flow.
        max_grads: gradients allowed, for each flow.
        loss_cutoff: stop at this loss; for the full solution only.
        estimate_error: compute the value again at a tenth of ``rtol`` and return the difference as ``error``.
        seed: seed of the random start of the eigenvalue.

    Returns:
        The sharpness at the end of the flow. Look at ``converged`` and ``reason``.

    Raises:
        MeasurementError: there is nothing to measure, the loss is not finite, or there is no gradient flow to follow.
        ConfigError: ``batches`` is a list of several bare tensors, or ``tol`` is out of its range.
        ValueError: the horizon or the learning rate is out of its range.
    """
    if not horizon > 0 or not 0 < learning_rate < math.inf:
        raise ValueError(f"`horizon` and `learning_rate` must be > 0, got {horizon} and {learning_rate}")
    results = []
    for tolerance in (rtol, rtol / 10) if estimate_error else (rtol,):
        computed = Precision(precision, model, model.parameters())
        with StateSnapshot(model, loss_fn=loss_fn) as isolation, computed.governing():
            objective = Objective(model, loss_fn, _as_list(batches), isolation=isolation, precision=computed)
            with objective.in_float32():
                lab = Lab(objective, hvp, None, Accuracy(tol=tol, max_hvps=500), seed)
                top = lab.eigenvalue()
                if not lab.hessian.symmetric:
                    raise MeasurementError(f"there is no gradient flow to follow: {NOT_SYMMETRIC}")
                if lab.hessian.rounded:
                    raise MeasurementError(ROUNDED)
                flowing = Flowing(lab, top, None, tolerance, max_grads)
                if math.isinf(horizon):
                    results.append(flow_to_the_end(flowing, 64 * learning_rate, loss_cutoff))
                else:
                    results.append(flow_for(flowing, horizon * learning_rate, afresh=True))
    last = results[-1]
    if not estimate_error:
        return last
    counts = {name: sum(getattr(r, name) for r in results) for name in ("grad_evals", "hvps")}
    return FlowResult(**{**vars(last), **counts, "error": abs(last.sharpness - results[0].sharpness)})


def stability(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Any,
    optimizer: Any,
    *,
    tier: Tier = "gfs",
    before: Vector | Sequence[Vector] = (),
    horizon: float = 4.0,
    tol: float = 1e-2,
    rtol: float = 1e-2,
    max_hvps: int = 100,
    max_grads: int = 100_000,
    hvp: HvpMethod = "auto",
    precision: PrecisionChoice = "auto",
    seed: int = 0,
) -> Measurement:
    """Measure sharpness, GFS sharpness and the optimizer's threshold once. Model and optimizer are left unchanged.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of batches, as in :func:`sharpness`.
        optimizer: a torch optimizer of some or all of the model's parameters.
        tier: ``"batch_sharpness"``, ``"sharpness"``, ``"gfs"`` or ``"gfs_full"``; with ``before``, also
            ``"directional"`` or ``"midpoint"``.
        before: copies of the trained weights, in the optimizer's order: those before the last optimizer step, or a list
            of those before the last step and those before the step before it.
        horizon: flow time of the short-horizon GFS sharpness, in units of the learning rate, > 0.
        tol: relative residual at which an eigenvalue counts as converged, > 0.
        rtol: relative error of the sharpness that a flow aims at, > 0.
        max_hvps: Hessian-vector products allowed for an eigenvalue, ≥ 1.
        max_grads: gradients allowed for a full gradient flow solution, ≥ 1.
        hvp: how Hessian-vector products are computed, as in :class:`~gfs_core.GFSConfig`.
        precision: as in :class:`~gfs_core.GFSConfig`.
        seed: seed of the random start.

    Returns:
        The measurement; a value that could not be measured is ``None``, and ``reasons`` says why.

    Raises:
        MeasurementError: nothing could be measured, for instance because the loss is not finite.
        ConfigError: ``batches`` is a list of several bare tensors, a tolerance or limit is out of its range, or
            ``before`` does not hold what ``tier`` needs.
    """
    given = _as_list(batches)
    conditions = Conditions(hvp, precision, Accuracy(tol, max_hvps, rtol, max_grads, horizon), seed)
    signals = Signals().named([tier])
    past = _iterates(before, tier, max(signal.past for signal in signals), parameters_of(optimizer))
    step = StepContext(0, model, optimizer, loss_fn, given, given, given, past)
    found = measure(signals, step, Learned(), conditions)
    return Measurement.from_readings(0, step.stability.name, found.readings, found.notes)


def _iterates(before: Any, tier: Tier, needed: int, params: Sequence[Tensor]) -> list[Vector]:
    """The past weights, the latest first.

    Raises:
        ConfigError: they are too few, or they are no weights of this optimizer.
    """
    held = [before] if len(before) and isinstance(before[0], Tensor) else list(before)
    if len(held) < needed:
        what = "the weights before the last step" if needed == 1 else "[weights before the last step, before that one]"
        raise ConfigError(f"tier={tier!r} needs the weights before the last {needed} step(s): give `before={what}`")
    shapes = [local(p).shape for p in params]
    for vector in held:
        if [local(t).shape for t in vector] != shapes:
            raise ConfigError("`before` does not fit the optimizer's trained weights: other shapes, or another order")
    return held[:needed]


def _as_list(batches: Any) -> list[Any]:
    if not isinstance(batches, list):
        return [batches]
    if len(batches) > 1 and all(isinstance(batch, Tensor) for batch in batches):
        raise ConfigError(
            f"a list counts as several batches, and this one holds {len(batches)} bare tensors; if it is one batch, as "
            "a DataLoader gives it, write `[batch]`; of several, make each a tuple"
        )
    return batches
