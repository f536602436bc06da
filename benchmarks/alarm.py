"""Does the alarm speak before the loss does? Faults in the middle of a training, and rules that watch it.

Writes alarm.json and alarm.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.alarm
The recorded runs are kept in $GFS_ALARM_RUNS (by default a folder of the temporary directory) and not made twice. They
take an hour on one core, the comparison some minutes.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import torch
from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException
from matplotlib.figure import Figure
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.data import digits, fashion_mnist
from benchmarks.tiers import Characters, adamw, cnn, mlp, sgd, text
from gfs_core import AlertLevel, EarlyWarning, Key, Profile, Reading
from gfs_core.signals.training import LOSS, STEP_RATE

HERE = Path(__file__).parent
RUNS = Path(os.environ.get("GFS_ALARM_RUNS", Path(tempfile.gettempdir()) / "gfs-alarm-runs"))
BATCH, EVERY = 64, 5
HEALTHY, AFTER, LONG = 300, 200, 600  # steps before the fault, after it, and of a run without one
SEEDS = range(5, 25)  # the alarm's rules were chosen on the seeds 0 to 4 and 100 to 102
ALLOWED, TOGETHER = 2.0, 20  # false alarms per 10,000 healthy steps; steps within which alarms count as one
LEAD = 10  # steps by which the alarm is to be earlier at faults of the rate
RATE = "learning rate over median of 50"
NEVER = (math.inf, math.inf)  # thresholds that nothing reaches
RUNNING_RATIO = Key("running_stability_ratio", "")
Batch = tuple[Tensor, Tensor]


# --- recording ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong from one step on; ``k`` counts the steps since, from 0.

    Attributes:
        rate: factor of the learning rate.
        inputs: factor of the inputs (of text: of the embedded characters).
        labels: whether the labels of each batch are shuffled.
        half: whether gradients go through float16 with a loss scale that doubles in every step and is never lowered.
        fresh: whether the optimizer's state is lost.
    """

    rate: Callable[[int], float] = lambda k: 1.0
    inputs: Callable[[int], float] = lambda k: 1.0
    labels: bool = False
    half: bool = False
    fresh: bool = False


OVERFLOW = "float16 overflow"
FAULTS = {
    "rate ×3": Fault(rate=lambda k: 3.0),
    "rate ×10": Fault(rate=lambda k: 10.0),
    "rate ×30": Fault(rate=lambda k: 30.0),
    "ramp 2 %": Fault(rate=lambda k: 1.02 ** (k + 1)),
    "ramp 5 %": Fault(rate=lambda k: 1.05 ** (k + 1)),
    "resume, rate ×5": Fault(rate=lambda k: 5.0, fresh=True),
    "labels shuffled": Fault(labels=True),
    "inputs grow 2 %": Fault(inputs=lambda k: 1.02 ** (k + 1)),
    "one bad batch": Fault(inputs=lambda k: 30.0 if k == 0 else 1.0),
    OVERFLOW: Fault(half=True),
}
RATE_FAULTS, OTHER_FAULTS = list(FAULTS)[:6], list(FAULTS)[6:]
OPTIMIZERS = ("momentum", "AdamW")
WORKLOADS = ("digits, MLP", "Fashion-MNIST, CNN", "text, transformer")


@dataclass
class Training:
    """A training with its monitor; a deep copy goes on from the same state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    overhead: float | None = None
    gain: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        self.monitor = gfs.StabilityMonitor(
            self.model, self.optimizer, gfs.GFSConfig(tier="running", every=EVERY, max_overhead=self.overhead)
        )
        self.rates = [g["lr"] for g in self.optimizer.param_groups]

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""
        x, y = batch
        if x.is_floating_point():
            out = self.model(self.gain[0] * x)
        else:
            handle = self.model.embed.register_forward_hook(lambda _m, _i, out: self.gain[0] * out)  # type: ignore[union-attr]
            out = self.model(x)
            handle.remove()
        return nn.functional.cross_entropy(out.flatten(0, -2), y.flatten())

    def step(self, batch: Batch, step: int, factor: float, scale: float | None) -> tuple[float, float, float | None]:
        """One training step: loss, norm of the gradient, and the running stability ratio where one was measured."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scale is not None:
            for g in grads:
                g.copy_((g * scale).half().float() / scale)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        measurement = self.monitor.step(self.loss, batch, step, loss=loss)
        self.optimizer.step()
        return loss.item(), norm, None if measurement is None else measurement.running_stability_ratio


