"""The noise of the batches: by which measure of it a control loses fewest runs, and what each says of a healthy run.

Writes noise.json (after every run; runs already there are not made again) and noise.md.
Run (four minutes on one core): OMP_NUM_THREADS=1 python -m benchmarks.noise
With `render` it only writes the report again.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import nn

import gfs_core as gfs
from benchmarks.lib.data import sentence_data, split, text_bytes
from benchmarks.lib.models import Characters, Sentences
from benchmarks.lib.monitors import put_running
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.limit.training import EVERY, Method, train
from benchmarks.limit.workloads import WORKLOADS, Data, Workload, digits_data
from gfs_core.actions.rate import PROFILE, ControlProfile, guiding_ratio
from gfs_core.linalg.blocks import RunningBlocks
from gfs_core.signals.base import Reading
from gfs_core.signals.context import StepContext
from gfs_core.signals.curvature import RunningCurvature
from gfs_core.signals.lab import Lab

STEPS, HEALTHY_STEPS = 400, 300
MULTIPLES, POLICIES, SHAPES = (10.0, 30.0), ("cap", "follow"), ("cosine", "constant")
MISSING = 0.25  # of the progress of the untouched run at the base rate: from there on a run is lost
LESS = 0.6  # times the default margin
LENGTH, WIDTH = 48, 48
MEMORY = 0.8  # weight of the past in the scalar variance, as in the bound


def _normalised(symbols: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(),
        nn.Linear(100, classes),
    )  # fmt: skip


def _convolutions(symbols: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


@functools.cache
def byte_data() -> Data:
    """Bytes of Python's manual, and those that follow."""
    return *split(text_bytes(4000, LENGTH), 400), 256, 256


def _language(symbols: int, classes: int) -> nn.Module:
    return Characters(symbols, LENGTH, WIDTH)


# The workloads under control, their seeds and schedules; the first is what the choice was made on.
OWN = "digits, MLP, momentum"
TRIED = {
    OWN: (WORKLOADS[OWN], 1, SHAPES),
    "digits, MLP, AdamW": (WORKLOADS["digits, MLP, AdamW"], 1, SHAPES[:1]),
    "digits, CNN, momentum": (Workload(digits_data, _convolutions, adaptive=False), 1, SHAPES),
    "sentences, transformer, momentum": (
        Workload(sentence_data, Sentences, adaptive=False, images=False),
        1,
        SHAPES[:1],
    ),
}
NORMALISED = ("digits, MLP with BatchNorm, momentum", Workload(digits_data, _normalised, adaptive=False), 1, SHAPES)
FASHION = "Fashion-MNIST, CNN, momentum"
HEALTHY: dict[str, tuple[bool, float, int]] = {  # whether AdamW, the rate, the batch
    "AdamW, 1e-3, batches of 16": (True, 1e-3, 16),
    "AdamW, 3e-3, batches of 32": (True, 3e-3, 32),
    "momentum, 0.05, batches of 32": (False, 0.05, 32),
}


# --- variants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is not as usual in a control.

    Attributes:
        margin: times the default.
        profile: of the control.
        prepare: what is done to the monitor before the first step.
    """

    margin: float = 1.0
    profile: ControlProfile = PROFILE
    prepare: Callable[[gfs.StabilityMonitor], None] | None = None


def _by_pairs(values: Mapping[str, float], noisy: bool) -> float | None:
    return guiding_ratio({name: value for name, value in values.items() if name != "mean_square_bound"}, noisy)


class ScalarVariance(RunningBlocks):
    """Its bound goes by the variance of vᵀH_B·v alone; there are only single products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.moments = 0, list[tuple[float, float]]()  # means of |vᵀH_B·v| and its square in each block

    @property
    def wants_pair(self) -> bool:
        """Never."""
        return False

    def average(
        self, quotients: Sequence[float], relative_loss: float | None = None, stands_for: int = 1
    ) -> float | None:
        """The same, and what the bound is made of."""
        if len(self.moments) != len(quotients):
            self.seen, self.moments = 0, [(0.0, 0.0)] * len(quotients)
        self.seen += 1
        keep = min(MEMORY, 1 - 1 / self.seen)
        self.moments = [
            (keep * mean + (1 - keep) * abs(q), keep * square + (1 - keep) * q * q)
            for (mean, square), q in zip(self.moments, quotients, strict=True)
        ]
        return super().average(quotients, relative_loss, stands_for)

    def bound(self, weight: float) -> float | None:
        """λ + weight·σ²/λ with that variance: the largest of the blocks'."""
        known = [(mean, square) for mean, square in self.moments if mean > 0]
        return max((mean + weight * max(square - mean * mean, 0.0) / mean for mean, square in known), default=None)


