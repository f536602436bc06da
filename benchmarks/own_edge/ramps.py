"""One training whose rate rises, as `find_rate` has it; once more, with the curvature solved at chosen steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch
from benchmarks.lib.store import Row, rounded
from benchmarks.lib.trainings import draw, gradient
from benchmarks.own_edge.combinations import Combination
from benchmarks.rate import Batches, trained
from gfs_core.search.ramp import Point, Ramp, is_lost
from gfs_core.signals import curvature

EVERY = 2  # steps between ratios
DECADES = 4.0  # that a ramp rises at most
BELOW = 4.0  # times below the onset, where the curvature is solved first
LAST = 0.5  # of the rate at which the loss was lost: up to there the level counts
BEFORE, BEHIND = 3, 6  # points below and above the onset
DRAWS = 8  # batches that a batch sharpness is averaged over
HELD_AT, HELD = 2.0, 300  # times the onset, and steps, at a constant rate
WARMUPS = (50, 100, 200)
INTERVALS: tuple[int | None, ...] = (2, 10, None)  # None: the default tier, interval and budget
GRID = 10**0.5
FARTHEST = 6  # rates of the grid from the base rate

# The running estimate goes by the whole batch, as it did in all ramps but one of 32 that were made before this line was
# there: else one timing decides whether it goes by parts of a batch, and a ramp cannot be made again to the bit.
curvature.whole_is_cheaper = lambda step, lab, seconds: True


class Taken(NamedTuple):
    """A step that was measured.

    Attributes:
        step: of the training.
        ratio: running stability ratio.
        noisy: ratio in the mean square, ``None`` where there is none yet.
    """

    step: int
    ratio: float
    noisy: float | None


class Training:
    """A training of a combination at its start."""

    def __init__(self, combination: Combination, seed: int) -> None:
        self.workload, self.combination = combination.workload(), combination
        torch.manual_seed(seed)
        self.model: nn.Module = self.workload.model()
        self.optimizer = self.workload.optimizer(self.model, combination.rate)
        self.batches = Batches(self.workload.data()[0], self.workload.batch, seed)

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch."""
        return self.workload.loss(self.model, batch)

    def steps(self, rates: Sequence[float]) -> Iterator[tuple[int, Batch, Tensor]]:
        """Step, batch and loss, with the gradient there; the step is taken when the next one is asked for."""
        for step, (rate, batch) in enumerate(zip(rates, self.batches, strict=False)):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(batch)
            gradient(self.optimizer, loss)
            yield step, batch, loss
            self.optimizer.step()

    def watched(self, rates: Sequence[float], config: gfs.GFSConfig) -> tuple[list[Point], list[Taken]]:
        """Train at these rates until the loss is lost, with the running ratio."""
        points, taken = list[Point](), list[Taken]()
        monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        for step, batch, loss in self.steps(rates):
            value, ratio = loss.item(), None
            if math.isfinite(value) and (made := monitor.step(self.loss, batch, loss=loss)) is not None:
                ratio = made.running_stability_ratio
                if ratio is not None:
                    taken.append(Taken(step, ratio, made.mean_square_stability_ratio))
            points.append(Point(rates[step], value, None, ratio))
            if is_lost([p.loss for p in points]):
                break
        monitor.close()
        return points, taken

    def solved(self, rates: Sequence[float], at: set[int]) -> dict[int, list[float | None]]:
        """Train once more; at these steps the solved ratio and the batch sharpness over the threshold."""
        sample, generator = self.combination.sample(), torch.Generator().manual_seed(0)
        found = {}
        for step, _, _ in self.steps(rates[: max(at) + 1]):
            if step in at:
                found[step] = [self.ratio(sample), self.batch_ratio(generator)]
        return found

    def ratio(self, sample: Batch) -> float | None:
        """Largest (preconditioned) eigenvalue on a sample of the training data, over the threshold."""
        return gfs.stability(
            self.model, lambda _, batch: self.loss(batch), sample, self.optimizer, tier="sharpness"
        ).stability_ratio

    def batch_ratio(self, generator: torch.Generator) -> float | None:
        """Mean over batches of gᵀS²HS²g/‖Sg‖², H and g of one batch, S the preconditioner; over the threshold."""
        threshold = gfs.stability_of(self.optimizer, list(self.model.parameters())).threshold
        (data, _), size = self.workload.data(), self.workload.batch
        count = 1 if size == len(data[1]) else DRAWS
        values = [
            gfs.stability(
                self.model, lambda _, batch: self.loss(batch), draw(data, size, generator), self.optimizer,
                tier="batch_sharpness",
            ).batch_sharpness
            for _ in range(count)
        ]  # fmt: skip
        known = [v for v in values if v is not None]
        return fmean(known) / threshold if known and threshold else None