@dataclass(frozen=True)
class Workload:
    """A model with its data and the rate of each optimizer."""

    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    rates: dict[str, float]

    def training(self, optimizer: str, seed: int, times: float = 1.0, overhead: float | None = None) -> Training:
        """A training at its start, its rate that of the workload times ``times``."""
        torch.manual_seed(seed)
        model = self.model()
        made = {"momentum": sgd, "AdamW": adamw}[optimizer](model, times * self.rates[optimizer])
        return Training(model, made, overhead)


def workloads() -> dict[str, Workload]:
    characters, alphabet = text(2000, 24)
    return {
        "digits, MLP": Workload(lambda: mlp(nn.ReLU), lambda: digits(1437), {"momentum": 0.03, "AdamW": 2e-3}),
        "Fashion-MNIST, CNN": Workload(cnn, lambda: fashion_mnist(3000), {"momentum": 0.03, "AdamW": 2e-3}),
        "text, transformer": Workload(
            lambda: Characters(alphabet, 24, 32), lambda: characters, {"momentum": 0.1, "AdamW": 3e-3}
        ),
    }


Stream = dict[str, list[Any]]  # "loss", "gradient", "ratio": one value per step; no ratio: None


def record(workload: Workload, optimizer: str, seed: int, overhead: float | None = None) -> dict[str, Any]:
    """All runs of one seed: two without a fault, and one per fault, from the same state."""
    data = workload.data()
    generator = torch.Generator().manual_seed(1000 + seed)
    total = max(LONG, HEALTHY + AFTER + EVERY)
    epochs = math.ceil(total / (len(data[1]) // BATCH))
    count = len(data[1])
    order = torch.cat([torch.randperm(count, generator=generator)[: count // BATCH * BATCH] for _ in range(epochs)])
    start = HEALTHY + seed % EVERY  # a measurement does not always come with the fault

    def made() -> Training:
        return workload.training(optimizer, seed, overhead=overhead)

    def run(
        training: Training, begin: int, end: int, fault: Fault, schedule: Callable[[int], float] = lambda step: 1.0
    ) -> Stream:
        out: Stream = {"loss": [], "gradient": [], "ratio": []}
        clock = training.monitor._schedule.clock
        clock.load(times if begin else clock.state())  # a run's budget does not grow while another one runs
        for step in range(begin, end):
            k = step - begin
            rows = order[step * BATCH : (step + 1) * BATCH]
            x, y = data[0][rows], data[1][rows]
            if fault.labels:
                y = y.flatten()[torch.randperm(y.numel(), generator=generator)].reshape(y.shape)
            if fault.fresh and k == 0:
                training.optimizer.state.clear()
            training.gain[0] = fault.inputs(k)
            scale = 2.0 ** (10 + k) if fault.half else None
            loss, norm, ratio = training.step((x, y), step, fault.rate(k) * schedule(step), scale)
            for name, value in (("loss", loss), ("gradient", norm), ("ratio", ratio)):
                out[name].append(value)
            if not math.isfinite(loss):
                break  # nothing but this follows
        return out

    training = made()
    times: dict[str, Any] = {}
    before = run(training, 0, start, Fault())
    times |= training.monitor._schedule.clock.state()
    tails = {name: run(copy.deepcopy(training), start, start + AFTER, fault) for name, fault in FAULTS.items()}
    rest = run(training, start, LONG, Fault())
    constant = {name: before[name] + rest[name] for name in before}
    return {
        "start": start,
        "constant": constant,
        "schedule": run(made(), 0, LONG, Fault(), warm_cosine),
        "faults": tails,
    }


def warm_cosine(step: int) -> float:
    return min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * step / LONG))


def recorded(name: str, workload: Workload, optimizer: str, seed: int, overhead: float | None = None) -> dict[str, Any]:
    budget = "" if overhead is None else f"-{overhead}"
    path = RUNS / f"{name.split(',')[0]}-{optimizer}-{seed}{budget}.json"
    if not path.is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(workload, optimizer, seed, overhead)))
        print(f"recorded {path.name}", flush=True)
    held: dict[str, Any] = json.loads(path.read_text())
    return held


# --- rules ----------------------------------------------------------------------------------------------------------


class Rule:
    """A rule with one knob: a larger value speaks less."""

    memory: int | None = None  # steps before a fault that it needs to have seen; None: all

    def __init__(self, name: str, knob: str, values: list[float], kind: str = "loss") -> None:
        self.name, self.knob, self.values, self.kind = name, knob, values, kind

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        raise NotImplementedError


class Score(Rule):
    """Speaks where a number is above the knob, or the loss or the gradient is not finite."""

    def __init__(self, name: str, knob: str, values: list[float], score: Callable[[Stream], list[float]], kind: str):
        super().__init__(name, knob, values, kind)
        self.score = score
        self.held: dict[int, list[float]] = {}

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        if id(stream["loss"]) not in self.held:
            self.held[id(stream["loss"])] = self.score(stream)
        return [i for i, v in enumerate(self.held[id(stream["loss"])]) if not v <= knob]


def over_deviation(stream: Stream) -> list[float]:
    out = []
    for i, loss in enumerate(stream["loss"]):
        recent = stream["loss"][max(i - 50, 0) : i]
        if len(recent) < 20:
            out.append(_unless(loss))
            continue
        mean = fmean(recent)
        out.append((loss - mean) / (math.sqrt(fmean((x - mean) ** 2 for x in recent)) + 1e-12))
    return out


def over_median(key: str, memory: float) -> Callable[[Stream], list[float]]:
    """The (smoothed) value over the median of the last 50."""

    def score(stream: Stream) -> list[float]:
        out, mean = [], None
        for i, value in enumerate(stream[key]):
            mean = value if mean is None else memory * mean + (1 - memory) * value
            recent = stream[key][max(i - 50, 0) : i]
            out.append(mean / median(recent) if len(recent) >= 20 else _unless(value))
        return out

    return score


def _unless(value: float) -> float:
    return -math.inf if math.isfinite(value) else math.inf


class RunningMean:
    """What SpikeDetection asks of its torchmetrics mean, at a fraction of the time; `main` compares the two."""

    def __init__(self, window: int) -> None:
        self.held: deque[float] = deque(maxlen=window)

    def to(self, device: Any) -> None:
        """It has nothing to move."""

    def update(self, value: Tensor) -> None:
        """Take in one loss."""
        self.held.append(value.item())

    def compute(self) -> Tensor:
        """The mean so far."""
        return torch.tensor(fmean(self.held) if self.held else math.nan)


class Lightning(Rule):
    """Lightning's own detector, its class as it is; the batch that it raises for is left out, as it asks."""

    memory = 60  # its window is 10

    def __init__(self, name: str, knob: str, values: list[float], tolerance: str, quick: bool = True) -> None:
        super().__init__(name, knob, values)
        self.tolerance, self.quick = tolerance, quick

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        tolerances = {"atol": None, "rtol": None, self.tolerance: knob}
        detector = SpikeDetection(exclude_batches_path=str(RUNS / "skip.json"), **tolerances)  # type: ignore[arg-type]
        detector._handle_spike = _speak  # type: ignore[method-assign, assignment]
        if self.quick:
            detector.running_mean = RunningMean(10)  # type: ignore[assignment]
        out = []
        for i, loss in enumerate(stream["loss"]):
            try:
                detector.on_train_batch_end(ONE_DEVICE, torch.tensor(loss), None, i)
            except TrainingSpikeException:
                out.append(i)
        return out


def _speak(fabric: Any, batch: int) -> None:
    raise TrainingSpikeException(batch)  # without the file of batches to skip


class Ours(Rule):
    """The package's early warning, whole or in parts.

    Args:
        name: of the rule.
        reads: what it is given; without its losses they still tell whether training makes fast progress.
        level: from which on it speaks.
    """

    def __init__(
        self, name: str, reads: tuple[str, ...] = ("rate", "loss", "ratio"), level: AlertLevel = AlertLevel.ALARM
    ) -> None:
        super().__init__(name, "strictness", [round(0.5 + 0.05 * i, 2) for i in range(41)], "ours")
        self.reads, self.level = reads, level
        self.profile = Profile() if "loss" in reads else replace(Profile(), spike=NEVER, mean_rise=NEVER)

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        warning, out = EarlyWarning(self.profile.scaled(knob)), []
        for step, (loss, ratio, rate) in enumerate(zip(stream["loss"], stream["ratio"], stream["rate"], strict=True)):
            readings = []
            if "rate" in self.reads:
                readings.append(Reading(STEP_RATE, step, rate))
            if "loss" in self.reads or math.isfinite(loss):
                readings.append(Reading(LOSS, step, loss))
            if "ratio" in self.reads:
                readings.append(Reading(RUNNING_RATIO, step, ratio))
            alerts = [a for r in readings if (a := warning.observe(r)) is not None]
            # On the way down nothing new is said.
            out += [a.step for a in alerts if a.rule != "calm" and a.level >= self.level]
        return out


ONE_DEVICE: Any = SimpleNamespace(
    strategy=SimpleNamespace(
        root_device="cpu", barrier=lambda: None, reduce_boolean_decision=lambda decision, all: bool(decision)
    )
)


def geometric(first: float, last: float, factor: float) -> list[float]:
    return [first * factor**i for i in range(math.ceil(math.log(last / first, factor)) + 1)]


def all_rules() -> list[Rule]:
    return [
        Ours("alarm"),
        Ours("alarm, without the rate", ("loss", "ratio")),
        Ours("alarm, ratio alone", ("ratio",)),
        Ours("alarm, loss alone", ("loss",)),
        Score("loss > mean + k·σ of 50", "k", geometric(2, 60, 1.02), over_deviation, "loss"),
        Score(
            "mean loss (0.9) over median of 50", "factor", geometric(1.02, 10, 1.01), over_median("loss", 0.9), "loss"
        ),
        Lightning("Lightning, rtol", "rtol", geometric(0.1, 30, 1.05), "rtol"),
        Lightning("Lightning, atol", "atol", geometric(0.02, 30, 1.05), "atol"),
        Score(
            "gradient over median of 50", "factor", geometric(1.2, 100, 1.03), over_median("gradient", 0.0), "gradient"
        ),
        Score(RATE, "factor", geometric(1.1, 20, 1.01), over_median("rate", 0.0), "rate"),
        Score(
            "mean gradient (0.9) over median of 50",
            "factor",
            geometric(1.05, 50, 1.02),
            over_median("gradient", 0.9),
            "gradient",
        ),
    ]


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One recorded run; ``fault`` starts at step ``start``, ``None``: a healthy run."""

    workload: str
    optimizer: str
    seed: int
    fault: str | None
    start: int
    stream: Stream

    def harm(self) -> int | None:
        """Steps from the fault until the loss is twice what it was and stays there, or is not finite; ``None``: never.

        It stays there if nine in ten of all later losses are as high.
        """
        losses = self.stream["loss"]
        limit = 2 * fmean(losses[self.start - 50 : self.start])
        high = [not loss <= limit for loss in losses]
        for i in range(self.start, len(losses)):
            if not math.isfinite(losses[i]) or (high[i] and fmean(high[i:]) >= 0.9):
                return i - self.start
        return None


def cases(overhead: float | None = None, seeds: range | None = None) -> list[Case]:
    out = []
    for name, workload in workloads().items():
        for seed in SEEDS if seeds is None else seeds:
            for optimizer in workload.rates:
                held = recorded(name, workload, optimizer, seed, overhead)
                start = held["start"]
                rates = {"constant": [1.0] * LONG, "schedule": [warm_cosine(step) for step in range(LONG)]}
                for kind, rate in rates.items():
                    out.append(Case(name, optimizer, seed, None, start, {**held[kind], "rate": rate}))
                for fault, after in held["faults"].items():
                    whole = {key: held["constant"][key][:start] + after[key] for key in after}
                    whole["rate"] = [1.0] * start + [FAULTS[fault].rate(k) for k in range(len(after["loss"]))]
                    out.append(Case(name, optimizer, seed, fault, start, whole))
    return out


def false_alarms(rule: Rule, knob: float, healthy: list[Case]) -> int:
    """How often it speaks; what follows within 20 steps counts as the same alarm."""
    count = 0
    for case in healthy:
        last = -math.inf
        for step in rule.alarms(case.stream, knob):
            count += step - last > TOGETHER
            last = step
    return count


def tune(rule: Rule, healthy: list[Case]) -> tuple[float, float]:
    """The smallest knob that keeps within the allowed false alarms, with their number per 10,000 steps."""
    steps = sum(len(c.stream["loss"]) for c in healthy)
    rates: dict[int, float] = {}

    def too_many(i: int) -> bool:
        rates[i] = 1e4 * false_alarms(rule, rule.values[i], healthy) / steps
        return rates[i] > ALLOWED

    low, high = -1, len(rule.values) - 1  # too many at low, not at high
    assert not too_many(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_many(middle) else (low, middle)
    return rule.values[high], rates[high]


def delay(rule: Rule, knob: float, case: Case) -> float:
    """Steps from the fault to the first alarm; infinite: none in the recorded steps."""
    first = 0 if rule.memory is None else case.start - rule.memory
    stream = case.stream if first == 0 else {key: values[first:] for key, values in case.stream.items()}
    return next((s + first - case.start for s in rule.alarms(stream, knob) if s + first >= case.start), math.inf)


def quantile(values: list[float], q: float) -> float:
    """The value that a fraction q of the others does not exceed; infinite values are allowed."""
    return sorted(values)[max(math.ceil(q * len(values)) - 1, 0)]


def compare(all_cases: list[Case]) -> dict[str, Any]:
    healthy = [c for c in all_cases if c.fault is None]
    faulty = [c for c in all_cases if c.fault is not None]
    harms = [math.inf if (h := c.harm()) is None else h for c in faulty]
    rules: list[tuple[Rule, float, float]] = [(rule, *tune(rule, healthy)) for rule in all_rules()]
    rows: list[dict[str, Any]] = []
    steps = sum(len(c.stream["loss"]) for c in healthy)
    for extra in (Ours("alarm, as it comes"), Ours("watch, as it comes", level=AlertLevel.WATCH)):
        rules.append((extra, 1.0, 1e4 * false_alarms(extra, 1.0, healthy) / steps))
    for rule, knob, rate in rules:
        delays = [delay(rule, knob, c) for c in faulty]
        for fault, optimizer, workload in itertools.product(FAULTS, OPTIMIZERS, (None, *WORKLOADS)):
            chosen = [
                (d, h)
                for d, h, c in zip(delays, harms, faulty, strict=True)
                if (c.fault, c.optimizer) == (fault, optimizer) and workload in (None, c.workload)
            ]
            if not chosen:
                continue
            own, harmed = [d for d, _ in chosen], [(d, h) for d, h in chosen if h < math.inf]
            rows.append({
                "rule": rule.name,
                "kind": rule.kind,
                "fault": fault,
                "optimizer": optimizer,
                "workload": workload or "all",
                "runs": len(own),
                "recall": fmean(d < math.inf for d in own),
                "quartiles": [_plain(quantile(own, q)) for q in (0.25, 0.5, 0.75)],
                "harmed": len(harmed),
                "steps_to_harm": _plain(quantile([h for _, h in harmed], 0.5)) if harmed else None,
                "before_harm": fmean(d < h for d, h in harmed) if harmed else None,
                "steps_left": _plain(-quantile([d - h for d, h in harmed], 0.5)) if harmed else None,
            })  # fmt: skip
        print(rule.name, knob, rate, flush=True)
    kinds = Counter((c.workload, c.optimizer) for c in healthy)
    return {
        "seeds": {f"{w}, {o}": n // 2 for (w, o), n in kinds.items()},
        "healthy_steps": steps,
        "rules": [
            {"rule": r.name, "kind": r.kind, "knob": r.knob, "value": k, "false_alarms": rate} for r, k, rate in rules
        ],
        "rows": rows,
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- tables ---------------------------------------------------------------------------------------------------------


Table = dict[tuple[str, str, str, str], dict[str, Any]]  # by rule, fault, optimizer, workload


def middle(row: dict[str, Any]) -> float:
    """The median delay; infinite where more than half of the runs passed without an alarm."""
    found: float | None = row["quartiles"][1]
    return math.inf if found is None else found


def best(table: Table, kinds: dict[str, str], fault: str, optimizer: str, workload: str = "all") -> dict[str, Any]:
    """The row of the rule with the smallest median delay; of equal ones the one that finds most."""
    return min((table[name, fault, optimizer, workload] for name in kinds), key=lambda r: (middle(r), -r["recall"]))


def number(value: float | None) -> str:
    return "–" if value is None or math.isinf(value) else f"{value:.0f}"


def cell(row: dict[str, Any]) -> str:
    if not row["recall"]:
        return "never"
    first, half, last = map(number, row["quartiles"])
    return f"{half} ({first} to {last}), {100 * row['recall']:.0f} %"


def header(names: list[str]) -> str:
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def summary(table: Table, others: dict[str, str]) -> list[str]:
    """The sentences at the top, from the numbers."""
    pairs = list(itertools.product(RATE_FAULTS, OPTIMIZERS))
    leads = {}
    for fault, optimizer in pairs:
        own, other = middle(table["alarm", fault, optimizer, "all"]), middle(best(table, others, fault, optimizer))
        leads[fault, optimizer] = 0.0 if own == other else other - own
    reached = [pair for pair in pairs if leads[pair] >= LEAD]
    named = [
        f"{r['fault']}, {r['optimizer']} ({number(middle(r))} against "
        f"{number(middle(best(table, others, r['fault'], r['optimizer'])))}; {r['harmed']} of {r['runs']} runs harmed)"
        for r in (table["alarm", f, o, "all"] for f, o in reached)
    ]
    out = [
        f"* **Faults of the rate.** The aim was a lead of {LEAD} steps in the median over the best other rule. It is "
        f"reached in {len(reached)} of {len(pairs)} cases: {'; '.join(named)}. Where no run was harmed the alarm told "
        "of a change, not of a danger."
    ]
    missed = [pair for pair in pairs if pair not in reached]
    if missed:
        found = [f"{f}, {o} ({leads[f, o]:+.0f})" for f, o in missed]
        slowest = max(middle(best(table, others, f, o)) for f, o in missed)
        out.append(
            f"* It is not reached in {len(missed)}: {'; '.join(found)}. There the best other rule takes "
            f"{number(slowest)} steps at most in the median"
            + (f": the loss shows the fault at once, and nothing could lead by {LEAD}." if slowest < LEAD else ".")
        )
    by_loss = {name: kind for name, kind in others.items() if kind == "loss"}
    cases = list(itertools.product(OTHER_FAULTS, OPTIMIZERS))
    late = [
        f"{f}, {o} ({number(middle(table['alarm', f, o, 'all']))} against {number(middle(best(table, by_loss, f, o)))})"
        for f, o in cases
        if middle(table["alarm", f, o, "all"]) > middle(best(table, by_loss, f, o))
    ]
    out.append(
        "* **Other faults.** The aim was to be no later in the median than the best rule that sees the loss alone. It "
        f"is reached in {len(cases) - len(late)} of {len(cases)} cases."
        + (f" Later: {'; '.join(late)}." if late else "")
    )
    bests = [(table["alarm", f, o, "all"], best(table, others, f, o)) for f, o in cases]
    earlier = [
        f"{own['fault']}, {own['optimizer']} ({number(middle(row))} against {number(middle(own))})"
        for own, row in bests
        if middle(row) < middle(own) and row["kind"] != "loss"
    ]
    if earlier:
        out.append(f"* A rule that sees the gradient is earlier at: {'; '.join(earlier)}.")
    ramps = [(f, o) for f, o in pairs if f.startswith("ramp")]
    ours = [table["alarm", f, o, "all"] for f, o in ramps]
    rest = [most_left(table, others, f, o) for f, o in ramps]
    out.append(
        f"* **Before the harm.** On the ramps the alarm came before it in {span(ours, 'before_harm', 100)} % of the "
        f"harmed runs, with {span(ours, 'steps_left')} steps left in the median; the other rule that left most time "
        f"did in {span(rest, 'before_harm', 100)} %, with {span(rest, 'steps_left')} left."
    )
    columns = [c for c in itertools.product(FAULTS, WORKLOADS, OPTIMIZERS) if c[0] != OVERFLOW]
    pairs_of = [(c, table["alarm", c[0], c[2], c[1]], best(table, others, c[0], c[2], c[1])) for c in columns]
    behind = [
        f"{', '.join(c)} ({number(middle(own))} against {number(middle(other))})"
        for c, own, other in pairs_of
        if middle(own) > middle(other)
    ]
    out.append(
        f"* **By workload** the alarm is later than the best other rule in {len(behind)} of "
        f"{len(columns)} medians (the overflow left out)" + (f": {'; '.join(behind)}." if behind else ".")
    )
    rows = [(table[RATE, f, o, "all"], table["alarm", f, o, "all"]) for f, o in pairs]
    silent = sorted({r["fault"] for r, _ in rows if math.isinf(middle(r))})
    out.append(
        "* **What the rate alone tells.** The alarm reads the learning rate as well, before the step: a jump needs no "
        "measurement. A rule that reads nothing else is left out of the others, as nothing but the rate can alarm it. "
        f"It is earlier than the alarm in {sum(middle(r) < middle(own) for r, own in rows)} of {len(rows)} cases, and "
        f"mostly silent at {', '.join(silent) or 'none'}: its knob has to let a warm-up pass. The row *alarm, without "
        "the rate* is what measurements and losses see."
    )
    return out


def span(rows: list[dict[str, Any]], key: str, factor: float = 1.0) -> str:
    """The smallest to the largest value."""
    values = [math.nan if r[key] is None else factor * r[key] for r in rows]
    return f"{min(values):.0f}" if min(values) == max(values) else f"{min(values):.0f} to {max(values):.0f}"


def most_left(table: Table, others: dict[str, str], fault: str, optimizer: str) -> dict[str, Any]:
    """The row of the rule that leaves most steps before the harm, in the median."""

    def left(row: dict[str, Any]) -> tuple[float, float]:
        return (-math.inf if row["steps_left"] is None else row["steps_left"], row["before_harm"] or 0.0)

    return max((table[name, fault, optimizer, "all"] for name in others), key=left)


def render(results: dict[str, Any]) -> str:
    table: Table = {(r["rule"], r["fault"], r["optimizer"], r["workload"]): r for r in results["rows"]}
    others = {r["rule"]: r["kind"] for r in results["rules"] if r["kind"] not in ("ours", "rate")}
    out = [HEAD, METHOD.format(**NUMBERS), *summary(table, others), "", RULES.format(steps=results["healthy_steps"])]
    out.append(header(["rule", "knob", "false alarms per 10,000 healthy steps"]))
    out += [f"| {r['rule']} | {r['knob']} {r['value']:.2f} | {r['false_alarms']:.1f} |" for r in results["rules"]]
    for title, faults in ((f"\n## Faults of the rate\n\n{DELAYS}", RATE_FAULTS), ("\n## Other faults", OTHER_FAULTS)):
        out.append(title)
        for optimizer in OPTIMIZERS:
            out += ["", header([optimizer, *faults])]
            for name in (r["rule"] for r in results["rules"]):
                out.append(f"| {name} | " + " | ".join(cell(table[name, f, optimizer, "all"]) for f in faults) + " |")
    columns = list(itertools.product(WORKLOADS, OPTIMIZERS))
    out += [WORKLOAD, header(["fault", *(f"{w}, {o}" for w, o in columns)])]
    for fault in FAULTS:
        pairs = [(table["alarm", fault, o, w], best(table, others, fault, o, w)) for w, o in columns]
        out.append(f"| {fault} | " + " | ".join(f"{number(middle(a))} / {number(middle(b))}" for a, b in pairs) + " |")
    out += [HARM, header(["fault", "optimizer", "harmed", "after steps", "alarm", "best other rule", "which"])]
    for fault, optimizer in itertools.product(FAULTS, OPTIMIZERS):
        own, other = table["alarm", fault, optimizer, "all"], most_left(table, others, fault, optimizer)
        harmed = f"| {fault} | {optimizer} | {own['harmed']} of {own['runs']} | "
        if own["harmed"]:
            sides = [f"{100 * r['before_harm']:.0f} %, {number(r['steps_left'])}" for r in (own, other)]
            harmed += f"{number(own['steps_to_harm'])} | " + " | ".join(sides) + f" | {other['rule']} |"
        else:
            harmed += "never |  |  |  |"
        out.append(harmed)
    return "\n".join(out) + "\n"


NUMBERS = {
    "seeds": len(SEEDS), "batch": BATCH, "first": HEALTHY, "last": HEALTHY + EVERY - 1,
    "after": AFTER, "every": EVERY, "allowed": ALLOWED, "long": LONG,
}  # fmt: skip
HEAD = """# Early warning: who speaks first?

    OMP_NUM_THREADS=1 python -m benchmarks.alarm

![Steps from a fault to the alarm, by rule](alarm.svg)
"""
METHOD = """\
Three trainings (an MLP on digits, a CNN on 3000 images of Fashion-MNIST, a transformer on the characters of Python's
help texts), two optimizers each, {seeds} seeds, batches of {batch}. A fault
begins at one of the steps {first} to {last} and lasts {after} steps. The stability ratio is the running estimate,
as the monitor gives it every {every} steps before the optimizer's step; the loss is known at every step. Every rule has
one knob, set as low as {allowed:.0f} false alarms per 10,000 steps of the healthy runs allow: {long} steps per seed at
a constant rate, and {long} with 60 steps of warm-up and a cosine. The alarm's knob scales all its thresholds. Its rules
were chosen on eight other seeds, but the thresholds of the ratio were raised beside those of the loss after the false
alarms of the first of these seeds had been counted, and all of them once more, by one factor, after those of ten of
these seeds. False alarms come in clusters (a batch that shakes one run shakes
all of its seed), so that their rate is not known well.
"""
RULES = """\
## Rules

{steps} healthy steps; alarms within 20 steps of the last one count as the same. A loss that is not finite is an alarm
by every rule, a gradient that is not for those that see it. *Lightning* is `SpikeDetection` itself with one of its
tolerances, the other off; the batch that it raises for is left out, as in use. *As it comes*: the thresholds as they
are in the package. A ramp multiplies the rate by 1.02 or 1.05 in every step. *Resume*: the optimizer's state is lost
and the rate five times as high. *Inputs grow*: by 2 % in every step; of text, the embedded characters. *One bad batch*:
its inputs are 30 times as large. *float16 overflow*: gradients go through float16 with a loss scale that starts at 1024
and doubles in every step.
"""
DELAYS = """\
Steps from the fault to the first alarm: median (quartiles) over all runs, and the share of runs in which it came within
the recorded steps. –: more runs passed without one."""
WORKLOAD = """
## By workload

Median delay of the alarm / of the best other rule for that column.
"""
HARM = """
## Before the harm

Harm: the loss is twice the mean of the last 50 steps before the fault and stays there (nine in ten of all later losses
are as high), or is not finite. *Alarm* and *best other rule*: the share of the harmed runs in which it came before the
harm, and the steps that were left in the median; the other rule is the one that leaves most.
"""


DRAWN = (
    "alarm",
    "alarm, without the rate",
    "loss > mean + k·σ of 50",
    "mean loss (0.9) over median of 50",
    "Lightning, rtol",
    "gradient over median of 50",
)


def draw(results: dict[str, Any]) -> None:
    """Delays as a picture: median and quartiles of every fault; at the top, what never came."""
    mpl.rcParams["svg.hashsalt"] = "alarm"
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, optimizer in zip(figure.subplots(2, 1, sharex=True), OPTIMIZERS, strict=True):
        for i, name in enumerate(DRAWN):
            rows = {
                r["fault"]: r
                for r in results["rows"]
                if (r["rule"], r["optimizer"], r["workload"]) == (name, optimizer, "all")
            }
            for x, fault in enumerate(FAULTS):
                low, mid, high = (AFTER * 1.2 if q is None else q for q in rows[fault]["quartiles"])
                place = x + 0.12 * (i - 2.5)
                axes.plot([place, place], [low, high], color=f"C{i}", linewidth=2)
                axes.plot(place, mid, "o", color=f"C{i}", markersize=6 if i else 9, label=name if x == 0 else None)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 3, 10, 30, 100, AFTER * 1.2], ["0", "1", "3", "10", "30", "100", "never"])
        axes.set_ylabel(f"{optimizer}: steps to the alarm")
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(range(len(FAULTS)), list(FAULTS), rotation=15)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(HERE / "alarm.svg", metadata={"Date": None})


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["draw"]:
        results = json.loads((HERE / "alarm.json").read_text())
        (HERE / "alarm.md").write_text(render(results))
        draw(results)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cases()
    quick, slow = Lightning("", "", [], "rtol"), Lightning("", "", [], "rtol", quick=False)
    for case in found[:3]:
        assert quick.alarms(case.stream, 0.5) == slow.alarms(case.stream, 0.5)
    results = {"versions": {"torch": torch.__version__, "python": platform.python_version()}, **compare(found)}
    (HERE / "alarm.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (HERE / "alarm.md").write_text(render(results))
    draw(results)


if __name__ == "__main__":
    main()
