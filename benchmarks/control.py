"""Control of the learning rate: whether it makes up for a wrong base rate, its cost, and what it is that works.

Writes control.json (after every run; runs already there are not made again), control.md and control.svg.
Run: OMP_NUM_THREADS=1 python -m benchmarks.control [rates] [edge] [start] [price] [ablation]
With `render` it only writes the report again.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import pydoc_data.topics
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import gfs_core as gfs
from benchmarks.data import digits, fashion_mnist
from benchmarks.tiers import Characters, adamw, cnn, mlp, sgd, text
from gfs_core.actions.rate import PROFILE, ControlProfile

try:
    import schedulefree  # type: ignore[import-untyped]
except ImportError:
    schedulefree = None

HERE = Path(__file__).parent
PARTS = ("rates", "edge", "start", "price", "ablation")
STEPS, BATCH, EVERY = 400, 64, 5
WARMUP = 0.05  # of the steps
PLATEAU = 25  # steps over which the plateau scheduler's loss is the mean, and over which the final loss is
MULTIPLES = (0.1, 1.0, 3.0, 10.0, 30.0)
START_STEPS = 200  # of STEPS, for the part `start`
SPIKE = 1.5  # times the initial loss, within the first tenth of the steps
SEEDS = {"rates": 5, "edge": 3, "start": 5, "price": 3, "ablation": 3}
DAMAGE, DAMAGED_LOSS = 3.0, 0.2  # times the best final loss of the same kind of run, and above this
GOAL = 0.01  # of accuracy
FREE = PROFILE.free  # measurements that no budget holds back
LENGTH, WORDS, WIDTH = 24, 16, 32  # characters of an example, words of a sentence, width of both transformers
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


# --- workloads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model, its data and its base rate.

    Attributes:
        data: gives training and validation data, and how many symbols and classes there are.
        model: made from those two numbers.
        adaptive: AdamW, otherwise SGD with momentum 0.9.
        images: whether it counts for the goal.
        accuracy: what is reported: the accuracy in validation, otherwise the loss.
    """

    data: Callable[[], tuple[Batch, Batch, int, int]]
    model: Callable[[int, int], nn.Module]
    adaptive: bool
    images: bool = True
    accuracy: bool = True

    @property
    def rate(self) -> float:
        """The base rate."""
        return 3e-3 if self.adaptive else 0.05


class Sentences(nn.Module):
    """A small transformer over the words of a sentence, with the mean over them at the end; 0 is no word."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, WIDTH), nn.Parameter(torch.zeros(WORDS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        there = (x > 0).unsqueeze(-1).float()
        hidden = self.blocks(self.embed(x) + self.place)
        out: Tensor = self.head((hidden * there).sum(1) / there.sum(1).clamp(min=1))
        return out


def _split(data: Batch, held_out: int) -> tuple[Batch, Batch]:
    """Training and validation data, by a fixed permutation."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))
    now, later = order[held_out:], order[:held_out]
    return (data[0][now], data[1][now]), (data[0][later], data[1][later])


@functools.cache
def digits_data() -> tuple[Batch, Batch, int, int]:
    return *_split(digits(), 360), 0, 10


@functools.cache
def fashion_data() -> tuple[Batch, Batch, int, int]:
    x, y = fashion_mnist(6000)
    return (x[:5000], y[:5000]), (x[5000:], y[5000:]), 0, 10


@functools.cache
def text_data() -> tuple[Batch, Batch, int, int]:
    data, alphabet = text(5000, LENGTH)
    return *_split(data, 500), alphabet, alphabet


