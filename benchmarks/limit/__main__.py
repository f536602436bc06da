"""Control by a limit of the stability ratio: whether there is an edge at 1, the start, the price, and what works.

Writes limit.json (after every run; runs already there are not made again) and limit.md.
Run: OMP_NUM_THREADS=1 python -m benchmarks.limit [edge] [start] [price] [ablation]
With `render` it only writes the report again.
"""

from __future__ import annotations

import argparse
import warnings

import gfs_core as gfs
from benchmarks.lib.store import Store
from benchmarks.limit.page import PARTS, render


def main() -> None:
    """Make the runs that are missing, and write the report after each part."""
    parser = argparse.ArgumentParser("benchmarks.limit", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join([*PARTS, "render"]))
    chosen = parser.parse_args().parts
    warnings.simplefilter("ignore", gfs.GFSWarning)
    store = Store("limit")
    for part in chosen:
        if part != "render":
            PARTS[part].run(store)
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
