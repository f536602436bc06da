"""What each signal costs, in steps of the training that it watches, on this machine.

Each signal is measured by a monitor of its own, by turns with steps of the training, so that both are timed in the same
run. Adds the workloads of this machine's device to price.json, and writes price.md from all of them.
Run (CPU: five minutes; GPU: four): OMP_NUM_THREADS=1 python -m benchmarks.price [WORKLOAD …]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gfs_core as gfs
from benchmarks.lib.data import digits, fashion_mnist, text_bytes
from benchmarks.lib.meters import timed
from benchmarks.lib.models import cnn, dense, gpt2, llama, seeded
from benchmarks.lib.store import FOLDER, Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import entropy, epochs, sgd
from benchmarks.lib.trainings import gradient as take

FIRST, WARM = 3, 5  # measurements with which a monitor begins, and after them
# Of each signal the options that turn it on, and it alone.
SIGNALS: dict[str, dict[str, Any]] = {
    "running": {"tier": "running"},
    "directional": {"tier": "directional", "running_every": None},
    "sharpness": {"tier": "sharpness", "running_every": None},
    "sharpness, probe_size=1": {"tier": "sharpness", "running_every": None, "probe_size": 1},
    "gfs, probe_size=1": {"tier": "gfs", "running_every": None, "probe_size": 1},
}
LONG = ("sharpness", "gfs, probe_size=1")  # left out of models whose steps are long


@dataclass
class Workload:
    """A training: its model, its optimizer, its loss, and batches without end."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], Tensor]
    batches: Iterator[Any]


def small(make: Callable[[], nn.Module], data: Any, optimizer: Callable[[nn.Module], Any], size: int) -> Workload:
    """A classifier on the CPU."""
    model = seeded(make)
    return Workload(
        model, optimizer(model), lambda b: entropy(model, b), epochs(data, size, torch.Generator().manual_seed(0))
    )


