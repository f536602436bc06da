"""What measuring costs as models, probes and numbers of processes grow, and a model of that cost.

Writes growth.json and growth.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.growth [--quick] [PART …]
The parts are parameters, probe and processes; a step without a measurement and the import are in `benchmarks.idle`.
`--model` prints the table of docs/cost.md, nothing else.
Times are seconds of the processor, not of the clock, so that other work on the machine disturbs them less; but for
several processes, which wait for each other.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable

import gfs_core as gfs
from benchmarks.growth import cost, processes
from benchmarks.growth.model import predicted
from benchmarks.growth.page import render
from benchmarks.lib.store import Row, Store

PARTS: dict[str, Callable[[bool], Iterable[Row]]] = {
    "processes": processes.run, "probe": cost.by_probe, "parameters": cost.by_parameters,
}  # fmt: skip


def main() -> None:
    """The parts that are named, or all, and the page after each."""
    parser = argparse.ArgumentParser("benchmarks.growth", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: does it run?")
    parser.add_argument("--model", action="store_true", help="print the table of docs/cost.md, and nothing else")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "REPEATS"), help="be one of several processes")
    given = parser.parse_args()
    if given.worker:
        return processes.worker(given.worker[0], int(given.worker[1]))
    if given.model:
        return print(predicted())
    warnings.simplefilter("ignore", gfs.GFSWarning)
    store = Store("growth")
    for part in given.parts:
        store.collect(part, PARTS[part](given.quick))
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
