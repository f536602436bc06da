"""Writes the pages again from the stored results, and measures nothing.

Run: python -m benchmarks.render [NAME …]
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.lib.store import Store

# What makes each page. Those without a line here are written by a benchmark that keeps no results.
PAGES = {
    "accelerator": "benchmarks.accelerator",
    "advice": "benchmarks.advice.page",
    "control": "benchmarks.control.page",
    "danger": "benchmarks.zoo.danger",
    "defaults": "benchmarks.defaults",
    "edge": "benchmarks.edge",
    "eigenvalues": "benchmarks.eigenvalues.page",
    "first": "benchmarks.first",
    "flow_cost": "benchmarks.flow_cost",
    "free": "benchmarks.free",
    "guard": "benchmarks.zoo.guarded",
    "growth": "benchmarks.growth.page",
    "health": "benchmarks.zoo.health",
    "idle": "benchmarks.idle",
    "limit": "benchmarks.limit.page",
    "long_run": "benchmarks.long_run",
    "memory": "benchmarks.memory",
    "midpoint": "benchmarks.midpoint",
    "mutation": "benchmarks.mutation",
    "noise": "benchmarks.noise",
    "own_edge": "benchmarks.own_edge.page",
    "peers": "benchmarks.peers.page",
    "peers_cuda": "benchmarks.peers.page",
    "plateau": "benchmarks.plateau",
    "price": "benchmarks.price",
    "rate": "benchmarks.rate",
    "rescue": "benchmarks.rescue",
    "running": "benchmarks.running",
    "start": "benchmarks.start",
    "tiers": "benchmarks.tiers.page",
    "verdicts": "benchmarks.verdicts",
}


def page(name: str) -> str:
    """The page that the stored results make."""
    text: str = importlib.import_module(PAGES[name]).render(Store(name).results)
    return text


def main() -> None:
    """Write the pages that are named, or all."""
    parser = argparse.ArgumentParser("benchmarks.render", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", default=list(PAGES), metavar="NAME", help=", ".join(PAGES))
    for name in parser.parse_args().names:
        Store(name).write_page(page(name))


if __name__ == "__main__":
    main()
