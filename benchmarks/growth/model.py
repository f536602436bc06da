"""A model of the cost: predicted seconds, intervals and memory of measurements on clusters."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.lib.meters import Passes
from benchmarks.lib.tables import table
from gfs_core.linalg.eigen import largest_eigenvalues

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


def measurement(gradients: float, products: float) -> float:
    """A solved measurement in gradients: the loss once, and two gradients for a product."""
    return 1 / 3 + gradients + 2 * products


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
    """The table of docs/cost.md."""
    head = ["run", "measurement", "gradients on the probe", "seconds", "training steps", "interval at 5 %"]
    head += ["overhead every 100 steps", "every 1000", "GB for vectors, each GPU"]
    cells = [
        [
            f"{r['run']}, step {r['step']:.1f} s", r["kind"], f"{r['gradients']:.1f}", f"{r['seconds']:.2g}",
            f"{r['steps']:.2g}", r["interval"], f"{r['every 100']:.1%}", f"{r['every 1000']:.2%}", f"{r['GB']:.2g}",
        ]
        for r in predict()
    ]  # fmt: skip
    return "\n".join(table(head, cells))