class Counted(RunningCurvature):
    """Counts the noise of whole batches in front of BatchNorm always, or never, whatever the control does."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def measure(self, step: StepContext, lab: Lab) -> list[Reading]:
        """Noise is not counted where a control only lowers the rate."""
        return super().measure(replace(step, rate_only_lowered=not self.always), lab)


def _scalar(monitor: gfs.StabilityMonitor) -> None:
    signal = RunningCurvature()
    signal.estimate = ScalarVariance()
    put_running(monitor, signal)


def _whole(monitor: gfs.StabilityMonitor) -> None:
    monitor.measuring.learned.splits, monitor.measuring.learned.whole = False, "this benchmark wants whole batches"


PAIRS, BOUND = replace(PROFILE, ratio=_by_pairs), "bound (default)"
VARIANTS = {
    BOUND: Variant(),
    "unbiased": Variant(profile=PAIRS),
    f"unbiased, {LESS} of the margin": Variant(LESS, PAIRS),
    "scalar variance": Variant(prepare=_scalar),
    f"bound on whole batches, every {4 * EVERY}": Variant(prepare=_whole),
}
COUNTED = {
    "noise counted": Variant(prepare=lambda monitor: put_running(monitor, Counted(True))),
    "noise not counted": Variant(prepare=lambda monitor: put_running(monitor, Counted(False))),
}


FEW = {name: VARIANTS[name] for name in (BOUND, "unbiased")}
SETTINGS = [
    *((name, *made, VARIANTS) for name, made in TRIED.items()),
    (FASHION, WORKLOADS[FASHION], 1, SHAPES[:1], FEW),
    (*NORMALISED, COUNTED),
]


def _run(workload: Workload, variant: Variant, policy: str, shape: str, rate: float, seed: int) -> Row:
    options: dict[str, Any] = {"tier": "running", "every": EVERY, "control": policy, "max_overhead": None}
    if variant.margin != 1.0:
        options["margin"] = round(variant.margin * PROFILE.margin_of(workload.adaptive), 3)
    method = Method(shape, options=options, profile=variant.profile, prepare=variant.prepare)
    return train(workload, method, rate, seed, STEPS).row()


def _untouched(workload: Workload, shape: str, seed: int) -> Row:
    return train(workload, Method(shape), workload.rate, seed, STEPS).row()


def _healthy(adaptive: bool, rate: float, batch: int) -> Row:
    workload = Workload(byte_data, _language, adaptive, images=False, accuracy=False)
    method = Method("cosine", warmup=True, options={"tier": "running", "every": EVERY, "max_overhead": None})
    run = train(workload, method, rate, 0, HEALTHY_STEPS, batch=batch)
    found: dict[str, list[float]] = {"plain": [], "mean_square": [], "bound": []}
    below = 0
    for m in run.measurements:
        if m.running_stability_ratio is None or m.mean_square_stability_ratio is None or m.mean_square_bound is None:
            continue
        below += m.mean_square_stability_ratio < m.running_stability_ratio
        for key, value in zip(
            found, (m.running_stability_ratio, m.mean_square_stability_ratio, m.mean_square_bound), strict=True
        ):
            found[key].append(value)
    values = {k: {"median": round(median(v), 3), "max": round(max(v), 3)} for k, v in found.items()}
    return {**run.row(), **values, "measurements": len(found["plain"]), "below": below}


# --- report ---------------------------------------------------------------------------------------------------------

HEAD = """# The noise of the batches

    OMP_NUM_THREADS=1 python -m benchmarks.noise

torch {torch}. How noisy steps stay stable depends on λ + f·σ²/λ ([control](../docs/control.md)). Three ways to σ² from
products on parts of a batch: *unbiased*, ½‖p − q‖² of two products at one direction on two parts, which is what
`gfs/mean_square_stability_ratio` shows; *bound*, ‖H_B·v‖² − (vᵀH_B·v)² of single products, which counts how far the
direction lags as noise, and by which a control goes; *scalar variance*, that of vᵀH_B·v alone.

