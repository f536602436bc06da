"""The doctor: whether a job can be measured, how, for what price, and what to set; without a job, what is installed."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfs_core import ConfigError, Measurement, read_history
from gfs_report import jobs
from gfs_report.advice import Advice, advise, interval
from gfs_report.runs import Run, read_run
from gfs_report.units import size

BEGIN = 8  # steps before the first measurement: Adam has second moments then, and the steps have their usual speed
STEPS = BEGIN + 9  # everything is measured at the first of them, cold, and at the last; the running estimate settles
_OPTIONS: dict[str, Any] = {
    "tier": "gfs",
    "every": 8,
    "running_every": 1,
    "max_overhead": None,
    "alarm": "off",
}
# Of what a monitor with these leaves out.
_INTERVALS = {"directional": 4, "batch_sharpness": 8, "sharpness": 4, "midpoint": 4}
_TIERS = ("running", "directional", "batch_sharpness", "sharpness", "midpoint", "gfs")
# A running ratio is 0.3 to 1.5 of the solved one once it has settled; it is the mean of a handful of products here.
_APART = 10.0
_NAMES = (
    "gfs-sharpness", "torch", "lightning", "pytorch-lightning", "transformers", "accelerate", "torchmetrics",
    "jsonargparse", "tensorboard", "bokeh", "typer", "rich",
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """A package: its version, empty where it is not there, and what this package asks of it."""

    name: str
    version: str
    wanted: str
    enough: bool


@dataclass(frozen=True)
class Price:
    """What one measurement of a tier costs, all that belongs to it included.

    Attributes:
        tier: its name.
        seconds: wall time, warm.
        steps: the same in training steps.
        every: steps between measurements for 5 % of the training time.
        memory: bytes of its vectors.
    """

    tier: str
    seconds: float
    steps: float
    every: int
    memory: int | None


@dataclass(frozen=True)
class Examination:
    """What the doctor has found.

    Attributes:
        target: the job.
        measurable: whether a stability ratio could be had.
        facts: of model, data and optimizer.
        products: how Hessian-vector products are computed, and why.
        precision: in which precision is measured, and why.
        threshold: the optimizer's rule, or why there is none.
        values: the last measurement, by name.
        step: seconds of a training step without measuring.
        prices: of each tier that could be had.
        memory: what measuring adds to the peak, against what is free; in a sentence.
        problems: why values could not be had.
        advice: what to set; ``None`` where the job cannot be measured.
    """

    target: str
    measurable: bool
    facts: dict[str, Any]
    products: str
    precision: str
    threshold: str
    values: dict[str, float]
    step: float | None
    prices: list[Price]
    memory: str
    problems: list[str]
    advice: Advice | None

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain values, for programs."""
        held = asdict(self)
        if self.advice is not None:
            held["advice"] |= {"python": self.advice.python, "yaml": self.advice.yaml, "flags": self.advice.flags}
        return held


def installed() -> list[Installed]:
    """The packages that this one works with."""
    from packaging.requirements import Requirement

    asked = {}
    for text in metadata.requires("gfs-sharpness") or []:
        requirement = Requirement(text)
        if str(requirement.specifier):
            asked[requirement.name.lower()] = requirement.specifier
    found = [Installed("python", platform.python_version(), "", True)]
    for name in _NAMES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        wanted = asked.get(name)
        enough = not version or wanted is None or wanted.contains(version, prereleases=True)
        found.append(Installed(name, version, "" if wanted is None else str(wanted), enough))
    return found


