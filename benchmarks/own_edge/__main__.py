"""A run's own edge: level and onset in ramps of the rate. Writes own_edge.json, own_edge.md and own_edge.svg.

Runs that are there already are not made again. Run (about forty minutes on one core):
OMP_NUM_THREADS=1 python -m benchmarks.own_edge [NAME …]
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial

import torch

import gfs_core as gfs
from benchmarks.lib.store import Store
from benchmarks.own_edge import ramps
from benchmarks.own_edge.combinations import CONSTANT, Combination, combinations
from benchmarks.own_edge.fits import compared
from benchmarks.own_edge.page import render
from benchmarks.own_edge.picture import draw
from benchmarks.own_edge.rows import BEGINS, FAST, NAME, SEEDS, SLOW, SLOWER, SLOWEST, SPEEDS


def run(store: Store, combination: Combination) -> None:
    """All runs of a combination."""
    onsets = []
    for seed in SEEDS:
        for growth in SPEEDS:
            row = store.add(
                "ramps", (*combination.key, growth, BEGINS[0], seed),
                partial(ramps.ramp, combination, growth, BEGINS[0], seed, growth == SLOW or seed == 0),
            )  # fmt: skip
            if growth == SLOW:
                onsets.append(row["onset"])
    for begins in BEGINS[1:]:
        store.add(
            "ramps", (*combination.key, FAST, begins, 0), partial(ramps.ramp, combination, FAST, begins, 0, False)
        )
    if combination.problem == CONSTANT:
        return
    if combination.key in SLOWEST:
        store.add(
            "ramps", (*combination.key, SLOWER, BEGINS[0], 0),
            partial(ramps.ramp, combination, SLOWER, BEGINS[0], 0, True),
        )  # fmt: skip
    if onsets[0] is not None:
        store.add("held", combination.key, partial(ramps.held, combination, onsets[0], 0))
    for seed in SEEDS:
        losses = store.add("reference", (*combination.key, seed), partial(ramps.reference, combination, seed))
        if seed == 0:
            store.add("warm-up", combination.key, partial(ramps.warmup, combination, ramps.best_of(losses), seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only combinations whose name holds one of these")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", gfs.GFSWarning)  # Adam's missing second moments at step 0
    store = Store(NAME)
    for combination in combinations():
        if not names or any(name in " | ".join(combination.key) for name in names):
            began = time.process_time()
            run(store, combination)
            if (spent := time.process_time() - began) > 1:
                name, seconds = " | ".join(combination.key), store.results.get("seconds", {})
                store.put("seconds", seconds | {name: seconds.get(name, 0) + round(spent)})
    store.put("fits", compared(store.results))
    store.write_page(render(store.results))
    draw(store.results)


if __name__ == "__main__":
    main()
