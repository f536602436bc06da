"""What to do at an alarm: each remedy tried out in a fresh run of the same training, from the step of the alarm on.

Writes advice.json and advice.md; cases that are there are not made again. The advice of the package was chosen on the
trainings of `benchmarks/zoo/design.py`, and is reported on those of `trial.py` and `exam_danger.py` there.
Run (twenty minutes): OMP_NUM_THREADS=1 python -m benchmarks.advice
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.advice.page import render
from benchmarks.advice.remedies import REST, Before, losses_with
from benchmarks.lib.data import Batch
from benchmarks.lib.models import digits_cnn, seeded
from benchmarks.lib.store import Row, Store
from benchmarks.lib.trainings import entropy
from benchmarks.zoo import design, exam_danger, trial
from benchmarks.zoo.breaks import AHEAD, BEHIND, breaks
from benchmarks.zoo.design import Make, adam, sgd
from benchmarks.zoo.parts import drawn, warmed
from benchmarks.zoo.rules import alerts
from benchmarks.zoo.training import Array, Stream, Training, plain, recorded
from gfs_core import Alert, AlertLevel

LEAST, LAST = 100, 20  # steps that there have to be after an alarm, and the last of them, which have to be good
SEEDS = {"design": (20, 3), "trial": (20, 3), "exam": (300, 1)}  # the first, and how many


def spoilt(
    factor: float, count: int, model: Callable[[], nn.Module], optimizer: Callable[[nn.Module], Any], data: Any, at: int
) -> Make:
    """A training with so many batches in a row whose inputs are multiplied."""

    def run(seed: int) -> Training:
        made, since = seeded(model, seed), at + 3 * seed % 50

        def batches() -> Iterator[Batch]:
            for step, (x, y) in enumerate(drawn(data(), 48, seed)):
                yield (x * factor if since <= step < since + count else x), y

        steps = since + REST
        return plain(made, optimizer(made), partial(entropy, made), batches(), steps, factor=warmed(50), fault=since)

    return run


# Kinds of `trial.DANGER` that in danger.md broke in one run of three at most, and take long.
SELDOM = (
    "no warm-up", "no norm of queries and keys", "RNN", "bfloat16 throughout", "rate ×3, AdamW", "rate ×30, AdamW",
    "ramp 2 %, AdamW", "resumed, rate ×5",
)  # fmt: skip
KINDS: dict[str, dict[str, Make]] = {
    "design": design.DANGER
    | {
        "a batch with NaN": spoilt(math.nan, 1, digits_cnn, partial(adam, rate=1e-3), design._digits, 300),
        "ten batches × 30": spoilt(30.0, 10, design._mlp, partial(sgd, rate=0.05), design._digits, 400),
    },
    "trial": {name: make for name, make in trial.DANGER.items() if name not in SELDOM}
    | {"a batch with NaN": spoilt(math.nan, 1, trial._small_cnn, partial(sgd, rate=0.02), trial._pooled, 500)},
    "exam": exam_danger.DANGER,
}


def cases(stream: Stream, full_batch: bool) -> dict[str, tuple[Alert, int]]:
    """By rule the first alarm that a break follows, or that tells of one, and the steps until the break."""
    found: dict[str, tuple[Alert, int]] = {}
    broken, since = breaks(stream, full_batch), stream.fault or 0
    for alert in alerts(stream):
        ahead = [at - alert.step for at in broken if -BEHIND <= max(at, since) - alert.step <= AHEAD]
        if alert.level is AlertLevel.ALARM and alert.step >= since and ahead:
            found.setdefault(alert.rule, (alert, ahead[0]))
    return found


def helped(losses: Array, at: int, full_batch: bool) -> bool:
    """Whether no break begins after the alarm, and the last losses are as low as before it, or nearly."""
    stream = Stream([], losses, losses, losses, {}, {})
    if any(step >= at for step in breaks(stream, full_batch)):
        return False
    first = median(losses[:5])
    best = min([median(losses[s - 10 : s]) for s in range(10, at + 1)], default=first)
    return bool(median(losses[-LAST:]) <= best + 0.1 * max(first - best, first / 2))


def known(stream: Stream, alert: Alert) -> Row:
    """What else is known at an alarm."""
    at, whole = alert.step, stream.whole
    lately = stream.rate[max(at - 50, 0)]
    return {
        "rate rose": bool(stream.rate[at] > 1.1 * lately),
        "adaptive": bool(np.isfinite(whole["rms_ratio"]).any()),
        "layers": len(alert.layers),
        "of": len(stream.layers),
    }


def tried(make: Make, seed: int, full_batch: bool) -> list[Row]:
    """What came of each remedy, in each case of one training."""
    stream = recorded(make(seed))
    rows: list[Row] = []
    for rule, (alert, ahead) in cases(stream, full_batch).items():
        at = alert.step
        if len(stream.loss) - at < LEAST and math.isfinite(stream.loss[-1]):
            continue
        with_each = losses_with(make, seed, Before(stream, at))
        found = [name for name, losses in with_each.items() if helped(losses, at, full_batch)]
        rows.append({"rule": rule, "step": at, "ahead": ahead, **known(stream, alert), "helped": found})
    return rows


def main() -> None:
    """Try every case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = Store("advice")
    for name, kinds in KINDS.items():
        first, count = SEEDS[name]
        for kind, make in kinds.items():
            for seed in range(first, first + count):
                full = kind.startswith("Adam")
                store.add(name, (kind, seed), lambda: {"cases": tried(make, seed, full)})  # noqa: B023
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
