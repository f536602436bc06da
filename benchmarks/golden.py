"""What the package computes, bit for bit: short deterministic trainings, recorded before a change and compared after.

Every value that is measured is kept exactly, with its reasons, the warnings, and the weights at the end. Only wall time
is left out. The trainings use the public names of the packages alone, so that the same file runs the code before and
after. Bits depend on the machine and on the version of torch: record and compare on the same one.

The code that runs is the one that PYTHONPATH finds first.
Run: OMP_NUM_THREADS=1 python -m benchmarks.golden record FILE [WORD ...]   those whose names hold a WORD; none: all
     OMP_NUM_THREADS=1 python -m benchmarks.golden compare FILE [WORD ...]  exits with 1 where something differs
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import gfs_core as gfs
from benchmarks import golden_trainings as made
from benchmarks.golden_trainings import Scenario, adamw, lightning, mlp, plain, trainer
from gfs_core.signals import curvature

WALL_TIME = ("seconds", "overhead")
TIERS = ("directional", "running", "batch_sharpness", "sharpness", "gfs", "gfs_full")
ADAPTERS = {"plain": plain, "Lightning": lightning, "Trainer": trainer}

Row = dict[str, Any]  # "step": an integer or a word; numbers, which JSON holds to the bit; lists of sentences
Recorded = dict[str, list[Row]]  # the rows of each scenario


# --- the table --------------------------------------------------------------------------------------------------------


def scenarios() -> dict[str, Scenario]:
    """All trainings, by name."""
    table: dict[str, Scenario] = {}
    for adapter, train in ADAPTERS.items():
        for tier in TIERS[:-1]:
            table[f"{adapter}, {tier}"] = Scenario({"tier": tier}, train)
        table[f"{adapter}, gfs_full"] = Scenario({"tier": "gfs_full"}, train, model=made.Regression, steps=5)
        table[f"{adapter}, AdamW"] = Scenario({"tier": "gfs"}, train, optimizer=adamw)
        table[f"{adapter}, accumulated"] = Scenario({"tier": "gfs"}, train, accumulate=2)
        table[f"{adapter}, accumulated, AdamW"] = Scenario({"tier": "batch_sharpness"}, train, mlp, adamw, accumulate=2)
        table[f"{adapter}, bfloat16"] = Scenario({"tier": "gfs"}, train, autocast=True)
        table[f"{adapter}, resumed"] = Scenario({"tier": "gfs"}, train, resume=6)
        table[f"{adapter}, cap"] = Scenario(
            {"tier": "running", "every": 1, "control": "cap"}, train, factor=made.steep, steps=40
        )
        table[f"{adapter}, attention"] = Scenario({"tier": "gfs"}, train, model=made.attention)
    table["Trainer, GPT-2"] = Scenario({"tier": "gfs"}, trainer, model=made.gpt2, optimizer=adamw)
    table["Trainer, GPT-2, added"] = Scenario({"tier": "sharpness"}, made.added, made.gpt2, adamw, accumulate=2)
    table["Trainer, added"] = Scenario({"tier": "gfs"}, made.added, accumulate=2)
    for control in ("follow", "warmup", "guard"):
        options = {"tier": "running", "every": 1, "control": control}
        table[f"plain, {control}"] = Scenario(options, plain, factor=made.jump, steps=80)
        table[f"plain, {control}, AdamW"] = Scenario(options, plain, mlp, adamw, made.jump, steps=80)
    table["plain, cdat"] = Scenario({"tier": "directional", "every": 1, "control": "cdat"}, plain, steps=30)
    table["plain, scheduler"] = Scenario({"tier": "running", "every": 1}, plain, steps=40, scheduler="cap")
    options = {"tier": "running", "every": 1, "control": "follow"}
    table["plain, follow, resumed"] = Scenario(options, plain, steps=40, resume=21)
    for adapter, train in ADAPTERS.items():  # the rate jumps after 50 steps; the training is destroyed
        table[f"{adapter}, alarm"] = Scenario({"tier": "running", "every": 1}, train, factor=made.jump, steps=80)
    table["plain, destroyed"] = Scenario({"tier": "sharpness", "every": 2}, plain, factor=made.explosion, steps=64)
    options = {"tier": "running", "every": 1, "alarm": "stop"}
    table["Lightning, alarm stops"] = Scenario(options, lightning, mlp, adamw, made.jump, steps=80)
    table["plain, alarm off"] = Scenario({"tier": "sharpness", "alarm": "off"}, plain)
    table["plain, unfrozen"] = Scenario({"tier": "gfs"}, plain, unfreeze=6)
    table["plain, fixed probe"] = Scenario({"tier": "gfs", "probe": "fixed"}, plain)
    table["plain, fixed probe, resumed"] = Scenario({"tier": "sharpness", "probe": "fixed"}, plain, resume=6)
    table["plain, probe_size"] = Scenario({"tier": "gfs", "probe_size": 24}, plain)
    table["plain, probe_size, accumulated"] = Scenario({"tier": "gfs", "probe_size": 40}, plain, accumulate=2)
    for hvp in ("exact", "gradients"):
        table[f"plain, hvp {hvp}"] = Scenario({"tier": "gfs", "hvp": hvp}, plain)
    for precision in ("training", "float32"):
        table[f"plain, bfloat16, {precision}"] = Scenario({"tier": "gfs", "precision": precision}, plain, autocast=True)
    table["plain, max_memory"] = Scenario({"tier": "gfs", "max_memory": 1.0}, plain)
    table["plain, max_memory, little"] = Scenario({"tier": "gfs", "max_memory": 6e-5}, plain)
    table["plain, strict, seed"] = Scenario({"tier": "gfs", "strict": True, "seed": 7}, plain)
    table["plain, attention, resumed"] = Scenario({"tier": "sharpness"}, plain, made.attention, adamw, resume=6)
    table["plain, recurrent"] = Scenario({"tier": "gfs"}, plain, made.recurrent)
    table["plain, BatchNorm"] = Scenario({"tier": "gfs", "every": 5}, plain, made.normalised, steps=26)
    table["plain, decay"] = Scenario({"tier": "gfs"}, plain, mlp, made.momentum_and_decay)
    table["plain, midpoint"] = Scenario({"tier": "midpoint", "every": 3}, plain, mlp, adamw, resume=5)
    table["plain, gfs_full, no end"] = Scenario({"tier": "gfs_full"}, plain, steps=1)
    for tier in ("directional", "running", "sharpness", "gfs"):
        table[f"plain, Adamax, {tier}"] = Scenario({"tier": tier}, plain, mlp, made.adamax)
    return table


def functions() -> list[Row]:
    """What the public functions return, for a net of digits, one with attention, and one that is fitted to the end."""
    rows: list[Row] = []
    for model in (mlp(), made.attention(), made.Regression()):
        x, y = (torch.stack([example[key] for example in made.examples(text=False)[:96]]) for key in ("x", "labels"))
        batches = [{"x": a, "labels": b} for a, b in zip(torch.split(x, 32), torch.split(y, 32), strict=True)]
        top = gfs.sharpness(model, _loss, batches, k=3)
        rows.append({"step": "sharpness", "values": top.values, "hvps": top.hvps, "reasons": [str(top.reason)]})
        top = gfs.sharpness(model, _loss, batches, solver="power", hvp="gradients", precision="float32", seed=2)
        rows.append({"step": "power", "values": top.values, "hvps": top.hvps, "reasons": [str(top.reason)]})
        horizon = math.inf if isinstance(model, made.Regression) else 4.0
        flow = gfs.gfs_sharpness(model, _loss, batches[0], horizon=horizon, learning_rate=0.05)
        row: Row = {"step": f"gfs_sharpness, {horizon}", "gfs_sharpness": flow.sharpness, "loss_probe": flow.loss}
        row |= {"time": flow.time, "grad_evals": flow.grad_evals, "hvps": flow.hvps, "reasons": [str(flow.reason)]}
        rows.append(row)
        for optimizer in (made.momentum(model), adamw(model)):
            for tier in ("batch_sharpness", "sharpness", "gfs"):
                rows.append(_row(gfs.stability(model, _loss, batches[0], optimizer, tier=tier)))
    return rows


def _loss(model: nn.Module, batch: made.Batch) -> Tensor:
    loss: Tensor = model(**batch)["loss"]
    return loss


# --- recording --------------------------------------------------------------------------------------------------------


def trained(scenario: Scenario) -> list[Row]:
    """The measurements and the losses of a training in its history, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        model = scenario.adapter(scenario, Path(folder))
        history = Path(scenario.config(Path(folder))["history"])
        rows = [_row(measurement) for measurement in gfs.read_history(history)]
        losses = [loss.value for part in gfs.history_parts(history) for loss in part.losses]
    squares = math.fsum(float(p.detach().double().square().sum()) for p in model.parameters())
    return [*rows, {"step": "end", "losses": losses, "squared_weights": squares}]


