"""What ``control="guard"`` does to healthy trainings, and to trainings in danger, beside a rescue and nothing.

The trainings are those that no rule was chosen on. What they do without a guard is in health.json and rescue.json, of
the same seeds. Writes guard.json and its page. Runs that are there are not made again.
Run (ten minutes): OMP_NUM_THREADS=1 python -m benchmarks.zoo.guarded
"""

from __future__ import annotations

import warnings
from statistics import fmean
from typing import Any

import torch

from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import percent, table
from benchmarks.zoo import exam_danger, exam_healthy
from benchmarks.zoo.breaks import ends_well
from benchmarks.zoo.live import SEEDS, compact, watched
from benchmarks.zoo.record import FIRST

PAGE = """# The guard of the learning rate

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.guarded

The trainings of [health.md](health.md) and [danger.md](danger.md), with `control="guard"` and every other default. Its
numbers were chosen on those of `benchmarks/zoo/design.py` and `trial.py`, one seed of each. One choice was made on the
trainings of this page, so that it is no fair judge of it: whether the step of a false alarm is skipped (below).

## Healthy trainings

Acted: steps skipped, times that the rate was lowered, rollbacks. The loss at the end (the median of the last 50) is
over that of the same run with nothing but an early warning.
"""
DANGER = """
## Trainings in danger

Share of runs that end well, as in [rescue.md](rescue.md): the median of the last 50 losses is at most a fifth of the
progress above the best that the run had when it was left alone. Where the data stays bad nothing here can help.
`alarm="rescue"` is the same mechanism, in other runs: what a monitor measures within its budget depends on the clock.
Over three seeds it ends well in 76 % ([rescue.md](rescue.md)); so did, in 77 %, an earlier one that halved the rate at
a rollback for 100 steps and never lowered it otherwise. So of these two neither is better here.

A guard that does not skip the step of an alarm of which the loss shows nothing ended well in 73 % of these runs, one of
each kind, and left 8 of 9 healthy ones untouched, as false alarms cost it no step. So the guard skips it: a choice that
these trainings decided, by three kinds of 22, and that other trainings have to confirm.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    plain, others = Store("health").results["live"], Store("rescue").results["danger"]
    cells, same = [], []
    for name, row in results["healthy"].items():
        share = row["end"] / plain[f"{name} | warn"]["end"]
        same.append(share == 1.0)
        cells.append([name, row["steps"], row["skipped"], row["lowered"], row["rollbacks"], f"{share:.3f}"])
    head = ["training", "steps", "skipped", "lowered", "rollbacks", "loss at the end"]
    untouched = f"**{sum(same)} of {len(same)} end at the very same loss.**"
    by_kind: dict[str, list[list[bool]]] = {}
    for key, row in results["danger"].items():
        kind, seed = key.split(" | ")
        alone, rescued = (others[f"{kind} | {way} | {seed}"] for way in ("nothing", "alarm=rescue"))
        well = [ends_well(r, alone) for r in (alone, rescued, row)]
        by_kind.setdefault(kind, []).append(well)
    shares = {kind: [fmean(column) for column in zip(*rows, strict=True)] for kind, rows in by_kind.items()}
    in_danger = [[kind, len(by_kind[kind]), *map(percent, columns)] for kind, columns in shares.items()]
    means = [percent(fmean(column)) for column in zip(*shares.values(), strict=True)]
    in_danger.append(["**mean**", sum(map(len, by_kind.values())), *means])
    ways = ["kind", "runs", "nothing", 'alarm="rescue"', "guard"]
    return "\n".join([PAGE, *table(head, cells), "", untouched, DANGER, *table(ways, in_danger)]) + "\n"


def main() -> None:
    """Run what is not there yet."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = Store("guard")

    def run(make: Any, seed: int) -> Row:
        return compact(watched(make(seed), "log", "guard"))

    first = FIRST["exam, danger"]
    for seed in range(first, first + SEEDS):
        for name, make in exam_danger.DANGER.items():
            store.add("danger", (name, seed), lambda m=make, s=seed: run(m, s))  # type: ignore[misc]
        for name, make in exam_healthy.HEALTHY.items():
            store.add("healthy", (name,), lambda m=make: run(m, FIRST["exam, healthy"]))  # type: ignore[misc]
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
