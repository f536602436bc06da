"""The free signals of a run: when they are read, within a hundredth of its time, and what is written of them."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gfs_core.optimizers.closures import closure_of
from gfs_core.optimizers.grad_scaling import GradScaling
from gfs_core.optimizers.thresholds import named_in_full, parameters_of, unwrap
from gfs_core.optimizers.updates import known
from gfs_core.run.notices import Notices
from gfs_core.run.ranks import Ranks
from gfs_core.signals.base import Reading
from gfs_core.signals.gradients import (
    GRAD_NORM,
    KEYS,
    NONFINITE,
    SUMMED,
    GradientSample,
    Layout,
    Sums,
    UpdateSample,
    readings_of,
)
from gfs_core.signals.layers import layers_of, names_of

SHARE = 0.01  # of wall time, for all free signals together
SILENCE = 50  # steps without a measurement after which the free signals alone are logged and written
_TOGETHER = 20  # least steps between samples of several processes, which add them up in some exchanges
_LATE = 2  # steps after a sample at which processes add it up: by then it has arrived everywhere
_MOST = 64  # samples that wait: before the first step of an optimizer none is read
_NOTED = 10  # first steps in which it is looked whether gradients are there when a step is told of
_THINNING = 0.01  # steps between lines with each layer's values, as a fraction of the steps so far
_WORD = 32  # numbers in an exchange
_FAILED = "the gradients of a step were not read"
_CLIPPED = 1e-3  # relative distance to the norm to which gradients are clipped, below which they have been


class Pace:
    """Spaces what is done repeatedly so that it takes a share of wall time.

    Args:
        share: of wall time, > 0; infinite for no limit.
        clock: returns seconds, from any origin.

    Attributes:
        price: seconds that it took the last time; 0 for the first time, which includes start-up of the libraries.
    """

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self.share, self.clock, self.price = share, clock, 0.0
        self._not_before = -math.inf
        self._cold, self._began = True, 0.0

    @property
    def due(self) -> bool:
        """Whether it may be done now."""
        return self.clock() >= self._not_before

    def took(self, began: float) -> None:
        """Record that it was done, from ``began`` until now."""
        if not self._cold:
            self.price = self.clock() - began
        self._cold = False
        self._began = began
        self._not_before = began + self.price / self.share

    def took_also(self, here: float, there: float) -> None:
        """Record that the last time took more.

        Args:
            here: further seconds of the host.
            there: seconds of an accelerator, which works beside the host.
        """
        if self.price:  # else it was the first time
            self.price = max(self.price + here, there)
            self._not_before = max(self._not_before, self._began + self.price / self.share)


class FreeSignals:
    """Reads gradients and the optimizer's state beside training, and keeps the latest values.

    The gradient is read where :meth:`before_step` is called, before clipping if that is so. Where nobody calls it for
    a step, it is read as the optimizer gets it. The update is read right after a step. Each of the two has half of
    :data:`SHARE`: it is read at every step if it costs less, and less often otherwise.

    Several processes take samples at the same steps, at least 20 apart, and add up what is spread over them.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        limited: whether the share of wall time is limited; otherwise everything is read at every step.
        ranks: the processes that train together; ``None``: this process only.
        notices: reports failures within a step of the optimizer.
        clock: returns seconds, from any origin.

    Attributes:
        step: the present step, as far as anybody has said.
        only_in_step: gradients are read as the optimizer gets them, never before. Found out in the first steps.
        counting: makes contexts whose wall time is not the training's.
        latest: the latest reading of each quantity and layer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        limited: bool,
        ranks: Ranks | None,
        notices: Notices,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.optimizer, self.ranks, self.clock = model, unwrap(optimizer), ranks, clock
        self.notices = notices
        self.counting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        share = SHARE / 2 if limited else math.inf
        self._gradients, self._updates = Pace(share, clock), Pace(share, clock)
        self._scaling = GradScaling(self.optimizer)
        self._scale_known = False  # only within the first step is it seen whether gradients are scaled
        self.step = -1
        self.only_in_step = False
        self.latest: dict[tuple[str, str], Reading] = {}
        self._layout: Layout | None = None
        self._asked = self._updated = -1  # the last steps of `_read_gradients` and of the sample after a step
        self._used, self._noted = _Used(), 0
        self._coming: list[GradientSample | UpdateSample] = []
        self._reasons: list[str] = []
        self._count = False  # whether an accelerator counts entries that are not finite
        self._published, self._layers_at = -1, 0
        self._agreed = -1  # the step at which all processes take the next sample; -1: the first one
        self._began = (clock(), 0)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        if not known(self.optimizer):
            self._reasons.append(f"update_ratio: the updates of {named_in_full(self.optimizer)} are not known")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_coming": []}  # what is on its way cannot be copied

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_step(self, step: int, clipped_at: float | None = None) -> None:
        """Read the gradients of ``step``, which are there now, if that is due; later calls at a step do nothing.

        Args:
            step: optimizer steps taken so far.
            clipped_at: the norm to which the gradients have been clipped, if theirs was larger; ``None``: not clipped.
        """
        self.step = step
        if not self.only_in_step:
            self._read_gradients(clipped_at)

    def _read_gradients(self, clipped_at: float | None = None) -> None:
        step = self.step
        if step == self._asked:
            return
        if not self._due(self._gradients, step):
            self._asked = step
            return
        params = parameters_of(self.optimizer)
        if not any(p.grad is not None for p in params):
            return
        if self._noted < _NOTED and self._used.holds(params):  # a loop that tells of a step before it has gradients
            self.only_in_step = True
            return
        self._asked, began = step, self.clock()
        with self.counting(), torch.no_grad():
            layout = self._laid_out(params)
            scale = self._scaling.scale()
            self._coming.append(GradientSample(step, layout, scale, self._count, clipped_at))
            del self._coming[:-_MOST]
        self._gradients.took(began)

    def _due(self, pace: Pace, step: int) -> bool:
        if self.ranks is None:
            return pace.due
        return not self.ranks.lost and (self._agreed < 0 or step == self._agreed)

    def _laid_out(self, params: list[torch.Tensor]) -> Layout:
        held = self._layout
        if (
            held is None
            or len(held.params) != len(params)
            or any(a is not b for a, b in zip(held.params, params, strict=True))
        ):
            if held is not None:
                self.latest = {}  # of other weights
            shares = None
            if self.ranks is not None:
                sharding = self.ranks.inner_product(params).sharding
                shares = [1 / self.ranks.size] * len(params) if sharding is None else list(sharding.shares)
            held = self._layout = Layout.of(params, layers_of(names_of(self.model, params)), shares)
        return held

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._scaling.looked:
            self._scaling.look()
            if self._scaling.active:  # what was read before is scaled or not: nobody knows
                self._coming = []
        # A closure computes them later. Under manual optimization Lightning always passes one, which does nothing.
        if (closure_of(args, kwargs) is None or self.only_in_step) and self.step >= 0:
            with self.notices.harmless(_FAILED, alone=True):
                self._read_gradients()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.step < 0:
            return
        step, self._scale_known = self.step, True
        if self._noted < _NOTED and self._layout is not None:
            self._noted += 1
            self._used.note(self._layout.params)
        if not known(optimizer):
            return
        if step == self._updated or not self._due(self._updates, step):
            return
        self._updated, began = step, self.clock()
        with self.counting(), self.notices.harmless(_FAILED, alone=True), torch.no_grad():
            layout = self._laid_out(parameters_of(optimizer))
            self._coming.append(UpdateSample(step, layout, optimizer))
        self._updates.took(began)

    def arrived(self) -> list[Reading]:
        """The readings that have arrived since the last call, each of the step that it belongs to.

        With several processes this may exchange; all of them call it at the same steps.

        Raises:
            OtherRankFailed: another process has failed since the last exchange.
            RanksLost: another process does not answer.
        """
        if self.ranks is not None:
            return self._together(self.ranks, self.step)
        if not self._coming or not self._scale_known:
            return []
        found: list[Reading] = []
        while self._coming and self._coming[0].transfer.arrived:
            began, sample = self.clock(), self._coming.pop(0)
            found += self._readings(sample.step, sample.sums(), sample.clipped_at)
            pace = self._gradients if isinstance(sample, GradientSample) else self._updates
            pace.took_also(self.clock() - began, sample.transfer.seconds)
        return self._kept(found)

    def _together(self, ranks: Ranks, step: int) -> list[Reading]:
        if self._agreed < 0:
            self._agreed = step
        if step < self._agreed + _LATE or self._layout is None:
            return []
        sums: Sums = {}
        clipped_at = None
        for sample in self._coming if self._scale_known else ():
            if sample.step == self._agreed:
                sums |= sample.sums()
                clipped_at = sample.clipped_at or clipped_at
                pace = self._gradients if isinstance(sample, GradientSample) else self._updates
                pace.took_also(0.0, sample.transfer.seconds)
        at, self._agreed, self._coming = self._agreed, step, []
        layers = len(self._layout.layers)
        own = [v for name in SUMMED for v in [float(name in sums), *sums.get(name, [0.0] * layers)]]
        own.append(float(self._interval(step)) if ranks.rank == 0 else 0.0)
        told = [t for i in range(0, len(own), _WORD) for t in ranks.total(own[i : i + _WORD])]
        self._agreed = step + int(told.pop())
        for i, name in enumerate(SUMMED):
            row = told[i * (layers + 1) : (i + 1) * (layers + 1)]
            if row[0] == ranks.size:
                sums[name] = row[1:]
            else:  # a process has none
                sums.pop(name, None)
        return self._kept(self._readings(at, sums, clipped_at))

    def _interval(self, step: int) -> int:
        """Steps until the next sample that keep the share of wall time, by this process's clock."""
        (then, first), now = self._began, self.clock()
        self._began = (now, step)
        each = (now - then) / max(step - first, 1)
        price = self._gradients.price + self._updates.price
        return max(_TOGETHER, min(math.ceil(price / (2 * self._gradients.share * max(each, 1e-9))), 10**6))

    def _readings(self, step: int, sums: Sums, clipped_at: float | None) -> list[Reading]:
        layout = self._layout
        if layout is None or any(len(row) != len(layout.layers) for row in sums.values()):
            return []  # of weights that are no longer trained
        found = readings_of(step, layout.layers, sums)
        whole = {r.key: r.value for r in found if not r.layer}
        norm = whole.get(GRAD_NORM)
        if norm is not None and not math.isfinite(norm):
            self._count = True
            self._reasons.append("grad_norm: the gradient is not finite")
        else:
            self._count = False if norm is not None else self._count
        if norm is not None and clipped_at is not None and not norm < (1 - _CLIPPED) * clipped_at:
            self._reasons.append(
                f"grad_norm: the gradient had been clipped to {clipped_at:g}, by how much is not known; "
                "`GFSCallback(...).set_trainer(trainer)` sees it before"
            )
            found = [r._replace(value=None) if r.key in (GRAD_NORM, NONFINITE) else r for r in found]
        return found

    def _kept(self, readings: list[Reading]) -> list[Reading]:
        """Note the latest values."""
        for reading in readings:
            self.latest[reading.key.name, reading.layer] = reading
        return readings

    def unpublished(self, step: int) -> bool:
        """Whether nothing was logged for so long that the free signals should be logged alone."""
        if self._published < 0:
            self._published = step
        return bool(self.latest) and step - self._published >= SILENCE

    def publish(self, step: int) -> tuple[list[Reading], list[str]]:
        """The latest readings for a line that is written at ``step``, and remarks, each told once.

        Each layer's values are in fewer lines as training goes on, some 70 for each doubling of the steps, so that a
        long history stays small. Loggers get the values of the whole model alone.
        """
        self._published = step
        reasons, self._reasons = list(dict.fromkeys(self._reasons)), []
        layers = step >= self._layers_at
        if layers and self.latest:
            self._layers_at = step + max(1, math.floor(_THINNING * step))
        kept = [r for r in self.latest.values() if not r.layer or (layers and (r.key is not NONFINITE or r.value))]
        return [_short(r) for r in kept if r.value is not None], reasons

    def state_dict(self) -> dict[str, Any]:
        """The latest values, and where the lines stand."""
        if self.ranks is None:
            self._coming, coming = [], self._coming
            for sample in coming if self._scale_known else ():
                self._kept(self._readings(sample.step, sample.sums(), sample.clipped_at))
        latest = [[r.key.name, r.step, r.value, r.layer] for r in self.latest.values() if r.value is not None]
        unscaled = self._scale_known and not self._scaling.active
        return {
            "latest": latest,
            "published": self._published,
            "layers_at": self._layers_at,
            "unscaled": unscaled,
            "only_in_step": self.only_in_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        by_name = {key.name: key for key in KEYS}
        self.latest, self._coming = {}, []
        self._kept([Reading(by_name[n], int(at), float(v), str(layer)) for n, at, v, layer in state["latest"]])
        self._published, self._layers_at = int(state["published"]), int(state["layers_at"])
        self._scale_known, self.only_in_step = bool(state["unscaled"]), bool(state["only_in_step"])


class _Used:
    """Notes which gradients an optimizer has used, so that they are not taken for those of its next step."""

    def __init__(self) -> None:
        self._grad: weakref.ref[torch.Tensor] | None = None
        self._version = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return _Used, ()  # a copy belongs to other weights

    def note(self, params: Sequence[torch.Tensor]) -> None:
        """The gradients that are there now are used."""
        grad = _first(params)
        self._grad, self._version = (None, -1) if grad is None else (weakref.ref(grad), grad._version)

    def holds(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether the gradients that are there are used ones."""
        grad = _first(params)
        return self._grad is not None and self._grad() is grad is not None and grad._version == self._version


def _first(params: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return next((p.grad for p in params if p.grad is not None), None)


def _short(reading: Reading) -> Reading:
    """A reading with six digits, and a layer's for the history alone."""
    value = float(f"{reading.value:.6g}")
    key = reading.key.unlogged if reading.layer else reading.key
    return reading._replace(key=key, value=value)
