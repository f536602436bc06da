"""Whether what the report says came first before an alarm is where a fault was planted.

Writes first.json and first.md. Run (6 minutes): OMP_NUM_THREADS=1 python -m benchmarks.first
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits, text
from benchmarks.lib.models import Characters, Rows, dense, digits_cnn, seeded
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import percent, table
from benchmarks.lib.trainings import adamw, entropy, epochs, sgd
from gfs_core.run.flight_recorder import STEPS
from gfs_core.signals.layers import layers_of, names_of
from gfs_report.first import departures

START = 130  # step at which a fault begins
LONGEST = 60  # steps after it at which an alarm is raised in any case
LEVEL = 3.0  # an alarm: the loss is this many times the median of its last 50
SEEDS = (0, 1)
RULE = "benchmark"


@dataclass(frozen=True)
class Training:
    """A healthy training.

    Attributes:
        make: the network.
        optimizer: of a network and a rate.
        rate: that rate.
        data: all of it.
        size: of a batch.
        chosen: whether the report's limits were chosen on it.
    """

    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float
    data: Callable[[], Batch]
    size: int
    chosen: bool = False


def plain(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD without momentum."""
    return torch.optim.SGD(model.parameters(), rate)


def normed() -> nn.Module:
    """Five linear layers with LayerNorm."""
    blocks = [m for _ in range(4) for m in (nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU())]
    return nn.Sequential(nn.Linear(64, 48), *blocks, nn.Linear(48, 10))


ALPHABET = text(400, 24)[1]
TRAININGS = {
    "MLP, tanh, SGD with momentum, batch 64": Training(lambda: dense(64, 48, 48, 10), sgd, 0.05, digits, 64, True),
    "CNN, AdamW, batch 32": Training(digits_cnn, adamw, 2e-3, digits, 32, True),
    "transformer on digits, AdamW, batch 64": Training(lambda: Rows("gelu", True), adamw, 2e-3, digits, 64),
    "characters, transformer, AdamW, batch 16": Training(
        lambda: Characters(ALPHABET, 24, 24), adamw, 2e-3, lambda: text(400, 24)[0], 16
    ),
    "five layers, LayerNorm, SGD, batch 16": Training(normed, plain, 0.05, digits, 16),
    "MLP, ReLU, SGD with momentum, batch 512": Training(
        lambda: dense(64, 64, 64, 64, 10, act=nn.ReLU), sgd, 0.05, digits, 512
    ),
}


def _grow(weights: list[Tensor], first: bool) -> None:
    for w in weights:
        w.mul_(1.05)


def _jump(weights: list[Tensor], first: bool) -> None:
    for w in weights if first else ():
        w.mul_(4.0)


def _scramble(weights: list[Tensor], first: bool) -> None:
    for w in weights if first else ():
        w.copy_(w.flatten()[torch.randperm(w.numel())].reshape(w.shape))


def _kick(weights: list[Tensor], first: bool) -> None:
    for w in weights:
        w.add_(torch.randn_like(w), alpha=0.1 * float(w.norm()) / math.sqrt(w.numel()))


def _climb(weights: list[Tensor], first: bool) -> None:
    for w in weights:
        assert w.grad is not None
        w.grad.mul_(-20.0)


# What is done to a layer at each step from START on: to its weights before the loss, or to its gradient after it.
FAULTS: dict[str, tuple[bool, Callable[[list[Tensor], bool], None]]] = {
    "its weights grow by 5 % a step": (False, _grow),
    "its weights times 4, once": (False, _jump),
    "its weights change places, once": (False, _scramble),
    "noise of a tenth of its weights' norm at each step": (False, _kick),
    "its gradient times −20": (True, _climb),
}


