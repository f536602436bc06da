"""The pilot: a user's own job for a few hundred steps at a few rates, and whether the signals behave there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gfs_core import ConfigError
from gfs_report import jobs
from gfs_report.advice import Advice
from gfs_report.runs import Run, read_run
from gfs_report.trial import checks
from gfs_report.trial.checks import CADENCE, EDGE, FEWEST_STEPS, TOLD, Check, Rate, nearest, rate_of_run


@dataclass(frozen=True)
class Pilot:
    """What a pilot has found.

    Attributes:
        target: what was run.
        steps: optimizer steps asked for.
        facts: of model, data and optimizer.
        rates: the runs, by factor.
        checks: what was asked of the signals.
        advice: what to set; ``None`` where nothing could be measured.
        margin: stability ratio for a control to keep below, and why.
        limits: what is not proved, or could not be seen.
        runs: what was logged, by factor.
    """

    target: str
    steps: int
    facts: dict[str, Any]
    rates: list[Rate]
    checks: list[Check]
    advice: Advice | None
    margin: tuple[float, str] | None
    limits: list[str]
    runs: dict[float, Run] = field(repr=False, default_factory=dict)

    @property
    def behaves(self) -> bool:
        """Whether the signals behave, as far as this pilot could tell."""
        return all(c.answer != "no" for c in self.checks)

    @property
    def lead(self) -> list[str]:
        """The verdict, in a few sentences."""
        own = nearest(self.rates)
        seen = f"{own.steps} steps at {', '.join(f'×{r.factor:g}' for r in self.rates)} of its learning rate"
        wrong = [c.evidence for c in self.checks if c.answer == "no"]
        if wrong:
            first = [f"The signals do not behave on this job, by {seen}.", *wrong]
        else:
            open_ = [c.question for c in self.checks if c.answer == "not told"]
            first = [f"The signals behave on this job, as far as {seen} can tell."]
            first += [f"Left open: {' '.join(open_)}"] if open_ else []
        harmed = any(r.harm is not None for r in self.rates)
        wanted = (EDGE, TOLD) if harmed else (EDGE,)
        rest = [c.evidence for c in self.checks if c.question in wanted and c.evidence not in wrong]
        return [*first, *rest, *([] if self.advice is None else [f"Set {self.advice.python}."])]

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain values, for programs."""
        return {
            "behaves": self.behaves,
            "verdict": self.lead,
            "target": self.target,
            "steps": self.steps,
            "facts": self.facts,
            "rates": [{name: _plain(value) for name, value in vars(rate).items()} for rate in self.rates],
            "checks": [asdict(c) for c in self.checks],
            "advice": None if self.advice is None else asdict(self.advice) | {"python": self.advice.python},
            "margin": None if self.margin is None else {"value": self.margin[0], "why": self.margin[1]},
            "limits": self.limits,
        }


def pilot(
    job: jobs.Target,
    *,
    steps: int = 300,
    rates: Sequence[float] = (0.5, 1.0, 2.0),
    out: Path = Path("gfs-pilot"),
    patience: float = 600.0,
    told: Callable[[float, int], None] = lambda factor, step: None,
) -> Pilot:
    """Run the job at each rate, one after the other, and judge.

    Args:
        job: what to run.
        steps: optimizer steps of each run.
        rates: factors on the job's own learning rate.
        out: folder for what the runs leave behind, each in its own ``rate-…``.
        patience: seconds without a sign of life after which a run is given up.
        told: called with a factor and the steps that its run has taken, now and then.

    Raises:
        ConfigError: a number is out of its range, or the target cannot be run.
        JobFailed: the run at the user's own rate crashed or hung.
        OSError: ``out`` cannot be written.
    """
    if steps < FEWEST_STEPS:
        raise ConfigError(f"`steps` must be ≥ {FEWEST_STEPS}, for everything to be measured twice; got {steps}")
    if not rates or not all(0 < r < float("inf") for r in rates):
        raise ConfigError(f"`rates` must be factors > 0 on the job's own learning rate, got {list(rates)}")
    options = {"tier": "gfs", "every": CADENCE["gfs"], "running_every": CADENCE["running"]}
    options |= {"max_overhead": None}
    intervals = {"sharpness": CADENCE["sharpness"]}
    for old in out.glob("rate-*"):  # of an earlier pilot in this folder
        if (old / "output.txt").is_file():
            shutil.rmtree(old)
    found: dict[float, Rate] = {}
    runs: dict[float, Run] = {}
    facts: dict[str, Any] = {}
    for factor in sorted(set(rates), key=lambda r: abs(np.log(r))):  # the user's own first: it tells whether it runs
        folder = out / f"rate-{factor:g}"
        plan = jobs.Plan(steps, options, factor, intervals=intervals)
        ended, problem = "error", ""
        try:
            outcome = jobs.run(job, plan, folder, patience=patience, told=partial(told, factor))
            ended, facts = outcome.ended, facts or outcome.facts
        except jobs.JobFailed as error:
            if not found:
                raise
            problem = str(error).splitlines()[0]
        run = _read(folder)
        if run is not None:
            runs[factor] = run
        found[factor] = rate_of_run(factor, ended, run, facts, problem)
    ordered = checks.held_against_lower([found[factor] for factor in sorted(found)], runs)
    asked = checks.ask(ordered, facts)
    return Pilot(
        job.name,
        steps,
        facts,
        ordered,
        asked,
        checks.what_to_set(ordered, asked, facts),
        checks.margin(ordered, facts),
        checks.limits(ordered, facts, steps),
        {factor: runs[factor] for factor in sorted(runs)},
    )


def _read(folder: Path) -> Run | None:
    try:
        return read_run(folder)
    except ConfigError:  # it failed before there was anything to log
        return None


def _plain(value: Any) -> Any:
    """Named tuples as dictionaries, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: _plain(v) for name, v in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(v) for name, v in vars(value).items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
