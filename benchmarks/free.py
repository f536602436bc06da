"""What the free signals cost, in steps of the training that they watch.

A training is watched by nothing but the free signals. Every call of theirs, hooks included, is timed inside of the run,
on an accelerator with the seconds that it works for them. Their share of the wall time is one part of the result, how
often they could be read within that the other. Adds the workloads of this machine's device to free.json, and writes
free.md.
Run (CPU: two minutes; GPU: two): OMP_NUM_THREADS=1 python -m benchmarks.free [WORKLOAD …]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.lib.meters import timed
from benchmarks.lib.store import FOLDER, Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient as take
from benchmarks.price import WORKLOADS, Workload
from gfs_core.run.free import FreeSignals
from gfs_core.run.notices import Notices
from gfs_core.signals.gradients import GradientSample, UpdateSample

SECONDS = 12.0  # of each training
LEAST = 60  # steps of each training, however long they take


class Timed(FreeSignals):
    """Free signals that add up the time of their calls."""

    def __init__(self, work: Workload, limited: bool) -> None:
        super().__init__(work.model, work.optimizer, limited, None, Notices(strict=True, ranks=None))
        self.close()
        self.seconds = 0.0
        self.there: dict[type, list[float]] = {GradientSample: [], UpdateSample: []}  # seconds of an accelerator
        self.read = {"grad_norm": 0, "update_ratio": 0}
        optimizer = self.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(lambda *a: self.during(self._before, *a)),
            optimizer.register_step_post_hook(lambda *a: self.during(self._after, *a)),
        ]

    def during(self, call: Callable[..., Any], *given: Any) -> Any:
        """Call and take the time."""
        began = time.perf_counter()
        out = call(*given)
        self.seconds += time.perf_counter() - began
        return out

    def step_begins(self, step: int) -> None:
        """What a monitor calls in a step."""
        self.during(self.before_step, step)
        coming = list(self._coming)
        for reading in self.during(self.arrived):
            if not reading.layer and reading.key.name in self.read:
                self.read[reading.key.name] += 1
        for sample in coming:
            if sample not in self._coming:
                self.there[type(sample)].append(sample.transfer.seconds)


def watched(work: Workload, limited: bool) -> Row:
    """A training of some seconds with the free signals."""
    free = Timed(work, limited)

    def train(step: int) -> None:
        take(work.optimizer, work.loss(next(work.batches)))
        free.step_begins(step)
        work.optimizer.step()

    for step in range(10):
        train(step)
    free.seconds, free.read, free.there = 0.0, dict.fromkeys(free.read, 0), {k: [] for k in free.there}
    began, steps = time.perf_counter(), 0
    while steps < LEAST or time.perf_counter() - began < SECONDS:
        train(10 + steps)
        steps += 1
    whole = timed(lambda: None)[0] + time.perf_counter() - began
    there = sum(map(sum, free.there.values()))
    free.close()
    return {
        "steps": steps,
        "share": free.seconds / whole,
        "device": there / whole,
        "gradients": free.read["grad_norm"] / steps,
        "updates": free.read["update_ratio"] / steps,
    }


def run(name: str, work: Workload) -> Row:
    """The shares of one workload, within the limit and without it."""

    def step() -> None:
        take(work.optimizer, work.loss(next(work.batches)))
        work.optimizer.step()

    for _ in range(5):
        step()
    seconds = median(timed(step)[0] for _ in range(20))
    weights = sum(p.numel() for p in work.model.parameters())
    tensors = sum(1 for _ in work.model.parameters())
    return {"workload": name, "weights": weights, "tensors": tensors, "step": seconds} | {
        "limited": watched(work, True),
        "every": watched(work, False),
    }


HEAD = f"""# What the free signals cost

    OMP_NUM_THREADS=1 python -m benchmarks.free

Norms of the gradient and the weights before a step, and those of the update and of the normalised gradient after it,
read during {SECONDS:g} seconds of a training (at least {LEAST} steps). *Share* is the wall time of all calls, hooks
included, over that of the training; on a GPU the seconds that it works for them stand beside, over the same. *Read* is
the share of steps whose gradient was read, and whose update was. Within the limit, each of the two may take half of
1 %; the calls of a step that is not read come on top, some microseconds. The last columns are without a limit
(`max_overhead=None`): the price of reading both at every step.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    head = ["training", "weights", "tensors", "step, ms", "share", "device", "gradient read", "update read"]
    lines = [HEAD]
    for device, environment in results.get("devices", {}).items():
        rows = [
            [r["workload"], f"{r['weights']:,}", r["tensors"], f"{1e3 * r['step']:.2f}"]
            + [f"{r['limited'][name]:.2%}" for name in ("share", "device")]
            + [f"{r['limited'][name]:.0%}" for name in ("gradients", "updates")]
            + [f"{r['every'][name]:.1%}" for name in ("share", "device")]
            for r in results[device]
        ]
        columns = [*head, "share, every step", "device, every step"]
        lines += [f"## {environment['device']}, torch {environment['torch']}", "", *table(columns, rows), ""]
    if "cuda" not in results.get("devices", {}):
        lines += ["On a GPU this was not run yet.", ""]
    return "\n".join(lines)


def main() -> None:
    """The workloads that are named, or all of this machine's device, and the page."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser("benchmarks.free", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", default=list(WORKLOADS[device]), metavar="WORKLOAD")
    named = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    store = Store("free", FOLDER)
    rows = []
    for name in parser.parse_args().names:
        rows.append(run(name, WORKLOADS[device][name]()))
        print(rows[-1], flush=True)
        store.put(device, rows)
    devices = store.results.get("devices", {}) | {device: {"device": named, "torch": torch.__version__}}
    store.put("devices", devices)
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
