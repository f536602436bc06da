"""What measuring costs against the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.growth.workload import EXAMPLES, WIDTHS, Run, batch_of
from benchmarks.lib.meters import timed
from benchmarks.lib.store import Row
from benchmarks.lib.tables import table

PROCESSES = f"""## Against the number of processes

gloo, 1.0e+06 parameters, {EXAMPLES} examples for each process, SGD. Wall time, as a multiple of the training step
before it (with DDP's exchange), medians. *local* is sharpness with `sync="local"`. Words and bytes are counted at
`torch.distributed.all_reduce`; what FSDP exchanges by itself is not in it. Four processes share two cores.
"""


def worker(kind: str, repeats: int) -> None:
    """One of several processes; rank 0 prints."""
    distributed.init_process_group("gloo")
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        run = Run(WIDTHS[1e6], wrap=fully_shard)
    else:
        run = Run(WIDTHS[1e6], wrap=nn.parallel.DistributedDataParallel)
    torch.manual_seed(distributed.get_rank())
    sent = {"words": 0, "bytes": 0}
    reduce = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        word = tensor.dtype is torch.float64 and tensor.numel() < 64
        sent["words" if word else "bytes"] += 1 if word else tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    monitors = {
        "running": run.monitor("running"), "sharpness": run.monitor("sharpness"),
        "local": run.monitor("sharpness", sync="local"),
    }  # fmt: skip
    if kind == "FSDP2":
        del monitors["local"]
    found: dict[str, list[Any]] = {tier: [] for tier in monitors}
    steps = []
    for repeat in range(repeats + 2):
        batch = batch_of(EXAMPLES)
        distributed.barrier()
        steps.append(timed(lambda b=batch: run.step(b), time.perf_counter)[0])
        for tier, monitor in monitors.items():
            sent.update(words=0, bytes=0)
            seconds, m = timed(lambda m=monitor, b=batch: m.step(run.loss, b), time.perf_counter)
            if repeat > 1:
                found[tier].append((seconds / steps[-1], m.grad_evals, m.hvps, sent["words"], sent["bytes"]))
    if distributed.get_rank() == 0:
        names = ("multiple", "gradients", "products", "words", "bytes")
        middle = {t: dict(zip(names, map(median, zip(*rows, strict=True)), strict=True)) for t, rows in found.items()}
        size = distributed.get_world_size()
        whole = 4 * sum(p.numel() for p in run.params)
        print(json.dumps({"engine": kind, "processes": size, "step": median(steps), "weights": whole, "of": middle}))
    distributed.barrier()
    distributed.destroy_process_group()


def run(quick: bool) -> Iterator[Row]:
    """One row for each engine and number of processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for kind, size in (("DDP", 1), ("DDP", 2), ("DDP", 4), ("FSDP2", 2)):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        own = ["-m", "benchmarks.growth", "--worker", kind, "3" if quick else "9"]
        done = subprocess.run([sys.executable, *torchrun, *own], env=environment, stdout=subprocess.PIPE, check=True)
        yield json.loads(done.stdout.decode().splitlines()[-1])


def render(rows: list[Row]) -> list[str]:
    cells = [
        [
            r["engine"], r["processes"], f"{1e3 * r['step']:.0f}", t, f"{m['multiple']:.1f}",
            f"{m['gradients']:.0f} + {m['products']:.0f}", f"{m['words']:.0f}",
            f"{m['bytes'] / r['weights'] / m['products']:.2f}",
        ]
        for r in rows
        for t, m in r["of"].items()
    ]  # fmt: skip
    head = ["engine", "processes", "step, ms", "measurement", "training steps", "gradients + products", "words"]
    return [PROCESSES, *table([*head, "copies of the weights reduced, each product"], cells), ""]
