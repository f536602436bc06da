"""The page of healthy trainings: false alarms of the early warning, and what a rescue did there."""

from __future__ import annotations

from typing import Any

from benchmarks.lib.store import Row
from benchmarks.lib.tables import table

HEALTH = """# Healthy trainings

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.record && python -m benchmarks.zoo

Trainings that end well, on which no rule and no threshold was chosen: those are in `benchmarks/zoo/design.py` and
`trial.py`, these in `exam_healthy.py`, with other models, data, optimizers and batch sizes. An alarm is a stretch at
that level, from the rise until the run is back. The early warning as it comes reads the loss, the rate and the free
signals of every layer at each step, and the running stability ratio at every tenth.
"""
LIVE = """
The same trainings again under the monitor itself, with every default (`python -m benchmarks.zoo.live healthy`). Steps
take milliseconds here, so that its budget lets it read free signals at every tenth to thirtieth step, and some 25 to 50
ratios. And with `alarm="rescue"`: steps that it skipped, rollbacks, and the loss at the end over that without.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows = results["healthy"]
    cells = [
        [r["training"], r["steps"], len(r["alarms"]), ", ".join(f"{s}–{e} {rule}" for s, e, rule in r["alarms"]) or "–"]
        for r in rows
    ]
    rate = 1e4 * sum(len(r["alarms"]) for r in rows) / sum(r["steps"] for r in rows)
    total = f"**{rate:.1f} false alarms in 10,000 steps.**"
    head = ["training", "steps", "alarms", "steps and rule"]
    return "\n".join([HEALTH, *table(head, cells), "", total, "", *live(results.get("live", {}))])


def live(rows: dict[str, Row]) -> list[str]:
    """What the monitor itself said of healthy trainings, and what a rescue did to them."""
    cells, alarms, steps = [], 0, 0
    for name in dict.fromkeys(key.split(" | ")[0] for key in rows):
        plain, rescued = rows[f"{name} | warn"], rows[f"{name} | rescue"]
        stretches = ", ".join(f"{start}–{end} {rule}" for start, end, rule in plain["alarms"]) or "–"
        alarms, steps = alarms + len(plain["alarms"]), steps + plain["steps"]
        end = f"{rescued['end'] / plain['end']:.2f}"
        cells.append([name, plain["ratios"], stretches, rescued["skipped"], rescued["rollbacks"], end])
    if not cells:
        return []
    head = ["training", "ratios", "alarms, with every default", "steps skipped", "rollbacks", "loss at the end"]
    return [LIVE, *table(head, cells), "", f"**{1e4 * alarms / steps:.1f} false alarms in 10,000 steps.**", ""]
