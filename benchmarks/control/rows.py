"""What the stored runs say: the excess of a method at a multiple of the tuned rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.control.methods import METHODS
from benchmarks.control.runs import SEEDS, SHIFTS, row_of, stored_best
from benchmarks.control.workloads import WORKLOADS
from benchmarks.lib.store import Row

LEAST = 0.1  # of what the tuned reference gains: who gains less is lost


@dataclass(frozen=True)
class Cell:
    """A method on a workload at a multiple of the tuned rate.

    Attributes:
        excesses: of the validation loss over that of the tuned reference, one per seed; infinite where a run is lost.
    """

    excesses: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median over the seeds."""
        return median(self.excesses)

    @property
    def lost(self) -> int:
        """Runs that are lost."""
        return sum(map(math.isinf, self.excesses))

    def __str__(self) -> str:
        return percent(self.middle) + (f" †{self.lost}" if self.lost and not math.isinf(self.middle) else "")


def excess(row: Row, best: Row, untrained: Row) -> float:
    """Relative excess of the loss of a run over that of the tuned reference; infinite where it has come to nothing."""
    loss = row["loss"]
    if loss is None or untrained["loss"] - loss < LEAST * (untrained["loss"] - best["loss"]):
        return math.inf
    return float(loss / best["loss"] - 1)


def cell(results: dict[str, Any], name: str, key: str, shift: int) -> Cell | None:
    """What there is of these runs; ``None``: nothing."""
    found = []
    for seed in range(SEEDS):
        best = stored_best(results, name, seed)
        row = row_of(results, name, key, shift, seed)
        if best is not None and row is not None and f"{name} | {seed}" in results.get("untrained", {}):
            reference = results["reference"][f"{name} | {best} | {seed}"]
            found.append(excess(row, reference, results["untrained"][f"{name} | {seed}"]))
    return Cell(tuple(found)) if found else None


def cells(results: dict[str, Any], key: str) -> dict[tuple[str, int], Cell]:
    """All cells of a method, by workload and half decades from the tuned rate.

    A method without a base rate counts at those multiples at which others are there.
    """
    out = {}
    for name in WORKLOADS:
        for shift in SHIFTS:
            there = not METHODS[key].free or cell(results, name, "constant", shift) is not None
            if there and (found := cell(results, name, key, shift)) is not None:
                out[name, shift] = found
    return out


def percent(value: float) -> str:
    """An excess in percent, † for a lost run."""
    if math.isinf(value):
        return "†"
    return f"{100 * value:+.1f} %" if abs(value) < 0.1 else f"{100 * value:+.0f} %"


def middle(found: list[float]) -> str:
    """The median of excesses."""
    return percent(median(found)) if found else "–"
