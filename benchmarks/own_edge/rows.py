"""The stored results, by combination, in the units that the page speaks of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any

from benchmarks.lib.store import Row
from benchmarks.own_edge.combinations import CONSTANT, Combination, combinations

NAME = "own_edge"
SEEDS = (0, 1)
SLOW, FAST, FASTEST = SPEEDS = (1.01, 1.03, 1.1)
SLOWER = 1.003
SLOWEST = [
    ("digits, MLP", "SGD", "64"),
    ("digits, MLP", "momentum", "64"),
    ("digits, MLP", "AdamW", "64"),
    ("digits, CNN", "momentum", "64"),
    ("digits, CNN", "AdamW", "64"),
    ("digits, deep tanh, squared", "SGD", "64"),
    ("digits, deep tanh, squared", "momentum", "64"),
    ("matrix factors, squared", "momentum", "64"),
    ("matrix factors, squared", "AdamW", "64"),
]  # that have a ramp of this speed too
BEGINS = (0.01, 0.1, 0.001)
LARGE = 256  # examples, from which on a batch is called large
THEORIES = {
    "2/η": "λη/2",
    "2(1 + β)/η": "λη/(2(1 + β))",
    "2(1 − β)/η": "λη/(2(1 − β))",
    "batch sharpness, 2(1 + β)/η": "batch sharpness · η/(2(1 + β))",
    "batch sharpness, 2(1 − β)/η": "batch sharpness · η/(2(1 − β))",
    "mean square": "(λ + f·σ²/λ)·η/(2(1 + β)), running estimate",
}


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
        """Whether all of its ramps are there."""
        return all(self.ramp(growth, seed) for growth in SPEEDS for seed in SEEDS)

    @property
    def large(self) -> bool:
        """Whether its batches are large."""
        return self.of.batch == 0 or self.of.batch >= LARGE

    @property
    def normalised(self) -> bool:
        """Whether it has BatchNorm."""
        return "BatchNorm" in self.of.problem

    def solved(self) -> list[list[float]]:
        """Rate, running ratio, solved ratio and batch sharpness at the points at and above the onset, of both seeds."""
        rows = [self.ramp(SLOW, seed) for seed in SEEDS]
        return [
            point
            for row in rows
            if row.get("onset") is not None
            for point in row.get("solved", [])
            if point[0] >= 0.99 * row["onset"] and point[2] is not None and point[3] is not None
        ]

    def level(self, growth: float) -> float | None:
        """The solved level in the ramp of this speed, seed 0."""
        row = self.ramp(growth)
        onset = row.get("onset")
        known = [p[2] for p in row.get("solved", []) if onset and p[0] >= 0.99 * onset and p[2] is not None]
        return median(known) if known else None

    def theories(self) -> dict[str, float]:
        """What is 1 by each theory, at the level; medians over the points of both seeds."""
        points = self.solved()
        if not points:
            return {}
        beta, edge = self.of.kind.beta, self.of.kind.edge
        small = (1 + beta) / (1 - beta)
        ratio, batch = (median(p[i] for p in points) for i in (2, 3))
        noisy = [v for seed in SEEDS if (v := self.ramp(SLOW, seed).get("noisy")) is not None]
        found = {"2/η": ratio * edge / 2, "2(1 + β)/η": ratio, "2(1 − β)/η": ratio * small}
        found |= {"batch sharpness, 2(1 + β)/η": batch, "batch sharpness, 2(1 − β)/η": batch * small}
        return found | ({"mean square": median(noisy)} if noisy else {})


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
