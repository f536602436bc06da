"""What the values of several streams were like lately, against the statistics of the standard library."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfs_core.detectors.past import Past

NORMAL = 1.4826


def expected(values: Sequence[float]) -> tuple[float, float]:
    """Of two in the middle the lower, as the rest of them."""
    middle = statistics.median_low(values)
    return middle, NORMAL * statistics.median_low([abs(value - middle) for value in values])


def filled(rows: Sequence[dict[str, float]], length: int = 100, first: int = 1, refresh: int = 1) -> Past:
    past = Past(length, first, refresh)
    for row in rows:
        past.add(row)
    return past


@given(st.lists(st.tuples(st.floats(-700, 710), st.floats(-700, 710)), min_size=1, max_size=40), st.integers(1, 20))
def test_median_and_scatter_are_those_of_the_latest_values(rows: list[tuple[float, float]], length: int) -> None:
    past = filled([{"a": a, "b": b} for a, b in rows], length)
    for place, name in enumerate("ab"):
        assert past.usual(name) == pytest.approx(expected([row[place] for row in rows][-length:]), abs=1e-12)


def test_the_scatter_of_normal_values_is_their_deviation() -> None:
    rng = random.Random(0)
    middle, scatter = filled([{"a": rng.gauss(3.0, 0.5)} for _ in range(4000)], 4000).usual("a")
    assert (middle, scatter) == (pytest.approx(3.0, abs=0.03), pytest.approx(0.5, rel=0.04))


def test_nothing_is_said_of_a_stream_with_too_few_values() -> None:
    past = Past(10, 3)
    for count in range(5):
        assert past.usual("a") == (None if count < 3 else (7.0, 0.0))
        past.add({"a": 7.0})
    assert past.usual("b") is None


@given(st.lists(st.tuples(st.one_of(st.none(), st.floats()), st.one_of(st.none(), st.floats())), max_size=40))
def test_values_that_are_missing_or_not_finite_are_passed_over(rows: list[tuple[float | None, float | None]]) -> None:
    length, first = 15, 3
    past = filled([{n: v for n, v in zip("ab", row, strict=True) if v is not None} for row in rows], length, first)
    for place, name in enumerate("ab"):
        known = [v for row in rows[-length:] if (v := row[place]) is not None and math.isfinite(v)]
        if len(known) < first:
            assert past.usual(name) is None
        elif max(map(abs, known)) < 1e300:
            assert past.usual(name) == pytest.approx(expected(known))


def test_a_stream_may_begin_late_and_end_early() -> None:
    rows = [{"a": float(k)} for k in range(5)] + [{"a": float(k), "b": 10.0 * k} for k in range(5, 10)]
    past = filled(rows, length=10, first=3)
    assert past.usual("a") == expected(range(10))
    assert past.usual("b") == expected([50.0, 60.0, 70.0, 80.0, 90.0])
    for k in range(10, 18):
        past.add({"b": 10.0 * k})
    assert past.usual("a") is None  # two of its values are held
    assert past.usual("b") == expected([10.0 * k for k in range(8, 18)])


def test_medians_are_computed_anew_after_so_many_arrivals() -> None:
    past = filled([{"a": 0.0}] * 9, refresh=5)
    assert past.usual("a") == (0.0, 0.0)
    seen = []
    for k in range(1, 21):
        past.add({"a": float(k)})
        seen.append(past.usual("a"))
    held = [[0.0] * 9 + [float(v) for v in range(1, k + 1)] for k in range(21)]
    assert seen == [expected(held[k - k % 5]) for k in range(1, 21)]


def test_all_is_forgotten() -> None:
    past = filled([{"a": 1.0, "b": 2.0}] * 9, first=3)
    past.clear()
    assert past.usual("a") is None
    assert past.state_dict() == Past(100, 3).state_dict()
    for _ in range(3):
        past.add({"b": 4.0})
    assert (past.usual("a"), past.usual("b")) == (None, (4.0, 0.0))


@pytest.mark.parametrize(
    ("cut", "missing"),
    [*((cut, 0) for cut in (0, 1, 7, 12, 33)), *((cut, 3) for cut in (1, 7, 12, 33))],
)
def test_a_state_is_gone_on_with_exactly(cut: int, missing: int) -> None:
    rng = random.Random(0)
    rows = [{name: rng.gauss(0, 1) for name in "abc"} for _ in range(40)]
    for k, row in enumerate(rows):
        if missing and k % missing == 0:
            del row["b"]
    whole, first, second = (Past(10, 4, refresh=3) for _ in range(3))
    for row in rows[:cut]:
        whole.add(row)
        first.add(row)
        assert whole.usual("b") == first.usual("b")
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    for row in rows[cut:]:
        whole.add(row)
        second.add(row)
        assert [whole.usual(name) for name in "abc"] == [second.usual(name) for name in "abc"]
    assert second.state_dict() == whole.state_dict()


def test_a_state_goes_on_with_as_many_values_as_are_held() -> None:
    narrow = Past(5, 1)
    narrow.load_state_dict(filled([{"a": float(k)} for k in range(20)]).state_dict())
    narrow.add({"a": 20.0})
    assert narrow.usual("a") == expected([16.0, 17.0, 18.0, 19.0, 20.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", [[1.0, 2.0]]), ("rows", [["x"]]), ("rows", 3), ("since", "x"), ("usual", {"a": [1.0]}), ("names", 3)],
)
def test_a_damaged_state_raises(name: str, value: object) -> None:
    state = {**filled([{"a": 1.0}]).state_dict(), name: value}
    with pytest.raises((ValueError, TypeError)):
        Past(10, 1).load_state_dict(state)
