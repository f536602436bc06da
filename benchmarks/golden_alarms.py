"""What the early warning says: streams of losses, rates and stability ratios of real trainings, and its events.

The streams are those of `benchmarks/lib/streams.py`, healthy and with each of its faults, around the start of a fault,
those of trainings of `benchmarks/golden.py`, with solved ratios, and those of `benchmarks/zoo`, with gradients. Writes
tests/golden/alarms.json, which tests/core/test_replays.py replays. Values are rounded to four digits before the events
are taken, so that a replay is exact on every machine.

Run: OMP_NUM_THREADS=1 python -m benchmarks.golden_alarms
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import gfs_core as gfs
from benchmarks import golden
from benchmarks import golden_trainings as made
from benchmarks.lib import streams as faulty
from benchmarks.zoo import design
from benchmarks.zoo.training import recorded
from tests.core.test_replays import FREE, Call, replayed

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "alarms.json"
BEFORE, AFTER = 160, 65  # steps around the start of a fault: the rules for ratios wait for 30 of them, of every 5 steps
SEED = 5
ORDER = ("rate", "loss", "normalised", "weights", "gradient")  # of the readings of a step


def of_benchmark() -> dict[str, list[Call]]:
    """Trainings of digits without a fault, and with each one."""
    streams: dict[str, list[Call]] = {}
    name = "digits, MLP"
    workload = faulty.workloads()[name]
    for optimizer in faulty.OPTIMIZERS:
        held = faulty.recorded(name, workload, optimizer, SEED)
        start = held["start"]
        rates = {"constant": lambda step: 1.0, "schedule": faulty.warm_cosine}
        for kind, rate in rates.items():
            streams[f"{optimizer}, {kind}"] = _calls(held[kind], [rate(step) for step in range(faulty.LONG)], 0, 250)
        for fault, after in held["faults"].items():
            whole = {key: held["constant"][key][:start] + after[key] for key in after}
            factors = [1.0] * start + [faulty.FAULTS[fault].rate(k) for k in range(faulty.AFTER)]
            calls = _calls(whole, factors, start - BEFORE, start + AFTER)
            # The rule for the rate speaks first where it is asked: the second optimizer is recorded without it.
            streams[f"{optimizer}, {fault}"] = [c for c in calls if c[0] != "rate" or optimizer == faulty.OPTIMIZERS[0]]
    return streams


def _calls(stream: dict[str, list[Any]], rates: list[float], begin: int, end: int) -> list[Call]:
    calls: list[Call] = []
    for step in range(begin, min(end, len(stream["loss"]))):
        calls += [("rate", step, rates[step]), ("loss", step, stream["loss"][step])]
        if stream["ratio"][step] is not None:
            calls.append(("running", step, stream["ratio"][step]))
    return calls


def growing(step: int) -> float:
    return 1.08 ** max(step - 60, 0)


def returning(step: int) -> float:
    return 6.0 if 50 <= step < 75 else 1.0


# Tier, optimizer, factor of the rate, and what the early warning is given.
TRAININGS: list[tuple[str, Callable[[nn.Module], Optimizer], Callable[[int], float], set[str]]] = [
    ("running", made.momentum, made.constant, {"rate", "loss", "running"}),
    ("running", made.momentum, growing, {"loss", "running"}),
    ("running", made.momentum, returning, {"rate", "loss", "running"}),
    ("running", made.adamw, returning, {"loss", "running"}),
    ("running", made.adamw, made.explosion, {"loss", "running"}),
    ("sharpness", made.momentum, growing, {"loss", "solved"}),
    ("sharpness", made.momentum, returning, {"solved"}),
    ("sharpness", made.adamw, made.constant, {"rate", "loss", "solved"}),
    ("sharpness", made.adamw, growing, {"solved"}),
]


def of_trainings() -> dict[str, list[Call]]:
    """Short trainings that are measured at every step: the rate grows, jumps and comes back, or is far too high."""
    streams: dict[str, list[Call]] = {}
    for tier, optimizer, factor, kinds in TRAININGS:
        options = {"tier": tier, "every": 1}
        calls = _measured(made.Scenario(options, made.plain, made.mlp, optimizer, factor, steps=130))
        streams[f"{tier}, {optimizer.__name__}, {factor.__name__}"] = [call for call in calls if call[0] in kinds]
    before, after = streams["running, momentum, growing"], streams["sharpness, adamw, growing"]
    streams["other weights"] = [*before, ("forget", 130, None), *((k, s + 130, v) for k, s, v in after)]
    streams["other weights, quiet again"] = [*after[:100], ("forget", 100, None), ("solved", 101, 9.0)]
    streams["short batches"] = [(*c, 3 if c[1] % 9 == 8 else 64) if c[0] == "loss" else c for c in before]
    # Two rules of which none of these trainings is an example.
    level = [("running", 5 * i, 0.2 + 0.01 * (i % 3)) for i in range(40)]
    streams["made up, steady growth"] = [*level, *(("running", 200 + 5 * k, 0.2 * 1.09**k) for k in range(24))]
    losses = [("loss", i, (1.0 if i < 100 else 1.03) + 0.01 * (i % 5)) for i in range(200)]
    streams["made up, higher losses"] = [*losses, *(("loss", 200 + i, 1.0 + 0.01 * (i % 5)) for i in range(100))]
    streams["not finite"] = [*streams["running, momentum, constant"], ("loss", 130, math.nan), ("loss", 131, math.inf)]
    return streams


def of_zoo() -> dict[str, list[Call]]:
    """Trainings whose gradients are recorded by layer, around a fault or a break."""
    streams: dict[str, list[Call]] = {}
    for name, begin, end in (("ramp 3 %, CNN, Adam", 380, 620), ("weights grow", 300, 520), ("momentum .99", 0, 250)):
        stream = recorded(design.DANGER[name](100))
        calls: list[Call] = []
        for step in range(begin, min(end, len(stream.loss))):
            calls += [("rate", step, float(stream.rate[step])), ("loss", step, float(stream.loss[step]))]
            if step % 2 == 0:  # as where reading them at every step would be too dear
                for kind, key in FREE.items():
                    found = zip(stream.layers, stream.by_layer[key.name][step], strict=True)
                    layers = [*found] if kind == "gradient" else []
                    values = [*layers, ("", stream.whole[key.name][step])]
                    calls += [(kind, step, float(v), layer) for layer, v in values if math.isfinite(v)]
        streams[f"zoo, {name}"] = sorted(calls, key=lambda c: (c[1], ORDER.index(c[0])))
    return streams


def _measured(scenario: made.Scenario) -> list[Call]:
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        made.plain(scenario, Path(folder))
        [part] = gfs.history_parts(Path(folder) / "history.jsonl")
    losses = {loss.step: loss.value for loss in part.losses}
    calls: list[Call] = []
    for m in part.measurements:
        calls.append(("rate", m.step, m.learning_rate))
        if m.step in losses:
            calls.append(("loss", m.step, losses[m.step]))
        solved = None if m.sharpness is None else m.stability_ratio
        ratios = {"running": m.running_stability_ratio, "solved": solved}
        calls += [(kind, m.step, ratio) for kind, ratio in ratios.items() if ratio is not None]
    return calls


def _rounded(call: Call) -> Call:
    kind, step, value, *more = call
    return (kind, step, float(f"{value:.4g}") if value is not None and math.isfinite(value) else value, *more)


def main() -> None:
    """Write the file."""
    golden.quiet()
    parts = []
    for name, calls in (of_benchmark() | of_trainings() | of_zoo()).items():
        held = [_rounded(call) for call in calls]
        events = replayed(held)
        print(name, len(held), [(e[0], *e[1:3]) for e in events], file=sys.stderr)
        parts.append(f"{json.dumps(name)}: " + json.dumps({"calls": held, "events": events}, separators=(",", ":")))
    TARGET.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