## Runs lost under control

Base rates ×10 and ×30, `cap` and `follow`, {steps} steps in batches of 64, measured every {every} steps with no
budget; base rate 0.05 with momentum 0.9, 0.003 with AdamW. Schedules: cosine and constant (AdamW, the transformer and
Fashion-MNIST: cosine). A run is *lost* if
a quarter or more of the progress in training loss is missing that the same training makes at the base rate without
control. In brackets: accuracy in validation, median and smallest. The choice was made on the workload of the first
table; all tables are of one process, made afterwards. With BatchNorm whole batches are measured; there `cap` does not
count the noise as it comes, and `follow` does. The CNN of digits has two convolutions; the transformer and the CNN of
Fashion-MNIST are those of [limit](limit.md).
"""
HEALTHY_HEAD = """## What each says of a healthy run

A causal transformer of two blocks over the bytes of Python's manual ({length} at a time, width {width}), {steps} steps,
warm-up and cosine, observed only, measured every {every} steps. Ratios over the whole run. *Below*: measurements whose
ratio in the mean square is less than the plain one, which its formula forbids.
"""
COLUMNS = ["run", "loss: first", "last", "measured", "plain: median", "max", "mean square: median", "max"]


def _lost(results: dict[str, Any], name: str) -> bool:
    workload, _, _, shape, _, seed = name.split(" | ")
    run, good = results["control"][name], results["untouched"][f"{workload} | {shape} | {seed}"]
    return run["final"] is None or run["final"] - good["final"] >= MISSING * (good["initial"] - good["final"])


def _cell(results: dict[str, Any], names: list[str]) -> str:
    values = [results["control"][n]["value"] or 0.0 for n in names]
    lost = sum(_lost(results, n) for n in names)
    return f"{lost} of {len(names)} ({median(values):.3f}, {min(values):.3f})"


def render(results: dict[str, Any]) -> str:
    """The page."""
    out = [HEAD.format(torch=results["environment"]["torch"], steps=STEPS, every=EVERY)]
    columns = [(p, m) for p in POLICIES for m in MULTIPLES]
    for workload, _, _, _, kinds in SETTINGS:
        rows = []
        for kind in kinds:
            own = [n for n in results["control"] if n.startswith(f"{workload} | {kind} | ")]
            cells = [
                _cell(results, [n for n in own if n.split(" | ")[2] == p and n.split(" | ")[4] == str(m)])
                for p, m in columns
            ]
            rows.append([kind, *cells, f"{sum(_lost(results, n) for n in own)} of {len(own)}"])
        out += [f"**{workload}**", "", *table(["σ²", *(f"{p}, ×{m:.0f}" for p, m in columns), "lost in all"], rows), ""]
    rows = []
    for name in HEALTHY:
        row = results["healthy"][name]
        ratios = [f"{row[k][of]:.3g}" for k in ("plain", "mean_square", "bound") for of in ("median", "max")]
        rows.append([name, f"{row['initial']:.2f}", f"{row['final']:.2f}", row["measurements"], *ratios, row["below"]])
    healthy = HEALTHY_HEAD.format(length=LENGTH, width=WIDTH, steps=HEALTHY_STEPS, every=EVERY)
    return "\n".join([*out, healthy, *table([*COLUMNS, "bound: median", "max", "below"], rows)]) + "\n"


# --- runs -----------------------------------------------------------------------------------------------------------


def make(store: Store) -> None:
    """Every run that is not there yet."""
    for name, setting in HEALTHY.items():
        store.add("healthy", (name,), functools.partial(_healthy, *setting))
    for seed, (name, workload, seeds, shapes, kinds) in itertools.product(range(max(s[2] for s in SETTINGS)), SETTINGS):
        if seed >= seeds:
            continue
        for shape in shapes:
            untouched = functools.partial(_untouched, workload, shape, seed)
            store.add("untouched", (name, shape, seed), untouched)
        for shape, multiple, policy, kind in itertools.product(shapes, MULTIPLES, POLICIES, kinds):
            run = functools.partial(_run, workload, kinds[kind], policy, shape, multiple * workload.rate, seed)
            store.add("control", (name, kind, policy, shape, multiple, seed), run)


def main() -> None:
    """Run what is missing, and write."""
    warnings.simplefilter("ignore")
    store = Store("noise")
    if "render" not in sys.argv[1:]:
        make(store)
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
