"""Compares the early warning with rules that others use, on trainings that no rule was chosen on.

Writes health.json and danger.json, and their pages. Run, after benchmarks.zoo.record (five minutes):
OMP_NUM_THREADS=1 python -m benchmarks.zoo
"""

from __future__ import annotations

import math

from benchmarks.lib.store import Row, Store
from benchmarks.zoo import danger, health
from benchmarks.zoo.breaks import breaks, told_of
from benchmarks.zoo.danger import ALLOWED, OURS
from benchmarks.zoo.record import streams
from benchmarks.zoo.rivals import AS_IT_COMES, RIVALS, alarms_of, tuned
from benchmarks.zoo.rules import Alarm, early_warning


def measured() -> tuple[list[Row], dict[str, dict[str, float]], dict[str, float], list[Row]]:
    """The alarms in health; the false alarms of each rule, and its threshold; what each says in danger."""
    healthy = list(streams("exam, healthy"))
    steps = sum(len(stream.loss) for _, _, stream in healthy)
    rows: list[Row] = []
    found = [early_warning(stream) for _, _, stream in healthy]
    for (name, seed, stream), own in zip(healthy, found, strict=True):
        rows.append({"training": name, "seed": seed, "steps": len(stream.loss), "alarms": [list(a) for a in own]})
        print(rows[-1], flush=True)
    limits: dict[str, float] = {}
    false = {OURS: _false(found, steps)}
    for rule, score in RIVALS.items():
        scores = [score(stream) for _, _, stream in healthy]
        limits[rule] = AS_IT_COMES[rule] if rule in AS_IT_COMES else tuned(scores, ALLOWED * steps)
        false[rule] = _false([alarms_of(s, limits[rule]) for s in scores], steps)
    found_in_danger: list[Row] = []
    for name, seed, stream in streams("exam, danger"):
        broken = breaks(stream, full_batch=name.startswith("Adam"))
        told = {OURS: told_of(stream, broken, early_warning(stream))}
        for rule, score in RIVALS.items():
            values = score(stream)
            speaks = bool((values > -math.inf).any())
            told[rule] = told_of(stream, broken, alarms_of(values, limits[rule])) if speaks else []
        found_in_danger.append({"kind": name, "seed": seed, "breaks": len(broken), "told": told})
        print(found_in_danger[-1], flush=True)
    return rows, false, limits, found_in_danger


def _false(alarms: list[list[Alarm]], steps: int) -> dict[str, float]:
    """Alarms in 10,000 of so many healthy steps, and the share of these that is under alarm."""
    every = [alarm for own in alarms for alarm in own]
    return {"alarms": 1e4 * len(every) / steps, "under": sum(a.end - a.start for a in every) / steps}


def main() -> None:
    """Compare, and write both pages."""
    healthy, false, limits, in_danger = measured()
    store = Store("health")
    store.put("healthy", healthy)
    store.write_page(health.render(store.results))
    store = Store("danger", fresh=True)
    for part, value in {"false": false, "limits": limits, "danger": in_danger}.items():
        store.put(part, value)
    store.write_page(danger.render(store.results))


if __name__ == "__main__":
    main()
