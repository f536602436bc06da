"""The learning rate that was found: its range, what it rests on, what it cost, and what is not known of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gfs_core.errors import MeasurementError
from gfs_core.search import pilots as runs
from gfs_core.search import ramp as ramps
from gfs_core.search.pilots import Choice, Pilot, choose
from gfs_core.search.ramp import Ramp


@dataclass(frozen=True)
class Cost:
    """What a search took.

    Attributes:
        ramp_steps: optimizer steps of the ramp.
        pilot_steps: of all pilots.
        seconds: wall time of everything.
    """

    ramp_steps: int
    pilot_steps: int
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps of ramp and pilots."""
        return self.ramp_steps + self.pilot_steps


@dataclass(frozen=True, repr=False)
class FoundRate:
    """A learning rate that was tried out before the training.

    Attributes:
        rate: recommended, as the largest rate that the schedule of the training comes to.
        range: rates that are about as good, as far as the pilots tell; (low, high).
        users: the rate that the training had.
        steps: of the training.
        judged_on: ``"validation"``, or ``"training"``: the losses of the last steps of a pilot.
        ramp: what the rising rate has shown.
        pilots: the short runs, in their order.
        choice: what the last pilots point to, those with the same data.
        cost: steps and seconds.
        unsure: what is not known, a sentence each.
    """

    rate: float
    range: tuple[float, float]
    users: float
    steps: int
    judged_on: str
    ramp: Ramp = field(repr=False)
    pilots: tuple[Pilot, ...] = field(repr=False)
    choice: Choice = field(repr=False)
    cost: Cost = field(repr=False)
    unsure: tuple[str, ...] = field(repr=False, default=())

    @property
    def factor(self) -> float:
        """By which all rates of the training are to be multiplied; the same for each of its parameter groups."""
        return self.rate / self.users

    def __repr__(self) -> str:
        low, high = self.range
        share = self.cost.steps / self.steps
        return (
            f"FoundRate({self.rate:.2g}, range {low:.2g} to {high:.2g}, ×{self.factor:.2g} of {self.users:.2g}, "
            f"judged on {self.judged_on} data, {len(self.pilots)} pilots, {share:.0%} of a training)"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"  {sentence}" for sentence in self.unsure)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is not finite is ``None``."""
        knee = self.ramp.knee
        return {
            "rate": self.rate,
            "range": list(self.range),
            "factor": self.factor,
            "users": self.users,
            "steps": self.steps,
            "judged_on": self.judged_on,
            "onset": None if knee is None else {"rate": knee.rate, "ratio": knee.ratio},
            "end": self.ramp.end,
            "ramp": [[_finite(v) for v in point] for point in self.ramp.points],
            "pilots": [
                {"rate": p.rate, "steps": p.steps, "share": p.share, "taken": p.taken, "loss": _finite(p.loss)}
                for p in self.pilots
            ],
            "cliff": self.choice.cliff,
            "cost": {**vars(self.cost), "steps": self.cost.steps},
            "unsure": list(self.unsure),
        }


class Trainings(Protocol):
    """Runs a user's training from its start, as often as is asked for; each leaves everything as it was."""

    users: float
    steps: int
    judged_on: str

    def ramp(self, first: float, growth: float, most: int) -> Ramp:
        """A training whose rate rises from ``first`` by a factor in each step, ``most`` times, or until it is lost."""

    def pilot(self, rate: float, steps: int, share: float) -> Pilot:
        """A training of so many steps whose schedule, in its shape, comes to this rate.

        ``share``: of the training data, that it goes through as often as the whole training would; 1: all of them.
        """


def search(trainings: Trainings, clock: Callable[[], float]) -> FoundRate:
    """Look for the rate of a training.

    Args:
        trainings: runs it.
        clock: seconds.

    Raises:
        MeasurementError: no rate was found at which a pilot learns.
    """
    began, steps, users = clock(), trainings.steps, trainings.users
    growth = ramps.growth_of(steps)
    most = math.ceil(ramps.DECADES / math.log10(growth))
    ramp = trainings.ramp(ramps.FIRST * users, growth, most)
    spent = [len(ramp.points)]

    def run(rate: float, length: int, share: float) -> Pilot:
        pilot = trainings.pilot(rate, length, share)
        spent.append(pilot.taken)
        return pilot

    tried = runs.search(run, ramp.start, steps, lambda more: sum(spent) + more <= steps)
    choice = choose([p for p in tried if p.share == tried[-1].share], steps)
    if choice is None:
        low, high = min(p.rate for p in tried), max(p.rate for p in tried)
        raise MeasurementError(
            f"no rate was found: the loss was lost in all pilots, or ended no lower than it began, at rates from "
            f"{low:.2g} to {high:.2g}; check the loss and the data, or begin from a lower rate"
        )
    cost = Cost(spent[0], sum(spent[1:]), clock() - began)
    found = FoundRate(
        choice.rate, (choice.low, choice.high), users, steps, trainings.judged_on, ramp, tuple(tried), choice, cost
    )
    return _with_doubts(found)


def _with_doubts(found: FoundRate) -> FoundRate:
    """The same with what is not known of it."""
    choice, ramp, last, out = found.choice, found.ramp, found.pilots[-1], list[str]()
    if last.steps < found.steps:
        data = "all of the data" if last.share == 1 else "a part of the data as small"
        lower = (last.steps / found.steps) ** runs.DRIFT
        out.append(
            f"The pilots had {last.steps} of the {found.steps} steps, over {data}: in the whole training another rate "
            f"may be best. Theirs is taken times {lower:.2g}, as longer trainings want lower ones."
        )
    if last.share == 1 < len({p.share for p in found.pilots}):
        out.append("Pilots on a part of the data learnt nothing: the choice rests on others that went through all.")
    if choice.flat:
        out.append("The losses of the pilots at neighbouring rates are too alike to tell which rate is best.")
    if choice.cliff is not None:
        lowered = f"; of the best one tried {runs.MARGIN:g} are taken" if choice.parabola is None else ""
        out.append(f"A pilot was lost at a rate of {choice.cliff:.2g}{lowered}.")
    if choice.parabola is None and choice.cliff is None:
        out.append("The best pilot has no worse one on either side: the range is open.")
    if ramp.knee is None:
        out.append(f"The onset of the run's own edge was not seen: {ramp.why}.")
    if ramp.end is None:
        out.append(f"The loss was not lost in the ramp, up to a rate of {ramp.points[-1].rate:.2g}.")
    if found.judged_on == "training":
        out.append("The pilots were judged on training data: what generalises best may be another rate.")
    out.append("One seed was tried. Other seeds scatter by some percent of the loss.")
    return FoundRate(**{**{name: getattr(found, name) for name in found.__dataclass_fields__}, "unsure": tuple(out)})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
