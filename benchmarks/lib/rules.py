"""Rules that say at which steps of a recorded training something is wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException
from torch import Tensor

from benchmarks.lib.streams import RUNS, Stream
from gfs_core import AlertLevel, EarlyWarning, Key, Profile, Reading
from gfs_core.signals.training import LOSS, STEP_RATE

NEVER = (math.inf, math.inf)  # thresholds that nothing reaches
RUNNING_RATIO = Key("running_stability_ratio", "")
RATE = "learning rate over median of 50"


class Rule:
    """A rule with one knob: a larger value speaks less."""

    memory: int | None = None  # steps before a fault that it needs to have seen; None: all

    def __init__(self, name: str, knob: str, values: list[float], kind: str = "loss") -> None:
        self.name, self.knob, self.values, self.kind = name, knob, values, kind

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        raise NotImplementedError


class Score(Rule):
    """Speaks where a number is above the knob, or the loss or the gradient is not finite."""

    def __init__(self, name: str, knob: str, values: list[float], score: Callable[[Stream], list[float]], kind: str):
        super().__init__(name, knob, values, kind)
        self.score = score
        self.held: dict[int, list[float]] = {}

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        if id(stream["loss"]) not in self.held:
            self.held[id(stream["loss"])] = self.score(stream)
        return [i for i, v in enumerate(self.held[id(stream["loss"])]) if not v <= knob]


def over_deviation(stream: Stream) -> list[float]:
    out = []
    for i, loss in enumerate(stream["loss"]):
        recent = stream["loss"][max(i - 50, 0) : i]
        if len(recent) < 20:
            out.append(_unless(loss))
            continue
        mean = fmean(recent)
        out.append((loss - mean) / (math.sqrt(fmean((x - mean) ** 2 for x in recent)) + 1e-12))
    return out


def over_median(key: str, memory: float) -> Callable[[Stream], list[float]]:
    """The (smoothed) value over the median of the last 50."""

    def score(stream: Stream) -> list[float]:
        out, mean = [], None
        for i, value in enumerate(stream[key]):
            mean = value if mean is None else memory * mean + (1 - memory) * value
            recent = stream[key][max(i - 50, 0) : i]
            out.append(mean / median(recent) if len(recent) >= 20 else _unless(value))
        return out

    return score


def _unless(value: float) -> float:
    return -math.inf if math.isfinite(value) else math.inf


class RunningMean:
    """What SpikeDetection asks of its torchmetrics mean, at a fraction of the time; `main` compares the two."""

    def __init__(self, window: int) -> None:
        self.held: deque[float] = deque(maxlen=window)

    def to(self, device: Any) -> None:
        """It has nothing to move."""

    def update(self, value: Tensor) -> None:
        """Take in one loss."""
        self.held.append(value.item())

    def compute(self) -> Tensor:
        """The mean so far."""
        return torch.tensor(fmean(self.held) if self.held else math.nan)


class Lightning(Rule):
    """Lightning's own detector, its class as it is; the batch that it raises for is left out, as it asks."""

    memory = 60  # its window is 10

    def __init__(self, name: str, knob: str, values: list[float], tolerance: str, quick: bool = True) -> None:
        super().__init__(name, knob, values)
        self.tolerance, self.quick = tolerance, quick

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        tolerances = {"atol": None, "rtol": None, self.tolerance: knob}
        detector = SpikeDetection(exclude_batches_path=str(RUNS / "skip.json"), **tolerances)  # type: ignore[arg-type]
        detector._handle_spike = _speak  # type: ignore[method-assign, assignment]
        if self.quick:
            detector.running_mean = RunningMean(10)  # type: ignore[assignment]
        out = []
        for i, loss in enumerate(stream["loss"]):
            try:
                detector.on_train_batch_end(ONE_DEVICE, torch.tensor(loss), None, i)
            except TrainingSpikeException:
                out.append(i)
        return out


def _speak(fabric: Any, batch: int) -> None:
    raise TrainingSpikeException(batch)  # without the file of batches to skip


class Ours(Rule):
    """The package's early warning, whole or in parts.

    Args:
        name: of the rule.
        reads: what it is given; without its losses they still tell whether training makes fast progress.
        level: from which on it speaks.
    """

    def __init__(
        self, name: str, reads: tuple[str, ...] = ("rate", "loss", "ratio"), level: AlertLevel = AlertLevel.ALARM
    ) -> None:
        super().__init__(name, "strictness", [round(0.5 + 0.05 * i, 2) for i in range(41)], "ours")
        self.reads, self.level = reads, level
        self.profile = Profile() if "loss" in reads else replace(Profile(), spike=NEVER, mean_rise=NEVER)

    def alarms(self, stream: Stream, knob: float) -> list[int]:
        """The steps at which it speaks."""
        warning, out = EarlyWarning(self.profile.scaled(knob)), []
        for step, (loss, ratio, rate) in enumerate(zip(stream["loss"], stream["ratio"], stream["rate"], strict=True)):
            readings = []
            if "rate" in self.reads:
                readings.append(Reading(STEP_RATE, step, rate))
            if "loss" in self.reads or math.isfinite(loss):
                readings.append(Reading(LOSS, step, loss))
            if "ratio" in self.reads:
                readings.append(Reading(RUNNING_RATIO, step, ratio))
            alerts = [a for r in readings if (a := warning.observe(r)) is not None]
            # On the way down nothing new is said.
            out += [a.step for a in alerts if a.rule != "calm" and a.level >= self.level]
        return out


ONE_DEVICE: Any = SimpleNamespace(
    strategy=SimpleNamespace(
        root_device="cpu", barrier=lambda: None, reduce_boolean_decision=lambda decision, all: bool(decision)
    )
)


def geometric(first: float, last: float, factor: float) -> list[float]:
    return [first * factor**i for i in range(math.ceil(math.log(last / first, factor)) + 1)]


def all_rules() -> list[Rule]:
    return [
        Ours("alarm"),
        Ours("alarm, without the rate", ("loss", "ratio")),
        Ours("alarm, ratio alone", ("ratio",)),
        Ours("alarm, loss alone", ("loss",)),
        Score("loss > mean + k·σ of 50", "k", geometric(2, 60, 1.02), over_deviation, "loss"),
        Score(
            "mean loss (0.9) over median of 50", "factor", geometric(1.02, 10, 1.01), over_median("loss", 0.9), "loss"
        ),
        Lightning("Lightning, rtol", "rtol", geometric(0.1, 30, 1.05), "rtol"),
        Lightning("Lightning, atol", "atol", geometric(0.02, 30, 1.05), "atol"),
        Score(
            "gradient over median of 50", "factor", geometric(1.2, 100, 1.03), over_median("gradient", 0.0), "gradient"
        ),
        Score(RATE, "factor", geometric(1.1, 20, 1.01), over_median("rate", 0.0), "rate"),
        Score(
            "mean gradient (0.9) over median of 50",
            "factor",
            geometric(1.05, 50, 1.02),
            over_median("gradient", 0.9),
            "gradient",
        ),
    ]
