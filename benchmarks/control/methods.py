"""The ways to set the rate that are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import gfs_core as gfs
from benchmarks.control.training import WARMUP, Act, Method, Training
from benchmarks.lib.data import Batch

PLATEAU = 25  # steps over which its loss is the mean
LAZY = 4  # steps between two looks of GeN, the fewest that its page recommends

# The configuration that won for NadamW over all workloads of AlgoPerf (Dahl et al. 2023), of its self-tuning baseline.
NADAMW = {"lr": 0.0017486387539278373, "betas": (1 - 0.06733926164, 0.9955159689799007), "eps": 1e-8,
          "weight_decay": 0.08121616522670176}  # fmt: skip


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _decay(own: torch.optim.Optimizer) -> float:
    return float(own.defaults["weight_decay"])


# --- what an engineer would do otherwise ----------------------------------------------------------------------------


def plateau(training: Training) -> Act:
    """Half the rate where the mean loss of 25 steps has not fallen three times."""
    scheduler = ReduceLROnPlateau(training.optimizer, factor=0.5, patience=2)

    def act(batch: Batch, loss: Tensor) -> None:
        if len(training.losses) % PLATEAU == 0:
            scheduler.step(fmean(training.losses[-PLATEAU:]))

    return act


def schedule_free(model: nn.Module, own: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    """Of the workload's kind, with a warm-up."""
    import schedulefree  # type: ignore[import-untyped]

    first = round(WARMUP * steps)
    if isinstance(own, torch.optim.AdamW):
        made = schedulefree.AdamWScheduleFree(_trained(model), rate, weight_decay=_decay(own), warmup_steps=first)
    else:
        made = schedulefree.SGDScheduleFree(_trained(model), rate, momentum=0.9, warmup_steps=first)
    made.train()
    return made


def prodigy(model: nn.Module, own: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    """At its rate of 1, over a cosine, as its page recommends."""
    import prodigyopt  # type: ignore[import-not-found]

    with contextlib.redirect_stdout(io.StringIO()):
        return prodigyopt.Prodigy(_trained(model), weight_decay=_decay(own))


def nadamw(model: nn.Module, own: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    """Torch's, with decoupled decay."""
    return torch.optim.NAdam(_trained(model), **NADAMW, decoupled_weight_decay=True)  # type: ignore[arg-type]


def zclip(training: Training) -> Act:
    """Its package, as it comes."""
    from zclip import ZClip  # type: ignore[import-not-found]

    clip = ZClip()
    return lambda batch, loss: clip.step(training.model)


def gen(training: Training) -> Act:
    """A parabola through three losses along the step on another batch, each few steps; fading out over the training."""
    from GeN import lr_parabola  # type: ignore[import-not-found]

    batches = training.batches(training.seed + 1000)

    class Net:
        """The model, for which the criterion is called with the inputs."""

        parameters = training.model.parameters

        def __call__(self, x: Tensor) -> Tensor:
            return x

    def act(batch: Batch, loss: Tensor) -> None:
        taken = len(training.losses)
        if taken % LAZY == 0:
            with contextlib.redirect_stdout(io.StringIO()):
                lr_parabola(
                    Net(), training.optimizer, lambda x, y: training.loss_of((x, y)), tr_iter=batches, device="cpu",
                    task="image_cls", scale=1 - taken / training.steps, lr_factor=[-1, 0, 1],
                )  # fmt: skip

    return act


# --- ours -----------------------------------------------------------------------------------------------------------

_ACTS = {"skipped": "the step was skipped", "lowered": "losses have risen at the alarm", "rollbacks": "went back"}


def controlled(**options: Any) -> Callable[[Training], Act]:
    """A monitor with every default but these options."""

    def made(training: Training) -> Act:
        monitor = gfs.StabilityMonitor(training.model, training.optimizer, gfs.GFSConfig(**options))
        if training.schedule is not None:
            monitor.protect(training.schedule)
        training.ended = monitor.close

        def act(batch: Batch, loss: Tensor) -> None:
            measurement = monitor.step(training.loss_of, batch, loss=loss)
            for name, text in _ACTS.items():
                if measurement is not None and any(text in reason for reason in measurement.reasons):
                    training.did[name] = training.did.get(name, 0) + 1

        return act

    return made


def _ours(warmup: float = 0.0, **options: Any) -> Method:
    return Method(warmup=warmup, acts=controlled(**options), source="gfs_core")


REFERENCE = "warm-up + cosine"
FINDER, SEARCH = "LR finder + cosine", "find_rate + cosine"
GUARD, START = "guard + cosine", "start + cosine"
PEERS: dict[str, Method] = {
    REFERENCE: Method(warmup=WARMUP, priced=False),
    "constant": Method(cosine=False, priced=False),
    "plateau": Method(cosine=False, acts=plateau, priced=False),
    FINDER: Method(warmup=WARMUP, free=True, priced=False, source="lightning"),
    "schedule-free": Method(cosine=False, optimizer=schedule_free, source="schedulefree"),
    "Prodigy + cosine": Method(optimizer=prodigy, free=True, source="prodigyopt"),
    "GeN": Method(cosine=False, acts=gen, source="gen-optim"),
    "ZClip + cosine": Method(warmup=WARMUP, acts=zclip, source="zclip"),
    "calibrated NadamW": Method(warmup=0.02, optimizer=nadamw, free=True),
}
OURS: dict[str, Method] = {
    GUARD: _ours(WARMUP, control="guard"),
    START: _ours(control="start"),
    SEARCH: Method(warmup=WARMUP, priced=False, source="gfs_core"),
    "cap, cosine": _ours(control="cap"),
    "follow, cosine": _ours(control="follow"),
    "warmup, cosine": _ours(control="warmup"),
    "CDAT, cosine": _ours(control="cdat"),
}
LIMITS = ("cap, cosine", "follow, cosine", "warmup, cosine", "CDAT, cosine")  # that keep a ratio below a limit
METHODS = PEERS | OURS
_MODULES = {"schedulefree": "schedulefree", "prodigyopt": "prodigyopt", "gen-optim": "GeN", "zclip": "zclip"}


def available(name: str) -> bool:
    """Whether the package that a method comes from is installed."""
    source = METHODS[name].source
    return source not in _MODULES or importlib.util.find_spec(_MODULES[source]) is not None
