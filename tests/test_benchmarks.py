"""The committed pages of the benchmarks are those that their committed results make, and every benchmark starts."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path

import pytest

from benchmarks.advice.remedies import REMEDIES
from benchmarks.control.rows import cells
from benchmarks.control.runs import GRID
from benchmarks.lib.store import FOLDER, SharedStore, Store, dumped, rounded
from benchmarks.lib.tables import table
from benchmarks.render import PAGES, page
from gfs_core.detectors.advice import ADVICE

# Of benchmarks/requirements.txt, which the tests do not need.
OTHERS = ("curvlinops", "hessian_eigenthings", "torchdiffeq", "schedulefree")
COMMANDS = sorted(
    [f"benchmarks.{p.stem}" for p in FOLDER.glob("*.py")]
    + [f"benchmarks.{p.parent.name}.__main__" for p in FOLDER.glob("*/__main__.py")]
)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_results_make(name: str) -> None:
    assert page(name) == (FOLDER / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_imports(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OTHERS:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_results_are_saved_after_each_row_and_not_made_again(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"loss": 0.5}

    store = Store("some", tmp_path, device="none")
    assert store.add("part", ("a", 1), make) == {"loss": 0.5}
    again = Store("some", tmp_path)
    assert again.add("part", ("a", 1), make) == {"loss": 0.5}
    assert len(made) == 1
    assert again.results["part"] == {"a | 1": {"loss": 0.5}}
    assert again.results["environment"]["device"] == "none"
    assert Store("some", tmp_path, fresh=True).results == {}


def test_processes_that_share_results_keep_each_others_rows(tmp_path: Path) -> None:
    first, second = SharedStore("some", tmp_path), SharedStore("some", tmp_path)
    first.add("part", ("a",), lambda: {"loss": 1.0})
    second.add("part", ("b",), lambda: {"loss": 2.0})
    assert SharedStore("some", tmp_path).results["part"] == {"a": {"loss": 1.0}, "b": {"loss": 2.0}}


def test_the_excess_of_a_method_is_that_over_the_best_reference_and_a_lost_run_has_an_infinite_one() -> None:
    name = "BatchNorm CNN, momentum, 32"
    losses = {at: 0.25 if at == 0 else 0.5 for at in range(-GRID, GRID + 1)}
    runs = {"×1": 0.3, "×10": 9.0, "×30": None}
    found = cells(
        {
            "untrained": {f"{name} | 0": {"loss": 9.5}},
            "reference": {f"{name} | {at} | 0": {"loss": loss} for at, loss in losses.items()},
            "runs": {f"{name} | constant | {times} | 0": {"loss": loss} for times, loss in runs.items()},
        },
        "constant",
    )
    assert {shift: cell.middle for (_, shift), cell in found.items()} == {
        0: pytest.approx(0.2),
        2: math.inf,
        3: math.inf,
    }
    assert [str(cell) for cell in found.values()] == ["+20 %", "†", "†"]


def test_each_row_is_a_line_of_the_file() -> None:
    text = dumped({"environment": {"torch": "2"}, "rows": [{"a": 1}, {"a": 2}], "runs": {"x": {"b": "×"}}, "empty": []})
    assert text.splitlines() == [
        "{",
        ' "environment": {"torch": "2"},',
        ' "rows": [',
        '  {"a": 1},',
        '  {"a": 2}',
        " ],",
        ' "runs": {',
        '  "x": {"b": "×"}',
        " },",
        ' "empty": []',
        "}",
    ]


def test_numbers_that_are_no_json_are_left_out() -> None:
    assert rounded({"a": [1.23456, float("nan")], "b": (2, "c")}, 3) == {"a": [1.23, None], "b": [2, "c"]}


def test_a_table() -> None:
    assert table(["a", "b"], [[1, "x"], [2, ""]]) == ["| a | b |", "|---|---|", "| 1 | x |", "| 2 |  |"]


@pytest.mark.parametrize("rule", ADVICE)
def test_no_remedy_helped_in_two_cases_more_than_the_advice_where_that_was_chosen(rule: str) -> None:
    runs = Store("advice").results["design"].values()
    cases = [case["helped"] for run in runs for case in run["cases"] if case["rule"] == rule]
    helped = {remedy: sum(remedy in case for case in cases) for remedy in REMEDIES}
    assert cases
    assert helped[ADVICE[rule].remedy] >= max(helped.values()) - 1
