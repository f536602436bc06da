"""Delays and false alarms of the rules, each at the same rate of false alarms."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from statistics import fmean
from typing import Any

from benchmarks.lib.rules import Ours, Rule, all_rules
from benchmarks.lib.streams import FAULTS, OPTIMIZERS, WORKLOADS, Case
from gfs_core import AlertLevel

ALLOWED, TOGETHER = 2.0, 20  # false alarms per 10,000 healthy steps; steps within which alarms count as one


def false_alarms(rule: Rule, knob: float, healthy: list[Case]) -> int:
    """How often it speaks; what follows within 20 steps counts as the same alarm."""
    count = 0
    for case in healthy:
        last = -math.inf
        for step in rule.alarms(case.stream, knob):
            count += step - last > TOGETHER
            last = step
    return count


def tune(rule: Rule, healthy: list[Case]) -> tuple[float, float]:
    """The smallest knob that keeps within the allowed false alarms, with their number per 10,000 steps."""
    steps = sum(len(c.stream["loss"]) for c in healthy)
    rates: dict[int, float] = {}

    def too_many(i: int) -> bool:
        rates[i] = 1e4 * false_alarms(rule, rule.values[i], healthy) / steps
        return rates[i] > ALLOWED

    low, high = -1, len(rule.values) - 1  # too many at low, not at high
    assert not too_many(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_many(middle) else (low, middle)
    return rule.values[high], rates[high]


def delay(rule: Rule, knob: float, case: Case) -> float:
    """Steps from the fault to the first alarm; infinite: none in the recorded steps."""
    first = 0 if rule.memory is None else case.start - rule.memory
    stream = case.stream if first == 0 else {key: values[first:] for key, values in case.stream.items()}
    return next((s + first - case.start for s in rule.alarms(stream, knob) if s + first >= case.start), math.inf)


def quantile(values: list[float], q: float) -> float:
    """The value that a fraction q of the others does not exceed; infinite values are allowed."""
    return sorted(values)[max(math.ceil(q * len(values)) - 1, 0)]


def compare(all_cases: list[Case]) -> dict[str, Any]:
    healthy = [c for c in all_cases if c.fault is None]
    faulty = [c for c in all_cases if c.fault is not None]
    harms = [math.inf if (h := c.harm()) is None else h for c in faulty]
    rules: list[tuple[Rule, float, float]] = [(rule, *tune(rule, healthy)) for rule in all_rules()]
    rows: list[dict[str, Any]] = []
    steps = sum(len(c.stream["loss"]) for c in healthy)
    for extra in (Ours("alarm, as it comes"), Ours("watch, as it comes", level=AlertLevel.WATCH)):
        rules.append((extra, 1.0, 1e4 * false_alarms(extra, 1.0, healthy) / steps))
    for rule, knob, rate in rules:
        delays = [delay(rule, knob, c) for c in faulty]
        for fault, optimizer, workload in itertools.product(FAULTS, OPTIMIZERS, (None, *WORKLOADS)):
            chosen = [
                (d, h)
                for d, h, c in zip(delays, harms, faulty, strict=True)
                if (c.fault, c.optimizer) == (fault, optimizer) and workload in (None, c.workload)
            ]
            if not chosen:
                continue
            own, harmed = [d for d, _ in chosen], [(d, h) for d, h in chosen if h < math.inf]
            rows.append({
                "rule": rule.name,
                "kind": rule.kind,
                "fault": fault,
                "optimizer": optimizer,
                "workload": workload or "all",
                "runs": len(own),
                "recall": fmean(d < math.inf for d in own),
                "quartiles": [_plain(quantile(own, q)) for q in (0.25, 0.5, 0.75)],
                "harmed": len(harmed),
                "steps_to_harm": _plain(quantile([h for _, h in harmed], 0.5)) if harmed else None,
                "before_harm": fmean(d < h for d, h in harmed) if harmed else None,
                "steps_left": _plain(-quantile([d - h for d, h in harmed], 0.5)) if harmed else None,
            })  # fmt: skip
        print(rule.name, knob, rate, flush=True)
    kinds = Counter((c.workload, c.optimizer) for c in healthy)
    return {
        "seeds": {f"{w}, {o}": n // 2 for (w, o), n in kinds.items()},
        "healthy_steps": steps,
        "rules": [
            {"rule": r.name, "kind": r.kind, "knob": r.knob, "value": k, "false_alarms": rate} for r, k, rate in rules
        ],
        "rows": rows,
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
