"""Several processes that train one model with gloo, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import gfs_core as gfs
import gfs_core.run.ranks
from gfs_core.linalg.vectors import local
from gfs_core.run.record import KEYS
from tests.core import engines
from tests.core.options import tuned
from tests.forks import START

BATCH = 32
PATIENCE = 300.0  # seconds until processes that hang are ended; with all else on two cores, a test takes two minutes


def run(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """What ``work(rank, size, *args)`` returns on each of ``size`` processes."""
    context = torch.multiprocessing.start_processes(
        _enter, (size, str(folder), work, args), size, join=False, start_method=START
    )
    ends = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > ends:
                raise TimeoutError(f"the processes did not end within {PATIENCE:g} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _enter(rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(work(rank, size, *args), f"{folder}/{rank}.pt")
    with contextlib.suppress(RuntimeError):
        distributed.barrier()
    # A rank that leaves while another still talks can abort it, or (torch 2.6) let it wait in the barrier for ever.
    Path(folder, f"{rank}.left").touch()
    ends = time.monotonic() + PATIENCE
    while not all(Path(folder, f"{r}.left").exists() for r in range(size)) and time.monotonic() < ends:
        time.sleep(0.01)
    os._exit(0)  # torch's threads, not ours, can abort the interpreter's own way out (seen once: SIGABRT)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def examples(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.3, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02),
    "lion-like": lambda params: torch.optim.Adafactor(params, 0.02),  # its threshold is not known
}
ZERO = {"zero-sgd": torch.optim.SGD, "zero-adamw": torch.optim.AdamW}  # each process keeps the state of some weights
FAULTS: dict[str, Callable[[], None]] = {}


def fault(make: Callable[[], None]) -> Callable[[], None]:
    FAULTS[make.__name__] = make
    return make


@fault
def raises() -> None:
    raise ValueError("the user's own")


@fault
def out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory left")


@fault
def sleeps() -> None:
    time.sleep(8)


def train(
    rank: int,
    size: int,
    kind: str,
    options: dict[str, Any],
    steps: int = 12,
    wrong: tuple[str, int, int] | None = None,
    timeout: float = 60.0,
    wrapped: bool = False,
    shard: bool = False,
    half: bool = False,
    normed: bool = False,
    poor: int | None = None,
    made: str = "",
    short: tuple[int, int, int] | None = None,
    second: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Train on every ``size``-th example of each batch; ``options`` may hold what is ``tuned``.

    ``wrong``: fault, rank and step of a measurement that fails.

    ``wrapped``: the loss goes through DistributedDataParallel; ``shard``: FSDP2, ``half``: in bfloat16; ``normed``:
    with BatchNorm, whose buffers are exchanged; ``poor``: a rank whose own clock allows nothing more after the first
    measurement; ``made``: a model of ``engines``; ``short``: rank and step at which there are so many examples;
    ``second``: makes a rank's loader of a second data set.
    """
    gfs_core.run.ranks.TIMEOUT = timeout
    model = engines.MADE[made]() if made else net()
    if normed:
        model.insert(1, nn.BatchNorm1d(12).double())
    trained: nn.Module = model
    if shard:
        # Four: two shards, two copies of each. The second layer is of the root, which stays gathered after a forward.
        shape, names = ((2, 2), ("copies", "shards")) if size == 4 else ((size,), ("shards",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        fully_shard(model[0], mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    elif size > 1:
        trained = DistributedDataParallel(model)
    if kind in ZERO:
        optimizer: Any = ZeroRedundancyOptimizer(trained.parameters(), ZERO[kind], lr=0.02)
    else:
        optimizer = OPTIMIZERS[kind](trained.parameters())
    events: list[gfs.Alert] = []
    options = dict(options)
    how = options.pop("tuned", {})
    config = gfs.GFSConfig(**options)
    measured = trained if wrapped else model
    probe = None if second is None else second(rank, size)
    monitor = tuned(gfs.StabilityMonitor(measured, optimizer, config, probe=probe, on_alarm=events.append), **how)
    found: list[gfs.Measurement] = []
    losses, rates = [], []
    sizes: dict[int, int] = {}
    if poor == rank:
        monitor.schedule.budget.spent["gfs"] = 1e9
    for step in range(steps):
        x, y = examples(step)
        own = x[rank::size], y[rank::size]
        if short is not None and short[:2] == (rank, step):
            own = own[0][: short[2]], own[1][: short[2]]

        def loss_of(batch: Any, step: int = step) -> Tensor:
            if wrong is not None and (rank, step) == wrong[1:]:
                FAULTS[wrong[0]]()
            if rank == 0:
                sizes.setdefault(step, len(batch[0]))
            return nn.functional.cross_entropy(measured(batch[0]).double(), batch[1])

        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(trained(own[0]).double(), own[1])
        loss.backward()
        measurement = monitor.step(loss_of, own, step, loss=loss)
        if measurement is not None:
            found.append(measurement)
        optimizer.step()
        rates.append(monitor.control.last)
        losses.append(float(loss.detach()))
    monitor.close()
    return {
        "found": [{"step": m.step, "reasons": m.reasons, **dict.fromkeys(KEYS), **m.values()} for m in found],
        "weights": [local(p).clone() for p in model.parameters()],
        "events": [(e.step, int(e.level), e.rule) for e in events],
        "scales": rates,
        "losses": losses,
        "sizes": sizes,
        "lost": monitor.ranks is not None and monitor.ranks.lost,
    }


def part(rank: int, size: int) -> float:
    """Talk, and part, many times."""
    total = 0.0
    for _ in range(300):
        ranks = gfs_core.run.ranks.Ranks()
        total += ranks.total([1.0])[0]
        ranks.close()
    return total


def only_the_first(rank: int, size: int) -> str:
    """What a monitor says that the other processes do not make."""
    gfs_core.run.ranks.TIMEOUT = 2.0
    model = net()
    try:
        if rank == 0:
            gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1))
    except gfs.MeasurementError as error:
        return str(error)
    return ""
