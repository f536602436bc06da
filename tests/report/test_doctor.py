from __future__ import annotations

import ast
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gfs_core import GFSConfig, Measurement
from gfs_report import jobs, terminal
from gfs_report.cli import app
from gfs_report.doctor import STEPS, Examination, Price, _advise, _disagreement, examine, installed
from tests.report import sources

_JOBS = {
    "twice": jobs.Target("modules:Net", "path", data="modules:Digits"),
    "manual": jobs.Target("modules:Manual", "path", data="modules:Digits"),
    "config": jobs.Target("config.yaml", "config"),
    "transformers": jobs.Target("hf.py", "script"),
    "crowded": jobs.Target("crowded.py", "script"),
}


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Examination | jobs.JobFailed]:
    """All jobs, side by side."""
    folder, here = tmp_path_factory.mktemp("job"), Path.cwd()
    (folder / "modules.py").write_text(sources.MODULES)
    (folder / "hf.py").write_text(sources.HUGGING_FACE)
    (folder / "config.yaml").write_text(sources.CONFIG)
    (folder / "crowded.py").write_text(sources.CROWDED)

    def one(job: jobs.Target) -> Examination | jobs.JobFailed:
        try:
            return examine(job)
        except jobs.JobFailed as error:
            return error

    os.chdir(folder)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(_JOBS, pool.map(one, _JOBS.values()), strict=True))
    finally:
        os.chdir(here)
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {"modules.py", "hf.py", "config.yaml", "crowded.py"}
    return found


def _found(examined: dict[str, Examination | jobs.JobFailed], name: str) -> Examination:
    found = examined[name]
    assert isinstance(found, Examination), found
    return found


def test_a_loss_without_a_second_derivative_is_measured_from_gradients(
    examined: dict[str, Examination | jobs.JobFailed],
) -> None:
    found = _found(examined, "twice")
    assert found.measurable
    assert found.products.startswith("products come from differences of gradients: no second derivative")
    assert found.problems == []
    assert found.threshold == "SGD: by formula, a sharpness of 40 at its present rate"
    assert found.values["stability_ratio"] == pytest.approx(found.values["sharpness"] / 40)
    assert found.facts["measured"] == 64 * 16 + 16 + 16 * 10 + 10
    assert found.facts["batch_size"] == 64
    assert {p.tier for p in found.prices} == {
        "running",
        "directional",
        "batch_sharpness",
        "sharpness",
        "midpoint",
        "gfs",
    }


def test_a_config_of_the_cli(examined: dict[str, Examination | jobs.JobFailed]) -> None:
    found = _found(examined, "config")
    assert found.measurable
    assert found.products == "exact, by double backward; checked against gradients"
    facts = found.facts
    assert (facts["optimizer"], facts["dtypes"], facts["device"]) == ("AdamW", ["float32"], "cpu")
    assert facts["frozen"] == 64 * 16 + 16
    assert facts["tied"] == 2  # weight and bias of the layer that stands at two places
    assert facts["measured"] == 16 * 16 + 16 + 16 * 10 + 10
    assert found.values["threshold"] == pytest.approx((2 - 0.002 * 0.1) * 1.9 / (0.1 * 0.002))
    weights = 4 * facts["measured"]
    vectors = {p.tier: p.memory for p in found.prices}
    assert vectors["running"] == 8 * weights  # copies of the weights with a preconditioner: benchmarks/memory.md
    assert vectors["sharpness"] == 13 * weights  # 12, and what the running estimate beside it keeps
    assert vectors["midpoint"] == 15 * weights  # and the weights before the last two steps
    assert "measuring raised the peak by" in found.memory


def test_the_trainer_of_transformers(examined: dict[str, Examination | jobs.JobFailed]) -> None:
    found = _found(examined, "transformers")
    assert found.measurable
    facts = found.facts
    assert (facts["framework"], facts["model"], facts["optimizer"]) == ("transformers", "GPT2LMHeadModel", "AdamW")
    assert (facts["batch_size"], facts["accumulation"], facts["tied"]) == (4, 2, 1)
    assert found.values["threshold"] == pytest.approx(2 * 1.9 / (0.1 * 2e-3))
    assert found.values["learning_rate"] == pytest.approx(2e-3)


