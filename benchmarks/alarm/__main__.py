"""Does the alarm speak before the loss does? Faults in the middle of a training, and rules that watch it.

Writes alarm.json, alarm.md and alarm.svg. Run: OMP_NUM_THREADS=1 python -m benchmarks.alarm
The recorded trainings are kept in $GFS_ALARM_RUNS (by default a folder of the temporary directory) and not made twice.
They take an hour on one core, the comparison some minutes. With `draw` it only writes the page and the picture again.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings

import torch

from benchmarks.alarm.compare import compare
from benchmarks.alarm.page import draw, render
from benchmarks.lib.rules import Lightning
from benchmarks.lib.streams import FOLDER, cases


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["draw"]:
        results = json.loads((FOLDER / "alarm.json").read_text())
        (FOLDER / "alarm.md").write_text(render(results))
        draw(results)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cases()
    quick, slow = Lightning("", "", [], "rtol"), Lightning("", "", [], "rtol", quick=False)
    for case in found[:3]:
        assert quick.alarms(case.stream, 0.5) == slow.alarms(case.stream, 0.5)
    results = {"versions": {"torch": torch.__version__, "python": platform.python_version()}, **compare(found)}
    (FOLDER / "alarm.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (FOLDER / "alarm.md").write_text(render(results))
    draw(results)


if __name__ == "__main__":
    main()
