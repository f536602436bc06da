"""The monitor: when to measure, with what, and what to do when it fails."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfs_core import history
from gfs_core.batches import copied, first_of_all, rotating_part
from gfs_core.budget import Clock
from gfs_core.config import GFSConfig, Tier
from gfs_core.curvature import HvpMethod
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError
from gfs_core.measure import SOLVED, Running, WarmStart, measure
from gfs_core.measurement import Measurement
from gfs_core.running import MeanLoss, RunningSharpness
from gfs_core.stability import parameters_of, stability_of
from gfs_core.vectors import Vector, clone, combine, norm, random_like, scale

_MIX_EVERY = 10  # measurements between two that mix a random direction into the warm start: …
_CHEAP_SHARE = 0.75
_MEMORY = 0.9  # weight of the past in the mean batch sharpness
_MIX = 0.3  # … an eigenvalue that overtakes the tracked one would otherwise never be seen


class StabilityMonitor:
    """Measures how close a run is to instability, now and then, without a trace in the training.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        config: the options; ``None``: the defaults.
        name: name of the optimizer in the log, where there are several.

    Raises:
        ConfigError: there is nothing to measure.

    Example:
        In a plain loop, before ``optimizer.step()``::

            monitor = StabilityMonitor(model, optimizer)
            for batch in loader:
                loss = loss_of(batch)
                loss.backward()
                measurement = monitor.step(loss_of, batch)  # None on most steps
                optimizer.step()
    """

    def __init__(self, model: nn.Module, optimizer: Any, config: GFSConfig | None = None, *, name: str = "") -> None:
        self.model, self.optimizer, self.name = model, optimizer, name
        self.config = GFSConfig() if config is None else config
        self.history: Path | None = Path(self.config.history) if self.config.history else None
        try:
            params = parameters_of(optimizer)
        except TypeError as error:
            raise ConfigError(str(error)) from None
        if not params:
            raise ConfigError("nothing to measure: the optimizer holds no parameter with `requires_grad=True`")
        self.count = 0  # optimizer steps seen, in a plain loop
        self.measured = self._solved = 0
        self._warm = WarmStart()
        self._method: HvpMethod = self.config.hvp
        self._trusted = False
        self._probe: list[Any] = []
        self._told: set[str] = set()
        self._running = RunningSharpness()
        self._turn = 0  # running measurements so far: whose turn it is among the parts
        self._parts = self.config.running_parts
        self._mean_loss = MeanLoss()
        self._batch_sharpness: float | None = None
        self._before: Vector | None = None  # the weights before the last step, …
        self._before_step = -1  # … for a measurement at this one
        self._clock = Clock()
        if self.config.probe == "fixed" and (self.config.probe_size or 256) < 256:
            self._tell(
                f"a fixed probe of {self.config.probe_size} examples is misleading: training fits its noise, and the "
                "trend of its sharpness has come out reversed; use probe='batch', or a larger fixed probe"
            )
        stability = stability_of(optimizer, params)
        self._cadence = self.config.cadence()
        if stability.empirical:
            self._cadence = {
                tier: self._cadence.get(tier, self.config.every) for tier in ("directional", *self._cadence)
            }
        if stability.reason and not stability.adaptive:
            self._tell(stability.reason)

    def step(
        self,
        loss_fn: Callable[[Any], Tensor],
        batch: Any,
        step: int | None = None,
        *,
        micro_batches: bool = False,
        loss: Tensor | float | None = None,
    ) -> Measurement | None:
        """Measure, if a measurement is due at this step.

        Args:
            loss_fn: ``loss_fn(batch)``, a 0-dim tensor, the mean over the batch; called several times.
            batch: the current batch; read only.
            step: optimizer steps taken so far; ``None``: counted by the calls.
            micro_batches: ``batch`` is a list of micro-batches; what is measured is the mean of their losses.
            loss: the loss of this batch, where training has computed it: makes the running estimate less noisy.

        Returns:
            The measurement, or ``None`` where none was due or it failed.

        Raises:
            Exception: with ``strict=True``, whatever made the measurement fail.
        """
        if step is None:
            step = self.count
            self.count += 1
        if loss is not None:
            self.saw(loss)
        if not self.wants(step):
            return None
        try:
            return self._step(loss_fn, batch, step, micro_batches)
        finally:
            if self._keeps(step + 1):
                self._before, self._before_step = clone(parameters_of(self.optimizer)), step + 1

    def saw(self, loss: Tensor | float) -> None:
        """Take in the loss of a training batch, the mean over it: it costs nothing, and helps the running estimate."""
        if "running" in self._cadence:
            self._mean_loss.add(loss)

    def _step(self, loss_fn: Callable[[Any], Tensor], batch: Any, step: int, micro_batches: bool) -> Measurement | None:
        current = batch if micro_batches else [batch]
        batches = first_of_all(current, self.config.probe_size)
        if self.config.probe == "fixed" and len(self._probe) < self.config.probe_batches:
            missing = self.config.probe_batches - len(self._probe)
            self._probe += [copied(b) for b in batches[:missing]]
            if len(self._probe) < self.config.probe_batches:
                return None
        tiers = self._due(step)
        if not tiers:
            return None
        probe = self._probe if self.config.probe == "fixed" else batches
        began = time.perf_counter()
        measurement = None
        before = self._before if self._before_step == step else None
        seconds: dict[Tier, float] = {}
        self._before = None
        running = None
        if "running" in tiers:
            micro = current[self._turn // self._parts % len(current)]
            running = Running(self._running, rotating_part(micro, self._parts, self._turn), self._mean_loss.value())
            self._turn += 1
        try:
            measurement, seconds = self._measure(
                lambda _model, b: loss_fn(b), probe, step, tiers, before=before, running=running, current=batches
            )
        except Exception as error:
            if self.config.strict:
                raise
            self._failed(error)
        early = self.measured == 0 and self._before_second_moments()
        self._clock.measured(began, time.perf_counter(), tiers, seconds, early)
        self.measured += 1
        if measurement is None:
            return None
        measurement = replace(
            measurement,
            seconds=self._clock.last,
            overhead=self._clock.overhead(),
            optimizer_name=self._label(measurement),
            batch_sharpness=self._averaged(measurement.batch_sharpness),
        )
        for reason in measurement.reasons:
            if "come with its first step" not in reason:
                self._tell(reason)
        if self.history is not None:
            try:
                history.append(self.history, measurement)
            except OSError as error:
                self._tell(f"the history cannot be written ({error}); training goes on without it")
                self.history = None
        return measurement

    def wants(self, step: int) -> bool:
        """Whether :meth:`step` would do anything with a batch at this step."""
        filling = self.config.probe == "fixed" and len(self._probe) < self.config.probe_batches
        return filling or self.due(step) or self._keeps(step + 1)

    def due(self, step: int) -> bool:
        """Whether a measurement is due: at the cadence of a tier, and only while the budget allows one."""
        return bool(self._due(step))

    def _due(self, step: int) -> list[Tier]:
        """The tiers to be measured at this step, cheapest first.

        What comes to be due together is afforded together, from the cheapest on.
        """
        due: list[Tier] = []
        for tier, every in self._cadence.items():
            possible = tier != "directional" or self._before_step == step  # otherwise its last step was not seen
            if possible and step % every == 0 and self._affords([*due, tier]):
                due.append(tier)
        return due

    def _keeps(self, step: int) -> bool:
        """Whether the weights before this step's predecessor are needed for a measurement at this step."""
        if "directional" not in self._cadence:
            return False
        return any(step % every == 0 and self._affords([tier]) for tier, every in self._cadence.items())

    def _affords(self, tiers: list[Tier]) -> bool:
        # The cheap tiers share three quarters of the budget evenly, so that the dearest comes to its turn; it may have
        # all that is left.
        share = 1.0 if self.config.tier in tiers else _CHEAP_SHARE / max(len(self._cadence) - 1, 1)
        return self._clock.affords(tiers, self.config.max_overhead, share)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next measurement depends on; loadable with ``weights_only=True``."""
        return {
            "count": self.count,
            "measured": self.measured,
            "solved": self._solved,
            "method": self._method,
            "trusted": self._trusted,
            "warm": [self._warm.raw, self._warm.preconditioned],
            "probe": self._probe,
            "before": [self._before_step, self._before],
            "running": [self._running.state_dict(), self._turn, self._parts, self._mean_loss.value()],
            "batch_sharpness": self._batch_sharpness,
            "clock": self._clock.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off. A warm start that does not fit the model is dropped."""
        self.count, self.measured = int(state.get("count", 0)), int(state.get("measured", 0))
        self._solved = int(state.get("solved", 0))
        if state.get("method") in ("auto", "exact", "gradients") and self.config.hvp == "auto":
            self._method = state["method"]
        self._trusted = bool(state.get("trusted", False))
        params = parameters_of(self.optimizer)

        def fitted(vector: list[Tensor] | None) -> list[Tensor] | None:
            if vector is None or [t.shape for t in vector] != [p.shape for p in params]:
                return None
            return [t.to(device=p.device, dtype=p.dtype, copy=True) for t, p in zip(vector, params, strict=True)]

        raw, preconditioned = (fitted(v) for v in state.get("warm", [None, None]))
        self._warm = WarmStart(raw, preconditioned)
        device = params[0].device
        self._probe = [_to(b, device) for b in state.get("probe", [])] if self.config.probe == "fixed" else []
        self._before_step, before = state.get("before", [-1, None])
        self._before = fitted(before)
        if "running" in state:
            running, self._turn, self._parts, mean_loss = state["running"]
            if (vector := fitted(running["vector"])) is not None:
                self._running.load_state_dict({**running, "vector": vector})
            self._mean_loss.load(mean_loss)
        self._batch_sharpness = state.get("batch_sharpness")
        self._clock.load(state.get("clock", {}))

    def _measure(
        self,
        loss_fn: Any,
        batches: list[Any],
        step: int,
        tiers: list[Tier],
        *,
        before: Vector | None,
        running: Running | None,
        current: list[Any],
    ) -> tuple[Measurement, dict[Tier, float]]:
        config = self.config
        seed = config.seed + self.measured  # the same at a resumed step as in the uninterrupted run
        if tiers[-1] in SOLVED:
            self._solved += 1
            if self._solved % _MIX_EVERY == 0:
                self._mix(seed)
        if before is not None and [t.shape for t in before] != [p.shape for p in parameters_of(self.optimizer)]:
            before = None  # weights were frozen or added since
        measurement, hessian, seconds = measure(
            self.model,
            loss_fn,
            batches,
            self.optimizer,
            tiers=tiers,
            before=before,
            running=running,
            current=current,
            directional=config.directional,
            horizon=config.horizon,
            hvp=self._method,
            trusted=self._trusted,
            tol=config.tol,
            rtol=config.rtol,
            max_hvps=config.max_hvps,
            max_grads=config.max_grads,
            seed=seed,
            step=step,
            warm=self._warm,
        )
        self._trusted = hessian.trusted
        if hessian.method == "gradients":
            self._method = "gradients"  # settled: no need to fail again
        return measurement, seconds

    def _before_second_moments(self) -> bool:
        stability = stability_of(self.optimizer, parameters_of(self.optimizer))
        return stability.adaptive and stability.threshold is None

    def _averaged(self, batch_sharpness: float | None) -> float | None:
        """The mean over batches so far, with the latest one; exponential in time."""
        if batch_sharpness is None:
            return None
        held = self._batch_sharpness
        self._batch_sharpness = batch_sharpness if held is None else _MEMORY * held + (1 - _MEMORY) * batch_sharpness
        return self._batch_sharpness

    def _mix(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for vector in (self._warm.raw, self._warm.preconditioned):
            if vector is not None:
                noise = random_like(vector, generator)
                scale(_MIX / norm(noise), noise)
                combine(1.0, noise, 1.0, vector)

    def _failed(self, error: Exception) -> None:
        self._warm, self._running = WarmStart(), RunningSharpness()  # may have been in use when it broke off
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            self._tell("a measurement ran out of memory; set `probe_size` to measure on fewer examples")
        elif isinstance(error, MeasurementError):
            self._tell(str(error))
        else:
            self._parts = 1  # it may be that this loss needs whole batches
            self._tell(f"the loss failed when it was evaluated again: {type(error).__name__}: {error}")

    def _tell(self, reason: str) -> None:
        kind = re.sub(r"[0-9.e+-]+|\b(nan|inf)\b", "", reason)  # the same with other numbers is not told again
        if kind not in self._told:
            self._told.add(kind)
            where = f" of {self.name}" if self.name else ""
            warnings.warn(f"gfs: stability measurement{where}: {reason}", GFSWarning, stacklevel=3)

    def _label(self, measurement: Measurement) -> str:
        return self.name or measurement.optimizer_name


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(v, device) for v in batch)
    return batch
