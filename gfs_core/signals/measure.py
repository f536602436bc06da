"""The measurements: sharpness, GFS sharpness, and both beside the optimizer's threshold."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core.config import Tier
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError, Reason
from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.linalg.eigen import EigenResult, Solver, largest_eigenvalues
from gfs_core.linalg.power import Sample
from gfs_core.linalg.vectors import Vector, axpy, clone, is_half, scale
from gfs_core.loss.learned import HvpMethod, Learned, PrecisionChoice
from gfs_core.loss.memory import GIB, Limits, vector_bytes
from gfs_core.loss.objective import LossFn, Objective
from gfs_core.loss.precision import Precision
from gfs_core.loss.processes import Processes, alone
from gfs_core.loss.products import NOT_SYMMETRIC, ROUNDED
from gfs_core.loss.snapshot import StateSnapshot
from gfs_core.optimizers.thresholds import Stability, parameters_of, stability_of
from gfs_core.run.record import Measurement
from gfs_core.signals.directional import Directional, along_by_losses, along_by_product, along_the_gradient
from gfs_core.signals.lab import FlowResult, Probe, flow_for
from gfs_core.signals.memory import peak_copies
from gfs_core.signals.solution import flow_to_the_end

WORST_RESIDUAL = 0.1  # an eigenvalue that did not converge and is less certain than this is left out
# A short-horizon value that needs more gradients is not worth its price, and left out. At rtol 1e-2; a method of second
# order needs rtol^-1/2 times as many.
SHORT_FLOW_GRADS = 100
SOLVED = ("sharpness", "gfs", "gfs_full")  # the tiers that solve for the eigenvalue on the probe


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
    """The ``k`` largest eigenvalues of the loss Hessian; the model is left exactly as it was.

    Args:
        model: any module; its parameters with ``requires_grad`` are the space.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of them: the objective is their mean. A batch that is a list itself, as a
            DataLoader gives it, goes in as ``[batch]``.
        tol: relative residual at which an eigenvalue counts as converged.
        k: how many.
        solver: ``"lanczos"``, or ``"power"`` for the literature's power iteration.
        hvp: how products are computed.
        precision: as in :class:`~gfs_core.GFSConfig`, for losses with autocast and weights in half precision.
        max_hvps: products allowed.
        seed: of the random start.

    Raises:
        MeasurementError: nothing to measure, a non-finite loss, or no second derivative with ``hvp="exact"``.
        ConfigError: a list of bare tensors.

    Example:
        >>> import torch, gfs_core as gfs
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[3.0]])
        >>> gfs.sharpness(model, lambda m, b: 0.5 * m(b).square().mean(), x).value  # ½(3w)²: 9
        9.0
    """
    computed = Precision(precision, model, model.parameters())
    with StateSnapshot(model, loss_fn=loss_fn) as isolation, computed.governing(), contextlib.ExitStack() as stack:
        objective = Objective(model, loss_fn, _as_list(batches), isolation=isolation, precision=computed)
        if computed.full_for_products:
            stack.enter_context(objective.in_float32())
        probe = Probe(objective, hvp=hvp)
        found = largest_eigenvalues(
            probe.hessian,
            probe.objective.weights,
            k=k,
            tol=tol,
            solver=solver,
            max_hvps=max_hvps,
            generator=torch.Generator().manual_seed(seed),
            inner=objective.inner,
        )
        if not probe.hessian.symmetric:
            warnings.warn(f"gfs: {NOT_SYMMETRIC}", GFSWarning, stacklevel=2)
        if probe.hessian.rounded:
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
    """Sharpness after gradient flow from the present weights; the model is left exactly as it was.

    Args:
        model: any module; its parameters with ``requires_grad`` move.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of them: the objective is their mean. A batch that is a list itself, as a
            DataLoader gives it, goes in as ``[batch]``.
        horizon: flow time in units of ``learning_rate``; infinite (the default): the full gradient flow
            solution, the quantity of Kreisler et al. 2023. A finite horizon is *not* that quantity.
        learning_rate: unit of the horizon; for the full solution, of the first stretch of flow only: the end
            does not depend on it.
        rtol: relative error of the sharpness aimed at.
        tol: relative residual of the eigenvalue.
        hvp: how products are computed.
        precision: ``"training"``, or float32: half precision does not do for a flow.
        max_grads: gradients allowed.
        loss_cutoff: full solution only: stop at this loss.
        estimate_error: compute the value again at a tenth of ``rtol`` and give the difference as ``error``.
        seed: of the random start of the eigenvalue.

    Raises:
        MeasurementError: nothing to measure, or a non-finite loss.
        ValueError: a horizon or learning rate that is not positive; a list of bare tensors.
    """
    if not horizon > 0 or not 0 < learning_rate < math.inf:
        raise ValueError(f"`horizon` and `learning_rate` must be > 0, got {horizon} and {learning_rate}")
    results = []
    for tolerance in (rtol, rtol / 10) if estimate_error else (rtol,):
        computed = Precision(precision, model, model.parameters())
        with StateSnapshot(model, loss_fn=loss_fn) as isolation, computed.governing():
            objective = Objective(model, loss_fn, _as_list(batches), isolation=isolation, precision=computed)
            with objective.in_float32():
                probe = Probe(objective, hvp=hvp, tol=tol, seed=seed, max_hvps=500)
                top = probe.top()
                if not probe.hessian.symmetric:
                    raise MeasurementError(f"there is no gradient flow to follow: {NOT_SYMMETRIC}")
                if probe.hessian.rounded:
                    raise MeasurementError(ROUNDED)
                flowing = probe.flow(top, None, tolerance, max_grads)
                if math.isinf(horizon):
                    results.append(flow_to_the_end(flowing, 64 * learning_rate, loss_cutoff))
                else:
                    results.append(flow_for(flowing, horizon * learning_rate, afresh=True))
    last = results[-1]
    if not estimate_error:
        return last
    counts = {name: sum(getattr(r, name) for r in results) for name in ("grad_evals", "hvps")}
    return FlowResult(**{**vars(last), **counts, "error": abs(last.sharpness - results[0].sharpness)})


@dataclass
class WarmStart:
    """Eigenvectors kept from one measurement to the next: of H, and of the optimizer's operator where it differs."""

    raw: Vector | None = None
    preconditioned: Vector | None = None


