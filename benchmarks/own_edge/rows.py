"""The stored results, by combination, in the units that the page speaks of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib.store import Row
from benchmarks.own_edge.combinations import CONSTANT, Combination, combinations

NAME = "own_edge"
SEEDS = (0, 1)
SLOW, FAST, FASTEST = SPEEDS = (1.01, 1.03, 1.1)
SLOWER = 1.003
CLOSELY = [
    ("digits, MLP", "SGD", "64"),
    ("digits, MLP", "momentum", "64"),
    ("digits, MLP", "AdamW", "64"),
    ("digits, MLP", "RMSprop", "64"),
    ("digits, CNN", "SGD", "64"),
    ("digits, CNN", "momentum", "64"),
    ("digits, CNN", "AdamW", "64"),
    ("digits, deep tanh, squared", "SGD", "64"),
    ("digits, deep tanh, squared", "momentum", "64"),
    ("matrix factors, squared", "momentum", "64"),
    ("matrix factors, squared", "AdamW", "64"),
]  # that have ramps at all speeds and from all beginnings
LATER = {
    ("digits, CNN", "momentum", "16"),
    ("digits, CNN", "AdamW", "16"),
    ("digits, CNN", "Adam", "64"),
    ("digits, CNN", "momentum", "512"),
    ("digits, CNN", "AdamW", "512"),
    ("digits, MLP", "SGD", "512"),
    ("digits, BatchNorm CNN", "SGD", "64"),
    ("digits, BatchNorm CNN", "momentum", "256"),
    ("characters, GRU", "AdamW", "32"),
    *(("characters, transformer", optimizer, "32") for optimizer in ("SGD", "momentum", "AdamW")),
    *(("Fashion-MNIST, CNN", optimizer, "64") for optimizer in ("SGD", "momentum", "AdamW")),
}  # that were made after the mean of onset and end had been thought of
BEGINS = (0.01, 0.1, 0.001)
NEAR = 3.0  # times the onset: up to there it is called the beginning of the level
LARGE = 256  # examples, from which on a batch is called large
THEORIES = (
    "2/η",
    "2(1 + β)/η",
    "2(1 − β)/η",
    "batch sharpness, 2(1 + β)/η",
    "batch sharpness, 2(1 − β)/η",
    "mean square",
)


class Point(NamedTuple):
    """A step of a ramp at which the curvature was solved.

    Attributes:
        rate: over the onset.
        running: the running stability ratio.
        ratio: the solved one.
        batch: batch sharpness over the threshold.
    """

    rate: float
    running: float
    ratio: float
    batch: float


@dataclass(frozen=True)
class Found:
    """What there is of one combination."""

    of: Combination
    results: dict[str, Any]

    def ramp(self, growth: float = SLOW, seed: int = 0, begins: float = BEGINS[0]) -> Row:
        """The row of a ramp, empty where it was not made."""
        row: Row = self.results["ramps"].get(" | ".join(map(str, (*self.of.key, growth, begins, seed))), {})
        return row

    def rates(self, growth: float, begins: float, count: int) -> list[float]:
        """The rates of its ratios."""
        return [begins * self.of.rate * growth ** (2 * i) for i in range(count)]

    def best(self, seed: int) -> float | None:
        """The best rate of the reference."""
        losses = self.results["reference"].get(" | ".join([*self.of.key, str(seed)]))
        if losses is None:
            return None
        return float(min((v, rate) for rate, v in losses.items() if v is not None)[1])

    def row(self, part: str) -> Row | None:
        """Its row of a part that has one seed."""
        found: Row | None = self.results.get(part, {}).get(" | ".join(self.of.key))
        return found

    @property
    def made(self) -> bool:
        """Whether its ramps at 1 and 3 % are there."""
        return all(self.ramp(growth, seed) for growth in (SLOW, FAST) for seed in SEEDS)

    @property
    def large(self) -> bool:
        """Whether its batches are large."""
        return self.of.batch == 0 or self.of.batch >= LARGE

    @property
    def normalised(self) -> bool:
        """Whether it has BatchNorm."""
        return "BatchNorm" in self.of.problem

    def points(self, growth: float = SLOW, seed: int = 0) -> list[Point]:
        """The points of a ramp that were solved, at and above its onset."""
        row = self.ramp(growth, seed)
        onset = row.get("onset")
        if onset is None:
            return []
        made = [Point(p[0] / onset, *p[1:]) for p in row.get("solved", []) if p[2] is not None and p[3] is not None]
        return [p for p in made if p.rate >= 0.99]

    def solved(self, upto: float = math.inf, above: float = 0.0) -> list[Point]:
        """Those of both seeds at 1 % a step, between these multiples of the onset."""
        return [p for seed in SEEDS for p in self.points(SLOW, seed) if above < p.rate <= upto]

    def slope(self) -> float | None:
        """Slope of the solved ratio over the rate above the onset, in logarithms; mean of both seeds."""
        lines = []
        for seed in SEEDS:
            known = [(math.log(p.rate), math.log(p.ratio)) for p in self.points(SLOW, seed) if p.ratio > 0]
            if len(known) > 3:
                lines.append(float(np.polyfit(*zip(*known, strict=True), 1)[0]))
        return fmean(lines) if lines else None

    def level(self, growth: float) -> float | None:
        """The solved level in the ramp of this speed, seed 0."""
        known = [p.ratio for p in self.points(growth)]
        return median(known) if known else None

    def theories(self, upto: float = math.inf) -> dict[str, float]:
        """What is 1 by each theory; medians over the points of both seeds up to this multiple of the onset."""
        points = self.solved(upto)
        if not points:
            return {}
        beta, edge = self.of.kind.beta, self.of.kind.edge
        small = (1 + beta) / (1 - beta)
        ratio, batch = median(p.ratio for p in points), median(p.batch for p in points)
        noisy = [v for seed in SEEDS if (v := self.ramp(SLOW, seed).get("noisy")) is not None]
        found = {"2/η": ratio * edge / 2, "2(1 + β)/η": ratio, "2(1 − β)/η": ratio * small}
        found |= {"batch sharpness, 2(1 + β)/η": batch, "batch sharpness, 2(1 − β)/η": batch * small}
        return found | ({"mean square": median(noisy)} if noisy and math.isinf(upto) else {})


def found_in(results: dict[str, Any]) -> list[Found]:
    """All combinations that are there, in the order of the problems; those with a constant curvature are left out."""
    order = list(dict.fromkeys(c.problem for c in combinations()))
    key = {p: i for i, p in enumerate(order)}
    made = [Found(c, results) for c in combinations() if c.problem != CONSTANT]
    kinds = ("SGD", "momentum", "RMSprop", "Adam", "AdamW")
    ordered = sorted(made, key=lambda f: (key[f.of.problem], kinds.index(f.of.optimizer), f.of.batch or 10**9))
    return [f for f in ordered if f.made]


def controls_in(results: dict[str, Any]) -> list[Found]:
    """The combinations with a constant curvature."""
    return [f for c in combinations() if c.problem == CONSTANT and (f := Found(c, results)).made]


def quotients(pairs: Iterable[tuple[float | None, float | None]]) -> list[float]:
    """The first over the second, where both are there."""
    return [a / b for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]


def spread(factors: list[float]) -> float:
    """Standard deviation in decades."""
    return stdev(map(math.log10, factors)) if len(factors) > 1 else math.nan


def typical(factors: list[float]) -> float:
    """By which factor they are off in the median, whichever way."""
    return float(10 ** median(abs(math.log10(f)) for f in factors))