def adamw(model: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    """As transformers are trained; fused on an accelerator."""
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def language(make: Callable[[], nn.Module], examples: int, length: int, device: str = "cpu") -> Workload:
    """A language model over bytes of English text; on an accelerator under bfloat16 autocast."""
    with torch.device(device):
        model = seeded(make)
    inputs, targets = (t.to(device) for t in text_bytes(64 * 1024 // length, length))

    def loss(batch: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = model(input_ids=batch[0]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    batches = epochs((inputs, targets), examples, torch.Generator().manual_seed(0))
    return Workload(model, adamw(model), loss, batches)


WORKLOADS: dict[str, dict[str, Callable[[], Workload]]] = {
    "cpu": {
        "MLP, digits, momentum, batch 64": lambda: small(
            lambda: dense(64, 100, 100, 10), digits(), lambda m: sgd(m, 0.1), 64
        ),
        "CNN, Fashion-MNIST, AdamW, batch 128": lambda: small(cnn, fashion_mnist(4000), adamw, 128),
        "GPT of 1.9 M weights, 8 × 128 bytes, AdamW": lambda: language(lambda: gpt2(192, 4, 128, 256), 8, 128),
    },
    "cuda": {
        "GPT of 11 M weights, 64 × 256 bytes, AdamW": lambda: language(lambda: gpt2(384, 6, 256, 256), 64, 256, "cuda"),
        "GPT-2, 124 M weights, 16 × 1024, AdamW": lambda: language(gpt2, 16, 1024, "cuda"),
        "Llama, 1.1 G weights, 8 × 1024, AdamW": lambda: language(llama, 8, 1024, "cuda"),
    },
}


def run(name: str, work: Workload, few: bool) -> Iterator[Row]:
    """A row for each signal. ``few``: without those that take long."""

    def step() -> None:
        take(work.optimizer, work.loss(next(work.batches)))
        work.optimizer.step()

    for _ in range(5):
        step()
    seconds = median(timed(step)[0] for _ in range(10))
    facts = {"workload": name, "weights": sum(p.numel() for p in work.model.parameters()), "step": seconds}
    bare = median(timed(lambda: take(work.optimizer, work.loss(next(work.batches))))[0] for _ in range(WARM))
    yield facts | {"signal": "one gradient, as training computes it", "warm": bare / seconds, "gradients": 1}
    yield facts | {"signal": "one gradient, isolated", **_gradient(work, step, seconds)}
    yield facts | {"signal": "a step without a measurement", "warm": _idle(work) / seconds}
    for signal, options in SIGNALS.items():
        if few and signal in LONG:
            continue
        config = gfs.GFSConfig(**{"every": 1, "max_overhead": None, "alarm": "off"} | options)
        monitor = gfs.StabilityMonitor(work.model, work.optimizer, config)

        def prepared(monitor: gfs.StabilityMonitor = monitor) -> Callable[[], Any]:
            step()
            batch = next(work.batches)
            loss = work.loss(batch)
            take(work.optimizer, loss)
            return lambda: monitor.step(work.loss, batch, loss=loss.detach())

        found = [timed(prepared()) for _ in range(FIRST + WARM)]
        warm, last = median(s for s, _ in found[FIRST:]), found[-1][1]
        row = facts | {"signal": signal, "warm": warm / seconds}
        row |= {"cold": found[0][0] / seconds, "dearest": max(s for s, _ in found[:FIRST]) / seconds}
        if last is not None:
            row |= {"gradients": last.grad_evals, "products": last.hvps, "reasons": list(last.reasons)}
        yield row | _kernels(prepared(), warm)
        monitor.close()


def _gradient(work: Workload, step: Callable[[], None], seconds: float) -> Row:
    """One gradient of a whole batch with all that keeps training as it was, in steps of these seconds."""

    def once() -> float:
        step()
        batch = next(work.batches)

        def isolated() -> None:
            with gfs.StateSnapshot(work.model) as snapshot:
                gfs.Objective(work.model, lambda _, b: work.loss(b), [batch], isolation=snapshot).gradient()

        return timed(isolated)[0]

    return {"cold": once() / seconds, "warm": median(once() for _ in range(WARM)) / seconds, "gradients": 1}


def _idle(work: Workload) -> float:
    """Seconds of a step of the monitor at which nothing is due, with its default early warning."""
    monitor = gfs.StabilityMonitor(
        work.model, work.optimizer, gfs.GFSConfig(tier="sharpness", every=10**9, running_every=None)
    )
    batch = next(work.batches)
    loss = work.loss(batch).detach()
    for number in range(60):
        monitor.step(work.loss, batch, number, loss=loss)
    seconds, _ = timed(lambda: [monitor.step(work.loss, batch, 60 + n, loss=loss) for n in range(200)])
    monitor.close()
    return seconds / 200


def _kernels(work: Callable[[], Any], seconds: float) -> Row:
    """The kernels that an accelerator is given, and how much of these seconds it works on them."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        timed(work)
    kernels = [e for e in recorded.events() if e.device_type.name == "CUDA"]
    return {"kernels": len(kernels), "busy": 1e-6 * sum(k.time_range.elapsed_us() for k in kernels) / seconds}


HEAD = """# What each signal costs

    OMP_NUM_THREADS=1 python -m benchmarks.price

Wall time in steps of the training (forward, backward, optimizer), timed by turns with it. *First*: a monitor's first
measurement. *Dearest*: the longest of the first {first}, over which it spreads what it finds out once about the model.
*Warm*: the median of the next {warm}. *Busy*: time of the kernels of one more, by torch's profiler, over a warm
measurement. Options: `every=1, max_overhead=None`, one signal at a time.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    lines = [HEAD.format(first=FIRST, warm=WARM)]
    for device in WORKLOADS:
        if device not in results:
            continue
        lines += [f"## {results[device + ', machine']}", ""]
        if remark := results.get(f"{device}, remark"):
            lines += [remark, ""]
        rows = results[device]
        for name in dict.fromkeys(row["workload"] for row in rows):
            own = [row for row in rows if row["workload"] == name]
            lines += [f"{name}: a step takes {1e3 * own[0]['step']:.3g} ms.", ""]
            head = ["signal", "first, steps", "dearest", "warm, steps", "gradients", "products", "kernels", "busy"]
            lines += [*table(head, [_cells(row) for row in own]), ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    def number(name: str, form: str) -> str:
        return "–" if row.get(name) is None else format(row[name], form)

    return [
        row["signal"], number("cold", ".1f"), number("dearest", ".1f"), number("warm", ".3g"),
        number("gradients", "d"), number("products", "d"), number("kernels", "d"), number("busy", ".0%"),
    ]  # fmt: skip


def main() -> None:
    """Measure the workloads of this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS[device]), metavar="WORKLOAD")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    store = Store("price", given.out)
    machine = f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU, 1 thread'}, torch {torch.__version__}"
    rows: list[Row] = []
    for name in given.workloads:
        work = WORKLOADS[device][name]()
        for row in run(name, work, few=device == "cuda"):
            rows.append(row)
            print(row, flush=True)
            store.put(device, rows)
            store.put(f"{device}, machine", machine)
            store.write_page(render(store.results))
        del work
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
