"""Compares the early warning with rules that others use, on trainings that no rule was chosen on.

Writes zoo.json, and the pages health.md and danger.md. Run, after benchmarks.zoo.record (two minutes):
OMP_NUM_THREADS=1 python -m benchmarks.zoo
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.lib.store import FOLDER, Row, Store
from benchmarks.lib.tables import table
from benchmarks.zoo.breaks import breaks, told_of
from benchmarks.zoo.record import streams
from benchmarks.zoo.rivals import RIVALS, alarms_of, tuned
from benchmarks.zoo.rules import early_warning

ALLOWED = 2e-4  # false alarms per healthy step, to which the rules of others are tuned
OURS = "early warning, as it comes"
HEALTH = """# Healthy trainings

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.record && python -m benchmarks.zoo

Trainings that end well, on which no rule and no threshold was chosen: those are in `benchmarks/zoo/design.py` and
`trial.py`, these in `exam_healthy.py`, with other models, data, optimizers and batch sizes. An alarm is a stretch at
that level, from the rise until the run is back. The early warning as it comes reads the loss, the rate and the free
signals of every layer at each step, and the running stability ratio at every tenth.
"""
DANGER = """# Trainings in danger

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.record && python -m benchmarks.zoo

A training *breaks* where the median of the next ten losses is above the best so far by a fifth of the progress (or by a
tenth of the first loss), or is not finite; with full batches also where a loss is five times the median of the last
hundred. *Warned*: breaks before which an alarm stood, up to 200 steps ahead but after the fault, if there is one;
*lead*: the median of the steps that were left. *Told*: breaks of which an alarm told at the latest three steps after.
The rules of others have the lowest threshold with at most 2 false alarms in 10,000 steps of the trainings of
[health.md](health.md); the early warning is as it comes, with {false:.1f} there. A cell: warned · told · lead.
"""


def measured() -> dict[str, Any]:
    """What each rule says of each training."""
    healthy = list(streams("exam, healthy"))
    steps = sum(len(stream.loss) for _, _, stream in healthy)
    rows: list[Row] = []
    for name, seed, stream in healthy:
        found = [[a.start, a.end, a.rule] for a in early_warning(stream)]
        rows.append({"training": name, "seed": seed, "steps": len(stream.loss), "alarms": found})
        print(rows[-1], flush=True)
    limits = {
        name: tuned([score(stream) for _, _, stream in healthy], ALLOWED * steps) for name, score in RIVALS.items()
    }
    danger: list[Row] = []
    for name, seed, stream in streams("exam, danger"):
        broken = breaks(stream, full_batch=name.startswith("Adam"))
        told = {OURS: told_of(stream, broken, early_warning(stream))}
        for rule, score in RIVALS.items():
            told[rule] = told_of(stream, broken, alarms_of(score(stream), limits[rule]))
        danger.append({"kind": name, "seed": seed, "breaks": len(broken), "told": told})
        print(danger[-1], flush=True)
    return {"healthy": rows, "limits": limits, "danger": danger}


def false_alarms(results: dict[str, Any]) -> float:
    """Of the early warning, in 10,000 healthy steps."""
    rows = results["healthy"]
    return 1e4 * sum(len(r["alarms"]) for r in rows) / sum(r["steps"] for r in rows)


def health(results: dict[str, Any]) -> str:
    """The page of healthy trainings."""
    cells = [
        [r["training"], r["steps"], len(r["alarms"]), ", ".join(f"{s}–{e} {rule}" for s, e, rule in r["alarms"]) or "–"]
        for r in results["healthy"]
    ]
    total = f"**{false_alarms(results):.1f} false alarms in 10,000 steps.**"
    return "\n".join([HEALTH, *table(["training", "steps", "alarms", "steps and rule"], cells), "", total, ""])


def danger(results: dict[str, Any]) -> str:
    """The page of trainings in danger."""
    rows = results["danger"]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    rules = [OURS, *RIVALS]
    cells = []
    for kind in kinds:
        own = [r for r in rows if r["kind"] == kind]
        broken = sum(r["breaks"] for r in own)
        cells.append([kind, f"{broken} in {len(own)}", *(_cell([t for r in own for t in r["told"][n]]) for n in rules)])
    mean = []
    for name in rules:
        shares = [
            sum(t is not None and t > 0 for t in found) / len(found)
            for kind in kinds
            if (found := [t for r in rows if r["kind"] == kind for t in r["told"][name]])
        ]
        mean.append(f"{sum(shares) / len(shares):.2f}")
    cells.append(["**mean share warned**", "", *mean])
    head = ["kind", "breaks in runs", *rules]
    return "\n".join([DANGER.format(false=false_alarms(results)), *table(head, cells), ""])


def _cell(told: list[int | None]) -> str:
    if not told:
        return "–"
    before = [t for t in told if t is not None and t > 0]
    heard = sum(t is not None for t in told)
    lead = f"{median(before):.0f}" if before else "–"
    return f"{len(before) / len(told):.2f} · {heard / len(told):.2f} · {lead}"


def main() -> None:
    """Compare, and write both pages."""
    store = Store("zoo", fresh=True)
    for part, value in measured().items():
        store.put(part, value)
    (FOLDER / "health.md").write_text(health(store.results))
    (FOLDER / "danger.md").write_text(danger(store.results))


if __name__ == "__main__":
    main()
