"""Largest eigenvalues: accuracy against dense Hessians, and what a warm measurement costs beside other libraries.

Needs benchmarks/requirements.txt. Writes eigenvalues.json and eigenvalues.md.
Run: OMP_NUM_THREADS=1 python -m benchmarks.eigenvalues
"""

from __future__ import annotations

import argparse

import scipy

from benchmarks.eigenvalues import accuracy, warm
from benchmarks.eigenvalues.page import render
from benchmarks.lib.store import Store


def main() -> None:
    """Both parts, and the page."""
    argparse.ArgumentParser(
        "benchmarks.eigenvalues", description=__doc__.splitlines()[0] if __doc__ else ""
    ).parse_args()
    store = Store("eigenvalues", fresh=True, scipy=scipy.__version__)
    store.collect("accuracy", accuracy.run())
    store.collect("warm", warm.run())
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