@dataclass
class Running:
    """What the running estimate needs for one measurement.

    Attributes:
        estimate: renewed by it.
        batches: the part of the current batch that is its turn, or all of it.
        others: another part of the same size, for a pair of products; empty: there is none.
        fraction: the examples of the part over those of the whole optimizer step; 0: the noise is not to be counted.
        mean_loss: mean loss of training; ``None``: not known.
        stands_for: measurements at the usual interval that this one is taken for.
    """

    estimate: RunningBlocks
    batches: Sequence[Any]
    others: Sequence[Any] = ()
    fraction: float = 1.0
    mean_loss: float | None = None
    stands_for: int = 1


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: Any,
    *,
    params: Sequence[Tensor] | None = None,
    tiers: Collection[Tier],
    before: Vector | None = None,
    running: Running | None = None,
    current: Sequence[Any] | None = None,
    directional: str = "product",
    horizon: float = 4.0,
    hvp: HvpMethod = "auto",
    learned: Learned | None = None,
    micro_batch: int | None = None,
    max_memory: float | None = None,
    precision: PrecisionChoice = "auto",
    check_precision: bool = True,
    tol: float = 1e-2,
    rtol: float = 1e-2,
    max_hvps: int = 100,
    max_grads: int = 20_000,
    seed: int = 0,
    step: int = 0,
    warm: WarmStart | None = None,
    mix: bool = False,
    ranks: Processes | None = None,
) -> tuple[Measurement, Learned, dict[Tier, float]]:
    """One measurement of the chosen tiers, in isolation; ``warm`` is read and renewed.

    ``learned`` is what the last measurement found out about the loss, and ``check_precision`` whether half precision
    is held against float32 (one product). An ``hvp`` or ``precision`` that is not ``"auto"`` goes before what is
    learned. ``tiers`` names what is measured, ``before`` the weights before the last optimizer step (consumed; without
    them nothing directional is measured), and ``directional`` how:
    ``"product"``, or ``"losses"`` for forward passes only. ``running`` is the running estimate, renewed (without it
    nothing running is measured), and ``current`` the batch whose batch sharpness is measured, by default ``batches``.
    ``ranks`` are the processes that measure together, each on its own data: the loss is the mean over all of them.
    All else is as in :class:`~gfs_core.GFSConfig`.

    Returns:
        The measurement, what is known of the loss now, for the next one, and the seconds that each tier's own part
        took.

    Raises:
        MeasurementError: nothing could be had.
    """
    warm = WarmStart() if warm is None else warm
    params = parameters_of(optimizer) if params is None else params
    stability = stability_of(optimizer, params)
    reasons = [stability.reason] if stability.reason else []
    values: dict[str, Any] = {"threshold": stability.threshold, "learning_rate": stability.learning_rate}
    seconds: dict[Tier, float] = {}
    # Before an adaptive optimizer's first step, or at rate 0, its operator is not known yet.
    known = stability.threshold is not None or stability.empirical
    learned = Learned() if learned is None else learned
    computed = Precision(learned.precision_for(precision), model, params, proven=learned.double_backward_verified)
    with (
        StateSnapshot(model, params, loss_fn) as isolation,
        alone(model),
        computed.governing(),
        contextlib.ExitStack() as stack,
    ):
        room = None
        if max_memory is not None:
            room = int(max_memory * GIB) - vector_bytes(params, peak_copies(tiers, not stability.plain))
        objective = Objective(model, loss_fn, batches, params, isolation, ranks, computed, Limits(micro_batch, room))
        if computed.full_for_products:
            stack.enter_context(objective.in_float32())
        probe = Probe(
            objective,
            hvp=hvp,
            learned=learned,
            tol=tol,
            max_hvps=max_hvps,
            seed=seed,
        )
        if running is not None and known and "running" in tiers:
            with _timed(seconds, "running"), probe.on(running.batches):
                values |= _running(probe, running, stability)
        if known and "batch_sharpness" in tiers:
            with _timed(seconds, "batch_sharpness"), probe.on(batches if current is None else current):
                inverse = None if stability.scale is None else stability.scale.squared()
                values["batch_sharpness"] = along_the_gradient(probe.hessian, inverse)
        if before is not None and "directional" in tiers:
            with _timed(seconds, "directional"):
                values["loss_probe"] = objective.loss()
                along = _along_the_step(probe, before, directional)
                values["directional_sharpness"] = along.sharpness
                if along.sharpness is None:
                    reasons.append("nothing along the last step: the weights have not moved, or by less than rounding")
                if along.critical is not None:
                    if stability.learning_rate is not None:
                        values["critical_lr"] = stability.learning_rate * along.critical
                    if stability.empirical:
                        values["stability_ratio"] = 1 / along.critical
        usable = False
        if any(tier in SOLVED for tier in tiers):
            with _timed(seconds, "sharpness"):
                if "loss_probe" not in values:
                    values["loss_probe"] = objective.loss()
                top, usable, solved = _solve(probe, stability, warm, reasons, mix)
                if usable and check_precision and probe.in_half_precision():
                    solved["precision_error"] = probe.precision_error(stability, top.vector, top.value)
                    if not probe.in_half_precision():
                        top, usable, anew = _solve(probe, stability, warm, reasons, mix)
                        solved |= anew
                values |= solved
        reasons += [r for r in (probe.hessian.reason, probe.hessian.resting, computed.reason) if r]
        if not probe.hessian.symmetric:  # no bound holds, and the field is the gradient of no loss that could flow down
            values.pop("residual", None)
        if not probe.hessian.symmetric or probe.hessian.rounded:
            tiers = [tier for tier in tiers if tier not in ("gfs", "gfs_full")]
        dear = "gfs" in tiers or "gfs_full" in tiers
        if usable and dear and stability.threshold is not None and stability.learning_rate is not None:
            with _timed(seconds, "gfs"), objective.in_float32():
                short = min(max_grads, int(SHORT_FLOW_GRADS * max(1.0, (1e-2 / rtol) ** 0.5)))
                flow = flow_for(probe.flow(top, stability, rtol, short), horizon * stability.learning_rate)
                if flow.converged:
                    values["gfs_sharpness"] = flow.sharpness
                    values["gfs_stability_ratio"] = flow.sharpness / stability.threshold
                else:
                    too_long = flow.reason is Reason.MAX_GRADIENTS
                    why = f"it needs more than {short} gradients here" if too_long else flow.reason
                    reasons.append(f"short-horizon GFS sharpness left out: {why}")
        if "gfs_full" in tiers and stability.learning_rate:
            with _timed(seconds, "gfs_full"), objective.in_float32():
                probe.hessian.release()
                isolation.restore_weights()
                again = probe.top(start=None if warm.raw is None else clone(warm.raw))
                flow = flow_to_the_end(probe.flow(again, None, rtol, max_grads), 64 * stability.learning_rate)
                if flow.converged:
                    values["gfs_sharpness_full"] = flow.sharpness
                else:
                    reasons.append(f"full GFS sharpness: {flow.reason}")
        reasons += [f"the loss changed `{name}` in place, too large to be put back" for name in isolation.leaks]
        values["hvps"] = probe.hessian.hvps
        values["grad_evals"] = objective.grad_evals
        probe.hessian.release()
    return Measurement(step, stability.name, reasons=tuple(reasons), **values), probe.hessian.learned, seconds