def _config(interval: int | None) -> gfs.GFSConfig:
    if interval is None:
        return gfs.GFSConfig()
    return gfs.GFSConfig(tier="running", every=interval, max_overhead=None, alarm="off")


def rates_of(first: float, growth: float) -> list[float]:
    """The rates of a ramp."""
    return [first * growth**i for i in range(int(DECADES / math.log10(growth)) + 1)]


def ramp(combination: Combination, growth: float, begins: float, seed: int, solve: bool) -> Row:
    """A ramp, and its knee.

    Args:
        combination: what is trained.
        growth: of the rate, from step to step.
        begins: at so much of the base rate.
        seed: of weights and batches.
        solve: whether the curvature is solved at some of its steps.
    """
    rates = rates_of(begins * combination.rate, growth)
    points, taken = Training(combination, seed).watched(rates, _config(EVERY))
    found = Ramp.of(points)
    row: Row = {
        "steps": len(points), "end": found.end,
        "onset": found.knee and found.knee.rate, "knee": found.knee and found.knee.ratio,
        "slopes": found.knee and found.knee.slopes, "why": found.why,
    }  # fmt: skip
    onset = found.knee.rate if found.knee else (found.end or rates[-1]) / 4
    top = LAST * (found.end or 2 * rates[-1])
    behind = [t for t in taken if onset <= rates[t.step] <= top]
    row["level"] = median(t.ratio for t in behind) if behind and found.knee else None
    noisy = [t.noisy for t in behind if t.noisy is not None]
    row["noisy"] = median(noisy) if noisy and found.knee else None
    by_step = {t.step: t.ratio for t in taken}
    row["ratios"] = rounded([by_step.get(step) for step in range(0, len(points), EVERY)], 3)
    if solve and top > onset:
        wanted = [*np.geomspace(onset / BELOW, onset, BEFORE, endpoint=False), *np.geomspace(onset, top, BEHIND)]
        steps = {min(range(len(points)), key=lambda i: abs(math.log(rates[i] / w))) for w in wanted}
        exact = Training(combination, seed).solved(rates, steps)
        near = {s: min(taken, key=lambda t: abs(t.step - s)).ratio for s in steps}
        row["solved"] = [[rates[s], near[s], *exact[s]] for s in sorted(steps)]
    return rounded(row, 4)


def held(combination: Combination, onset: float, seed: int) -> Row:
    """A ramp of 3 % up to twice the onset, and 300 steps there: whether the level is that of a constant rate."""
    rising = [r for r in rates_of(combination.rate / 100, 1.03) if r < HELD_AT * onset]
    rates = [*rising, *[HELD_AT * onset] * HELD]
    points, taken = Training(combination, seed).watched(rates, _config(EVERY))
    if is_lost([p.loss for p in points]):
        return {"lost": True}
    last = [t.ratio for t in taken if t.step >= len(rates) - HELD / 3]
    first = [t.ratio for t in taken if 0 <= t.step - len(rising) < HELD / 3]
    steps = {len(rates) - 1 - 20 * i for i in range(5)}
    exact = Training(combination, seed).solved(rates, steps).values()
    return rounded(
        {
            "lost": False,
            "first": median(first),
            "last": median(last),
            "solved": _median(e[0] for e in exact),
            "batch": _median(e[1] for e in exact),
        },
        4,
    )


def _median(values: Iterator[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def reference(combination: Combination, seed: int) -> Row:
    """Validation losses after warm-up and cosine, at rates half a decade apart, until the best has worse neighbours."""
    losses: dict[int, float] = {}
    workload = combination.workload()
    wanted = {-1, 0, 1}
    while wanted:
        for i in wanted:
            losses[i] = trained(workload, combination.rate * GRID**i, seed)
        best = min(losses, key=lambda i: losses[i])
        wanted = {i for i in (best - 1, best + 1) if i not in losses and abs(i) <= FARTHEST}
    return rounded({f"{combination.rate * GRID**i:.4g}": losses[i] for i in sorted(losses)}, 5)


def best_of(losses: Row) -> float:
    """The best rate."""
    return float(min((v, r) for r, v in losses.items() if v is not None)[1])


def warmup(combination: Combination, rate: float, seed: int) -> Row:
    """Linear warm-ups to this rate: what their ratios tell, at several intervals."""
    row: Row = {"rate": rate}
    for length, interval in itertools.product(WARMUPS, INTERVALS):
        rates = [rate * (i + 1) / length for i in range(length)]
        points, taken = Training(combination, seed).watched(rates, _config(interval))
        knee = Ramp.of(points).knee
        last = [t.ratio for t in taken if t.step >= 0.75 * length]
        row[f"{length} {interval or 'default'}"] = [
            len(taken), knee and knee.rate, knee and knee.ratio, median(last) if last else None,
            is_lost([p.loss for p in points]),
        ]  # fmt: skip
    return rounded(row, 4)
