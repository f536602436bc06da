"""The midpoint of three iterates beside a short gradient flow: how well each takes the swing out of the sharpness.

Three quantities beside each other: the stability ratio at the present weights (raw), at the midpoint, and after
gradient flow for four learning rates (GFS₄). Writes `midpoint.json` (after every training) and `midpoint.md`.
Run (about half an hour on one core): OMP_NUM_THREADS=1 python -m benchmarks.midpoint
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits, fashion_mnist, text_bytes
from benchmarks.lib.models import Characters, Rows, cnn, dense, digits_cnn, seeded
from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import entropy, epochs, gradient, squared

EVERY = 5  # odd: a swing of period two is seen from both sides
WARM = 3  # the first measurements, which are cold, are left out
FIXED, FIXED_ROWS = 512, 64  # examples of the fixed probe of a mini-batch training; rows of text
SMOOTH = 9  # measurements in the moving mean of the raw ratio
ALLOWED_MEDIAN, ALLOWED_WORST = 1.1, 1.5  # of the midpoint's unsteadiness over that of GFS₄, within each table
RATIOS = {"raw": "stability_ratio", "midpoint": "midpoint_stability_ratio", "GFS₄": "gfs_stability_ratio"}
TIERS = {"raw": "sharpness", "midpoint": "midpoint", "GFS₄": "gfs"}

Loss = Callable[[nn.Module, Batch], Tensor]
Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Training:
    """One training; ``batch`` is ``None`` for full batch.

    Attributes:
        model: makes the network.
        data: inputs and targets.
        optimizer: makes the optimizer from the weights.
        batch: examples of a batch.
        loss: of a model and a batch.
        steps: how many there are; the last ``watched`` of them are measured.
        watched: see there.
        cosine: whether the rate falls to zero along a cosine.
        fixed: examples of the fixed probe.
        start: stability ratio at the first step that the rate is set to; ``None``: the rate is that of the optimizer.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    optimizer: Make
    batch: int | None = None
    loss: Loss = entropy
    steps: int = 600
    watched: int = 240
    cosine: bool = False
    fixed: int = FIXED
    start: float | None = None


def one_hot(data: Batch) -> Batch:
    """The data with targets for a squared loss."""
    return data[0], nn.functional.one_hot(data[1], 10).float()


def sgd(rate: float, beta: float = 0.0, **more: Any) -> Make:
    """SGD with this momentum."""
    return lambda params: torch.optim.SGD(params, rate, momentum=beta, **more)


def adamw(rate: float, **more: Any) -> Make:
    """AdamW."""
    return lambda params: torch.optim.AdamW(params, rate, **more)


