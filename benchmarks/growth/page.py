"""The page of all parts."""

from __future__ import annotations

from typing import Any

from benchmarks.growth import cost, processes
from benchmarks.growth.workload import LENGTH

HEAD = f"""# Growth

    OMP_NUM_THREADS=1 python -m benchmarks.growth

A transformer of four blocks whose width grows, float32, sequences of {LENGTH} tokens, one thread. Nothing ran on an
accelerator. Times are processor times, but for several processes. Other work shared the machine. AdamW at
1e8 parameters was not run, for the time it takes.
"""


def render(results: dict[str, Any]) -> str:
    """The page of the parts that there are."""
    out = [HEAD]
    if "remark" in results:
        out += [results["remark"], ""]
    for part, first in (("parameters", "parameters"), ("probe", "examples")):
        if results.get(part):
            out += cost.render(results[part], part, first)
    if results.get("processes"):
        out += processes.render(results["processes"])
    return "\n".join(out).rstrip() + "\n"
