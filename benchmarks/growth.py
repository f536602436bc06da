"""What measuring costs as models, probes and numbers of processes grow, and a model of that cost.

Writes growth.json and growth.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.growth [--quick] [PART …]
The parts are parameters, probe, processes, step and import. `--model` prints the table of docs/cost.md, nothing else.
Times are seconds of the processor, not of the clock, so that other work on the machine disturbs them less; but for
several processes, which wait for each other.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gfs_core as gfs
from benchmarks.memory import LiveBytes
from gfs_core.linalg.eigen import largest_eigenvalues
from gfs_core.linalg.vectors import random_like
from gfs_core.loss.batches import rotating_part
from gfs_core.loss.learned import Learned

HERE = Path(__file__).parent
VOCABULARY, LENGTH, EXAMPLES = 64, 8, 16  # tokens known, in an example; examples in a batch
WIDTHS = {1e4: 12, 1e5: 44, 1e6: 144, 1e7: 456, 1e8: 1442}  # parameters: width
RATES: dict[Any, float] = {torch.optim.SGD: 0.1, torch.optim.AdamW: 1e-3}
TIERS: tuple[Any, ...] = ("running", "sharpness", "gfs")


class Block(nn.Module):
    """Causal attention and an MLP, before each a LayerNorm."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        n, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).masked_fill(later, -math.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Four blocks; the head is tied to the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.blocks(self.embedding(tokens) + self.place)
        return self.norm(x) @ self.embedding.weight.T


def batch_of(examples: int) -> Tensor:
    """Sequences in which a token mostly follows from the one before."""
    tokens = [torch.randint(VOCABULARY, (examples,))]
    for _ in range(LENGTH):
        noise = torch.randint(VOCABULARY, (examples,)) * (torch.rand(examples) < 0.2)
        tokens.append((5 * tokens[-1] + 1 + noise) % VOCABULARY)
    return torch.stack(tokens, 1)


class Run:
    """A model in training."""

    def __init__(self, width: int, kind: Any = torch.optim.SGD, wrap: Callable[[Any], Any] = lambda m: m) -> None:
        torch.manual_seed(0)
        self.model = wrap(GPT(width))
        self.optimizer = kind(self.model.parameters(), lr=RATES[kind])
        self.params = list(self.model.parameters())

    def loss(self, batch: Tensor) -> Tensor:
        """Of the next token."""
        return nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def gradient(self, batch: Tensor) -> None:
        """Forward and backward pass."""
        self.optimizer.zero_grad()
        self.loss(batch).backward()  # type: ignore[no-untyped-call]

    def step(self, batch: Tensor) -> None:
        """A training step."""
        self.gradient(batch)
        self.optimizer.step()

    def monitor(self, tier: Any, **options: Any) -> gfs.StabilityMonitor:
        """One that measures this tier alone, at every step."""
        beside = {} if tier == "running" else {"running_every": None}
        options = {"every": 1, "max_overhead": None, "strict": True, **beside, **options}
        return gfs.StabilityMonitor(self.model, self.optimizer, gfs.GFSConfig(tier=tier, **options))


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[float, Any]:
    began = clock()
    out = work()
    return clock() - began, out


def entered(run: Run) -> None:
    with gfs.StateSnapshot(run.model, run.params):
        pass


# --- parameters and probe -------------------------------------------------------------------------------------------


