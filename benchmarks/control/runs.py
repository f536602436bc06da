"""The runs of the comparison: which there are, and in which order they are made."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from benchmarks.control import finders
from benchmarks.control.methods import FINDER, GUARD, LIMITS, METHODS, REFERENCE, SEARCH, available
from benchmarks.control.price import priced
from benchmarks.control.training import trained, untrained
from benchmarks.control.workloads import LANGUAGE, WORKLOADS
from benchmarks.lib.store import FOLDER, Row, Store

SEEDS = 3  # of the small workloads; the language models have one
SHIFTS = {-2: "×0.1", 0: "×1", 2: "×10", 3: "×30"}  # half decades from the tuned rate
FIRST = (0, 2)  # of the language models, in the first pass
GRID, LANGUAGE_GRID, WIDEST = 4, 2, 6  # half decades to either side of the usual rate that are tried for the best


def rate_at(name: str, half_decades: int) -> float:
    """The usual rate of a workload, so many half decades higher."""
    return float(WORKLOADS[name].rate * 10 ** (half_decades / 2))


@functools.cache
def code_of(source: str) -> str:
    """What the results of a method depend on: the tree of the package, or a version."""
    if source != "gfs_core":
        return version(source)
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD:gfs_core"], cwd=FOLDER, capture_output=True, text=True)
    return found.stdout.strip()


def tuned(store: Store, name: str, seed: int) -> int:
    """Where the best rate of warm-up and cosine lies, in half decades from the usual one."""
    reach = LANGUAGE_GRID if name in LANGUAGE else GRID
    low, high = -reach, reach
    losses: dict[int, float] = {}
    while True:
        for at in range(low, high + 1):
            row = reference(store, name, at, seed)
            losses[at] = math.inf if row["loss"] is None else row["loss"]
        best = min(losses, key=lambda at: losses[at])
        if best == low > -WIDEST:
            low -= 1
        elif best == high < WIDEST:
            high += 1
        else:
            return best


def reference(store: Store, name: str, at: int, seed: int) -> Row:
    """The training with warm-up and cosine at a rate of the grid."""
    workload = WORKLOADS[name]
    make = functools.partial(trained, workload, METHODS[REFERENCE], rate_at(name, at), seed, workload.steps)
    return store.add("reference", (name, at, seed), make)


def run(store: Store, name: str, key: str, shift: int, best: int, seed: int) -> None:
    """One method at one multiple of the tuned rate."""
    workload, method, rate = WORKLOADS[name], METHODS[key], rate_at(name, best + shift)
    steps = workload.steps
    if key == REFERENCE:
        reference(store, name, best + shift, seed)
        return
    if method.priced:
        usual = rate_at(name, tuned(store, name, 0))
        steps = store.add("price", (name, key), lambda: priced(workload, key, usual) | _code(key))["steps"]
    make: Callable[[], Row] = {
        FINDER: functools.partial(finders.lightning_finder, workload, rate, seed),
        SEARCH: functools.partial(finders.searched, workload, rate, seed),
    }.get(key, functools.partial(trained, workload, method, rate, seed, steps))
    where = "any" if method.free else SHIFTS[shift]
    store.add("runs", (name, key, where, seed), lambda: make() | _code(key))
    if key == GUARD and shift <= 0:  # for as many steps as the reference, so that the weights may be the same
        whole = functools.partial(trained, workload, method, rate, seed, workload.steps)
        store.add("healthy", (name, where, seed), lambda: whole() | _code(key))


def _code(key: str) -> Row:
    return {"code": code_of(METHODS[key].source)}


def passes(share: int, of: int) -> Iterator[list[tuple[str, int, int]]]:
    """Workload, seed and multiple, a pass at a time; the first one is a whole comparison."""
    names = [name for i, name in enumerate(WORKLOADS) if i % of == share]
    for seed in range(SEEDS):
        places = []
        for name, shift in itertools.product(names, SHIFTS):
            if name not in LANGUAGE:
                places.append((name, seed, shift))
            elif seed < 2 and (shift in FIRST) == (seed == 0):
                places.append((name, 0, shift))
        yield places


def run_all(store: Store, names: list[str], share: int, of: int) -> None:
    """Make the runs of these methods that are missing, of this share of the workloads; the limits last in each pass."""
    for places in passes(share, of):
        for group in ([n for n in names if n not in LIMITS], [n for n in names if n in LIMITS]):
            for (name, seed, shift), key in itertools.product(places, filter(available, group)):
                run(store, name, key, shift, tuned(store, name, seed), seed)
                before = functools.partial(untrained, WORKLOADS[name], METHODS[REFERENCE], seed)
                store.add("untrained", (name, seed), before)


def row_of(results: dict[str, Any], name: str, key: str, shift: int, seed: int) -> Row | None:
    """The stored run of a method at a multiple of the tuned rate; ``None``: there is none."""
    best = stored_best(results, name, seed)
    if best is None:
        return None
    if key == REFERENCE:
        found: Row | None = results["reference"].get(f"{name} | {best + shift} | {seed}")
        return found
    where = "any" if METHODS[key].free else SHIFTS[shift]
    row: Row | None = results.get("runs", {}).get(f"{name} | {key} | {where} | {seed}")
    return row


def stored_best(results: dict[str, Any], name: str, seed: int) -> int | None:
    """As :func:`tuned`, of what is stored; ``None``: not all rates of the grid were tried."""
    losses = {}
    for stored, row in results.get("reference", {}).items():
        own, at, of = stored.split(" | ")
        if own == name and int(of) == seed:
            losses[int(at)] = math.inf if row["loss"] is None else row["loss"]
    reach = LANGUAGE_GRID if name in LANGUAGE else GRID
    if not losses.keys() >= set(range(-reach, reach + 1)):
        return None
    return min(losses, key=lambda at: losses[at])
