"""Control of the learning rate, beside what an engineer would do otherwise, at base rates off by ×0.1 to ×30.

Writes control.json (after every run; runs already there are not made again), control.md and control.svg. Several
processes may share the workloads.
Run (two hours on one core): OMP_NUM_THREADS=1 python -m benchmarks.control [--share 0/2] [--methods NAME …]
With `render` it only writes the report again.
"""

from __future__ import annotations

import argparse
import warnings

import torch

from benchmarks.control.methods import METHODS
from benchmarks.control.page import draw, render
from benchmarks.control.runs import run_all
from benchmarks.lib.store import SharedStore


def main() -> None:
    """Make the runs that are missing, and write the report."""
    parser = argparse.ArgumentParser("benchmarks.control", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="?", choices=["run", "render"], default="run")
    parser.add_argument("--share", default="0/1", help="which part of the workloads: 0/2 and 1/2 are the two halves")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = SharedStore("control")
    if given.what == "run":
        share, of = map(int, given.share.split("/"))
        run_all(store, given.methods, share, of)
    store.write_page(render(store.results))
    draw(store.results)


if __name__ == "__main__":
    main()
