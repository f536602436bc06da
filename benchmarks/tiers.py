"""What each tier tells of the exact stability ratio, what it costs, and whether the budget holds.

Writes tiers.json and tiers.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.tiers [accuracy] [cost] [budget]
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import pydoc_data.topics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.data import digits, fashion_mnist

HERE = Path(__file__).parent
STEPS, EVERY, FIRST = 600, 20, 40  # steps of a run, between comparisons, of the first comparison
Batch = tuple[Tensor, Tensor]


# --- accuracy -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training, and the data that the exact ratio is measured on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Batch
    batch: int
    schedule: bool
    squared: bool = False

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""
        x, y = batch
        out = self.model(x)
        if self.squared:
            return 0.5 * (out - nn.functional.one_hot(y, 10)).square().sum(1).mean()
        return nn.functional.cross_entropy(out.flatten(0, -2), y.flatten())

    def steps(self, count: int, seed: int) -> Iterator[tuple[int, Batch, Tensor]]:
        """Step, batch and loss of each step, its gradient computed; it is taken when the next one is asked for.

        A schedule warms up over an eighth of the steps and follows a cosine.
        """
        rates = [g["lr"] for g in self.optimizer.param_groups]
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        for step in range(count):
            falling = 0.5 * (1 + math.cos(math.pi * step / count))
            factor = min(1.0, (step + 1) / (count / 8)) * falling if self.schedule else 1.0
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            if len(order) < self.batch:
                order = torch.randperm(len(self.data[1]), generator=generator)
            rows, order = order[: self.batch], order[self.batch :]
            batch = self.data[0][rows], self.data[1][rows]
            loss = self.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield step, batch, loss
            self.optimizer.step()


class Characters(nn.Module):
    """A small causal transformer over characters."""

    def __init__(self, alphabet: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(alphabet, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, alphabet)
        self.register_buffer("mask", torch.triu(torch.full((length, length), -math.inf), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, length, alphabet)."""
        out: Tensor = self.head(self.blocks(self.embed(x) + self.place, mask=self.mask))
        return out


def text(count: int, length: int = 48) -> tuple[Batch, int]:
    characters = "".join(pydoc_data.topics.topics.values())[: count * (length + 1)]
    alphabet = sorted(set(characters))
    ids = torch.tensor([alphabet.index(c) for c in characters]).reshape(count, length + 1)
    return (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), len(alphabet)


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), activation(), nn.Linear(100, 100), activation(), nn.Linear(100, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate)


def of(model: Callable[[], nn.Module], optimizer: Any, rate: float, data: Batch, batch: int, *more: bool) -> Run:
    made = model()
    return Run(made, optimizer(made, rate), data, batch, *more)


def characters(schedule: bool) -> Run:
    data, alphabet = text(400)
    return of(lambda: Characters(alphabet, 48), adamw, 3e-3, data, 32, schedule)


def tanh() -> nn.Module:
    return mlp(nn.Tanh)


def relu() -> nn.Module:
    return mlp(nn.ReLU)


def runs() -> dict[str, Callable[[], Run]]:
    return {
        "digits, MLP, momentum 0.1": lambda: of(tanh, sgd, 0.1, digits(1437), 256, True),
        "digits, MLP, squared loss, momentum 0.1": lambda: of(tanh, sgd, 0.1, digits(1437), 256, True, True),
        "digits, MLP, AdamW 3e-3": lambda: of(relu, adamw, 3e-3, digits(1437), 64, True),
        "Fashion-MNIST, CNN, momentum 0.03": lambda: of(cnn, sgd, 0.03, fashion_mnist(2000), 256, True),
        "Fashion-MNIST, CNN, AdamW 2e-3": lambda: of(cnn, adamw, 2e-3, fashion_mnist(2000), 256, True),
        "text, transformer, AdamW 3e-3": lambda: characters(True),
        "digits, MLP, AdamW 3e-3, constant rate": lambda: of(relu, adamw, 3e-3, digits(1437), 64, False),
        "Fashion-MNIST, CNN, momentum 0.03, constant rate": lambda: of(cnn, sgd, 0.03, fashion_mnist(2000), 256, False),
    }


