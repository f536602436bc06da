"""The numbers of the early warning: where they come from, that each of them matters, and what a strictness does."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gfs_core import AlertLevel, EarlyWarning, Profile
from tests.core.observed import observe_loss, observe_ratio, play, stream
from tests.core.test_replays import RECORDED, replayed

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(Profile)


@pytest.mark.parametrize("spec", FIELDS, ids=lambda spec: spec.name)
def test_each_number_says_what_it_is_and_where_it_comes_from(spec: Any) -> None:
    assert spec.metadata["help"]
    assert (ROOT / spec.metadata["source"]).is_file()


def half_raised(every: int, growth: float) -> list[Any]:
    """The loss creeps up, and a ratio with it; at last the ratio jumps."""
    calls: list[Any] = [("loss", k, 1.0 + 0.02 * (k % 2)) for k in range(120)]
    for k in range(300):
        calls.append(("loss", 120 + k, 1.0 + 0.0006 * k + 0.02 * (k % 2)))
        if k % every == 0:
            calls.append(("running", 120 + k, 0.06 * growth ** max(k // every - 40, 0) * (1.0 if k < 280 else 2.6)))
    return calls


def at_the_edge(outgrown: float = 1.0, loss: float = 0.1) -> list[Any]:
    """The gradient rises tenfold, and the loss with it, where the ratio is 1 and the rate steady; both come back."""
    calls: list[Any] = []
    for k in range(400):
        risen = 200 <= k < 240
        calls += [
            ("rate", k, 0.1),
            ("loss", k, max(1.0 - 0.01 * k, 0.2) + (loss if risen else 0.0)),
            ("running", k, 1.0),
        ]
        calls += [("normalised", k, outgrown if risen else 1.0), ("weights", k, 5.0)]
        calls += [("gradient", k, 10.0 if risen else 1.0, "layer"), ("gradient", k, 10.0 if risen else 1.0)]
    return calls


def again_and_again() -> list[Any]:
    """The gradient rises every 150 steps for a while, each time farther; at the third time the loss rises as well."""
    calls: list[Any] = []
    for k in range(1000):
        time, within = divmod(k, 150)
        risen = time > 0 and within < 10
        calls.append(("loss", k, max(1.0 - 0.01 * k, 0.2) + (0.15 if risen and time == 3 else 0.0)))
        calls.append(("gradient", k, 1.6**time if risen else 1.0))
    return calls


def little_to_lose() -> list[Any]:
    """The gradient rises once the loss has nearly been fitted."""
    calls: list[Any] = []
    for k in range(300):
        calls += [("loss", k, max(1.0 - 0.01 * k, 0.04)), ("gradient", k, 20.0 if k == 299 else 1.0)]
    return calls


def falling() -> list[Any]:
    """Gradients rise while the loss falls, slower and slower."""
    return [
        call
        for k in range(300)
        for call in (("loss", k, 2 * 0.98**k + 0.001 * (k % 7)), ("gradient", k, 1.02**k + 0.5 * (k % 5 == 0)))
    ]


@cache
def streams() -> list[tuple[list[Any], list[Any]]]:
    """Streams with what is told of them: made-up ones, and the recorded ones."""
    made = [
        [("loss", k, 1.0 + 0.0001 * (k % 3) + 0.003 * (k > 50)) for k in range(100)],  # hardly varies
        [(kind, k, 1.0 if k < 15 else 10.0) for k in range(20) for kind in ("rate", "loss")],  # jump early
        [("rate", k, 1.0 if k < 100 else 0.1 if k < 130 else 0.3) for k in range(140)],  # lower for a while
        [("solved", k, 0.2 if k < 40 or k % 2 else 0.9) for k in range(80)],  # high in one batch of two
        [("running", 5 * k, 0.02 * 1.12**k) for k in range(32)],  # rises all along
        [("running", 20 * k, 0.4 * 1.07 ** max(k - 40, 0)) for k in range(60)],  # grows, near the edge …
        [("running", 20 * k, 0.06 * 1.1 ** max(k - 40, 0)) for k in range(60)],  # … and far from it
    ]
    made += [
        half_raised(3, 1.05),
        half_raised(5, 1.12),
        at_the_edge(),
        at_the_edge(outgrown=1.9),
        at_the_edge(loss=0.4),
        falling(),
        again_and_again(),
        little_to_lose(),
    ]
    for kind in ("running", "rate"):  # stays high while the losses are well
        made.append([(name, k, v) for k in range(400) for name, v in ((kind, 0.2 if k < 100 else 0.6), ("loss", 1.0))])
    return [(calls, replayed(calls)) for calls in (*made, *(held["calls"] for held in RECORDED.values()))]


def halved(value: Any) -> Any:
    return tuple(v / 2 for v in value) if isinstance(value, tuple) else type(value)(value / 2)


def doubled(value: Any) -> Any:
    return tuple(2 * v for v in value) if isinstance(value, tuple) else 2 * value


@pytest.mark.parametrize("name", [spec.name for spec in FIELDS])
def test_each_number_makes_a_difference(name: str) -> None:
    held = getattr(Profile(), name)
    others = [dataclasses.replace(Profile(), **{name: change(held)}) for change in (halved, doubled)]
    assert any(replayed(calls, other) != told for calls, told in streams() for other in others)


def test_a_strictness_multiplies_thresholds_and_leaves_windows() -> None:
    once, twice = Profile(), Profile().scaled(2.0)
    changed = {spec.name for spec in FIELDS if getattr(once, spec.name) != getattr(twice, spec.name)}
    assert changed == {
        "rise",
        "jump",
        "closeness",
        "grown",
        "rate_rise",
        "gradient",
        "normalised",
        "spike",
        "mean_rise",
    }
    assert (twice.rise, twice.jump, twice.spike) == ((1.5, 2.5), 5.0, (8.0, 12.0))
    assert once.scaled(1.0) == once


def test_a_stricter_warning_speaks_less() -> None:
    levels = []
    for strictness in (0.5, 1.0, 2.0, 3.0):
        warning = EarlyWarning(Profile().scaled(strictness))
        assert play(stream(300, lambda step: 0.2), warning) == []
        observe_ratio(warning, 300, 0.42, solved=False)  # 1.1 above the usual one, relative to it
        observe_loss(warning, 300, 1.4)  # 16 spreads above it, of which one counts three tenths
        levels.append(warning.level)
    assert levels == [AlertLevel.ALARM, AlertLevel.WATCH, AlertLevel.QUIET, AlertLevel.QUIET]


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Profile().jump = 3.0  # type: ignore[misc]


def test_a_state_is_the_same_under_another_profile_but_for_what_its_windows_hold() -> None:
    warning, narrow = EarlyWarning(), EarlyWarning(dataclasses.replace(Profile(), loss_window=30))
    play(stream(300, lambda step: 0.2, noise=0.1), warning)
    narrow.load_state_dict(json.loads(json.dumps(warning.state_dict())))
    state = warning.state_dict()
    state["context"]["losses"] = state["context"]["losses"][-30:]
    assert narrow.state_dict() == state
