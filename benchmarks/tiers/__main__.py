"""What each tier tells of the exact stability ratio, what it costs, and whether the budget holds.

Writes tiers.json and tiers.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.tiers [accuracy] [cost] [budget]
"""

from __future__ import annotations

import argparse

from benchmarks.lib.store import Store
from benchmarks.tiers.page import PARTS, render


def main() -> None:
    """Make the parts that are named, and write the page after each."""
    parser = argparse.ArgumentParser("benchmarks.tiers", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "parts", nargs="*", default=["accuracy", "budget", "cost"], metavar="PART", help=", ".join(PARTS)
    )
    store = Store("tiers")
    for part in parser.parse_args().parts:
        store.collect(part, PARTS[part].run())
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
