"""The monitor itself, with every default: in healthy trainings, and as a rescue in those and in trainings in danger.

The trainings are those that no rule was chosen on. Writes part "live" of health.json, and part "danger" of
rescue.json, and their pages. Runs that are there are not made again.
Run (forty minutes): OMP_NUM_THREADS=1 python -m benchmarks.zoo.live [healthy] [danger]
"""

from __future__ import annotations

import math
import sys
import warnings
from functools import partial
from statistics import fmean, median, pstdev
from typing import Any

import torch

from benchmarks import rescue
from benchmarks.lib.meters import clock
from benchmarks.lib.store import Row, Store
from benchmarks.zoo import exam_danger, exam_healthy, health
from benchmarks.zoo.record import FIRST
from benchmarks.zoo.training import Training
from gfs_core import Alert, AlertLevel, GFSConfig, StabilityMonitor
from gfs_core.optimizers.skipping import SkipHook

SEEDS = 3  # of each training in danger
LAST = 50  # losses whose median is that of the end
OTHERS = (
    128,
    6.0,
)  # losses or gradients that make up the usual one, and deviations above it: OLMo-core's SkipStepOptimizer


def watched(training: Training, alarm: Any, control: Any = "observe") -> Row:
    """Run a training under a monitor with every default but the action and the control.

    Returns:
        ``losses``, the stretches at the level of an alarm, ``ratios`` that were measured, ``skipped`` steps,
        times that the rate was ``lowered`` and ``rollbacks``, and the ``seconds`` it took.
    """
    alerts: list[Alert] = []
    config = GFSConfig(alarm=alarm, control=control)
    monitor = StabilityMonitor(training.model, training.optimizer, config, on_alarm=alerts.append)
    losses: list[float] = []
    stretches: list[list[Any]] = []
    ratios = skipped = lowered = back = 0
    standing = False
    began = clock()
    for taken, step in enumerate(training.steps):
        made = monitor.step(step.loss_of, step.batch, loss=step.loss)
        losses.append(step.loss)
        was, standing = standing, monitor.watch.level == AlertLevel.ALARM
        if standing and not was:
            stretches.append([taken, taken + 1, alerts[-1].rule if alerts else ""])
        if standing:
            stretches[-1][1] = taken + 1
        if made is not None:
            ratios += made.stability_ratio is not None
            skipped += any("the step was skipped" in reason for reason in made.reasons)
            lowered += any("losses have risen at the alarm" in reason for reason in made.reasons)
            back += any("went back" in reason for reason in made.reasons)
    seconds = clock() - began
    return {"losses": losses, "alarms": stretches, "ratios": ratios, "skipped": skipped, "lowered": lowered,
            "rollbacks": back, "seconds": seconds}  # fmt: skip


def left_alone(training: Training, rule: str) -> Row:
    """Run a training without a monitor; a rule of others may leave out steps, or none."""
    hook = SkipHook(training.optimizer)
    held: list[float] = []
    losses: list[float] = []
    skipped = 0
    began = clock()
    for step in training.steps:
        losses.append(step.loss)
        value = step.loss if rule == "skip: loss" else _gradient(training) if rule == "skip: gradient" else 0.0
        hook.asked = _unusual(value, held)
        skipped += hook.asked
        held += [value] if math.isfinite(value) else []
    seconds = clock() - began
    hook.close()
    return {"losses": losses, "skipped": skipped, "seconds": seconds}


def _gradient(training: Training) -> float:
    grads = [p.grad for group in training.optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def _unusual(value: float, held: list[float]) -> bool:
    window, deviations = OTHERS
    recent = held[-window:]
    if not math.isfinite(value):
        return True
    return len(recent) >= window // 2 and value > fmean(recent) + deviations * pstdev(recent) + 1e-12


WAYS = {
    "nothing": partial(left_alone, rule=""), "skip: gradient": partial(left_alone, rule="skip: gradient"),
    "skip: loss": partial(left_alone, rule="skip: loss"), "alarm=skip": partial(watched, alarm="skip"),
    "alarm=rescue": partial(watched, alarm="rescue"),
}  # fmt: skip


def ended(losses: list[float]) -> float | None:
    """The median of the last losses; ``None``: the run is lost."""
    last = losses[-LAST:]
    return median(last) if all(map(math.isfinite, last)) else None


def compact(row: Row) -> Row:
    """A row without its losses: what it began with, its best, and its end."""
    losses = row.pop("losses")
    finite = [loss for loss in losses if math.isfinite(loss)]
    best = min((median(finite[i : i + 10]) for i in range(0, max(len(finite) - 9, 1), 5)), default=None)
    return {"steps": len(losses), "first": median(losses[:5]), "best": best, "end": ended(losses), **row}


def main() -> None:
    """Run what is not there yet."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["healthy", "danger"]
    if "healthy" in wanted:
        store = Store("health")
        seed = FIRST["exam, healthy"]
        for name, make in exam_healthy.HEALTHY.items():
            for alarm in ("warn", "rescue"):
                store.add("live", (name, alarm), lambda m=make, a=alarm: compact(watched(m(seed), a)))  # type: ignore[misc]
        store.write_page(health.render(store.results))
    if "danger" in wanted:
        store = Store("rescue")
        first = FIRST["exam, danger"]
        for name, make in exam_danger.DANGER.items():
            for seed in range(first, first + SEEDS):
                for way, run in WAYS.items():
                    store.add("danger", (name, way, seed), lambda m=make, r=run, s=seed: compact(r(m(s))))  # type: ignore[misc]
        store.write_page(rescue.render(store.results))


if __name__ == "__main__":
    main()
