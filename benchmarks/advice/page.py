"""The page on what helps at an alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.advice.remedies import LEFT_OUT, REMEDIES, REST
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table
from gfs_core.detectors.advice import ADVICE, BACK, advice

HEAD = f"""# What helps at an alarm

    OMP_NUM_THREADS=1 python -m benchmarks.advice

torch {{torch}}. The trainings in danger of `benchmarks/zoo`, and some with one spoilt batch, on seeds of their own. A
*case* is the first alarm of a rule in a run, if the run, left alone, breaks at most 200 steps after it, or broke at
most 3 steps before it (a *break* is that of [danger.md](danger.md)). From the step of the alarm on each remedy is taken
in a copy of the run, for up to {REST} steps:

- *nothing*: the run goes on.
- *rate / 3*, *rate / 10*: a lower learning rate for good.
- *rate of before*: the rate is never again above what it was {BACK} steps before the alarm.
- *clip*: the gradient's norm is at most the median of the last 100.
- *leave out*: {LEFT_OUT} steps are not taken.
- *go back*: weights and optimizer are those of {BACK} steps before the alarm, and the rate is never again above that of
  then, or a part of it. Training goes on with the batches that come next.

A remedy has *helped* where no break begins after the alarm, and the median of the last 20 losses is at most the best of
before (of medians of ten) and a tenth of the progress. No remedy here looks at the data: where it stays bad, none can
help. All are taken at once, as `alarm="rescue"` would. Whoever comes later can still go back.
"""
CHOSEN = """
## The advice

For each rule a remedy that helped most often on the design trainings, or in one case fewer, and how often it helped on
the others. Of those that helped as often it is going back, which can be done later too, and with the highest rate.
There was no case of a rule that is not here. *Nothing did*: the cases that came back by themselves.
"""
NAMES = {
    "design": "Trainings on which the advice was chosen (`benchmarks/zoo/design.py`)",
    "trial": "Other trainings (`benchmarks/zoo/trial.py`)",
    "exam": "More of them (`benchmarks/zoo/exam_danger.py`)",
}


def render(results: dict[str, Any]) -> str:
    """The page."""
    held = {name: list(_cases(results[name])) for name in NAMES if name in results}
    lines = [HEAD.format(**results["environment"])]
    lines += [CHOSEN.strip("\n"), "", *_advice(held)]
    for name, rows in held.items():
        lines += ["", f"## {NAMES[name]}", "", "By rule, and whether the rate was above that of 50 steps before:", ""]
        lines += _shares(rows, lambda r: f"{r['rule']}, rate {'rose' if r['rate rose'] else 'steady'}")
        lines += ["", "By kind:", "", *_shares(rows, lambda r: r["kind"])]
    return "\n".join(lines) + "\n"


def _cases(runs: dict[str, Row]) -> Iterable[Row]:
    for key, run in runs.items():
        for case in run["cases"]:
            yield {"kind": key.rsplit(" | ", 1)[0], **case}


def _advice(held: dict[str, list[Row]]) -> list[str]:
    remedies = {rule: found.remedy for rule, found in ADVICE.items()}
    chosen_on, *others = held.values()
    sets = [chosen_on, [case for cases in others for case in cases]]
    rows = []
    for rule in remedies:
        own = [[case for case in cases if case["rule"] == rule] for cases in sets]
        rows.append([rule, remedies[rule], *_counts(own, remedies), advice(rule, 1000)])
    rows.append(["**all**", "", *_counts(sets, remedies), ""])
    head = ["rule", "remedy", "helped where it was chosen", "nothing did", "helped on others", "nothing did"]
    return table([*head, "said at step 1000"], rows)


def _shares(rows: list[Row], of: Callable[[Row], str]) -> list[str]:
    groups = sorted({of(row) for row in rows})
    own = {group: [row for row in rows if of(row) == group] for group in groups} | {"**all**": rows}
    cells = [[g, len(cases), *(sum(r in c["helped"] for c in cases) for r in REMEDIES)] for g, cases in own.items()]
    return table(["", "cases", *REMEDIES], cells)


def _counts(held: list[list[Row]], remedies: dict[str, str]) -> Iterable[str]:
    """Of each set, in how many cases the remedy of the rule helped, and in how many it was good to do nothing."""
    for cases in held:
        yield f"{sum(remedies[case['rule']] in case['helped'] for case in cases)} of {len(cases)}"
        yield str(sum("nothing" in case["helped"] for case in cases))
