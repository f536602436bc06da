"""Whether the run's own edge, learnt while the rate rises, makes the early warning better. Adds to own_edge.json.

Run, after benchmarks.zoo.record (ten minutes): OMP_NUM_THREADS=1 python -m benchmarks.zoo.own_edge
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.lib.store import Row, Store
from benchmarks.own_edge.page import render
from benchmarks.zoo.breaks import breaks, told_of
from benchmarks.zoo.record import FIRST, streams
from benchmarks.zoo.rules import early_warning
from gfs_core import EarlyWarning, Profile, Reading
from gfs_core.detectors.base import Finding, Track
from gfs_core.detectors.baseline import RUNNING_RATIO
from gfs_core.detectors.context import Context
from gfs_core.detectors.early_warning import DETECTORS
from gfs_core.search.ramp import knee_of
from gfs_core.signals.training import STEP_RATE

SEEDS = 3  # of each danger
RISING = 1.02  # times the largest rate so far, from which on it counts as rising
FEWEST, FARTHER = 12, 4.0  # ratios while it rises, and times the first rate, before anything is learnt
LOW, HIGH = 0.5, 1.6  # times the level: below it a run is far from its edge, above it has left it
STRICTER, LESS = 1.5, 0.7  # what thresholds of gradients are multiplied by there
Points = list[tuple[float, float]]


def by_knee(points: Points) -> float | None:
    """The median of the ratios behind the knee."""
    knee = knee_of([rate for rate, _ in points], [ratio for _, ratio in points])
    return None if knee is None else median(ratio for rate, ratio in points if rate >= knee.rate)


def by_last_quarter(points: Points) -> float:
    """The median of the last quarter's ratios."""
    return median(ratio for _, ratio in points[-len(points) // 4 :])


LEARNT: dict[str, Callable[[Points], float | None] | None] = {
    "as it is": None,
    "level behind a knee": by_knee,
    "level at the end of the rise": by_last_quarter,
}


class AtOwnEdge(Context):
    """A context whose swings and gradients are judged beside the run's own edge, once that is known."""

    level: float | None

    @property
    def swings_at_edge(self) -> bool:
        """As in the class above, about the level in place of 1."""
        if self.level is None or self.ratio is None:
            return super().swings_at_edge
        low, high = self._profile.at_edge
        return low < self.ratio / self.level < high and self.rate_is_steady and not self.outgrown

    @property
    def strictness(self) -> float:
        """As in the class above, and less where the run has left its edge upwards, more far below it."""
        beside = 1.0 if self.level is None or self.ratio is None else self.ratio / self.level
        return super().strictness * (LESS if beside > HIGH else STRICTER if beside < LOW else 1.0)


class Learns:
    """Reads rates and ratios, and tells the context the level; it judges nothing."""

    name = "own edge"
    reads: tuple[str, ...] = (STEP_RATE.name, RUNNING_RATIO)
    by_layer = False

    def __init__(self, level_of: Callable[[Points], float | None], context: Context) -> None:
        context.__class__ = AtOwnEdge
        assert isinstance(context, AtOwnEdge)
        context.level = None
        self.track = Track("ratios", 1, context.rise_began)
        self._level_of, self._context = level_of, context
        self._rate = 0.0
        self._points: Points = []

    def observe(self, reading: Reading) -> Finding | None:
        """Take in a rate or a ratio."""
        if reading.value is None or not 0 < reading.value < math.inf:
            return None
        if reading.key.name == STEP_RATE.name:
            self._rate = reading.value
        elif not self._points or self._rate > RISING * self._points[-1][0]:
            self._points.append((self._rate, reading.value))
            if len(self._points) >= FEWEST and self._rate > FARTHER * self._points[0][0]:
                self._context.level = self._level_of(self._points) or self._context.level
        return None

    def forget(self) -> None:
        """Drop nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is saved here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""


def judged(level_of: Callable[[Points], float | None] | None) -> Row:
    """False alarms, the runs in which a level was learnt, and what was warned of."""
    made: list[AtOwnEdge] = []

    def warning(profile: Profile | None) -> EarlyWarning:
        if level_of is None:
            return EarlyWarning(profile)
        made_by = [lambda _, context: Learns(level_of, context), *DETECTORS]
        found = EarlyWarning(profile, made_by)
        made.append(found._context)  # type: ignore[arg-type]
        return found

    healthy = [(len(stream.loss), early_warning(stream, make=warning)) for _, _, stream in streams("exam, healthy")]
    told: dict[str, list[int | None]] = {}
    for name, seed, stream in streams("exam, danger"):
        if seed < FIRST["exam, danger"] + SEEDS:
            broken = breaks(stream, full_batch=name.startswith("Adam"))
            told.setdefault(name, []).extend(told_of(stream, broken, early_warning(stream, make=warning)))
    each = [of for of in told.values() if of]
    return {
        "false": sum(len(alarms) for _, alarms in healthy),
        "steps": sum(steps for steps, _ in healthy),
        "learnt, healthy": sum(c.level is not None for c in made[: len(healthy)]),
        "learnt, danger": sum(c.level is not None for c in made[len(healthy) :]),
        "warned": sum(sum(t is not None and t > 0 for t in of) / len(of) for of in each) / len(each),
        "lead": median(t for of in each for t in of if t is not None and t > 0),
    }


def main() -> None:
    """Judge each, and write the page."""
    store = Store("own_edge")
    for name, level_of in LEARNT.items():
        print(name, store.add("alarms", (name,), lambda level_of=level_of: judged(level_of)), flush=True)  # type: ignore[misc]
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