def names() -> list[str]:
    """Everything that can be recorded."""
    return ["public functions", *scenarios()]


def recorded(name: str) -> list[Row]:
    """The rows of a scenario, and the warnings of this package; nothing that ran before matters."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    began = time.perf_counter()
    # Which way takes less time is decided by the clock, so it is not left open.
    by_whole = mock.patch.object(curvature, "whole_is_cheaper", return_value=True)
    with by_whole, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = functions() if name == "public functions" else trained(scenarios()[name])
    told = [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]
    print(f"{time.perf_counter() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
    return [*rows, {"step": "warnings", "reasons": list(dict.fromkeys(told))}]


def _row(measurement: gfs.Measurement) -> Row:
    values = {name: v for name, v in measurement.values().items() if name not in WALL_TIME}
    return {"step": measurement.step, **values} | ({"reasons": [*measurement.reasons]} if measurement.reasons else {})


def written(found: Recorded) -> str:
    """As JSON: the rows of a scenario by columns, one a line."""
    parts = []
    for name, rows in found.items():
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = (f"{json.dumps(key)}: {json.dumps([row.get(key) for row in rows])}" for key in keys)
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(columns) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(path: Path) -> Recorded:
    """What was recorded in a file."""
    held = json.loads(path.read_text())
    return {
        name: [
            {key: value for key, value in zip(columns, row, strict=True) if value is not None}
            for row in zip(*columns.values(), strict=True)
        ]
        for name, columns in held.items()
    }


# --- comparing --------------------------------------------------------------------------------------------------------

Difference = tuple[
    str, str, Any, Any, float
]  # step, key, old, new, relative difference: infinite where it is no number


def differences(old: list[Row], new: list[Row], tolerance: float = 0.0) -> list[Difference]:
    """All differences of one scenario: those of numbers in the order of the rows, then those of sentences."""
    found: list[Difference] = []
    before, after = _by_step(old), _by_step(new)
    for place in [*before, *(p for p in after if p not in before)]:
        a, b = before.get(place, {}), after.get(place, {})
        for key in [*a, *(k for k in b if k not in a)]:
            far = _far(a.get(key), b.get(key))
            if far > tolerance:
                found.append((str(place[0]), key, a.get(key), b.get(key), far))
    return sorted(found, key=lambda d: d[1] == "reasons")


def _by_step(rows: list[Row]) -> dict[tuple[int | str, int], Row]:
    """Each row by its step, and by how many rows of that step are before it."""
    places: dict[tuple[int | str, int], Row] = {}
    for row in rows:
        count = next(n for n in itertools.count() if (row["step"], n) not in places)
        places[row["step"], count] = row
    return places


def _far(a: Any, b: Any) -> float:
    """The relative difference of two values; 0 where they are the same, infinite where they cannot be compared."""
    if a == b or (a != a and b != b):  # NaN is the same as NaN
        return 0.0
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(_far, a, b), default=0.0)
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (a, b)):
        return math.inf
    return float(abs(a - b) / max(abs(a), abs(b)))


def compare(old: Recorded, new: Recorded, tolerance: float) -> bool:
    """Print, for each scenario, whether it is equal or how it differs first; say whether all are equal."""
    same = True
    for name in new:
        found = (
            differences(old[name], new[name], tolerance) if name in old else [("", "", "not recorded", "", math.inf)]
        )
        if not found:
            print(f"equal    {name}")
            continue
        same = False
        step, key, a, b, far = found[0]
        print(f"DIFFERS  {name}: step {step}, {key}: {a} → {b}, relative {far:.1e}; {len(found)} in all")
    return same


def quiet() -> None:
    """One thread, and nothing printed by the frameworks."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()


def main() -> int:
    """Record or compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that counts as equal")
    given = parser.parse_args()
    quiet()
    print(f"the code in {Path(gfs.__file__).parent}", file=sys.stderr)
    chosen = [name for name in names() if not given.words or any(word in name for word in given.words)]
    found = {name: recorded(name) for name in chosen}
    if given.what == "compare":
        return 0 if compare(read(given.file), found, given.tolerance) else 1
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.write_text(written(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