def _solve(
    probe: Probe, stability: Stability, warm: WarmStart, reasons: list[str], mix: bool
) -> tuple[EigenResult, bool, dict[str, Any]]:
    """The sharpness, and the optimizer's own where it differs: the last one, whether it is usable, and the values."""
    values: dict[str, Any] = {}
    top = probe.top(start=warm.raw, mix=mix)
    usable = _usable(top, reasons, probe.hessian.symmetric)
    warm.raw = top.vector if usable else None
    if usable:
        values["sharpness"], values["residual"] = top.value, top.error_bound
    if stability.threshold is not None and not stability.plain:
        top = probe.top(stability, start=warm.preconditioned, mix=mix)
        usable = _usable(top, reasons, probe.hessian.symmetric)
        warm.preconditioned = top.vector if usable else None
        if usable:
            values["preconditioned_sharpness"] = top.value
    if usable and stability.threshold is not None:
        values["stability_ratio"] = top.value / stability.threshold
    return top, usable, values


def _along_the_step(probe: Probe, before: Vector, how: str) -> Directional:
    """Curvature along the step from ``before``, which is consumed, to the present weights."""
    before = [b.float() if is_half(b) else b for b in before]
    scale(-1.0, before)
    axpy(1.0, probe.objective.weights, before)
    if probe.objective.inner.norm(before) == 0.0:  # the optimizer did not move: a skipped step, a rate of 0
        return Directional(None, None)
    if how == "losses":
        return along_by_losses(probe.objective, before)
    return along_by_product(probe.hessian, before)


