"""Where the early warning ends: under a budget of 5 %, and in runs that are wrong from the start.

Writes alarm_limits.json and alarm_limits.md, after benchmarks.alarm, whose tuned rules it takes.
Run: OMP_NUM_THREADS=1 python -m benchmarks.alarm_limits
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from statistics import fmean, median
from typing import Any

import torch

import gfs_core as gfs
from benchmarks.alarm.compare import delay, false_alarms, quantile
from benchmarks.alarm.page import header, number
from benchmarks.lib.rules import Ours, all_rules
from benchmarks.lib.streams import BATCH, FAULTS, FOLDER, OPTIMIZERS, WORKLOADS, cases, workloads

BUDGET = 0.05
SEEDS = range(5, 9)
STEPS, MULTIPLES = 300, (1, 10, 30)


def budget() -> dict[str, Any]:
    """The alarm with all the measurements, and with those that a budget leaves, on the same seeds."""
    out: dict[str, Any] = {}
    for name, overhead in (("no budget", None), (f"{BUDGET:.0%}", BUDGET)):
        found = cases(overhead, SEEDS)
        healthy = [c for c in found if c.fault is None]
        steps = sum(len(c.stream["loss"]) for c in healthy)
        rule = Ours("alarm")
        gaps = {
            workload: median(steps_between(c.stream["ratio"]) for c in healthy if c.workload == workload)
            for workload in WORKLOADS
        }
        delays = {
            f"{fault}, {optimizer}": [
                delay(rule, 1.0, c) for c in found if (c.fault, c.optimizer) == (fault, optimizer)
            ]
            for fault, optimizer in itertools.product(FAULTS, OPTIMIZERS)
        }
        out[name] = {
            "false_alarms": 1e4 * false_alarms(rule, 1.0, healthy) / steps,
            "healthy_steps": steps,
            "steps_between": gaps,
            "delays": {
                key: {
                    "median": None if math.isinf(m := quantile(values, 0.5)) else m,
                    "recall": fmean(v < math.inf for v in values),
                }
                for key, values in delays.items()
            },
        }
    return out


def steps_between(ratios: list[float | None]) -> float:
    """Mean distance of two measurements after the first hundred steps."""
    late = [i for i, r in enumerate(ratios) if r is not None and i >= 100]
    return (late[-1] - late[0]) / max(len(late) - 1, 1) if len(late) > 1 else float(len(ratios) - 100)


def from_the_start() -> list[dict[str, Any]]:
    """Runs whose rate is far too high from step 0, and who tells."""
    held = {r["rule"]: r["value"] for r in json.loads((FOLDER / "alarm.json").read_text())["rules"]}
    rules = [r for r in all_rules() if r.kind not in ("ours", "rate")]
    rows = []
    for (name, workload), optimizer, multiple, seed in itertools.product(
        workloads().items(), OPTIMIZERS, MULTIPLES, SEEDS
    ):
        training = workload.training(optimizer, seed, multiple)
        events: list[gfs.Alert] = []
        training.monitor.watch.function = events.append
        x, y = workload.data()
        generator = torch.Generator().manual_seed(seed)
        stream: dict[str, list[float]] = {"loss": [], "gradient": []}
        for step in range(STEPS):
            picked = torch.randint(len(y), (BATCH,), generator=generator)
            loss, gradient, _ = training.step((x[picked], y[picked]), step, 1.0, None)
            stream["loss"].append(loss)
            stream["gradient"].append(gradient)
            if not math.isfinite(loss):
                break
        alarms = [e for e in events if e.level is gfs.AlertLevel.ALARM]
        others = [min(r.alarms(stream, held[r.name]), default=None) for r in rules]
        losses = stream["loss"]
        rows.append({
            "workload": name,
            "optimizer": optimizer,
            "multiple": multiple,
            "dead": not fmean(losses[-30:]) < 0.95 * losses[0],
            "alarm": alarms[0].step if alarms else None,
            "rule": alarms[0].rule if alarms else None,
            "others": min((step for step in others if step is not None), default=None),
            "final": fmean(losses[-30:]) if math.isfinite(losses[-1]) else None,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def render(results: dict[str, Any]) -> str:
    """The page."""
    both = results["budget"]
    names = list(both)
    out = [HEAD.format(seeds=len(SEEDS), budget=BUDGET), header(["", *names])]
    out.append(
        "| false alarms per 10,000 healthy steps | "
        + " | ".join(f"{both[n]['false_alarms']:.1f}" for n in names)
        + " |"
    )
    for workload in WORKLOADS:
        cells = (f"{both[n]['steps_between'][workload]:.0f}" for n in names)
        out.append(f"| steps between measurements, {workload} | " + " | ".join(cells) + " |")
    for key in both[names[0]]["delays"]:
        cells = (f"{number(both[n]['delays'][key]['median'])}, {both[n]['delays'][key]['recall']:.0%}" for n in names)
        out.append(f"| {key} | " + " | ".join(cells) + " |")
    wrong = [r for r in results["start"] if r["multiple"] > 1]
    both_told = [r for r in wrong if r["alarm"] is not None and r["others"] is not None]
    right = [r for r in results["start"] if r["multiple"] == 1]
    said = START_SAID.format(
        wrong=len(wrong),
        own=sum(r["alarm"] is not None for r in wrong),
        others=sum(r["others"] is not None for r in wrong),
        right=len(right),
        false_own=sum(r["alarm"] is not None for r in right),
        false_others=sum(r["others"] is not None for r in right),
        both=len(both_told),
        earlier=sum(r["alarm"] < r["others"] for r in both_told),
        later=sum(r["alarm"] > r["others"] for r in both_told),
    )
    columns = [
        "workload",
        "optimizer",
        "rate",
        "not trained at the end",
        "alarm in",
        "at step",
        "by",
        "others in",
        "at step",
    ]
    out += [START.format(seeds=len(SEEDS), steps=STEPS), said, header(columns)]
    rows = results["start"]
    for workload, optimizer, multiple in itertools.product(WORKLOADS, OPTIMIZERS, MULTIPLES):
        own = [r for r in rows if (r["workload"], r["optimizer"], r["multiple"]) == (workload, optimizer, multiple)]
        alarms, others = ([r[key] for r in own if r[key] is not None] for key in ("alarm", "others"))
        by = ", ".join(sorted({r["rule"] for r in own if r["rule"]}))
        cells = [
            workload, optimizer, f"×{multiple}", f"{sum(r['dead'] for r in own)} of {len(own)}",
            f"{len(alarms)}", f"{median(alarms):.0f}" if alarms else "", by,
            f"{len(others)}", f"{median(others):.0f}" if others else "",
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


HEAD = """# The early warning: a budget, and runs that are wrong from the start

    OMP_NUM_THREADS=1 python -m benchmarks.alarm_limits

