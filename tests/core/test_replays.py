"""The early warning says of recorded trainings what it said before; `benchmarks/golden_alarms.py` records them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gfs_core as gfs
from gfs_core.signals.gradients import GRAD_NORM, RMS_RATIO, WEIGHT_NORM
from tests.core.observed import observe_loss, observe_rate, observe_ratio

FILE = Path(__file__).parents[1] / "golden" / "alarms.json"
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}
RULES = {"gradient", "rise", "growth", "rate", "spike", "loss", "not finite", "calm", "second moment"}
FREE = {"gradient": GRAD_NORM, "weights": WEIGHT_NORM, "normalised": RMS_RATIO}

Call = Sequence[Any]  # kind, step, value; of a loss how many examples it is of, of a gradient the layer, if known
Told = list[Any]  # step, level, rule, reason


def replayed(calls: Sequence[Call], profile: gfs.Profile | None = None) -> list[Told]:
    """What the early warning tells of a stream of observations."""
    warning = gfs.EarlyWarning(profile)
    told: list[Told] = []
    for kind, step, value, *more in calls:
        if kind == "rate":
            alert = observe_rate(warning, step, value)
        elif kind == "loss":
            alert = observe_loss(warning, step, value, *more)
        elif kind in FREE:
            alert = warning.observe(gfs.Reading(FREE[kind], step, value, *more))
        elif kind == "forget":
            alert = warning.forget(step)
        else:
            alert = observe_ratio(warning, step, value, solved=kind == "solved")
        if alert is not None:
            assert (alert.level, alert.reason) == (warning.level, warning.reason)
            told.append([alert.step, int(alert.level), alert.rule, alert.reason])
    return told


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_stream_gives_the_recorded_events(name: str) -> None:
    assert replayed(RECORDED[name]["calls"]) == RECORDED[name]["events"]


def test_every_rule_speaks_in_what_was_recorded_and_some_streams_are_quiet() -> None:
    assert {event[2] for stream in RECORDED.values() for event in stream["events"]} == RULES
    assert {call[0] for stream in RECORDED.values() for call in stream["calls"]} == {
        "rate", "loss", "running", "solved", "forget", *FREE,
    }  # fmt: skip
    assert sum(not stream["events"] for stream in RECORDED.values()) >= 3
