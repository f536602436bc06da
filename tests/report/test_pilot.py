from __future__ import annotations

import dataclasses
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

from gfs_core import ConfigError, GFSConfig, read_history
from gfs_report import jobs
from gfs_report.advice import advise
from gfs_report.cli import app
from gfs_report.runs import Curve, Mark, Run, read_run
from gfs_report.trial import checks, evidence
from gfs_report.trial.checks import Rate
from gfs_report.trial.page import write_pilot
from gfs_report.trial.pilot import Pilot, pilot
from tests.report import sources
from tests.report.browser import look_at, needs_chromium

LR = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    for name, text in {
        "train.py": sources.LIGHTNING,
        "hf.py": sources.HUGGING_FACE,
        "modules.py": sources.MODULES,
        "config.yaml": sources.CONFIG,
        "unknown.yaml": sources.CONFIG.replace("width", "breadth"),
        "crash.py": 'print("loading")\nraise ValueError("no such data")\n',
        "hang.py": 'import time\nprint("waiting")\ndef lock():\n    time.sleep(100)\nlock()\n',
        "nothing.py": 'print("hello")\n',
        "usage.py": "import argparse\nargparse.ArgumentParser().parse_args()\n",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def piloted(folder: Path) -> dict[str, Pilot]:
    """Both frameworks' pilots, run side by side."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with ThreadPoolExecutor(2) as pool:
            lightning = pool.submit(
                pilot, jobs.target("train.py", ["--lr", str(LR)]), steps=120, rates=(1, 10), out=Path("out/train")
            )
            transformers = pool.submit(pilot, jobs.target("hf.py"), steps=40, rates=(0.5,), out=Path("out/hf"))
            return {"lightning": lightning.result(), "transformers": transformers.result()}
    finally:
        os.chdir(here)


def test_the_script_runs_as_the_user_would_run_it_and_nothing_is_left(folder: Path, piloted: dict[str, Pilot]) -> None:
    left = {p.name for p in folder.iterdir()} - {"__pycache__"}
    assert left == {p for p in left if p.endswith((".py", ".yaml"))} | {"out"}  # no logs, no checkpoints, no `after`
    own, tenfold = piloted["lightning"].rates
    assert (own.ended, own.steps, tenfold.ended) == ("steps", 120, "diverged")
    assert {p.name for p in (folder / "out/train/rate-1").iterdir()} == {
        "history.jsonl", "metrics.csv", "output.txt", "outcome.json",
    }  # fmt: skip
    assert not list((folder / "out/hf").glob("**/checkpoint-*"))


@pytest.mark.parametrize("factor", [1, 10])
def test_the_factor_is_on_the_rate_and_on_its_schedule(folder: Path, piloted: dict[str, Pilot], factor: int) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32)[:50], torch.tensor(labels)[:50]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    losses, rates = [], [factor * LR * 0.999**step for step in range(12)]
    for rate in rates:
        loss = 0.5 * (net(x) - nn.functional.one_hot(y, 10)).square().sum(1).mean()
        losses.append(loss.item())
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
    run = read_run(folder / f"out/train/rate-{factor}")
    np.testing.assert_allclose(run.logged["train_loss"].values[:12], losses, rtol=1e-3)
    np.testing.assert_allclose(run.logged["learning_rate"].values[:12], rates, rtol=1e-9)
    history = read_history(folder / f"out/train/rate-{factor}/history.jsonl")
    for m in [m for m in history if m.step < 12 and m.threshold is not None]:
        assert m.threshold == pytest.approx(2 / rates[m.step])
        if m.sharpness is not None:
            assert m.stability_ratio == pytest.approx(m.sharpness * rates[m.step] / 2)


def test_the_verdict_on_full_batch_descent(piloted: dict[str, Pilot]) -> None:
    found = piloted["lightning"]
    answers = {c.question: c.answer for c in found.checks}
    assert answers[checks.MEASURED] == answers[checks.EDGE] == answers[checks.TOLD] == "yes"
    assert found.behaves
    own, tenfold = found.rates
    assert own.edge is not None
    assert own.edge.standing == "held"
    assert 0.9 < own.edge.band.value < 1.2
    assert tenfold.harm is not None
    assert tenfold.harm.ratio_before > 5
    assert own.price is not None
    assert own.price.tiers.keys() == {"running", "sharpness", "gfs"}
    assert found.facts["batches_per_epoch"] == 1
    assert found.advice is not None
    assert not any("mini-batches" in text for text in found.limits)
    assert "theorem" in found.limits[0]


def test_the_page_and_the_numbers_beside_it(tmp_path: Path, piloted: dict[str, Pilot]) -> None:
    found = piloted["lightning"]
    page = write_pilot(found, tmp_path).read_text()
    for text in (found.lead[0], found.advice.python.replace("'", "&#39;"), found.limits[0]):
        assert text in page
    for factor in ("×1", "×10"):
        assert f"Stability ratio at {factor}" in page
    held = json.loads((tmp_path / "pilot.json").read_text())
    assert held["behaves"] is True
    assert [r["factor"] for r in held["rates"]] == [1, 10]
    assert held["rates"][0]["edge"]["band"]["value"] == found.rates[0].edge.band.value
    assert held["rates"][1]["harm"]["kind"] == "not finite"


def test_the_page_in_a_browser(tmp_path: Path, piloted: dict[str, Pilot]) -> None:
    needs_chromium()
    assert look_at(write_pilot(piloted["lightning"], tmp_path), "pilot") >= 4


def test_the_trainer_of_transformers(piloted: dict[str, Pilot], folder: Path) -> None:
    found = piloted["transformers"]
    [rate] = found.rates
    assert (rate.ended, rate.steps) == ("steps", 40)
    facts = found.facts
    assert (facts["framework"], facts["optimizer"], facts["model"]) == ("transformers", "AdamW", "GPT2LMHeadModel")
    assert (facts["batch_size"], facts["accumulation"], facts["clipping"], facts["tied"]) == (4, 2, 1.0, 1)
    run = read_run(folder / "out/hf/rate-0.5")
    letters = 80  # about; the first loss is that of guessing
    assert run.logged["train_loss"].values[0] == pytest.approx(math.log(letters), rel=0.1)
    assert set(run.logged["learning_rate"].values) == {1e-3}
    history = {m.step: m for m in read_history(folder / "out/hf/rate-0.5/history.jsonl")}
    assert set(history) >= {*range(0, 40, 5), *range(2, 15, 2)}  # the running estimate settles
    assert history[10].threshold == pytest.approx(2 * 1.9 / (0.1 * 1e-3), rel=1e-3)
    assert any("clips" in text for text in found.limits)
    assert any("mini-batches" in text for text in found.limits)


@pytest.mark.parametrize(
    ("name", "arguments", "data", "text"),
    [
        ("absent.py", [], None, "there is no file absent.py"),
        ("train", [], None, "neither a script"),
        ("train.py", [], "modules:Digits", "leave it out"),
        ("modules:Net", ["--lr"], None, "takes no arguments"),
        ("modules:Net", [], "modules", "must be an import path"),
    ],
)
def test_a_target_that_is_none(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, arguments: list[str], data: str | None, text: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=text):
        jobs.target(name, arguments, data)


def _run(folder: Path, name: str, *, data: str | None = None, arguments: tuple[str, ...] = (), **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        jobs.run(jobs.target(name, arguments, data), jobs.Plan(40), Path("out/other"), **options)


def test_a_target_that_cannot_be_run(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ended without training"):
        _run(folder, "nothing.py")
    with pytest.raises(ConfigError, match="there is no module absent"):
        _run(folder, "absent:Net")
    with pytest.raises(ConfigError, match=r"refused by LightningCLI(.|\n)*breadth"):
        _run(folder, "unknown.yaml")


def test_a_job_that_crashes_or_hangs_shows_its_last_lines(folder: Path) -> None:
    with pytest.raises(
        jobs.JobFailed, match=r"before its first optimizer step: ValueError: no such data(.|\n)*loading"
    ):
        _run(folder, "crash.py")
    with pytest.raises(jobs.JobFailed, match=r"left with status 2(.|\n)*unrecognized arguments: --lr"):
        _run(folder, "usage.py", arguments=("--lr",))
    with pytest.raises(jobs.JobFailed, match=r"hangs: no step and no output for 1 seconds(.|\n)*waiting") as hung:
        _run(folder, "hang.py", patience=1)
    if os.name == "posix":
        assert "in lock" in str(hung.value)


def test_a_folder_with_something_else_in_it_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"):
        jobs.run(jobs.target(str(folder / "nothing.py")), jobs.Plan(40), tmp_path)
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("options", "text"), [({"steps": 10}, "`steps` must be"), ({"rates": [0.0]}, "`rates` must be")]
)
def test_numbers_out_of_their_range(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        pilot(jobs.target(str(folder / "nothing.py")), **options)


def _curve(values: Any, every: int = 1) -> Curve:
    values = np.asarray(values, np.float64)
    return Curve(every * np.arange(len(values)), values)


def test_where_a_ratio_stands() -> None:
    rise = np.linspace(0.1, 1.0, 20)
    held = evidence.edge(_curve([*rise, *(1 + 0.1 * np.sin(np.arange(40)))], 5), harmed=False)
    assert held is not None
    assert (held.standing, held.reached) == ("held", 85)  # the median of three is past 0.9 from there on
    assert held.band.value == pytest.approx(1.0, abs=0.02)
    below = evidence.edge(_curve(0.5 * rise, 5), harmed=False)
    assert below == (None, None, pytest.approx(0.5, abs=0.03), "below")
    assert evidence.edge(_curve([*rise, *[0.2] * 60]), harmed=False).standing == "left"
    assert evidence.edge(_curve([*rise, *[2.0] * 60]), harmed=False).standing == "past"
    assert evidence.edge(_curve([*[3.0] * 10, *[0.2] * 60]), harmed=False, start=10).standing == "below"


def test_what_harms_and_who_told_of_it() -> None:
    quiet = 1 + 0.05 * np.random.default_rng(0).standard_normal(200)
    assert evidence.harm(Run("quiet"), _curve(quiet)) is None
    spike = quiet.copy()
    spike[100:105] = 9.0
    assert evidence.harm(Run("spike"), _curve(spike)) is None  # it comes back by itself
    doubled = np.concatenate([quiet, 3.0 * quiet])
    ratio = {"stability_ratio": _curve([0.5] * 19 + [1.3, 9.0], 10)}
    run = Run("doubled", gfs=ratio, marks=[Mark(20, 1, "old"), Mark(170, 2, "grows"), Mark(200, 2, "late")])
    assert evidence.harm(run, _curve(doubled)) == (200, "doubled", 30, 1.3)
    lost = quiet.copy()
    lost[60:] = np.nan
    assert evidence.harm(Run("lost"), _curve(lost)) == (60, "not finite", None, None)
    assert evidence.harm(Run("worse"), _curve(np.linspace(1, 1.5, 100))).kind == "worse"


def test_a_rate_that_ends_at_chance_is_a_harm() -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(200)
    chance = np.concatenate([[2.3], 60 * np.exp(-np.arange(10) / 3) + 2.3, np.full(189, 2.31)]) + noise
    run = Run("×30", gfs={"stability_ratio": _curve([6.0, 0.0] + [0.01] * 18, 10)})
    found = evidence.harm(run, _curve(chance))
    assert (found.kind, found.step <= 2, found.ratio_before) == ("blown up", True, 6.0)
    jumped = np.concatenate([np.linspace(2.3, 0.1, 100), np.full(100, 1.1)]) + noise  # back from a spike, half-way
    jumped[100:110] = 8.0
    assert evidence.harm(Run("half"), _curve(jumped)) is not None


def test_a_rate_that_gains_far_less_than_a_lower_one_is_a_harm() -> None:
    own = Rate(1.0, "steps", 300, loss=(2.3, 0.1))
    slower = Rate(3.0, "steps", 300, loss=(2.3, 0.5))
    behind = Rate(30.0, "steps", 300, loss=(2.3, 1.87), edge=_edge("past", 4.0))
    found = checks.held_against_lower([own, slower, behind], {30.0: Run("×30", marks=[Mark(120, 1, "grows")])})
    assert [r.harm for r in found[:2]] == [None, None]
    assert found[2].harm == (299, "behind", 179, 4.0)
    assert {c.question: c.answer for c in checks.ask(found, {})}[checks.TOLD] == "yes"
    too_low = checks.held_against_lower([Rate(0.1, "steps", 300, loss=(2.3, 2.2)), own], {})
    assert [r.harm for r in too_low] == [None, None]  # a rate that is only slow


def test_how_two_signals_agree() -> None:
    random = np.random.default_rng(0)
    dear = np.exp(random.standard_normal(60))
    same = evidence.agreement(_curve(0.8 * dear), _curve(dear))
    assert same is not None
    assert same.correlation == pytest.approx((1, 1, 1))
    assert same.quotient == pytest.approx((0.8, 0.8, 0.8))
    other = evidence.agreement(_curve(np.exp(random.standard_normal(60))), _curve(dear))
    assert other is not None
    assert other.correlation.low < 0 < other.correlation.high
    assert other.quotient.low < other.quotient.value < other.quotient.high
    assert evidence.agreement(_curve(dear[:9]), _curve(dear[:9]), start=2) is None


def test_a_flow_that_falls_more_steadily() -> None:
    falling = np.exp(-0.02 * np.arange(20))
    swing = falling * np.where(np.arange(20) % 2, 1.2, 0.8)
    raw, flow = evidence.steadier(Run("r", gfs={"sharpness": _curve(swing, 20), "gfs_sharpness": _curve(falling, 20)}))
    assert (flow.rises, flow.trend) == (0, -1)
    assert raw.rises == pytest.approx(10 / 19)
    assert flow.swing == pytest.approx(0.02)
    assert raw.swing > 0.3


def test_the_price_of_each_tier_is_told_apart() -> None:
    cost = {0: 9.0} | {s: 0.1 + 0.4 * (s % 10 == 0) + 2.0 * (s % 20 == 0) for s in range(5, 200, 5)}
    clock = np.cumsum([1.0 + cost.get(s, 0.0) for s in range(200)])
    steps = np.array(sorted(cost))
    spent = Curve(steps, np.array([cost[s] for s in steps]))
    price = evidence.price(Run("r", gfs={"seconds": spent}, logged={"seconds": _curve(clock)}), checks.CADENCE)
    assert price is not None
    assert price.step == pytest.approx(1)
    assert price.tiers == pytest.approx({"running": 0.1, "sharpness": 0.4, "gfs": 2.0})
    assert price.measurement()["gfs"] == pytest.approx(2.4)


@pytest.mark.parametrize("prices", [(0.1, 0.4, 2.4), (0.1, 5.0, 50.0), (0.001, 0.01, 0.05), (2.0, 30.0, 300.0)])
def test_what_is_advised_is_within_the_budget(prices: tuple[float, float, float]) -> None:
    held = dict(zip(("running", "sharpness", "gfs"), prices, strict=True))
    advice = advise(1.0, held)
    intervals = GFSConfig(**advice.options).intervals()
    assert sum(held[tier] / every for tier, every in intervals.items()) <= 0.05
    assert f"every={advice.options['every']}" in advice.python
    assert f"--gfs_every {advice.options['every']}" in advice.flags


def test_advice_leaves_out_what_does_not_help() -> None:
    prices = {"running": 0.1, "sharpness": 0.4, "gfs": 2.4, "directional": 0.2}
    assert advise(1.0, prices).options["tier"] == "gfs"
    assert advise(1.0, prices, flow="it swings").options["tier"] == "sharpness"
    assert advise(1.0, prices, running="it is off").options["running_every"] is None
    assert advise(1.0, prices, empirical=True).options == {"tier": "directional", "every": 5}


def _edge(standing: Any, middle: float, reached: int | None = 50) -> evidence.Edge:
    band = None if reached is None else evidence.Interval(middle, middle - 0.1, middle + 0.1)
    return evidence.Edge(reached, band, middle, standing)


def test_signals_that_do_not_behave() -> None:
    def answers(*rates: Rate) -> dict[str, str]:
        return {c.question: c.answer for c in checks.ask(rates, {})}

    good = Rate(1.0, "steps", 300, had=1.0, edge=_edge("held", 1.0))
    assert "no" not in answers(good).values()
    past = Rate(2.0, "steps", 300, had=1.0, edge=_edge("past", 2.5))
    assert answers(good, past)[checks.EDGE] == "no"
    silent = Rate(2.0, "diverged", 300, had=1.0, harm=evidence.Harm(80, "not finite", None, 0.1))
    assert answers(good, silent)[checks.TOLD] == "no"
    told = Rate(2.0, "diverged", 300, had=1.0, harm=evidence.Harm(80, "not finite", 12, 0.1))
    assert answers(good, told)[checks.TOLD] == "yes"
    assert answers(Rate(1.0, "steps", 300, had=0.5))[checks.MEASURED] == "no"
    wide, near = evidence.Interval(0.1, -0.2, 0.3), evidence.Interval(0.8, 0.7, 0.9)
    off = Rate(1.0, "steps", 300, had=1.0, agreement=evidence.Agreement(30, wide, near, spread=9.0))
    assert answers(off)[checks.FOLLOWED] == "no"
    still = Rate(1.0, "steps", 300, had=1.0, agreement=evidence.Agreement(30, wide, near, spread=1.2))
    assert answers(still)[checks.FOLLOWED] == "yes"
    far = Rate(1.0, "steps", 300, had=1.0, agreement=evidence.Agreement(30, near, evidence.Interval(4, 3, 5), 9.0))
    assert answers(far)[checks.FOLLOWED] == "no"
    distant = dataclasses.replace(far, agreement=far.agreement._replace(largest=0.2))
    assert answers(distant)[checks.FOLLOWED] == "not told"
    unsure = Rate(1.0, "steps", 300, had=1.0, agreement=evidence.Agreement(30, near, evidence.Interval(2, 1, 3), 9.0))
    assert answers(unsure)[checks.FOLLOWED] == "not told"


def test_the_margin_goes_below_a_ratio_that_did_harm() -> None:
    own = Rate(1.0, "steps", 300, past_margin=0.1)
    assert checks.margin([own], {})[0] == 0.5
    assert checks.margin([own], {"adaptive": True})[0] == 0.75
    hurt = Rate(2.0, "diverged", 300, harm=evidence.Harm(80, "doubled", 3, 0.5))
    value, why = checks.margin([own, hurt], {})
    assert value == pytest.approx(0.4)
    assert "10%" in why


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["crash.py"], 1, "no such data"),
        (["nothing.py"], 2, "ended without training"),
        (["usage.py", "--", "--lr"], 1, "unrecognized arguments: --lr"),
        (["crash.py", "--rates", "one"], 2, "--rates must be numbers"),
        (["crash.py", "--steps", "10"], 2, "`steps` must be"),
    ],
)
def test_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: list[str], status: int, text: str
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["pilot", *arguments])
    assert done.exit_code == status, done.output
    assert text in done.output
