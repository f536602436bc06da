"""The page of all parts."""

from __future__ import annotations

from typing import Any

from benchmarks.tiers import accuracy, budget, cost

PARTS: dict[str, Any] = {"accuracy": accuracy, "cost": cost, "budget": budget}
HEAD = """# Tiers: accuracy, cost, budget

    OMP_NUM_THREADS=1 python -m benchmarks.tiers
"""


def render(results: dict[str, Any]) -> str:
    """The page of the parts that there are."""
    found = [part.render(results[name]) for name, part in PARTS.items() if results.get(name)]
    remark = [results["remark"], ""] if "remark" in results else []
    return "\n".join([HEAD, *remark, *"\n\n".join("\n".join(lines) for lines in found).splitlines()]) + "\n"