## With `max_overhead={budget}`

The runs of [alarm.md](alarm.md) again on {seeds} seeds, as the package comes: with all measurements, and with those
that a budget of {budget:.0%} of the wall time leaves. Faults: median delay in steps (–: never), and the share of runs
in which the alarm came. What sees the loss or the rate alone needs no measurement and is not touched.
"""
START = """
## Wrong from the start

The base rate times 1, 10 and 30 from step 0, {seeds} seeds, {steps} steps. There is no healthy past that a rule could
compare with; the stability ratio in the mean square has its edge at 1 and needs none. *Others*: the earliest rule of
[alarm.md](alarm.md) that sees loss or gradient, each as tuned there. An alarm at ×1 would be a false one.
"""


START_SAID = """\
Of the {wrong} runs that are wrong the alarm told of {own} and the others together of {others}; of the {right} at ×1,
wrongly, {false_own} and {false_others}. Where both spoke the alarm was earlier in {earlier} of {both} and later in
{later}: a start is so wild that loss and gradient show it first.
"""


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["render"]:
        (FOLDER / "alarm_limits.md").write_text(render(json.loads((FOLDER / "alarm_limits.json").read_text())))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = {"start": from_the_start(), "budget": budget()}
    (FOLDER / "alarm_limits.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (FOLDER / "alarm_limits.md").write_text(render(results))


if __name__ == "__main__":
    main()