def _running(probe: Probe, running: Running, stability: Stability) -> dict[str, Any]:
    """The running estimate after one more product on its part of the data, or two, on two parts."""
    estimate, error = running.estimate, None
    first = estimate.vector is None
    operator, losses = probe.operator(stability), list[float]()

    def other(vector: Vector) -> Vector:
        losses.append(probe.hessian.loss)
        with probe.on(running.others):
            return operator(vector)

    pairs = estimate.wants_pair and len(running.others) > 0
    objective = probe.objective
    sample = Sample(operator, objective.weights, other if pairs else None, operator.gradient, objective.inner)
    quotients = estimate.update(sample)
    if first and estimate.vector is not None and probe.in_half_precision():
        error = probe.precision_error(stability, estimate.vector, quotients[0])
        if not probe.in_half_precision():
            estimate.restart()
            quotients = estimate.update(sample.alone())
    losses.append(probe.hessian.loss)
    loss, mean = sum(losses) / len(losses), running.mean_loss
    relative = loss / mean if mean is not None and mean > 0 and loss > 0 else None
    value = estimate.average(quotients, relative, running.stands_for)
    if value is None or stability.threshold is None:
        return {"running_sharpness": value, "precision_error": error}
    weight = stability.noise_factor * running.fraction
    noisy, bound = estimate.noisy(weight), estimate.bound(weight)
    return {
        "precision_error": error,
        "running_sharpness": value,
        "running_stability_ratio": value / stability.threshold,
        "mean_square_stability_ratio": None if noisy is None else noisy / stability.threshold,
        "mean_square_bound": None if bound is None else bound / stability.threshold,
    }


@contextlib.contextmanager
def _timed(seconds: dict[Tier, float], tier: Tier) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[tier] = time.perf_counter() - began


def stability(
    model: nn.Module, loss_fn: LossFn, batches: Any, optimizer: Any, *, tier: Tier = "gfs", **options: Any
) -> Measurement:
    """Sharpness, GFS sharpness and the optimizer's threshold, once; nothing is left changed.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch.
        batches: one batch, or a list of them, as in :func:`sharpness`.
        optimizer: a torch optimizer over (some of) the model's parameters.
        tier: ``"batch_sharpness"``, ``"sharpness"``, ``"gfs"`` or ``"gfs_full"``; with ``before=``, a copy of the
            weights before the last optimizer step, also ``"directional"``.
        **options: ``before``; ``directional``, ``horizon``, ``hvp``, ``tol``, ``rtol``, ``seed`` as in
            :class:`~gfs_core.GFSConfig`.

    Raises:
        MeasurementError: not even the sharpness could be had.
    """
    return measure(model, loss_fn, _as_list(batches), optimizer, tiers=(tier,), **options)[0]


def _usable(top: EigenResult, reasons: list[str], symmetric: bool) -> bool:
    """Whether an eigenvalue is worth giving; ``reasons`` says what is wrong.

    It has converged or, of a symmetric operator, where the residual is a bound, is not far from it.
    """
    if not math.isfinite(top.value):
        raise MeasurementError("the sharpness is not finite")
    if top.converged:
        return True
    usable = symmetric and top.error_bound <= WORST_RESIDUAL
    why = top.reason if symmetric else "no eigenvalue of a curvature that is not symmetric was found"
    reasons.append(f"sharpness{'' if usable else ' left out'} (relative residual {top.error_bound:.0e}): {why}")
    return usable


def _as_list(batches: Any) -> list[Any]:
    if not isinstance(batches, list):
        return [batches]
    if len(batches) > 1 and all(isinstance(batch, Tensor) for batch in batches):
        raise ConfigError(
            f"a list counts as several batches, and this one holds {len(batches)} bare tensors; if it is one batch, as "
            "a DataLoader gives it, write `[batch]`; of several, make each a tuple"
        )
    return batches