def cost(width: int, kind: Any, examples: int, repeats: int, tiers: tuple[Any, ...] = TIERS) -> dict[str, Any]:
    """Gradients, products and measurements by turns, between training steps; then their memory."""
    run = Run(width, kind)
    for _ in range(3):
        run.step(batch_of(examples))
    monitors = {tier: run.monitor(tier) for tier in tiers}
    multiples: dict[str, list[float]] = {}
    counts: dict[str, list[tuple[int, int]]] = {tier: [] for tier in tiers}
    gradients, fixed, drawn = [], [], []
    for repeat in range(repeats + 1):
        batch = batch_of(examples)
        with gfs.StateSnapshot(run.model, run.params) as isolation:
            seconds = products(run, batch, isolation)
        gradient = [timed(lambda b=batch: run.gradient(b))[0]]
        for tier, monitor in monitors.items():
            seconds[tier], found = timed(lambda m=monitor, b=batch: m.step(run.loss, b))
            counts[tier].append((found.grad_evals, found.hvps))
            gradient.append(timed(lambda b=batch: run.gradient(b))[0])
        part = rotating_part(batch, 16, repeat)
        seconds["part"] = timed(lambda b=part: run.gradient(b))[0]
        if repeat:  # the first one is cold
            gradients.append(median(gradient))
            fixed.append(timed(lambda: entered(run))[0])
            drawn.append(timed(lambda: random_like(run.params, torch.Generator()))[0])
            for name, value in seconds.items():
                multiples.setdefault(name, []).append(value / gradients[-1])
        run.optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in run.params)
    middle = {t: [median(c[i] for c in counts[t][1:]) for i in (0, 1)] for t in tiers}
    times = {k: median(v) for k, v in multiples.items()}
    row = {
        "parameters": sum(p.numel() for p in run.params), "optimizer": kind.__name__, "examples": examples,
        "gradient": median(gradients), "multiples": times,
        "cold": {t: counts[t][0] for t in tiers}, "warm": middle,
        "model": {t: measurement(*middle[t]) if t != "running" else 3 * times["part"] for t in tiers},
        "isolation": median(fixed), "random": median(drawn), "weights": weights,
        "memory": memory(run, monitors, batch_of(examples), weights), "loss": float(run.loss(batch_of(512)).detach()),
    }  # fmt: skip
    print(row, flush=True)
    return row


def products(run: Run, batch: Tensor, isolation: gfs.StateSnapshot) -> dict[str, float]:
    """Seconds of one product of each kind; each kind has made one before."""
    objective = gfs.Objective(run.model, lambda _, b: run.loss(b), [batch], isolation=isolation)
    vector = random_like(run.params, torch.Generator().manual_seed(1))
    seconds = {}
    for name, method in (("exact", "exact"), ("difference", "gradients")):
        hessian = gfs.Hessian(objective, method, Learned(double_backward_verified=True))  # type: ignore[arg-type]
        hessian(vector)
        seconds[name] = timed(lambda h=hessian: h(vector))[0]
    return seconds


def memory(run: Run, monitors: dict[Any, gfs.StabilityMonitor], batch: Tensor, weights: int) -> dict[str, float]:
    """Copies of the weights: what the two kinds of graph keep, and the peak of measurements with what they keep."""
    run.optimizer.zero_grad()
    copies = {}
    with LiveBytes() as live:
        loss = run.loss(batch)
        copies["graph"] = live.now / weights
        gradients = torch.autograd.grad(loss, run.params, create_graph=True)
        copies["graph kept"] = live.now / weights - 1  # but for the gradients
    del loss, gradients
    for name, examples in (("whole", batch), ("one", batch[:1])):
        for tier, monitor in monitors.items():
            if name == "whole" and tier != "sharpness":
                continue
            gc.collect()
            held = (monitor._warm.raw, monitor._warm.preconditioned, monitor._running.vector)
            with LiveBytes() as live:
                monitor.step(run.loss, examples)
            copies[f"{tier}, {name}"] = live.peak / weights + sum(v is not None for v in held)
    return copies


# --- processes ------------------------------------------------------------------------------------------------------


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