def test_what_is_advised_can_be_set_and_is_within_the_budget(
    examined: dict[str, Examination | jobs.JobFailed],
) -> None:
    for name in ("twice", "config", "transformers", "crowded"):
        found = _found(examined, name)
        assert found.advice is not None
        assert found.step is not None
        call = ast.parse(found.advice.python, mode="eval").body
        assert isinstance(call, ast.Call)
        config = GFSConfig(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})
        prices = {p.tier: p.seconds for p in found.prices}
        assert sum(prices[tier] / every for tier, every in config.intervals().items()) <= 0.05 * found.step
        for p in found.prices:
            assert p.seconds / (p.every * found.step) <= 0.05 < p.seconds / max(1e-9, (p.every - 1) * found.step)


def test_what_cannot_be_measured_is_said(examined: dict[str, Examination | jobs.JobFailed]) -> None:
    """The job itself is not at fault and runs on: it is examined, and found not to be measurable, with the way out."""
    manual = _found(examined, "manual")
    assert not manual.measurable
    assert (manual.values, manual.prices, manual.advice) == ({}, [], None)
    told = " ".join(manual.problems)
    assert "this module uses manual optimization" in told
    assert "GFSCallback(loss_fn=...)" in told
    assert "Traceback" not in told
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.show_examination(manual, console)
    text = console.export_text()
    assert "This job cannot be measured" in text
    assert "manual optimization" in text


def test_the_findings_are_printed_and_given_as_json(examined: dict[str, Examination | jobs.JobFailed]) -> None:
    found = _found(examined, "config")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.show_examination(found, console)
    text = console.export_text()
    for part in (found.products, found.threshold, found.advice.python, found.advice.flags, "This job can be measured."):
        assert part in text
    held = json.loads(json.dumps(found.to_dict()))
    assert held["measurable"] is True
    assert held["advice"]["python"] == found.advice.python
    assert held["prices"][0]["tier"] == "running"


def test_what_is_installed() -> None:
    found = {p.name: p for p in installed()}
    assert found["torch"].version == metadata.version("torch")
    assert found["torch"].wanted == ">=2.6"
    assert all(p.enough for p in found.values())


def test_without_a_job_the_command_says_what_is_installed() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    held = json.loads(done.output)
    there = {"name": "torch", "version": metadata.version("torch"), "wanted": ">=2.6", "enough": True}
    assert there in held["installed"]
    assert CliRunner().invoke(app, ["doctor", "absent.py"]).exit_code == 2


def test_ratios_that_disagree_are_remarked_on_with_the_likely_cause() -> None:
    above = _disagreement({"running_stability_ratio": 188_800.0, "stability_ratio": 0.8})
    assert "the running stability ratio, 1.89e+05, is far from the solved one, 0.8: it comes from parts of" in above
    assert "begins low" in _disagreement({"running_stability_ratio": 0.01, "stability_ratio": 0.8})
    assert _disagreement({"running_stability_ratio": 0.2, "stability_ratio": 0.8}) == ""
    assert _disagreement({"running_stability_ratio": 0.2}) == ""


def test_where_memory_is_short_what_was_measured_is_advised(
    examined: dict[str, Examination | jobs.JobFailed],
) -> None:
    found = _found(examined, "crowded")
    assert any("the next one is on half as many examples" in problem for problem in found.problems)
    assert found.advice is not None
    assert found.advice.options["probe_size"] == 256
    assert "it had for probe_size=256." in found.advice.reasons[-1]
    prices = [Price("sharpness", 0.4, 0.4, 10, None)]
    failed = _advise(prices, 1.0, {"measuring": {"fits": 128}}, Measurement(STEPS - 1), "")
    assert "probe_size" not in failed.options  # nor is it known whether so few fit


def test_an_estimate_that_disagrees_is_not_advised() -> None:
    prices = [Price(tier, seconds, seconds, 10, None) for tier, seconds in (("running", 0.1), ("sharpness", 0.4))]
    last = Measurement.of(STEPS - 1, sharpness=1.0)
    assert _advise(prices, 1.0, {}, last, "").options.get("running_every", 0) is not None
    apart = _advise(prices, 1.0, {}, last, "far")
    assert apart.options["running_every"] is None
    assert any("it is far from the solved ratio here" in reason for reason in apart.reasons)
