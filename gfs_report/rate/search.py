"""The ramp and the pilots of a search as runs of a user's own job, each in a process of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from gfs_core import ConfigError
from gfs_core.search.found import FoundRate, search
from gfs_core.search.pilots import Pilot
from gfs_core.search.ramp import Point, Ramp, is_lost
from gfs_core.search.trial import FEWEST, LAST, OPTIONS, check_steps
from gfs_report import jobs
from gfs_report.runs import Run, read_run

_OF_A_STEP = ("threshold", "no_threshold", "preconditioned", "vector_bytes")  # facts that say nothing of the whole run


@dataclass(frozen=True)
class FoundForJob:
    """What was found for a job.

    Attributes:
        target: what was run.
        rate: the rate, and what it rests on.
        facts: of model, data and optimizer.
    """

    target: str
    rate: FoundRate
    facts: dict[str, Any]

    @property
    def lead(self) -> list[str]:
        """What was found, in a few sentences."""
        found, (low, high) = self.rate, self.rate.range
        times = f"×{found.factor:.2g} of the job's own {found.users:.2g}"
        cost, more = found.cost, "" if found.judged_on == "validation" else ", as there are no validation data"
        where = (
            [] if found.ramp.knee is None else [f"the ratio stopped following the rate at {found.ramp.knee.rate:.2g}"]
        )
        where += [] if found.ramp.end is None else [f"the loss was lost at {found.ramp.end:.2g}"]
        return [
            f"A learning rate of {found.rate:.2g} is recommended, {times}. "
            f"Rates from {low:.2g} to {high:.2g} are about as good, as far as short runs tell.",
            *([f"While the rate rose, {' and '.join(where)}."] if where else []),
            f"The pilots were judged on {found.judged_on} data{more}. The search took {cost.steps} steps, "
            f"{cost.steps / found.steps:.0%} of a training of {found.steps}, in {cost.seconds:.0f} seconds.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for programs."""
        return {"target": self.target, "verdict": self.lead, **self.rate.to_dict(), "facts": self.facts}


def find(
    job: jobs.Target,
    *,
    steps: int | None = None,
    out: Path = Path("gfs-rate"),
    patience: float = 600.0,
    told: Callable[[str, int, int], object] = lambda what, step, of: None,
) -> FoundForJob:
    """Look for the learning rate of a job.

    Args:
        job: what is trained.
        steps: of the whole training; ``None``: those that its trainer would take.
        out: folder for what the runs leave behind.
        patience: seconds without a sign of life after which a run is given up.
        told: called with what runs, the steps that it has taken, and how many it has at most.

    Raises:
        ConfigError: a number is out of its range, or the target cannot be run.
        JobFailed: the job fails by itself, at its own rate.
        MeasurementError: no rate was found at which a pilot learns.
        OSError: ``out`` cannot be written.
    """
    if steps is None and job.kind == "path":
        raise ConfigError(f"{job.name} brings no number of steps; give --steps, those of the whole training")
    if steps is not None:
        check_steps(steps)
    for old in (*out.glob("ramp"), *out.glob("start"), *out.glob("pilot-*")):  # of an earlier search in this folder
        if (old / "output.txt").is_file():
            shutil.rmtree(old)
    runs = _Jobs(job, steps, out, patience, told)
    return FoundForJob(job.name, search(runs, time.perf_counter), runs.facts)


class _Jobs:
    """Runs the job as often as is asked for."""

    def __init__(
        self,
        job: jobs.Target,
        steps: int | None,
        out: Path,
        patience: float,
        told: Callable[[str, int, int], object],
    ) -> None:
        self.job, self.out, self.patience, self.told = job, out, patience, told
        plan = jobs.Plan(1, begin=2, schedule=steps or 0, judge=True)
        self.facts = jobs.run(job, plan, out / "start", patience=patience, told=partial(self._told, "start", 1)).facts
        self.schedule: list[float] = self.facts.pop("schedule")
        for name in _OF_A_STEP:
            self.facts.pop(name, None)
        self.steps, self.users = len(self.schedule), max(self.schedule)
        judged = self.facts.pop("judged", None)
        self.judged_on = "training" if judged is None else "validation"
        self._start = fmean(judged) if judged else None  # after one step, and so nearly that of the untrained model
        if self.steps < FEWEST:
            raise ConfigError(f"the job takes {self.steps} steps, too few to try anything out: {FEWEST} are the least")
        if not self.users > 0:
            raise ConfigError(f"the largest learning rate of the job's schedule must be > 0, got {self.users}")

    def ramp(self, first: float, growth: float, most: int) -> Ramp:
        """A training whose rate rises from ``first`` by a factor in each step, at most so many times."""
        rates = [first * growth**i for i in range(most)]
        run, _ = self._run("ramp", jobs.Plan(most, OPTIONS, rates=rates))
        return Ramp.of(points_of(run))

    def pilot(self, rate: float, steps: int, share: float) -> Pilot:
        """A training of so many steps whose schedule, in its shape, comes to this rate, over a share of the data."""
        rates = [rate / self.users * self.schedule[i * self.steps // steps] for i in range(steps)]
        plan = jobs.Plan(steps, begin=steps + 1, rates=rates, judge=True, share=share)
        data = "" if share < 1 else "-all-data"
        run, outcome = self._run(f"pilot-{rate:.3g}-{steps}{data}", plan)
        losses = [point.loss for point in points_of(run)]
        judged: list[float] = []
        if outcome is not None and outcome.ended != "diverged":
            judged = outcome.facts.get("judged") or losses[-LAST:]
        return Pilot.of(rate, steps, losses, judged, self._start, share)

    def _run(self, name: str, plan: jobs.Plan) -> tuple[Run, jobs.Outcome | None]:
        """What a run has logged, and how it ended; ``None``: it failed on the way, as some do whose loss is lost."""
        folder, outcome = self.out / name, None
        try:
            outcome = jobs.run(
                self.job, plan, folder, patience=self.patience, told=partial(self._told, name, plan.steps)
            )
        except jobs.JobFailed as error:
            try:
                run = read_run(folder)
            except ConfigError:
                raise error from None
            if len(points_of(run)) == 0:
                raise
            return run, None
        return read_run(folder), outcome

    def _told(self, name: str, of: int, step: int) -> None:
        self.told(name.replace("-", " "), step, of)


def points_of(run: Run) -> list[Point]:
    """The steps of a run until its loss was lost.

    Raises:
        ConfigError: the losses of its steps are not known.
    """
    if "train_loss" not in run.logged:
        raise ConfigError("the job does not tell the losses of its steps: `training_step` must return the loss")
    loss, rate = run.logged["train_loss"], run.logged["learning_rate"]
    held = {name: dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for name, c in run.gfs.items()}
    ratios, norms = held.get("running_stability_ratio", {}), held.get("grad_norm", {})
    rates = dict(zip(rate.steps.tolist(), rate.values.tolist(), strict=True))
    points: list[Point] = []
    for step, value in zip(loss.steps.tolist(), loss.values.tolist(), strict=True):
        points.append(Point(rates[step], value, norms.get(step), ratios.get(step)))
        if is_lost([p.loss for p in points]):
            break
    return points