def batch_norm() -> nn.Sequential:
    """Two convolutions with BatchNorm, for digits given flat."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def small(act: type[nn.Module]) -> Callable[[], nn.Module]:
    """Two hidden layers of 40, for digits."""
    return lambda: dense(64, 40, 40, 10, act=act)


# The midpoint was designed on five others: digits, MLP with tanh and 0.2 and 0.6, with ReLU and 0.3, with AdamW and
# batches of 64, and a CNN with momentum and batches of 64.
FULL = {
    "digits, MLP tanh, GD, squared loss": Training(
        small(nn.Tanh), lambda: one_hot(digits(400)), sgd(0.1), loss=squared, steps=1200, start=0.5
    ),
    "digits, MLP tanh, GD": Training(small(nn.Tanh), lambda: digits(400), sgd(0.1), steps=300, start=0.3),
    "digits, MLP ReLU, GD": Training(small(nn.ReLU), lambda: digits(400), sgd(0.1), steps=300, start=0.3),
    "digits, MLP ReLU, GD, squared loss": Training(
        small(nn.ReLU), lambda: one_hot(digits(400)), sgd(0.1), loss=squared, steps=1200, start=0.5
    ),
    "digits, MLP tanh, momentum, squared loss": Training(
        small(nn.Tanh), lambda: one_hot(digits(400)), sgd(0.1, 0.9), loss=squared, steps=1200, start=0.25
    ),
    "digits, MLP ReLU, momentum, decay 0.001": Training(
        small(nn.ReLU), lambda: digits(400), sgd(0.1, 0.9, weight_decay=1e-3), steps=300, start=0.25
    ),
    "digits, MLP tanh, Adam 0.003, squared loss": Training(
        small(nn.Tanh), lambda: one_hot(digits(400)), lambda p: torch.optim.Adam(p, 3e-3), loss=squared, steps=1200
    ),
    "digits, MLP ReLU, AdamW 0.01, decay 0.1, squared loss": Training(
        small(nn.ReLU), lambda: one_hot(digits(400)), adamw(0.01, weight_decay=0.1), loss=squared, steps=1200
    ),
    "digits, MLP tanh, RMSprop 0.001, squared loss": Training(
        small(nn.Tanh), lambda: one_hot(digits(400)), lambda p: torch.optim.RMSprop(p, 1e-3), loss=squared
    ),
    "Fashion-MNIST, CNN, GD, squared loss": Training(
        cnn, lambda: one_hot(fashion_mnist(300)), sgd(0.1), loss=squared, steps=800, watched=200, start=0.5
    ),
}
MINI = {
    "digits, MLP tanh, SGD 0.3, 16": Training(small(nn.Tanh), lambda: digits(1437), sgd(0.3), 16),
    "digits, MLP ReLU, Nesterov 0.05, 64, cosine": Training(
        small(nn.ReLU), lambda: digits(1437), sgd(0.05, 0.9, nesterov=True), 64, cosine=True
    ),
    "digits, CNN tanh, momentum 0.1, decay 5e-4, 128": Training(
        lambda: digits_cnn(act=nn.Tanh), lambda: digits(1437), sgd(0.1, 0.9, weight_decay=5e-4), 128
    ),
    "digits, CNN with BatchNorm, momentum 0.05, 64": Training(batch_norm, lambda: digits(1437), sgd(0.05, 0.9), 64),
    "digits, transformer on rows, AdamW 0.003, 32": Training(
        lambda: Rows("gelu", True), lambda: digits(1437), adamw(3e-3), 32, watched=200
    ),
    "digits, MLP ReLU, SGD 0.2, 512": Training(small(nn.ReLU), lambda: digits(1437), sgd(0.2), 512),
    "Fashion-MNIST, CNN, AdamW 0.002, 128": Training(cnn, lambda: fashion_mnist(2000), adamw(2e-3), 128, watched=200),
    "Fashion-MNIST, CNN, SGD 0.1, 256": Training(cnn, lambda: fashion_mnist(2000), sgd(0.1), 256, watched=200),
    "text, byte transformer, AdamW 0.002, 16": Training(
        lambda: Characters(256, 32),
        lambda: text_bytes(600, 32),
        adamw(2e-3),
        16,
        steps=400,
        watched=120,
        fixed=FIXED_ROWS,
    ),
    "text, byte transformer, momentum 0.1, 32": Training(
        lambda: Characters(256, 32),
        lambda: text_bytes(600, 32),
        sgd(0.1, 0.9),
        32,
        steps=400,
        watched=120,
        fixed=FIXED_ROWS,
    ),
}


def train(training: Training) -> Row:
    """What the three quantities were, by probe, and what they took."""
    model = seeded(training.model)
    data = training.data()
    optimizer = training.optimizer(list(model.parameters()))
    if training.start is not None:
        first = gfs.stability(model, training.loss, [data], optimizer, tier="sharpness").stability_ratio or math.nan
        optimizer.param_groups[0]["lr"] = float(f"{optimizer.param_groups[0]['lr'] * training.start / first:.2g}")
    rate = optimizer.param_groups[0]["lr"]
    rows = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(7))[: training.fixed]
    fixed = data[0][rows], data[1][rows]
    size = training.batch or len(data[1])
    batches = epochs(data, size, torch.Generator().manual_seed(0))
    names = ["the batch"] if training.batch is None else ["the current batch", f"a fixed probe of {len(rows)}"]

    def monitor(tier: Any) -> gfs.StabilityMonitor:
        config = gfs.GFSConfig(tier=tier, every=EVERY, running_every=None, max_overhead=None, alarm="off")
        return gfs.StabilityMonitor(model, optimizer, config)

    monitors = {name: {kind: monitor(tier) for kind, tier in TIERS.items()} for name in names}
    found: dict[str, dict[str, list[gfs.Measurement]]] = {n: {k: [] for k in TIERS} for n in names}
    for step in range(training.steps):
        if training.cosine:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / training.steps))
        batch = data if training.batch is None else next(batches)
        gradient(optimizer, training.loss(model, batch))
        for place, name in enumerate(names if step >= training.steps - training.watched else []):
            probe = (batch, fixed)[place]
            for kind, held in monitors[name].items():
                measured = held.step(lambda b: training.loss(model, b), probe, step)
                if measured is not None:
                    found[name][kind].append(measured)
        optimizer.step()
    out: Row = {"rate": rate}
    for name in names:
        by = found[name]
        out[name] = {kind: [getattr(m, RATIOS[kind]) for m in by[kind]][WARM:] for kind in TIERS} | {
            "price": {
                kind: [
                    mean(m.hvps or 0 for m in by[kind][WARM:]),
                    mean(m.grad_evals or 0 for m in by[kind][WARM:]),
                    median(m.seconds or 0.0 for m in by[kind][WARM:]),
                ]
                for kind in TIERS
            }
        }
    rounded_out: Row = rounded(out, 5)
    return rounded_out


# --- statistics -------------------------------------------------------------------------------------------------------


def unsteadiness(values: Sequence[float | None]) -> float:
    """Mean absolute change of the logarithm from one value to the next; missing and non-positive ones are left out."""
    steps = [abs(math.log(b / a)) for a, b in pairwise(values) if a and b and a > 0 and b > 0]
    return mean(steps) if steps else math.nan


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Centred moving mean."""
    reach = SMOOTH // 2
    out: list[float | None] = []
    for i in range(len(values)):
        near = [v for v in values[max(i - reach, 0) : i + reach + 1] if v is not None]
        out.append(mean(near) if near else None)
    return out


def correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """Rank correlation where both are there."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else math.nan


def relative(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """Median of a / b, minus one."""
    quotients = [x / y for x, y in zip(a, b, strict=True) if x and y]
    return median(quotients) - 1 if quotients else math.nan


# --- the page ---------------------------------------------------------------------------------------------------------


ABOUT = f"""# The midpoint of three iterates, and a short gradient flow

Both take the swing out of the sharpness at the edge of stability. The midpoint (w₋₁ + 2w₀ + w₊₁)/4 needs two copies of
the weights and another solve, GFS₄ a gradient flow. Here: the stability ratio at the present weights (raw), at the
midpoint, and after the flow, every {EVERY} steps of the last part of each training, with the tolerances of a run. With
full batch, the rate of descent with and without momentum is set by the stability ratio at the first step (0.25 to 0.5).

*Unsteadiness* is the mean absolute change of the logarithm of the ratio from one measurement to the next; in brackets
from one to the next but one, {2 * EVERY} steps later, where a swing of period two is seen from one side only. *Level*
is the median of the quotient minus one. *Rank correlation* is over the measurements of a training; smoothed raw is a
moving mean over {SMOOTH} measurements.

The rule for which is the default was fixed before these trainings were run: the midpoint, if its unsteadiness over that
of GFS₄ is at most {ALLOWED_MEDIAN} in the median of each of the three tables, and at most {ALLOWED_WORST} in every
training; otherwise GFS₄ stays.
"""


def statistics(found: Row) -> Row:
    """Of one training and one probe."""
    by = {kind: found[kind] for kind in TIERS}
    flat = smoothed(by["raw"])
    return {
        "every": {kind: unsteadiness(values) for kind, values in by.items()},
        "second": {kind: mean([unsteadiness(values[i::2]) for i in (0, 1)]) for kind, values in by.items()},
        "level": (relative(by["midpoint"], by["GFS₄"]), relative(by["midpoint"], by["raw"])),
        "rank": (
            correlation(by["midpoint"], by["GFS₄"]),
            correlation(by["midpoint"], flat),
            correlation(by["GFS₄"], flat),
        ),
        "ratio": median(v for v in by["raw"] if v is not None),
        "missing": sum(v is None for v in by["GFS₄"]) / max(len(by["GFS₄"]), 1),
    }


def of_probe(results: Row, part: str, start: str) -> dict[str, Row]:
    """What was found on the probe whose name starts so, by training."""
    return {
        name: next(found for probe, found in row.items() if probe.startswith(start))
        for name, row in results.get(part, {}).items()
    }


def steadiness_table(rows: dict[str, Row]) -> list[str]:
    """A line for each training, and one for the median."""
    head = ["training", "ratio", *TIERS, "midpoint / GFS₄", "level: of GFS₄, of raw",
            "rank correlation: with GFS₄, with smoothed raw", "GFS₄ with smoothed raw", "GFS₄ absent"]  # fmt: skip
    lines = []
    for name, found in rows.items():
        s = statistics(found)
        lines.append([
            name, f"{s['ratio']:.2f}", *(f"{s['every'][k]:.4f} ({s['second'][k]:.4f})" for k in TIERS),
            f"{s['every']['midpoint'] / s['every']['GFS₄']:.2f}", "{:+.1%}, {:+.1%}".format(*s["level"]),
            "{:.2f}, {:.2f}".format(*s["rank"][:2]), f"{s['rank'][2]:.2f}", f"{s['missing']:.0%}",
        ])  # fmt: skip
    return table(head, lines)


def price_table(results: Row) -> list[str]:
    """What a measurement takes: beside the raw one, and in its seconds."""
    rows = {
        f"{name}, {probe}": found["price"]
        for part in ("full batch", "mini-batch")
        for name, row in results.get(part, {}).items()
        for probe, found in row.items()
        if probe.startswith("the")
    }
    lines = []
    for name, price in rows.items():
        (p0, g0, s0), (p1, g1, s1), (p2, g2, s2) = (price[kind] for kind in TIERS)
        lines.append([name, f"{p0:.1f}, {g0:.1f}", f"{p1 - p0:+.1f}, {g1 - g0:+.1f}", f"{p2 - p0:+.1f}, {g2 - g0:+.1f}",
                      f"{s1 / s0:.2f}", f"{s2 / s0:.2f}"])  # fmt: skip
    head = ["training, on its own batch", "raw: products, gradients", "midpoint beside it", "GFS₄ beside it",
            "seconds with the midpoint / raw", "with GFS₄ / raw"]  # fmt: skip
    return table(head, lines)


def quotients(rows: dict[str, Row]) -> list[float]:
    """Unsteadiness of the midpoint over that of GFS₄, of each training."""
    every = [statistics(found)["every"] for found in rows.values()]
    return [e["midpoint"] / e["GFS₄"] for e in every if e["GFS₄"] > 0]


def render(results: Row) -> str:
    """The page that the results make."""
    tables = {
        "Full batch": of_probe(results, "full batch", "the batch"),
        "Mini-batches, measured on the current one": of_probe(results, "mini-batch", "the current"),
        f"Mini-batches, measured on a fixed probe of {FIXED} examples, or {FIXED_ROWS} rows of text": of_probe(
            results, "mini-batch", "a fixed"
        ),
    }
    lines = [ABOUT]
    holds = True
    said = []
    for title, rows in tables.items():
        lines += [f"## {title}\n", *steadiness_table(rows), ""]
        found = quotients(rows)
        holds = holds and median(found) <= ALLOWED_MEDIAN and max(found) <= ALLOWED_WORST
        said.append(f"{title.lower()}: median {median(found):.2f}, from {min(found):.2f} to {max(found):.2f}")
    lines += ["## Verdict\n", "Unsteadiness of the midpoint over that of GFS₄: " + "; ".join(said) + ".", ""]
    lines += [f"By the rule above the default is {'the midpoint' if holds else 'GFS₄'}.", ""]
    lines += ["## Price\n", *price_table(results), ""]
    if "remark" in results:
        lines += [results["remark"], ""]
    return "\n".join(lines)


def main() -> None:
    """Run the trainings that are not there yet, and write the page."""
    warnings.simplefilter("ignore", gfs.GFSWarning)
    torch.set_num_threads(1)
    store = Store("midpoint")
    for part, trainings in (("full batch", FULL), ("mini-batch", MINI)):
        for name, training in trainings.items():
            store.add(part, (name,), lambda training=training: train(training))  # type: ignore[misc]
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