def accelerators() -> list[str]:
    """The accelerators that torch sees, by name."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def examine(
    job: jobs.Target, *, patience: float = 600.0, told: Callable[[int], None] = lambda step: None
) -> Examination:
    """Run the job for its first steps, measure everything a few times, and say what was found.

    Args:
        job: what to run.
        patience: seconds without a sign of life after which it is given up.
        told: called with the steps taken, now and then.

    Raises:
        ConfigError: the target cannot be run.
        JobFailed: it crashed or hung.
    """
    with tempfile.TemporaryDirectory(prefix="gfs-doctor-") as folder:
        plan = jobs.Plan(STEPS, _OPTIONS, begin=BEGIN, intervals=_INTERVALS)
        outcome = jobs.run(job, plan, Path(folder) / "run", patience=patience, told=told)
        history = sorted(outcome.folder.glob("history*.jsonl"))
        try:
            measured = read_history(history[0]) if history else []
        except ConfigError:  # no line was complete
            measured = []
        printed = jobs.last_lines(outcome.folder / "output.txt", 1000)
        step = _step_seconds(read_run(outcome.folder))
    last = next((m for m in measured if m.step == STEPS - 1), Measurement(STEPS - 1))
    begun = "were not kept"  # weights of the steps before the monitor began
    problems = [reason for m in measured for reason in m.reasons if begun not in reason or m.step > BEGIN]
    problems += [line.strip() for line in re.findall(r"GFSWarning: gfs: (?:stability measurement: )?(.*)", printed)]
    if outcome.steps < STEPS:
        problems.append(f"the job ended after {outcome.steps} steps; it takes {STEPS} to measure everything")
    values = _latest(measured)
    apart = _disagreement(values)
    problems = list(dict.fromkeys([*problems, *([apart] if apart else [])]))
    facts = outcome.facts
    measurable = any(m.stability_ratio is not None for m in measured)
    prices = _prices(facts, step) if measurable else []
    return Examination(
        target=job.name,
        measurable=measurable,
        facts={k: v for k, v in facts.items() if not isinstance(v, dict)},
        products=_products(facts, problems) if measured else "not computed",
        precision=_precision(facts, problems),
        threshold=_threshold(facts),
        values=values,
        step=step,
        prices=prices,
        memory=_memory(facts),
        problems=problems,
        advice=_advise(prices, step, facts, last, apart) if prices and step is not None else None,
    )


def _step_seconds(run: Run) -> float | None:
    """Seconds of a step before measuring began; the first ones hold what is done once."""
    clock = run.logged.get("seconds")
    durations = np.diff(clock.values[:BEGIN])[1:] if clock is not None else np.array([])
    return float(np.median(durations)) if len(durations) else None


def _prices(facts: dict[str, Any], step: float | None) -> list[Price]:
    parts = facts.get("measuring", {}).get("prices", {})
    vectors = facts.get("vector_bytes", {})
    out = []
    for tier in _TIERS:
        if tier in parts and step:
            needed = parts.get("sharpness", 0.0) if tier in ("midpoint", "gfs") else 0.0
            seconds = parts.get("", 0.0) + parts[tier] + needed
            out.append(Price(tier, seconds, seconds / step, interval(seconds, step), vectors.get(tier)))
    return out


def _advise(prices: list[Price], step: float, facts: dict[str, Any], last: Measurement, apart: str) -> Advice:
    """What to set; ``last`` is what was measured at the last step, where all tiers were due."""
    fits = facts.get("measuring", {}).get("fits")
    extra = {}
    if fits is not None and last.sharpness is not None:  # else it is not known whether so many fit
        extra["probe_size"] = (fits, f"Memory had no room for twice as many examples; it had for probe_size={fits}.")
    return advise(
        step,
        {p.tier: p.seconds for p in prices},
        running="it is far from the solved ratio here" if apart else "",
        empirical=bool(facts.get("empirical")),
        extra=extra,
    )


def _disagreement(values: dict[str, float]) -> str:
    """A remark on a running ratio that is far from the solved one, with the likely cause; empty where it is not."""
    running, solved = values.get("running_stability_ratio", 0.0), values.get("stability_ratio", 0.0)
    if not (running > 0 and solved > 0) or 1 / _APART <= running / solved <= _APART:
        return ""
    text = f"the running stability ratio, {running:.3g}, is far from the solved one, {solved:.3g}"
    if running > solved:
        return (
            f"{text}: it comes from parts of batches, and differs where the loss is no mean over the examples of a "
            "batch or the optimizer's second moments are still young; go by the solved one"
        )
    return (
        f"{text}: it averages over batches and begins low, and the solved one is that of a single batch, whose noise "
        "it finds where batches are small; more steps tell (`gfs pilot`)"
    )


def _products(facts: dict[str, Any], problems: list[str]) -> str:
    """How products are computed; the reason is taken out of ``problems``, for it is none."""
    why = next((p for p in problems if p.startswith(("products come from", "second derivatives need"))), "")
    if why:
        problems.remove(why)
    how = facts.get("measuring", {}).get("products")
    if how == "gradients":
        return why or "products come from differences of gradients"
    return f"exact, by double backward; {why}" if why else "exact, by double backward; checked against gradients"


def _precision(facts: dict[str, Any], problems: list[str]) -> str:
    why = next((p for p in problems if "measured in float32" in p), "")
    dtypes = ", ".join(facts.get("dtypes", []))
    text = f"training computes in {facts.get('precision', 'an unknown precision')}, weights are {dtypes}"
    return f"{text}; {why}" if why else text


def _threshold(facts: dict[str, Any]) -> str:
    if facts.get("threshold") is None:
        return facts.get("no_threshold") or "not known"
    kind = "preconditioned sharpness" if facts.get("preconditioned") else "sharpness"
    return f"{facts['optimizer']}: by formula, a {kind} of {facts['threshold']:.4g} at its present rate"


def _latest(measured: list[Measurement]) -> dict[str, float]:
    """The latest of each value that was had."""
    unwanted = ("alarm", "overhead", "hvps", "grad_evals", "seconds")
    return {key: value for m in measured for key, value in m.values().items() if key not in unwanted}


def _memory(facts: dict[str, Any]) -> str:
    peaks, free = facts.get("peak_bytes"), facts.get("free_bytes")
    weights = f"weights {size(facts.get('weight_bytes', 0))}"
    if peaks is None:
        return f"{weights}; what measuring adds is not known on this system"
    more = peaks["after"] - peaks["before"]
    text = f"{weights}; measuring raised the peak by {size(more)} to {size(peaks['after'])}"
    return text if free is None else f"{text}; {size(free)} were still free at the end"
