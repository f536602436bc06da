"""Control of the learning rate: whether it makes up for a wrong base rate, its cost, and what it is that works.

Writes control.json (after every run; runs already there are not made again), control.md and control.svg.
Run: OMP_NUM_THREADS=1 python -m benchmarks.control [rates] [edge] [start] [price] [ablation]
With `render` it only writes the report again.
"""

from __future__ import annotations

import argparse
import warnings

import gfs_core as gfs
from benchmarks.control import rates
from benchmarks.control.page import PARTS, render
from benchmarks.lib.store import Store


def main() -> None:
    """Make the runs that are missing, and write the report after each part."""
    parser = argparse.ArgumentParser("benchmarks.control", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join([*PARTS, "render"]))
    chosen = parser.parse_args().parts
    warnings.simplefilter("ignore", gfs.GFSWarning)
    store = Store("control")
    for part in chosen:
        if part != "render":
            PARTS[part].run(store)
        store.write_page(render(store.results))
        if store.results.get("rates"):
            rates.draw(store.results)


if __name__ == "__main__":
    main()
