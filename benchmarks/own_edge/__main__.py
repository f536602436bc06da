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
from benchmarks.lib.store import Row, Store
from benchmarks.own_edge import ramps
from benchmarks.own_edge.combinations import CONSTANT, Combination, combinations
from benchmarks.own_edge.fits import compared
from benchmarks.own_edge.page import render
from benchmarks.own_edge.picture import draw
from benchmarks.own_edge.rows import BEGINS, CLOSELY, FAST, FASTEST, NAME, SEEDS, SLOW, SLOWER


def run(store: Store, combination: Combination) -> None:
    """All runs of a combination."""
    closely = combination.key in CLOSELY

    def ramp(growth: float, seed: int, begins: float = BEGINS[0]) -> Row:
        solve = growth == SLOW or (closely and seed == 0 and begins == BEGINS[0])
        key = (*combination.key, growth, begins, seed)
        return store.add("ramps", key, partial(ramps.ramp, combination, growth, begins, seed, solve))

    slow = [ramp(SLOW, seed) for seed in SEEDS]
    for seed in SEEDS:
        ramp(FAST, seed)
    for seed in SEEDS if closely else SEEDS[:1]:
        ramp(FASTEST, seed)
    if combination.problem == CONSTANT:
        return
    if closely:
        ramp(SLOWER, 0)
        for begins in BEGINS[1:]:
            ramp(FAST, 0, begins)
    if slow[0]["onset"] is not None:
        store.add("held", combination.key, partial(ramps.held, combination, slow[0]["onset"], 0))
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
    for part, chosen in (("fits: others", False), ("fits: chosen on", True)):
        store.put(part, compared(store.results, chosen))
    store.write_page(render(store.results))
    draw(store.results)


if __name__ == "__main__":
    main()