def processes(quick: bool) -> list[dict[str, Any]]:
    rows = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for kind, size in (("DDP", 1), ("DDP", 2), ("DDP", 4), ("FSDP2", 2)):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        own = ["-m", "benchmarks.growth", "--worker", kind, "3" if quick else "9"]
        done = subprocess.run([sys.executable, *torchrun, *own], env=environment, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(done.stdout.decode().splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


# --- step and import ------------------------------------------------------------------------------------------------


def _steps(monitor: gfs.StabilityMonitor, loss_of: Any, batch: Tensor, steps: range, loss: Tensor | None) -> None:
    for step in steps:
        monitor.step(loss_of, batch, step, loss=loss)


def idle_step(quick: bool) -> list[dict[str, Any]]:
    """Microseconds of a step at which nothing is measured."""
    rows = []
    for size in (1e4, 1e6):
        run = Run(WIDTHS[size])
        batch = batch_of(EXAMPLES)
        never = run.monitor("gfs", every=10**9, running_every=10**9)
        spent = run.monitor("gfs", every=10, running_every=5, max_overhead=1e-9)
        for name, monitor, loss in (("nothing due", never, None), ("nothing due, loss given", never, torch.tensor(1.0)),
                                    ("defaults, budget spent, loss given", spent, torch.tensor(1.0))):  # fmt: skip
            monitor.step(run.loss, batch, 0)
            blocks = []
            for block in range(5 if quick else 20):
                steps = range(1 + 500 * block, 501 + 500 * block)
                work = partial(_steps, monitor, run.loss, batch, steps, loss)
                blocks.append(1e6 * timed(work)[0] / 500)
            rows.append({"parameters": size, "case": name, "least": min(blocks), "median": median(blocks)})
    return rows


def imports(quick: bool) -> dict[str, Any]:
    """Milliseconds of fresh interpreters, by turns; and of `import gfs_core` alone, after `import torch`.

    With byte code beside the sources, as an installed package has it.
    """
    compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    seconds: dict[str, list[float]] = {"torch": [], "torch, gfs_core": [], "gfs_core": []}
    after = "import torch, time; t = time.process_time(); import gfs_core; print(time.process_time() - t)"
    for turn in range(6 if quick else 22):
        for names, held in seconds.items():
            code = after if names == "gfs_core" else f"import {names}, time; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, env=compiled)
            if turn > 0:  # the first may have compiled
                held.append(1e3 * float(done.stdout))
    both, one = seconds["torch, gfs_core"], seconds["torch"]
    rows = {k: {"least": min(v), "median": median(v)} for k, v in seconds.items()}
    return {**rows, "difference": {"least": min(both) - min(one), "median": median(both) - median(one)}}


# --- model ----------------------------------------------------------------------------------------------------------


def measurement(gradients: float, products: float) -> float:
    """A solved measurement in gradients: the loss once, and two gradients for a product."""
    return 1 / 3 + gradients + 2 * products


PEAK, UTILISATION = 989e12, 0.4  # H100, dense bfloat16; the fraction of it that training reaches
MEMORY, BUS, WORD = 2e12, 200e9, 2e-3  # bytes/s of memory and between processes; seconds of a word
STEP_TOKENS, DRAWN = 2**22, 1.5e8  # random numbers a second
SETTINGS: tuple[tuple[str, float, int, int, bool, tuple[tuple[str, int, float, float, float], ...]], ...] = (
    ("1B, DDP", 1e9, 64, 4, False, (  # tokens, gradients and products of the warm start, solves
        ("running, 2 sequences", 8192, 1, 1, 0),
        ("directional, micro-batch of 4", 16384, 4 / 3, 1, 0),
        ("sharpness, probe_size=1", 4096, 4 / 3, 8, 2),
        ("sharpness, micro-batch of 4", 16384, 4 / 3, 8, 2),
        ("sharpness, whole step", 65536, 1 / 3 + 9, 8, 2),
        ("gfs, probe_size=1", 4096, 7 + 1 / 3, 12, 2),
    )),
    ("70B, FSDP2", 70e9, 512, 4, True, (
        ("running, 1 sequence", 8192, 2, 1, 0),
        ("running, 1024 tokens", 1024, 2, 1, 0),
        ("directional, 1 sequence", 8192, 3 + 1 / 3, 1, 0),
        ("sharpness, 1 sequence", 8192, 2 + 1 / 3, 8, 2),
        ("sharpness, 1024 tokens", 1024, 2 + 1 / 3, 8, 2),
        ("gfs, 1024 tokens", 1024, 10 + 1 / 3, 12, 2),
    )),
)  # fmt: skip
COPIES = {"running": 5.3, "directional": 4.0, "sharpness": 8.3, "gfs": 9.3}  # memory.md, Adam; directional: an estimate


class Passes(TorchDispatchMode):
    """Counts how often tensors are read or written whole, in elements."""

    sees_measurements = True

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            declared = func._schema.arguments[: len(args)]
            written = [a for a, s in zip(args, declared, strict=True) if s.alias_info and s.alias_info.is_write]
            for tensors in ((args, kwargs), (out, written)):
                each = {t.data_ptr(): t.numel() for t in tree_leaves(tensors) if isinstance(t, Tensor)}
                self.elements += sum(each.values())
        return out


def passes_of_a_product(products: int = 8, size: int = 100_000) -> float:
    """Reads and writes of a whole vector that the eigenvalue solver adds to each product, in a solve of so many."""
    diagonal = torch.linspace(0.0, 1.0, size)
    with Passes() as counted:
        largest_eigenvalues(lambda v: [diagonal * v[0]], [diagonal], tol=0.0, max_hvps=products)
    return counted.elements / size / products - 3  # of the product itself: two read, one written


def predict() -> list[dict[str, Any]]:
    """Predicted seconds, intervals and memory of a measurement on clusters. A model, not a measurement."""
    rows, passes = [], passes_of_a_product()
    for name, n, ranks, micro, sharded, kinds in SETTINGS:
        own = n / ranks if sharded else n

        def gradient(tokens: float, n: float = n, ranks: int = ranks, sharded: bool = sharded) -> float:
            gathered = 3 * 2 * n * (ranks - 1) / ranks / BUS if sharded else 0.0  # two gathers, one scatter; bfloat16
            return max(6 * n * tokens / (PEAK * UTILISATION), gathered)

        local = STEP_TOKENS / ranks
        pieces = max(local / (4096 * micro), 1)
        step = pieces * gradient(local / pieces) + (0 if sharded else 0.5 * 8 * n / BUS)  # half of it is hidden
        for kind, tokens, gradients, products, solves in kinds:
            seconds = (gradients + 2 * products) * gradient(tokens)
            exchanged = 0.0 if sharded else 8 * n * (ranks - 1) / ranks / BUS
            vectors = (passes * products + 10) * 4 * own / MEMORY
            words = (4 * products + 6) * WORD
            mixed = solves * own / DRAWN / 10
            seconds += products * exchanged + vectors + words + mixed
            share = 0.05
            interval = math.ceil(seconds / step * (1 - share) / share)
            rows.append({
                "run": name, "step": step, "kind": kind, "gradients": gradients + 2 * products,
                "seconds": seconds, "mixed": mixed, "steps": seconds / step, "interval": interval,
                "every 100": seconds / (seconds + 100 * step), "every 1000": seconds / (seconds + 1000 * step),
                "GB": (COPIES[kind.split(",")[0]] + 0.5 * sharded) * 4 * own / 1e9,
            })  # fmt: skip
    return rows


def predicted() -> str:
    head = ("run", "measurement", "gradients on the probe", "seconds", "training steps", "interval at 5 %",
            "overhead every 100 steps", "every 1000", "GB for vectors, each GPU")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in predict():
        cells = (f"{r['run']}, step {r['step']:.1f} s", r["kind"], f"{r['gradients']:.1f}", f"{r['seconds']:.2g}",
                 f"{r['steps']:.2g}", str(r["interval"]), f"{r['every 100']:.1%}", f"{r['every 1000']:.2%}",
                 f"{r['GB']:.2g}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- tables ---------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]) + "\n"


def render(found: dict[str, Any]) -> str:
    out = [HEAD]
    for part, first in (("parameters", "parameters"), ("probe", "examples")):
        costs, copies = [], []
        for r in found.get(part, []):
            m = r["multiples"]
            name = [f"{r[first]:.1e}" if first == "parameters" else str(r[first]), r["optimizer"]]
            cells = [
                f"{m[t]:.1f} ({r['warm'][t][0]:.0f} + {r['warm'][t][1]:.0f}; {m[t] / r['model'][t]:.1f})"
                if t in m else "–" for t in TIERS
            ]  # fmt: skip
            fixed = [f"{1e3 * r['isolation']:.1f} ({r['isolation'] / r['gradient']:.2f})", f"{1e3 * r['random']:.1f}"]
            gradient = f"{1e3 * r['gradient']:.1f}"
            costs.append([*name, gradient, f"{m['exact']:.1f}", f"{m['difference']:.1f}", *cells, *fixed])
            c = r["memory"]
            own = [f"{c[f'{t}, one']:.1f}" if t in m else "–" for t in TIERS]
            graphs = [f"{c[k]:.1f} ({c[k] * r['weights'] / 2**20:.3g})" for k in ("graph", "graph kept")]
            copies.append([*name, *own, *graphs, f"{c['sharpness, whole']:.1f}"])
        if costs:
            head = [first, "optimizer"]
            ways = ["gradient, ms", "exact product", "from differences"]
            out += [f"## Against the {'number of parameters' if part == 'parameters' else 'size of the probe'}\n"]
            out += [COST, table([*head, *ways, *TIERS, "isolation, ms (gradients)", "random vector, ms"], costs)]
            graphs = ["graph (MiB)", "graph kept for products (MiB)", "peak of sharpness, whole batch"]
            out += [MEMORY_TEXT, table([*head, *(f"{t}, one example" for t in TIERS), *graphs], copies)]
    if rows := found.get("processes", []):
        out += [PROCESSES]
        out += [table(
            ["engine", "processes", "step, ms", "measurement", "training steps", "gradients + products", "words",
             "copies of the weights reduced, each product"],
            [[r["engine"], str(r["processes"]), f"{1e3 * r['step']:.0f}", t, f"{m['multiple']:.1f}",
              f"{m['gradients']:.0f} + {m['products']:.0f}", f"{m['words']:.0f}",
              f"{m['bytes'] / r['weights'] / m['products']:.2f}"] for r in rows for t, m in r["of"].items()],
        )]  # fmt: skip
    if rows := found.get("step", []):
        cells = [[f"{r['parameters']:.0e}", r["case"], f"{r['least']:.1f}", f"{r['median']:.1f}"] for r in rows]
        out += ["## A step without a measurement, µs\n", table(["parameters", "case", "least", "median"], cells)]
    if rows := found.get("import", {}):
        cells = [[k, f"{v['least']:.0f}", f"{v['median']:.0f}"] for k, v in rows.items()]
        out += [IMPORT, table(["import", "least", "median"], cells)]
    return "\n".join(out).rstrip() + "\n"


HEAD = f"""# Growth

    OMP_NUM_THREADS=1 python -m benchmarks.growth

A transformer of four blocks whose width grows, float32, sequences of {LENGTH} tokens, one thread. Nothing ran on an
accelerator. Times are processor times, but for several processes. Other work shared the machine. AdamW at
1e8 parameters was not run, for the time it takes.
"""
COST = """Medians of interleaved repeats, in gradients (forward and backward pass on the whole batch). In brackets:
gradients and products of a warm measurement, then measured / predicted by [the model of cost](../docs/cost.md). A graph
counts as a gradient. A measurement follows at every step, on a new batch. *StateSnapshot* is entering and leaving it.
"""
MEMORY_TEXT = """Copies of the weights. One example: the peak of a warm measurement with the warm start, as in
[memory.md](memory.md). A graph is what the loss keeps for its backward pass on the whole batch; for exact products, the
gradient's graph with it.
"""
PROCESSES = f"""## Against the number of processes

gloo, 1.0e+06 parameters, {EXAMPLES} examples for each process, SGD. Wall time, as a multiple of the training step
before it (with DDP's exchange), medians. *local* is sharpness with `sync="local"`. Words and bytes are counted at
`torch.distributed.all_reduce`; what FSDP exchanges by itself is not in it. Four processes share two cores.
"""
IMPORT = """## Import, ms of processor time

Fresh interpreters by turns, with byte code beside the sources, as an installed package has it. *gfs_core* is timed
inside one that holds torch already; *difference*: of whole ones.
"""


def main() -> None:
    if "--worker" in sys.argv:
        return worker(sys.argv[-2], int(sys.argv[-1]))
    if "--model" in sys.argv:
        return print(predicted())
    warnings.simplefilter("ignore", gfs.GFSWarning)
    quick = "--quick" in sys.argv
    asked = [a for a in sys.argv[1:] if not a.startswith("-")]
    path = HERE / "growth.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    sizes = {1e4: 9, 1e5: 9, 1e6: 7, 1e7: 3, 1e8: 1}
    sgd, adam = torch.optim.SGD, torch.optim.AdamW

    def save(part: str, rows: Any) -> None:
        found[part] = rows
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(render(found))

    parts: dict[str, Callable[[], Any]] = {
        "import": lambda: imports(quick), "step": lambda: idle_step(quick), "processes": lambda: processes(quick),
    }  # fmt: skip
    for part, work in parts.items():
        if not asked or part in asked:
            save(part, work())
    if not asked or "probe" in asked:
        rows = []
        for examples in (8, 32, 128) if quick else (8, 16, 32, 64, 128, 256, 512, 1024):
            rows.append(cost(WIDTHS[1e6], sgd, examples, 2 if examples > 64 else 4, ("running", "sharpness")))
            save("probe", rows)
    if not asked or "parameters" in asked:
        rows = []
        for size in list(sizes)[: 3 if quick else None]:
            for kind in (sgd, adam):
                rows.append(cost(WIDTHS[size], kind, EXAMPLES, 2 if quick else sizes[size]))
                save("parameters", rows)


if __name__ == "__main__":
    main()