@functools.cache
def sentence_data() -> tuple[Batch, Batch, int, int]:
    """Sentences of the eight topics of Python's manual that have most; the 1500 commonest words."""
    found = {
        topic: [re.findall(r"[a-z_]+", s.lower()) for s in re.split(r"[.!?]\s", body)]
        for topic, body in pydoc_data.topics.topics.items()
    }
    kept = {topic: [s for s in sentences if len(s) >= 4] for topic, sentences in found.items()}
    chosen = sorted(kept, key=lambda topic: -len(kept[topic]))[:8]
    counts = Counter(word for topic in chosen for s in kept[topic] for word in s)
    ids = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(1500))}
    rows = [([ids.get(w, 1) for w in s][:WORDS], label) for label, topic in enumerate(chosen) for s in kept[topic]]
    x = torch.tensor([words + [0] * (WORDS - len(words)) for words, _ in rows])
    return *_split((x, torch.tensor([label for _, label in rows])), len(rows) // 5), len(ids) + 2, len(chosen)


def _mlp(symbols: int, classes: int) -> nn.Module:
    return mlp(nn.ReLU)


def _cnn(symbols: int, classes: int) -> nn.Module:
    return cnn()


def _characters(symbols: int, classes: int) -> nn.Module:
    return Characters(symbols, LENGTH, WIDTH)


WORKLOADS = {
    "digits, MLP, momentum": Workload(digits_data, _mlp, adaptive=False),
    "digits, MLP, AdamW": Workload(digits_data, _mlp, adaptive=True),
    "Fashion-MNIST, CNN, momentum": Workload(fashion_data, _cnn, adaptive=False),
    "Fashion-MNIST, CNN, AdamW": Workload(fashion_data, _cnn, adaptive=True),
    "characters, transformer, AdamW": Workload(text_data, _characters, adaptive=True, images=False, accuracy=False),
    "sentences, transformer, AdamW": Workload(sentence_data, Sentences, adaptive=True, images=False),
}
IMAGES = [name for name, workload in WORKLOADS.items() if workload.images]


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How the rate is set.

    Attributes:
        shape: what the schedule looks like: constant, cosine or plateau.
        warmup: whether there is a linear warm-up.
        free: schedule-free.
        options: of the monitor; ``None``: no monitor.
        profile: of the control.
    """

    shape: str = "constant"
    warmup: bool = False
    free: bool = False
    options: dict[str, Any] | None = None
    profile: ControlProfile = PROFILE

    def factor(self, step: int, steps: int) -> float:
        """The schedule's factor of the base rate."""
        first = max(1, round(WARMUP * steps)) if self.warmup else 0
        if step < first:
            return (step + 1) / first
        along = (step - first) / (steps - first)
        return 0.5 * (1 + math.cos(math.pi * along)) if self.shape == "cosine" else 1.0


def _controlled(policy: str, shape: str, **options: Any) -> Method:
    made = {"tier": "running", "every": EVERY, "control": policy, **options}
    return Method(shape, options=made)


BASELINES = {
    "constant": Method(),
    "warm-up + cosine": Method("cosine", warmup=True),
    "plateau": Method("plateau"),
    "schedule-free": Method(warmup=True, free=True),
}
if schedulefree is None:
    del BASELINES["schedule-free"]
OURS = {
    "cap, cosine": _controlled("cap", "cosine"),
    "cap, constant": _controlled("cap", "constant"),
    "follow, cosine": _controlled("follow", "cosine"),
    "follow, constant": _controlled("follow", "constant"),
}
METHODS = {**BASELINES, "CDAT": _controlled("cdat", "constant"), **OURS}
STARTS = {
    "no warm-up": Method(),
    "linear warm-up of 5 %": Method(warmup=True),
    "control='warmup'": _controlled("warmup", "constant"),
}


@dataclass
class Training:
    """One training and what is to be known of it.

    Attributes:
        losses: of the steps taken; the last one may not be finite.
        measurements: the monitor's.
        measuring: seconds in the monitor, …
        rest: … and in everything else of the steps.
        times: seconds of each step, all included.
    """

    losses: list[float] = field(default_factory=list)
    measurements: list[gfs.Measurement] = field(default_factory=list)
    measuring: float = 0.0
    rest: float = 0.0
    times: list[float] = field(default_factory=list)
    value: float = math.nan
    lost: bool = False

    @property
    def final(self) -> float:
        """Mean loss of the last steps."""
        return fmean(self.losses[-PLATEAU:])

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, or ends above its start."""
        return not self.final <= self.losses[0]

    def row(self) -> Row:
        """What is stored of it."""
        return {
            "value": _number(self.value),
            "initial": _number(self.losses[0]),
            "final": _number(self.final),
            "diverged": self.diverged,
            "steps": len(self.losses),
            "overhead": self.measurements[-1].overhead if self.measurements else None,
            "lost": self.lost,
            "seconds": round(self.measuring + self.rest, 2),
        }


def _number(value: float) -> float | None:
    """A number for JSON; ``None``: not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _optimizer(model: nn.Module, workload: Workload, method: Method, rate: float, steps: int) -> Any:
    if not method.free:
        return (adamw if workload.adaptive else sgd)(model, rate)
    first = max(1, round(WARMUP * steps))
    if workload.adaptive:
        return schedulefree.AdamWScheduleFree(model.parameters(), rate, weight_decay=0.01, warmup_steps=first)
    return schedulefree.SGDScheduleFree(model.parameters(), rate, momentum=0.9, warmup_steps=first)


def train(
    workload: Workload,
    method: Method,
    rate: float,
    seed: int,
    steps: int,
    *,
    batch: int = BATCH,
    taken: int | None = None,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
) -> Training:
    """Train for ``taken`` of ``steps`` steps; a run whose loss is not finite ends there."""
    data, held_out, symbols, classes = workload.data()
    torch.manual_seed(seed)
    model = workload.model(symbols, classes)
    made: Any = _optimizer(model, workload, method, rate, steps) if optimizer is None else optimizer(model, rate)
    plateau = ReduceLROnPlateau(made, factor=0.5, patience=2) if method.shape == "plateau" else None
    run, generator, order = Training(), torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)

    def loss_of(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    monitor = None
    if method.options is not None:
        monitor = gfs.StabilityMonitor(model, made, gfs.GFSConfig(**method.options))
        monitor.control.profile = method.profile
    if method.free:
        made.train()
    for step in range(steps if taken is None else taken):
        if plateau is None and not method.free:
            for group in made.param_groups:
                group["lr"] = rate * method.factor(step, steps)
        if len(order) < batch:
            order = torch.randperm(len(data[1]), generator=generator)
        rows, order = order[:batch], order[batch:]
        own = data[0][rows], data[1][rows]
        began = time.perf_counter()
        made.zero_grad()
        loss = loss_of(own)
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        measurement = None if monitor is None else monitor.step(loss_of, own, loss=loss)
        after = time.perf_counter()
        made.step()
        ended = time.perf_counter()
        run.rest += ended - after + before - began
        run.measuring += after - before
        run.times.append(ended - began)
        run.losses.append(float(loss.detach()))
        if measurement is not None and measurement.seconds is not None:
            run.measurements.append(measurement)
        if not math.isfinite(run.losses[-1]):
            break
        if plateau is not None and (step + 1) % PLATEAU == 0:
            plateau.step(run.final)
    if monitor is not None:
        run.lost = monitor.control.lost
        monitor.close()
    if method.free:
        made.eval()
    with torch.no_grad():
        out = model(held_out[0])
        right = (out.argmax(-1) == held_out[1]).float().mean()
        run.value = float(right if workload.accuracy else loss_of(held_out))
    return run


# --- parts ----------------------------------------------------------------------------------------------------------


class Store:
    """The results, saved after every run."""

    def __init__(self) -> None:
        self.path = HERE / "control.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.results["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
        self.results["threads"] = torch.get_num_threads()

    def add(self, part: str, key: tuple[Any, ...], make: Callable[[], Row]) -> Row:
        """The row of this run, made only where it is not there."""
        rows = self.results.setdefault(part, {})
        name = " | ".join(map(str, key))
        if name not in rows:
            began = time.perf_counter()
            rows[name] = make()
            print(f"{part} | {name}: {rows[name]} ({time.perf_counter() - began:.1f} s)", flush=True)
            self.save()
        found: Row = rows[name]
        return found

    def save(self) -> None:
        """Write the results, a line per run."""
        held = []
        for part, rows in self.results.items():
            if part in (*PARTS, "cost"):
                lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
                held.append(f" {json.dumps(part)}: {{\n{lines}\n }}")
            else:
                held.append(f" {json.dumps(part)}: {json.dumps(rows)}")
        written = self.path.with_suffix(".tmp")
        written.write_text("{\n" + ",\n".join(held) + "\n}\n")
        written.replace(self.path)


def row_of(workload: Workload, method: Method, rate: float, seed: int, steps: int) -> Row:
    """What is stored of one training."""
    return train(workload, method, rate, seed, steps).row()


def fraction(workload: Workload, method: Method) -> Row:
    """The time that control adds, as a fraction of that of the same run without it, and the steps that leaves.

    The free measurements weigh more in a shorter run: the steps are those that take as long as all of them without
    control, counted in a run that is long enough.
    """
    train(workload, method, workload.rate, 0, STEPS, taken=20)  # the first calls are slow
    found = []
    for _ in range(3):
        run = train(workload, method, workload.rate, 0, STEPS)
        allowed = STEPS * run.rest / len(run.losses)
        steps = next((i for i, spent in enumerate(itertools.accumulate(run.times), 1) if spent >= allowed), STEPS)
        found.append((steps, run.rest / len(run.losses)))
    steps, each = sorted(found)[1]
    return {"fraction": round(STEPS / steps - 1, 3), "step_ms": round(1e3 * each, 3), "steps": steps}


def rates(store: Store) -> None:
    for name, workload in WORKLOADS.items():
        store.add("cost", (name, "running"), functools.partial(fraction, workload, OURS["cap, cosine"]))
        store.add("cost", (name, "cdat"), functools.partial(fraction, workload, METHODS["CDAT"]))
    for seed, (name, workload) in itertools.product(range(SEEDS["rates"]), WORKLOADS.items()):
        for multiple, (key, method) in itertools.product(MULTIPLES, METHODS.items()):
            steps = STEPS
            if method.options is not None:
                kind = "cdat" if method.options["control"] == "cdat" else "running"
                steps = store.results["cost"][f"{name} | {kind}"]["steps"]
            rate = multiple * workload.rate
            make = functools.partial(row_of, workload, method, rate, seed, steps)
            store.add("rates", (name, key, multiple, seed), make)


def start(store: Store) -> None:
    def made(workload: Workload, method: Method, rate: float, seed: int) -> Row:
        run = train(workload, method, rate, seed, STEPS, taken=START_STEPS)
        early = run.losses[: STEPS // 10]
        return {**run.row(), "spiked": not max(early) <= SPIKE * early[0] or not math.isfinite(early[-1])}

    for seed, (name, workload) in itertools.product(range(SEEDS["start"]), WORKLOADS.items()):
        for multiple, (key, method) in itertools.product((1.0, 10.0, 30.0), STARTS.items()):
            make = functools.partial(made, workload, method, multiple * workload.rate, seed)
            store.add("start", (name, key, multiple, seed), make)


def price(store: Store) -> None:
    for seed, (name, workload) in itertools.product(range(SEEDS["price"]), WORKLOADS.items()):
        for multiple, policy, budget in itertools.product(MULTIPLES, ("cap", "follow"), (0.05, None)):
            method = _controlled(policy, "cosine", max_overhead=budget)
            make = functools.partial(row_of, workload, method, multiple * workload.rate, seed, STEPS)
            store.add("price", (name, policy, budget, multiple, seed), make)


def _plain(measurement: gfs.Measurement, noisy: bool) -> float | None:
    return measurement.running_stability_ratio


def _short_horizon(measurement: gfs.Measurement, noisy: bool) -> float | None:
    return measurement.gfs_stability_ratio


def _larger(measurement: gfs.Measurement, noisy: bool) -> float | None:
    found = [r for r in (measurement.running_stability_ratio, measurement.mean_square_bound) if r is not None]
    return max(found, default=None)


def _growth(factor: float) -> ControlProfile:
    return replace(PROFILE, growth=factor, growth_adaptive=factor)


DEFAULT = "default: every 5, 1/16, mean square; momentum: margin 0.5, growth 1.02; AdamW: 0.75, 1.05"
SOLVED: dict[str, Any] = {"tier": "sharpness", "running_every": None, "every": 10}
VARIANTS: dict[str, tuple[dict[str, Any], ControlProfile]] = {  # options of the monitor, and the control's profile
    DEFAULT: ({}, PROFILE),
    **{f"measured every {n}": ({"every": n}, PROFILE) for n in (2, 10, 20, 50)},
    **{f"on 1/{n} of a batch": ({"running_parts": n}, PROFILE) for n in (4, 8, 32)},
    **{f"margin {m}": ({"margin": m}, PROFILE) for m in (0.25, 0.5, 0.75, 1.0)},
    **{f"growth {g}": ({}, _growth(g)) for g in (1.005, 1.02, 1.05, 1.1)},
    "growth not limited": ({}, _growth(math.inf)),
    "by the plain running ratio": ({}, replace(PROFILE, ratio=_plain)),
    "by the larger of the plain and the mean-square ratio": ({}, replace(PROFILE, ratio=_larger)),
    "by the solved ratio of the batch, every 10": (SOLVED, PROFILE),
    "by the solved ratio of a fixed probe of 64, every 10": ({**SOLVED, "probe": "fixed", "probe_batches": 1}, PROFILE),
    "by the GFS_4 ratio of the batch, every 10": ({**SOLVED, "tier": "gfs"}, replace(PROFILE, ratio=_short_horizon)),
}
DEAR = list(VARIANTS)[-1]  # one seed only


COUNTS = ("hvps", "grad_evals")


def ablation(store: Store) -> None:
    def made(workload: Workload, method: Method, rate: float, seed: int) -> Row:
        run = train(workload, method, rate, seed, STEPS)
        counts = {n: sum(getattr(m, n) or 0 for m in run.measurements) / len(run.losses) for n in COUNTS}
        return {**run.row(), **{n: round(c, 3) for n, c in counts.items()}}

    runs = list(itertools.product(range(SEEDS["ablation"]), IMAGES, VARIANTS, (1.0, 30.0)))
    for seed, name, key, multiple in sorted(runs, key=lambda run: run[2] == DEAR):
        if key != DEAR or seed == 0:
            options, profile = VARIANTS[key]
            method = replace(_controlled("follow", "cosine", max_overhead=None, **options), profile=profile)
            rate = multiple * WORKLOADS[name].rate
            make = functools.partial(made, WORKLOADS[name], method, rate, seed)
            store.add("ablation", (name, key, multiple, seed), make)


EDGE_MODELS = {"digits, MLP": WORKLOADS[IMAGES[1]], "Fashion-MNIST, CNN": WORKLOADS[IMAGES[3]]}
EDGE_OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, float], torch.optim.Optimizer], float]] = {
    "SGD": (lambda model, rate: torch.optim.SGD(model.parameters(), rate), 0.5),
    "momentum": (sgd, 0.05),
    "AdamW": (adamw, 3e-3),
}
EDGE_RATES = (0.3, 1.0, 3.0, 10.0)
RATIOS = {"plain": "running_stability_ratio", "mean_square": "mean_square_bound"}
WINDOWS = {"first": (0.0, 1 / 8), "middle": (1 / 3, 2 / 3), "last": (2 / 3, 1.0)}