def candidates(batch: int) -> dict[str, tuple[gfs.GFSConfig, float]]:
    """Each estimator with the fraction of a batch that it works on."""

    def config(tier: Any, every: int, **options: Any) -> gfs.GFSConfig:
        beside = {} if tier in ("directional", "running") else {"running_every": None}
        return gfs.GFSConfig(tier=tier, every=every, max_overhead=None, **beside, **options)

    made: dict[str, tuple[gfs.GFSConfig, float]] = {}
    for every, parts in ((5, 16), (5, 32), (10, 8), (20, 4)):
        made[f"running, every {every}, 1/{parts}"] = config("running", every, running_parts=parts), 1 / parts
    for parts in (1, 4, 16):
        size = None if parts == 1 else batch // parts
        made[f"solved, every 20, 1/{parts} of the batch"] = config("sharpness", EVERY, probe_size=size), 1 / parts
    made["batch sharpness, every 20"] = config("batch_sharpness", EVERY), 1.0
    made["directional, every 20, product"] = config("directional", EVERY), 1.0
    made["directional, every 20, losses only"] = config("directional", EVERY, directional="losses"), 1.0
    made["solved, every 20, fixed probe of 64"] = config("sharpness", EVERY, probe="fixed", probe_size=64), 64 / batch
    return made


def value(measurement: gfs.Measurement) -> float | None:
    """The estimate of the stability ratio that a measurement holds."""
    found = measurement
    if found.running_stability_ratio is not None:
        return found.running_stability_ratio
    if found.stability_ratio is not None:
        return found.stability_ratio
    if found.batch_sharpness is not None and found.threshold is not None:
        return found.batch_sharpness / found.threshold
    if found.critical_lr is not None and found.learning_rate is not None:
        return found.learning_rate / found.critical_lr
    return None


def follow(name: str, make: Callable[[], Run]) -> list[dict[str, Any]]:
    """All estimators along one run; each measures in isolation, so that none knows of the others."""
    torch.manual_seed(0)
    run = make()
    exact = gfs.StabilityMonitor(
        run.model, run.optimizer, gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None)
    )
    made = candidates(run.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gfs.GFSWarning)
        monitors = {k: gfs.StabilityMonitor(run.model, run.optimizer, config) for k, (config, _) in made.items()}
    latest: dict[str, float] = {}
    price = dict.fromkeys(made, 0.0)
    pairs: dict[str, list[tuple[float, float]]] = {k: [] for k in made}
    for step, batch, loss in run.steps(STEPS, seed=1):
        for key, monitor in monitors.items():
            measurement = monitor.step(run.loss, batch, step, loss=loss)
            if measurement is not None:
                # A product is counted as two gradients, a forward pass as a third of one.
                counted = (measurement.grad_evals or 0) + 2 * (measurement.hvps or 0)
                counted += 2 if "losses" in key else 0
                price[key] += counted * made[key][1] if step else 0
                if (found := value(measurement)) is not None:
                    latest[key] = found
        if step % EVERY == 0 and step >= FIRST:
            true = exact.step(run.loss, run.data, step)
            assert true is not None
            assert true.stability_ratio is not None
            for key in made:
                if key in latest:
                    pairs[key].append((latest[key], true.stability_ratio))
    rows_out = []
    for key, held in pairs.items():
        if len(held) < 10:
            continue
        ours, true_values = zip(*held, strict=True)
        errors = [math.log(a / b) for a, b in held if a > 0]
        rows_out.append({
            "run": name,
            "estimator": key,
            "gradients_per_step": price[key] / STEPS,
            "rank_correlation": float(spearmanr(ours, true_values)[0]),
            "median_quotient": math.exp(median(errors)),
            "worst_factor": math.exp(max(abs(e) for e in errors)),
            "range": max(true_values) / min(true_values),
        })  # fmt: skip
        print(rows_out[-1], flush=True)
    return rows_out


# --- cost -----------------------------------------------------------------------------------------------------------

TIERS: dict[str, dict[str, Any]] = {
    "directional, losses only": {"tier": "directional", "directional": "losses"},
    "directional, product": {"tier": "directional"},
    "running": {"tier": "running"},
    "batch sharpness": {"tier": "batch_sharpness", "running_every": None},
    "sharpness": {"tier": "sharpness", "running_every": None},
    "gfs": {"tier": "gfs", "running_every": None},
}