def record_of(
    training: Training, fault: str, where: int, seed: int, budget: float | None = None
) -> tuple[gfs.AlarmRecord, str, int]:
    """The record of an alarm, the layer at fault and the number of layers.

    Args:
        training: the training.
        fault: the kind of fault; empty for none.
        where: 0 for the first layer, 1 for one in the middle, 2 for the last.
        seed: of the network and of the order of the batches.
        budget: part of the wall time that measuring may take; ``None``: no limit, so that gradients are always read.
    """
    model = seeded(training.make, seed)
    optimizer = training.optimizer(model, training.rate)
    params = list(model.parameters())
    layers = layers_of(names_of(model, params))
    matrices = [i for i, p in enumerate(params) if p.ndim > 1]
    target = layers[matrices[(0, len(matrices) // 2, -1)[where]]]
    own = [p for p, layer in zip(params, layers, strict=True) if layer == target and p.ndim > 1]
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = gfs.GFSConfig(tier="running", max_overhead=budget, history=f"{folder}/history.jsonl")
        monitor = gfs.StabilityMonitor(model, optimizer, config)
        batches = epochs(training.data(), training.size, torch.Generator().manual_seed(seed))
        for step, batch in enumerate(batches):
            if fault and step >= START and not FAULTS[fault][0]:
                with torch.no_grad():
                    FAULTS[fault][1](own, step == START)
            optimizer.zero_grad()
            loss = entropy(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if fault and step >= START and FAULTS[fault][0]:
                FAULTS[fault][1](own, step == START)
            monitor.step(lambda b: entropy(model, b), batch, step, loss=loss.detach())
            optimizer.step()
            losses.append(loss.item())
            usual = median(losses[max(0, step - 50) : step] or [math.inf])
            harmed = step >= START and not losses[-1] <= LEVEL * usual
            if harmed or step == START + LONGEST:
                break
        monitor.close()
        calm, alarm = (gfs.Alert(step, level, "", RULE) for level in (gfs.AlertLevel.QUIET, gfs.AlertLevel.ALARM))
        monitor.recorder.look(step, [calm, alarm], alarm.level)  # whatever the early warning has said
        records = map(gfs.read_alarm, Path(folder).glob("alarms/*"))
        return next(r for r in records if r.alert.rule == RULE), target, len(set(layers))


def faulty(name: str, fault: str, where: int, seed: int, budget: float | None = None) -> Row:
    """Which layer is named first."""
    record, target, layers = record_of(TRAININGS[name], fault, where, seed, budget)
    found = departures(record)
    named = [d.layer for d in found if d.layer]
    norms = {d.layer: d for d in found if d.key == "grad_norm" and d.layer}
    largest = max(norms, key=lambda layer: float(norms[layer].curve.values[-1]) / norms[layer].usual, default="")
    first = next((d.step for d in found), None)
    return {
        "layers": layers,
        "alarm": record.step - START,
        "found": len(found),
        "first": bool(named) and named[0] == target,
        "early": any(d.step < START for d in found),
        "within_three": target in named[:3],
        "largest_gradient": largest == target,
        "after": None if first is None else first - START,
        "gradients": sum(m.grad_norm is not None for m in record.measurements),
    }


def healthy(name: str, seed: int) -> Row:
    """How many signals are said to have left their past where nothing happened."""
    record, _, _ = record_of(TRAININGS[name], "", 0, seed)
    return {"found": [f"{d.key} {d.layer} {d.step - record.step}" for d in departures(record)]}


HEAD = f"""# What came first before an alarm

    OMP_NUM_THREADS=1 python -m benchmarks.first

A fault is planted in one layer (the first, a middle or the last one) of a healthy training at step {START}. An alarm is
raised when the loss is {LEVEL:g} times the median of its last 50, {LONGEST} steps later at the latest. The record of
that moment is read as `gfs report` reads it. Seeds {", ".join(map(str, SEEDS))}; free signals are read at every step.

- *Named first*: the first row of the table that names a layer names the layer at fault; *in the first three* likewise.
- *Too early*: some row is of a step before the fault. *Nothing named*: no signal had left its past.
- *By the gradient*: the layer at fault is the one whose gradient has grown most at the alarm, among those that have
  left their past; it needs no order in time.
- *After*: steps from the fault to the first row, median and largest.

The limits of the report (`gfs_report/first.py`) were chosen on the first two trainings, with other seeds.
"""


TABLES = {"By training": 0, "By fault, in the other trainings": 1, "By place, in the other trainings": 2}
COLUMNS = ("runs", "named first", "in the first three", "too early", "nothing named", "by the gradient", "after")


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows: dict[str, Row] = results["faulty"]
    lines = [HEAD]
    for title, places in (
        ("By training", 0),
        ("By fault, in the other trainings", 1),
        ("By place, in the other trainings", 2),
    ):
        groups: dict[str, list[Row]] = {}
        for key, row in rows.items():
            parts = key.split(" | ")
            if places == 0 or not TRAININGS[parts[0]].chosen:
                groups.setdefault(parts[places], []).append(row)
        cells = [[_shown(name, places), *_shares(group)] for name, group in groups.items()]
        others = [r for key, r in rows.items() if not TRAININGS[key.split(" | ")[0]].chosen]
        cells.append(["**all others**" if places == 0 else "**all**", *_shares(others)])
        head = [
            "",
            "runs",
            "named first",
            "in the first three",
            "too early",
            "nothing named",
            "by the gradient",
            "after",
        ]
        lines += [f"\n## {title}\n", *table(head, cells)]
    limited = list(results["limited"].values())
    read = [r["gradients"] for r in limited]
    lines += [
        "\n## Under the default budget\n",
        "The other trainings, seed 0. Their steps take milliseconds, of which free signals may have a hundredth: the "
        f"record holds {min(read)} to {max(read)} gradients (median {median(read):g}), where it holds {STEPS} above.\n",
        *table(["", *COLUMNS], [["**all**", *_shares(limited)]]),
    ]
    quiet = results["healthy"]
    lines += [
        "\n## Where nothing happened\n",
        "The same trainings without a fault, read at the same time. Signals that are said to have left their past:\n",
        *table(["training", "records", "with any", "signals in all"], _quiet(quiet)),
    ]
    return "\n".join(lines) + "\n"


def _shown(name: str, places: int) -> str:
    if places == 2:
        return ("first layer", "middle", "last")[int(name)]
    return name + (" (chosen on)" if places == 0 and TRAININGS[name].chosen else "")


def _shares(group: list[Row]) -> list[str]:
    def share(name: str) -> str:
        return percent(sum(bool(r[name]) for r in group) / len(group))

    after = [r["after"] for r in group if r["after"] is not None and not r["early"]]
    none = percent(sum(not r["found"] for r in group) / len(group))
    spread = f"{median(after):g} ({max(after)})" if after else ""
    return [
        str(len(group)), share("first"), share("within_three"), share("early"), none, share("largest_gradient"), spread,
    ]  # fmt: skip


def _quiet(rows: dict[str, Row]) -> list[list[str]]:
    cells = []
    for name in TRAININGS:
        found = [r["found"] for key, r in rows.items() if key.startswith(name)]
        cells.append([name, str(len(found)), str(sum(map(bool, found))), str(sum(map(len, found)))])
    return cells


def main() -> None:
    """All trainings with all faults, those that are not there yet, and the page."""
    torch.set_num_threads(1)
    store = Store("first")
    for name, seed in itertools.product(TRAININGS, (*SEEDS, 2, 3)):
        store.add("healthy", (name, seed), partial(healthy, name, seed))
    for name, fault, where, seed in itertools.product(TRAININGS, FAULTS, (0, 1, 2), SEEDS):
        store.add("faulty", (name, fault, where, seed), partial(faulty, name, fault, where, seed))
    others = [name for name, training in TRAININGS.items() if not training.chosen]
    for name, fault, where in itertools.product(others, FAULTS, (0, 1, 2)):
        store.add("limited", (name, fault, where), partial(faulty, name, fault, where, 0, 0.05))
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