def edge(store: Store) -> None:
    def made(workload: Workload, optimizer: Any, rate: float, batch: int, seed: int) -> Row:
        options = {"max_overhead": None}
        run = train(
            workload, _controlled("observe", "constant", **options), rate, seed, STEPS, batch=batch, optimizer=optimizer
        )
        row = run.row()
        for (name, attribute), (window, (low, high)) in itertools.product(RATIOS.items(), WINDOWS.items()):
            found = [(m.step, getattr(m, attribute)) for m in run.measurements]
            held = [(step, ratio) for step, ratio in found if ratio is not None and math.isfinite(ratio)]
            inside = [ratio for step, ratio in held if low * len(run.losses) <= step <= high * len(run.losses)]
            inside = inside or [ratio for _, ratio in held[-1:]]  # a run that ended within a few steps
            row[f"{name}_{window}"] = _number(median(inside)) if inside else None
        return row

    for seed, (name, workload) in itertools.product(range(SEEDS["edge"]), EDGE_MODELS.items()):
        for (key, (optimizer, base)), batch in itertools.product(EDGE_OPTIMIZERS.items(), (16, 64, 256)):
            for multiple in EDGE_RATES:
                make = functools.partial(made, workload, optimizer, multiple * base, batch, seed)
                store.add("edge", (name, key, batch, multiple, seed), make)


