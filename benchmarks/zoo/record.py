"""Records the zoo: a file for each training and seed, made once.

Run: OMP_NUM_THREADS=1 python -m benchmarks.zoo.record [SET ...] [--only WORD] [--seeds N] [--jobs N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.lib.streams import RUNS
from benchmarks.zoo import design, exam_danger, exam_healthy, trial
from benchmarks.zoo.training import Stream, recorded

SETS = {
    "design, healthy": design.HEALTHY, "design, danger": design.DANGER,
    "trial, healthy": trial.HEALTHY, "trial, danger": trial.DANGER,
    "exam, healthy": exam_healthy.HEALTHY, "exam, danger": exam_danger.DANGER,
}  # fmt: skip
# Of each training, how many seeds and the first of them; no two sets share one.
SEEDS = {
    "design, healthy": 3, "design, danger": 6, "trial, healthy": 2, "trial, danger": 3,
    "exam, healthy": 1, "exam, danger": 10,
}  # fmt: skip
FIRST = {
    "design, healthy": 100, "design, danger": 100, "trial, healthy": 0, "trial, danger": 0,
    "exam, healthy": 200, "exam, danger": 200,
}  # fmt: skip


def path_of(kind: str, name: str, seed: int) -> Path:
    """Where a stream is kept."""
    return RUNS / "zoo" / kind / f"{name}, {seed}.npz".replace("/", "-")


def saved(stream: Stream, path: Path) -> None:
    """Write a stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"whole {k}": v for k, v in stream.whole.items()} | {f"layer {k}": v for k, v in stream.by_layer.items()}
    np.savez_compressed(
        path, layers=np.array(stream.layers), loss=stream.loss, rate=stream.rate, ratio=stream.ratio,
        fault=-1 if stream.fault is None else stream.fault, **{k: v.astype(np.float32) for k, v in arrays.items()},
    )  # fmt: skip


def loaded(path: Path) -> Stream:
    """Read a stream."""
    with np.load(path) as held:
        whole, layer = (
            {k.split(" ", 1)[1]: held[k].astype(float) for k in held.files if k.startswith(start)}
            for start in ("whole ", "layer ")
        )
        fault = int(held["fault"])
        ratio = held["ratio"] if "ratio" in held else np.full(len(held["loss"]), np.nan)  # earlier files have none
        return Stream(
            held["layers"].tolist(), held["loss"], held["rate"], ratio, whole, layer, None if fault < 0 else fault
        )  # fmt: skip


def streams(kind: str) -> Iterator[tuple[str, int, Stream]]:
    """The name, the seed and the stream of all that is recorded of a set."""
    for name in SETS[kind]:
        for seed in range(FIRST[kind], FIRST[kind] + SEEDS[kind]):
            if (path := path_of(kind, name, seed)).exists():
                yield name, seed, loaded(path)


def record(kind: str, name: str, seed: int) -> str:
    """Record one training; returns a line about it."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    stream = recorded(SETS[kind][name](seed))
    saved(stream, path_of(kind, name, seed))
    loss = stream.loss
    return (
        f"{time.perf_counter() - began:5.1f} s  {kind}: {name}, {seed}: {len(loss)} steps, "
        f"loss {loss[0]:.3g} → least {np.nanmin(loss):.3g}, last {loss[-1]:.3g}"
    )


def main() -> None:
    """Record what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET")
    parser.add_argument("--only", default="", help="trainings whose names hold this word")
    parser.add_argument("--seeds", type=int, help="of each training, at most")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    wanted = [
        (kind, name, seed)
        for kind in given.sets
        for name in SETS[kind]
        for seed in range(FIRST[kind], FIRST[kind] + min(given.seeds or 99, SEEDS[kind]))
        if given.only in name and not path_of(kind, name, seed).exists()
    ]
    with ProcessPoolExecutor(given.jobs) as pool:
        for line in pool.map(record, *zip(*wanted, strict=True)) if wanted else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