def cost(width: int, depth: int, examples: int) -> list[dict[str, Any]]:
    """Warm measurements between training steps of an MLP, as a multiple of the time of such a step."""
    rows = []
    for name, options in TIERS.items():
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(width, 10))
        parameters = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x, y = torch.randn(examples, width), torch.randint(10, (examples,))

        def loss_of(batch: Batch, model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(every=1, max_overhead=None, **options))
        count = 20 if parameters < 3e6 else 5 if parameters < 3e7 else 2
        steps, measured, counts = [], [], []
        skipped = 3 if parameters < 3e7 else 2
        for step in range(count + skipped):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = loss_of((x, y))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            middle = time.perf_counter()
            measurement = monitor.step(loss_of, (x, y), loss=loss)
            ended = time.perf_counter()
            if step >= skipped and measurement is not None:
                steps.append(middle - began)
                measured.append(ended - middle)
                counts.append(((measurement.grad_evals or 0), (measurement.hvps or 0)))
        rows.append({
            "parameters": parameters,
            "tier": name,
            "step_ms": 1e3 * median(steps),
            "times_a_step": median(measured) / median(steps),
            "gradients": median(c[0] for c in counts),
            "products": median(c[1] for c in counts),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


# --- budget ---------------------------------------------------------------------------------------------------------


def connected(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), *layers, nn.Linear(width, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def budget(name: str, make: Callable[[], nn.Module], examples: int, seconds: float) -> dict[str, Any]:
    """The default configuration for some time: what was spent after each tier's first measurement, and how often."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = fashion_mnist(2000)

    def loss_of(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    began = time.perf_counter()
    monitor = gfs.StabilityMonitor(model, optimizer)
    found, step = [], 0
    while time.perf_counter() - began < seconds:
        rows = torch.randint(len(x), (examples,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        measurement = monitor.step(loss_of, batch, loss=loss)
        found += [measurement] if measurement is not None else []
        optimizer.step()
        step += 1
    wall = time.perf_counter() - began
    kinds = ("running_sharpness", "sharpness", "gfs_sharpness")
    firsts = {next((i for i, m in enumerate(found) if getattr(m, kind) is not None), None) for kind in kinds}
    firsts.add(0)
    later = sum(m.seconds or 0.0 for i, m in enumerate(found) if i not in firsts)
    often = [m.step for m in found if m.running_sharpness is not None]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": 1e3 * (wall - sum(m.seconds or 0.0 for m in found)) / step,
        "steps": step,
        "after_the_first": later / wall,
        "with_the_first": sum(m.seconds or 0.0 for m in found) / wall,
        "logged": found[-1].overhead,
        "steps_between_running": median(b - a for a, b in itertools.pairwise(often)) if often[1:] else None,
        "running": len(often),
        "gfs": sum(m.gfs_sharpness is not None for m in found),
    }


# --- tables ---------------------------------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> str:
    out = [HEAD]
    rows = results.get("accuracy", [])
    names = list(dict.fromkeys(r["run"] for r in rows))
    keys = list(dict.fromkeys(r["estimator"] for r in rows))
    if rows:
        out += [ACCURACY, "| estimator | " + " | ".join(str(i + 1) for i in range(len(names))) + " |"]
        out.append("|---" * (len(names) + 1) + "|")
        table = {(r["run"], r["estimator"]): r for r in rows}
        for key in keys:
            cells = []
            for name in names:
                r = table.get((name, key))
                cells.append(
                    "–" if r is None else f"{r['rank_correlation']:.2f} · {r['median_quotient']:.2f} · "
                    f"{r['worst_factor']:.1f} · {100 * r['gradients_per_step']:.0f} %"
                )  # fmt: skip
            out.append(f"| {key} | " + " | ".join(cells) + " |")
        out += ["", "| | run | largest / smallest exact ratio |", "|---|---|---|"]
        for i, name in enumerate(names):
            spread = next(r["range"] for r in rows if r["run"] == name)
            out.append(f"| {i + 1} | {name} | {spread:.1f} |")
        default = [r for r in rows if r["estimator"] == "running, every 5, 1/16"]
        reached = sum(r["rank_correlation"] >= 0.95 for r in default)
        out += ["", READING.format(reached=reached, count=len(default))]
    if rows := results.get("cost", []):
        out += [COST, "| parameters | step, ms | " + " | ".join(TIERS) + " |", "|---" * (len(TIERS) + 2) + "|"]
        for parameters in dict.fromkeys(r["parameters"] for r in rows):
            own = {r["tier"]: r for r in rows if r["parameters"] == parameters}
            cells = [
                f"{r['times_a_step']:.1f} ({r['gradients']:.0f} + {r['products']:.0f})" if (r := own.get(tier)) else "–"
                for tier in TIERS
            ]
            step = median(r["step_ms"] for r in own.values())
            out.append(f"| {parameters:.1e} | {step:.1f} | " + " | ".join(cells) + " |")
    if rows := results.get("budget", []):
        out += [
            BUDGET,
            "| model | parameters | step, ms | steps | after the first | with the first | as logged | "
            "running: measurements (steps between) | GFS_4 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            out.append(
                f"| {r['model']} | {r['parameters']:.1e} | {r['step_ms']:.2f} | {r['steps']} | "
                f"{100 * r['after_the_first']:.2f} % | {100 * r['with_the_first']:.2f} % | {100 * r['logged']:.2f} % | "
                f"{r['running']} ({r['steps_between_running']}) | {r['gfs']} |"
            )
    return "\n".join(out) + "\n"


HEAD = """# Tiers: accuracy, cost, budget

    OMP_NUM_THREADS=1 python -m benchmarks.tiers
"""
ACCURACY = f"""## Accuracy

Eight runs of {STEPS} steps (seed 0), warm-up and cosine unless it says constant rate. Every {EVERY} steps from step
{FIRST} on, each estimator's latest value is compared with the exact stability ratio: the solved eigenvalue on *all* the
training data. A cell holds: rank correlation over the run · median of estimate / exact · the worst factor it was off ·
cost per training step in gradients of the batch (a product counted as two gradients, a forward pass as a third).
"""
READING = """\
The default estimator is the first row. It reaches a rank correlation of 0.95 within 5 % in {reached} of the {count}
runs. Many small products on changing parts beat few large ones at the same cost, and solving on a small part is the
worst use of it. Where a schedule moves the ratio over two orders of magnitude, following it is easy, and even a small
fixed probe does well; at a constant rate the exact ratio swings by some tens of per cent from one comparison to the
next, and not even the whole batch, solved at ten to thirty times the cost, follows that. The worst factors are those
of the first hundred steps, where the curvature changes faster than an average can. What is read along the optimizer's
step (directional) or along the gradient (batch sharpness) is another quantity, and no stand-in for the ratio away
from the edge."""
COST = """
## Cost

Medians of warm measurements at 20 consecutive steps (5 above 3e6 parameters, 2 above 3e7) of an MLP with momentum,
batch of 64, as multiples of the time of a training step; in brackets gradients + products. *Running* works on a
sixteenth of the batch. An MLP with so small a batch does little more than read its weights: a product on 4 examples
then costs a third of one on 64, and every further pass over the weights counts. In convolutions and attention over
long sequences it does not. In time a product took three to four steps here, more than the two gradients that it is
counted as above.
"""
BUDGET = """
## Budget

The default configuration, `max_overhead=0.05`, on Fashion-MNIST with AdamW: seconds of all measurements but those that
held the first of a kind, over wall time; all of them; and what the log says.
"""


def main() -> None:
    chosen = sys.argv[1:] or ["accuracy", "cost", "budget"]
    path = HERE / "tiers.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    results["threads"] = torch.get_num_threads()
    if "accuracy" in chosen:
        results["accuracy"] = [row for name, make in runs().items() for row in follow(name, make)]
        _write(results)
    if "budget" in chosen:
        results["budget"] = [
            budget("MLP, batch 32", lambda: connected(64, 1), 32, 40.0),
            budget("MLP, batch 256", lambda: connected(512, 3), 256, 60.0),
            budget("MLP, batch 256", lambda: connected(2048, 3), 256, 150.0),
            budget("CNN with BatchNorm, batch 128", convolutional, 128, 90.0),
        ]
        _write(results)
    if "cost" in chosen:
        sizes = ((64, 2, 64), (220, 2, 64), (700, 2, 64), (2200, 2, 64), (5000, 4, 64))
        results["cost"] = [row for size in sizes for row in cost(*size)]
    _write(results)


def _write(results: dict[str, Any]) -> None:
    (HERE / "tiers.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "tiers.md").write_text(render(results))


if __name__ == "__main__":
    main()