# --- report ---------------------------------------------------------------------------------------------------------


def grouped(rows: dict[str, Row]) -> dict[tuple[str, ...], list[Row]]:
    """The runs that differ in nothing but their seed."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for name, row in rows.items():
        found.setdefault(tuple(name.split(" | ")[:-1]), []).append(row)
    return found


def values(rows: list[Row], accuracy: bool) -> list[float]:
    """What the runs came to in validation; a diverged run counts for what it came to, infinite where it has no loss."""
    return [(0.0 if accuracy else math.inf) if r["value"] is None else r["value"] for r in rows]


def cell(rows: list[Row] | None, accuracy: bool) -> str:
    """Median, smallest and largest value, with the number of diverged runs."""
    if not rows:
        return "–"
    found = values(rows, accuracy)
    digits_ = 3 if accuracy else 2
    low, mid, high = (_plainly(v, digits_) for v in (min(found), median(found), max(found)))
    diverged = sum(r["diverged"] for r in rows)
    return f"{mid} ({low}–{high})" + (f" †{diverged}" if diverged else "")


def _plainly(value: float, digits_: int) -> str:
    return "∞" if math.isinf(value) else f"{value:.{digits_}f}" if value < 100 else f"{value:.0e}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def _times(multiples: tuple[float, ...]) -> list[str]:
    return [f"×{m:g}" for m in multiples]


def best_baseline(groups: dict[tuple[str, ...], list[Row]], name: str) -> tuple[float, str, float]:
    """The best median among the baselines of this workload, with its method and multiple."""
    accuracy = WORKLOADS[name].accuracy
    found = [
        (median(values(rows, accuracy)), key, multiple)
        for key, multiple in itertools.product(BASELINES, MULTIPLES)
        if (rows := groups.get((name, key, str(multiple))))
    ]
    return (max if accuracy else min)(found, key=lambda f: f[0])


def render_rates(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["rates"])
    cost = results["cost"]
    out = [RATES]
    head = ["workload", "step, ms", "running: added", "steps", "CDAT: added", "steps"]
    out += table(
        head,
        [
            [
                name,
                f"{cost[f'{name} | running']['step_ms']:.1f}",
                *(
                    text_
                    for kind in ("running", "cdat")
                    for text_ in (
                        f"{100 * cost[f'{name} | {kind}']['fraction']:.0f} %",
                        str(cost[f"{name} | {kind}"]["steps"]),
                    )
                ),
            ]
            for name in WORKLOADS
        ],
    )
    for name, workload in WORKLOADS.items():
        what = "accuracy in validation" if workload.accuracy else "loss in validation (smaller is better)"
        best, key, multiple = best_baseline(groups, name)
        out += [
            f"**{name}**, base rate {workload.rate:g}: {what}. Best tuned baseline: {key}, ×{multiple:g}, {best:.3f}."
        ]
        cells = [
            [key, *(cell(groups.get((name, key, str(m))), workload.accuracy) for m in MULTIPLES)] for key in METHODS
        ]
        out += ["", *table(["method", *_times(MULTIPLES)], cells)]
    return out + losses_of_accuracy(groups) + goals(groups)


def behind(groups: dict[tuple[str, ...], list[Row]], name: str, key: str, multiple: float) -> float | None:
    """By how much the median of a method lies behind the best tuned baseline; < 0: it is ahead."""
    rows = groups.get((name, key, str(multiple)))
    if not rows:
        return None
    accuracy = WORKLOADS[name].accuracy
    return (1 if accuracy else -1) * (best_baseline(groups, name)[0] - median(values(rows, accuracy)))


def losses_of_accuracy(groups: dict[tuple[str, ...], list[Row]]) -> list[str]:
    out = [BEHIND]
    cells = []
    for name, key in itertools.product(IMAGES, METHODS):
        found = [behind(groups, name, key, m) for m in MULTIPLES]
        shown = ["–" if f is None else f"{100 * f:.1f}" for f in found]
        worst = max((f for f in found if f is not None), default=math.nan)
        cells.append([name, key, *shown, f"{100 * worst:.1f}"])
    return out + table(["workload", "method", *_times(MULTIPLES), "worst"], cells)


def goals(groups: dict[tuple[str, ...], list[Row]]) -> list[str]:
    """Sentences on the goals, from the numbers."""
    out = [GOALS]
    for key in METHODS:
        held: dict[str, list[float]] = {}
        lowest = min(
            (min(values(rows, True)) for k, rows in groups.items() if k[1] == key and k[0] in IMAGES), default=0.0
        )
        for name in IMAGES:
            held[name] = [f for m in MULTIPLES if (f := behind(groups, name, key, m)) is not None]
        pairs = [(f, name, m) for name in IMAGES for m in MULTIPLES if (f := behind(groups, name, key, m)) is not None]
        if not pairs:
            continue
        within = sum(f <= GOAL for f, _, _ in pairs)
        above = [f for f, _, m in pairs if m >= 1]
        all_of = sum(bool(h) and max(h) <= GOAL for h in held.values())
        worst = max(pairs)
        diverged = sum(r["diverged"] for k, rows in groups.items() if k[1] == key for r in rows)
        count = sum(len(rows) for k, rows in groups.items() if k[1] == key)
        out.append(
            f"- *{key}*: within {100 * GOAL:.0f} point in {within} of {len(pairs)} cells (from ×1 on in "
            f"{sum(f <= GOAL for f in above)} of {len(above)}), at every multiple on {all_of} of {len(IMAGES)} image "
            f"workloads; worst: {100 * worst[0]:.1f} points behind ({worst[1]}, ×{worst[2]:g}); "
            f"lowest accuracy of a single run {lowest:.3f}. "
            f"Diverged on all six workloads: {diverged} of {count} runs."
        )
    worse = []
    for name, key in itertools.product(WORKLOADS, OURS):
        accuracy = WORKLOADS[name].accuracy
        ours, theirs = (groups.get((name, k, "1.0")) for k in (key, "warm-up + cosine"))
        if ours and theirs:
            sign = 1 if accuracy else -1
            low = min(sign * v for v in values(theirs, accuracy))
            if (short := low - sign * median(values(ours, accuracy))) > 0:
                by = f"{100 * short:.1f} points" if accuracy else f"{short:.3f}"
                worse.append(f"*{key}* on {name} (by {by})")
    out.append("")
    if worse:
        out.append(
            f"At ×1 the median is worse than the worst seed of warm-up + cosine in {len(worse)} of "
            f"{len(WORKLOADS) * len(OURS)} cases: " + "; ".join(worse) + "."
        )
    else:
        out.append("At ×1 no median of a control is worse than the worst seed of warm-up + cosine.")
    return [*out, ""]


def render_edge(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["edge"])
    runs = damaged_runs(groups)
    head = ["data, model", "optimizer", "batch", "rate", "damaged", "final loss"]
    head += [f"{name}: {window}" for name in ("plain", "mean square") for window in ("first eighth", "middle", "last")]
    rows = []
    for key, own in groups.items():
        marks = [bad for k, bad, _ in runs if k == key]
        finals = [math.inf if r["final"] is None else r["final"] for r in own]
        cells = [_middle([r[f"{n}_{w}"] for r in own]) for n, w in itertools.product(RATIOS, WINDOWS)]
        model, optimizer, batch, multiple = key
        damaged = f"{sum(marks)} of {len(marks)}"
        rows.append([model, optimizer, batch, f"×{float(multiple):g}", damaged, _plainly(median(finals), 3), *cells])
    out = [EDGE, *table(head, rows), *areas(runs)]
    return out


def damaged_runs(groups: dict[tuple[str, ...], list[Row]]) -> list[tuple[tuple[str, ...], bool, Row]]:
    """Every run with its group and whether it is damaged."""
    finals = {key: median(_final(r) for r in rows) for key, rows in groups.items()}
    out = []
    for key, rows in groups.items():
        best = min((k for k in finals if k[:3] == key[:3]), key=lambda k: finals[k])
        above = float(key[3]) > float(best[3])
        for row in rows:
            bad = not _final(row) <= max(DAMAGE * finals[best], DAMAGED_LOSS)
            out.append((key, bad and (above or math.isinf(_final(row))), row))
    return out


def _final(row: Row) -> float:
    return math.inf if row["final"] is None else float(row["final"])


def _middle(found: list[float | None]) -> str:
    there = [f for f in found if f is not None]
    return _plainly(median(there), 2) if there else "–"


BOTH = "larger of both"
LOOKS = {"first eighth": ("first",), "thirds": ("middle", "last"), "any": ("first", "middle", "last")}


def largest(row: Row, name: str, look: str) -> float:
    """The largest median of this ratio over the parts of the run looked at; 0 where nothing was measured."""
    names = list(RATIOS) if name == BOTH else [name]
    return max(row[f"{n}_{window}"] or 0.0 for n, window in itertools.product(names, LOOKS[look]))


def area(bad: list[float], good: list[float]) -> float:
    """Area under the ROC curve: the share of pairs in which the damaged run has the larger value."""
    if not bad or not good:
        return math.nan
    return fmean((b > g) + 0.5 * (b == g) for b in bad for g in good)


def areas(runs: list[tuple[tuple[str, ...], bool, Row]]) -> list[str]:
    """Areas under the ROC curve, and what a threshold of 1 tells."""
    looks = list(itertools.product((*RATIOS, BOTH), LOOKS))
    under, at_one = [], []
    for label in ("all", *EDGE_OPTIMIZERS, "16", "64", "256", *EDGE_MODELS):
        own = [(bad, row) for key, bad, row in runs if label in (*key, "all")]
        bad, good = ([row for b, row in own if b is is_bad] for is_bad in (True, False))
        start = [f"batch {label}" if label.isdigit() else label, str(len(bad)), str(len(good))]
        found = [([largest(r, *look) for r in bad], [largest(r, *look) for r in good]) for look in looks]
        under.append(start + [f"{area(*f):.2f}" for f in found])
        at_one.append(start + [f"{sum(v >= 1 for v in b)} · {sum(v >= 1 for v in g)}" for b, g in found])
    head = ["runs", "damaged", "healthy", *(f"{name}: {look}".replace("_", " ") for name, look in looks)]
    return [AREAS, *table(head, under), ONE, *table(head, at_one), *_edge_reading(runs)]


def _edge_reading(runs: list[tuple[tuple[str, ...], bool, Row]]) -> list[str]:
    def found(label: str, name: str, look: str) -> tuple[list[float], list[float]]:
        own = [(bad, largest(row, name, look)) for key, bad, row in runs if label in (*key, "all")]
        return [v for bad, v in own if bad], [v for bad, v in own if not bad]

    areas_ = {(n, look): area(*found("all", n, look)) for n, look in itertools.product(RATIOS, LOOKS)}
    better = areas_["mean_square", "thirds"] > max(areas_["plain", "thirds"], 0.5)
    plain, square = (found("momentum", n, "first eighth") for n in RATIOS)
    return [
        f"Over all runs, by the thirds: {areas_['mean_square', 'thirds']:.2f} for the mean-square ratio, "
        f"{areas_['plain', 'thirds']:.2f} for the plain one: the mean-square ratio "
        f"{'tells' if better else 'does not tell'} damaged runs from healthy ones there. In the first eighth: "
        f"{areas_['mean_square', 'first eighth']:.2f} and {areas_['plain', 'first eighth']:.2f}. What differs there is "
        f"where the edge lies with momentum: of {len(plain[0])} damaged runs {sum(v >= 1 for v in square[0])} are at 1 "
        f"or above by the mean-square ratio and {sum(v >= 1 for v in plain[0])} by the plain one, whose largest value "
        f"is {max(plain[0], default=math.nan):.2f}; of {len(plain[1])} healthy runs {sum(v >= 1 for v in square[1])} "
        "are, by the mean-square ratio.",
        "",
    ]


def render_start(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["start"])
    rows = []
    for name, key in itertools.product((*WORKLOADS, "all"), STARTS):
        cells = []
        for multiple in ("1.0", "10.0", "30.0"):
            own = [r for k, rs in groups.items() if k[1:] == (key, multiple) and name in (k[0], "all") for r in rs]
            bad, spiked = (sum(r[n] for r in own) for n in ("diverged", "spiked"))
            cells.append(f"{bad} · {spiked} of {len(own)}")
        rows.append([name, key, *cells])
    return [START, *table(["workload", "start", "×1", "×10", "×30"], rows)]


def render_price(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["price"])
    rows = []
    for (name, workload), policy, budget in itertools.product(WORKLOADS.items(), ("cap", "follow"), ("0.05", "None")):
        own = [groups.get((name, policy, budget, str(m))) for m in MULTIPLES]
        spent = [r["overhead"] for rs in own for r in rs or [] if r["overhead"] is not None]
        share = f"{100 * median(spent):.1f} % ({100 * min(spent):.1f}–{100 * max(spent):.1f})" if spent else "–"
        cells = [cell(rs, workload.accuracy) for rs in own]
        rows.append([name, policy, "5 %" if budget == "0.05" else "none", share, *cells])
    out = [PRICE, *table(["workload", "policy", "budget", "overhead", *_times(MULTIPLES)], rows)]
    if not results.get("rates"):
        return out
    compared = grouped(results["rates"])
    out.append("Behind the best tuned baseline, in points of accuracy, over the image workloads:")
    out.append("")
    for policy, budget in itertools.product(("cap", "follow"), ("0.05", "None")):
        found = [
            (best_baseline(compared, name)[0] - median(values(there, True)), name, m)
            for name, m in itertools.product(IMAGES, MULTIPLES)
            if (there := groups.get((name, policy, budget, str(m))))
        ]
        if found:
            below = sum(f[0] <= GOAL for f in found)
            worst = max(found)
            at = f"{worst[1]}, ×{worst[2]:g}"
            above = max(f[0] for f in found if f[2] >= 1)
            out.append(
                f"- *{policy}*, {'budget 5 %' if budget == '0.05' else 'no budget'}: within {100 * GOAL:.0f} point in "
                f"{below} of {len(found)} cells; worst {100 * worst[0]:.1f} ({at}), from ×1 on {100 * above:.1f}; mean "
                f"{100 * fmean(f[0] for f in found):.1f}."
            )
    return [*out, ""]


def render_ablation(results: dict[str, Any]) -> list[str]:
    groups = grouped(results["ablation"])
    rows = []
    means: dict[str, tuple[float, float]] = {}
    for key in VARIANTS:
        places = list(itertools.product(IMAGES, ("1.0", "30.0")))
        cells = [_short(groups.get((name, key, multiple))) for name, multiple in places]
        own = [(name, r) for name, multiple in places for r in groups.get((name, key, multiple), [])]
        if not own:
            continue
        kinds = [values([r for name, r in own if WORKLOADS[name].adaptive is kind], True) for kind in (False, True)]
        if all(kinds):
            means[key] = (fmean(kinds[0]), fmean(kinds[1]))
        spent = [r["overhead"] for _, r in own if r["overhead"] is not None]
        lost = sum(r["lost"] for _, r in own)
        cells += [f"{fmean(kind):.3f} ({min(kind):.3f})" if kind else "–" for kind in kinds]
        cells.append((f"{100 * median(spent):.0f} %" if spent else "–") + (f", lost in {lost}" if lost else ""))
        rows.append([key, *cells])
    short = [f"{name}, {times}" for name, times in itertools.product(IMAGES, ("×1", "×30"))]
    head = ["variant of `follow`", *short, "momentum", "AdamW", "overhead"]
    return [ABLATION, *table(head, rows), *_ablation_reading(means)]


def _short(rows: list[Row] | None) -> str:
    whole = cell(rows, True)
    return whole.split(" (")[0] + "".join(whole.partition(" †")[1:])


def _ablation_reading(means: dict[str, tuple[float, float]]) -> list[str]:
    """What the means of the two kinds of optimizers say; in points of accuracy against the default."""
    if DEFAULT not in means:
        return []
    out = []
    for kind, name in enumerate(("momentum", "AdamW")):
        change = {key: 100 * (mean[kind] - means[DEFAULT][kind]) for key, mean in means.items() if key != DEFAULT}
        for what, held in (
            ("more than 1 point better than the default", {k: c for k, c in change.items() if c > 1}),
            ("within 1 point of it", {k: c for k, c in change.items() if -1 <= c <= 1}),
            ("worse by more than 1 point", {k: c for k, c in change.items() if c < -1}),
        ):
            ordered = sorted(held.items(), key=lambda item: -item[1])
            said = "; ".join(f"{key} ({c:+.1f})" for key, c in ordered) or "none"
            out.append(f"- *{name}*, {what}: {said}.")
    return [*out, ""]


def render(results: dict[str, Any]) -> str:
    out = [HEAD]
    makers = {
        "rates": render_rates,
        "edge": render_edge,
        "start": render_start,
        "price": render_price,
        "ablation": render_ablation,
    }
    for part, make in makers.items():
        rows, wanted = results.get(part, {}), expected(part)
        if rows:
            out += make(results)
        if len(rows) < wanted:
            out += [f"*{part}: {wanted - len(rows)} of {wanted} runs are missing.*", ""]
    out.append(f"torch {results['versions']['torch']}, Python {results['versions']['python']}, one thread.")
    return "\n".join(out) + "\n"


def expected(part: str) -> int:
    """Runs of a part when it is complete."""
    each = {
        "rates": len(WORKLOADS) * len(MULTIPLES) * len(METHODS),
        "edge": len(EDGE_MODELS) * len(EDGE_OPTIMIZERS) * 3 * len(EDGE_RATES),
        "start": len(WORKLOADS) * 3 * len(STARTS),
        "price": len(WORKLOADS) * len(MULTIPLES) * 4,
        "ablation": len(IMAGES) * 2 * len(VARIANTS),
    }
    once = len(IMAGES) * 2 * (SEEDS[part] - 1) if part == "ablation" else 0
    return each[part] * SEEDS[part] - once


def draw(results: dict[str, Any]) -> None:
    """A picture of the part `rates`, where matplotlib is installed."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return
    mpl.rcParams["svg.hashsalt"] = "control"
    groups = grouped(results["rates"])
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, workload) in zip(axes, WORKLOADS.items(), strict=True):
        ends = []
        for i, key in enumerate(METHODS):
            found = [(m, groups.get((name, key, str(m)), [])) for m in MULTIPLES]
            points = [(m, median(values(rows, workload.accuracy))) for m, rows in found if rows]
            style = "-" if key in OURS else "--"
            axis.plot(*zip(*points, strict=True), style, marker=".", color=f"C{i}", label=key)
            ends += [value for _, value in points]
        if not workload.accuracy:
            axis.set_ylim(min(ends) - 0.1, min(max(ends), min(ends) + 2.5))
        axis.set_xscale("log")
        axis.set_xticks(MULTIPLES, _times(MULTIPLES))
        axis.minorticks_off()
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("accuracy" if workload.accuracy else "loss", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(HERE / "control.svg", metadata={"Date": None})


HEAD = f"""# Control of the learning rate

    OMP_NUM_THREADS=1 python -m benchmarks.control

Batches of {BATCH} if it does not say otherwise, {STEPS} steps, ReLU. Digits: 1437 images for training, 360 for
validation. Fashion-MNIST: 5000 and 1000. Characters of Python's manual, {LENGTH} at a time: 4500 and 500. Sentences of
that manual's eight longest topics, by topic: four fifths and one fifth. AdamW has torch's defaults, momentum is 0.9. A
run has *diverged* (†, with the number of such runs) if its loss is not finite or the mean loss of its last {PLATEAU}
steps is above the first loss. Such runs count with what they came to. A run that falls back to guessing, with a loss
just below the first, is not marked; the accuracy shows it.
"""
RATES = f"""## The base rate off by a factor

Every method at multiples of one base rate, {SEEDS["rates"]} seeds: median (smallest–largest). *Plateau* halves the rate
when the mean loss of {PLATEAU} steps has not fallen for three times; *schedule-free* has a warm-up of 5 %, as
*warm-up + cosine* has; the cosines under *cap* and *follow* have none. Control has its defaults: measured every {EVERY}
steps, within the budget of 5 % of wall time.

![Validation over multiples of the base rate](control.svg)

The total cost is the same: control takes time, so controlled runs have fewer steps: as many as take the time of
{STEPS} without control. Runs are so short that the budget counts little beside the first {FREE} measurements, which
are free of it, and the models so small that much of a measurement is Python's: counted in gradients, a product on a
sixteenth of the batch every {EVERY} steps adds {200 / (16 * EVERY):.1f} %.
"""
BEHIND = """### Behind the best tuned baseline

Points of accuracy by which the median lies behind the best median of all methods without control at all multiples;
negative: ahead of it.
"""
GOALS = f"""### The goals

Within {100 * GOAL:.0f} point of that baseline at every multiple; no divergence; at ×1 not worse than warm-up + cosine
by more than its seeds differ.
"""
EDGE = f"""## Is there an edge at 1?

Constant rates, nothing controlled, {SEEDS["edge"]} seeds; base rates 0.5 (SGD), 0.05 (momentum), 0.003 (AdamW). A run
is *damaged* if its loss is not finite, or its rate is above the best one for the same data, optimizer and batch, and
the mean loss of its last {PLATEAU} steps above {DAMAGED_LOSS} and more than {DAMAGE:g} times what that rate came to.
The ratios are medians over a part of the run (of the steps taken, where it ended early), and over seeds; where there
was none (–), it counts as 0. Once such a run has come to the plateau at a loss of log 10 = 2.30, where its network
gives all inputs the same answer, the ratio is low again, and only the first eighth tells of what happened.
*Mean square* is `mean_square_bound` here and below, from single products, by which a control goes. It is no
`mean_square_stability_ratio`: these runs are older than that one's formula, for which there is no such table.
"""
AREAS = """Area under the ROC curve for *damaged* (½: tells nothing), of the median of the first eighth, of the larger
one of the middle and the last third, and of the largest of the three:
"""
ONE = """Damaged · healthy runs in which that is 1 or above:
"""
START = f"""## The start

Constant rate after the start, {SEEDS["start"]} seeds, the first {START_STEPS} of {STEPS} steps. Each cell: runs
diverged · runs whose loss rose above {SPIKE} times the first within a tenth of {STEPS} steps.
"""
PRICE = f"""## The price

*cap* and *follow* over a cosine, {SEEDS["price"]} seeds, all with {STEPS} steps: with the default budget of 5 % of wall
time, and without one. *Overhead* is what the last measurement says of the whole run: median (smallest–largest). The
first {FREE} measurements of a controlled run are free of the budget.
"""
ABLATION = f"""## What it is that works

`follow` over a cosine, {SEEDS["ablation"]} seeds (GFS_4: one), {STEPS} steps, one thing changed at a time: median
accuracy. *Momentum* and *AdamW*: mean over all runs of a line (worst run). *Overhead* is the median of what the monitor
says.
"""


def main() -> None:
    chosen = sys.argv[1:] or list(PARTS)
    warnings.simplefilter("ignore", gfs.GFSWarning)
    store = Store()
    parts = {"rates": rates, "edge": edge, "start": start, "price": price, "ablation": ablation}
    for part in chosen:
        if part != "render":
            parts[part](store)
        finish(store)


def finish(store: Store) -> None:
    """Write the report of what is there."""
    (HERE / "control.md").write_text(render(store.results))
    if store.results.get("rates"):
        draw(store.results)


if __name__ == "__main__":
    main()
