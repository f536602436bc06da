"""Real trainings, half of them destroyed in different ways, recorded as a user would have them: what is said first."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from benchmarks.destroyed import DESIGN, EXAM, ODD
from benchmarks.lib.data import digits, text
from benchmarks.lib.harmed import Fault, jump, ramp, train
from gfs_report.cli import app
from gfs_report.comparison.compare import compare
from gfs_report.losses import FAILED, course
from gfs_report.ratios import lower_rate
from gfs_report.runs import Curve, Run, read_run
from gfs_report.verdict import Verdict, judge
from lightning_gfs import GFSCallback

TANH, RELU, WHOLE = list(DESIGN.values())[:3]
CNN, (_, REGRESSION, _, AUTOENCODER, NOISY, BINARY) = DESIGN["CNN, SGD"], EXAM.values()
PRETRAINED = ODD["design"]["fine-tuning that hardly moves"]

# The task, its fault, the steps between logged losses, and what became of the loss.
DESTROYED: dict[str, tuple[Any, Fault, int, tuple[str, ...]]] = {
    "high rate from the start": (TANH, jump(30.0), 1, ("worse", "lost")),  # it fell for four steps
    "high rate from the start, at chance": (CNN, jump(90.0), 1, ("blown up", "worse", "stuck", "not finite")),
    "high rate, whole batches": (WHOLE, jump(30.0), 10, ("not finite",)),
    "jump in the middle": (AUTOENCODER, jump(90.0, 0.5), 1, ("lost",)),
    "ramp": (BINARY, ramp(5.0), 10, ("lost", "not finite")),
    "late collapse": (RELU, jump(90.0, 0.92), 1, ("lost",)),
    "labels shuffled": (RELU, Fault(0.5, labels=True), 10, ("lost",)),
    "units dead from half": (RELU, Fault(0.5, bias=-100.0), 25, ("lost",)),
    "weights exploded": (RELU, Fault(0.5, weights=30.0), 10, ("lost",)),
    "half recovered": (TANH, jump(30.0, 0.4, 0.45), 1, ("lost",)),
}
HEALTHY: dict[str, tuple[Any, Fault, int, tuple[str, ...]]] = {
    "momentum": (TANH, Fault(), 1, ("fell",)),
    "AdamW": (RELU, Fault(), 10, ("fell",)),
    "whole batches at the edge": (WHOLE, Fault(), 1, ("fell",)),
    "bad batch": (RELU, Fault(0.5, 0.501, inputs=30.0), 1, ("fell",)),
    "batches of 4, warm-up": (NOISY, Fault(), 1, ("fell",)),
    "fitted": (BINARY, Fault(fit=48), 1, ("fell",)),
    "regression, few points": (REGRESSION, Fault(), 50, ("fell",)),
    "fine-tuning that hardly moves": (PRETRAINED, Fault(), 1, ("flat",)),
}


# A run that goes past the edge in its first steps alone tells it only where it is measured there, which the default
# budget does not allow.
MEASURED_AT_THE_START = {"every": 10_000, "tier": "sharpness", "running_every": None, "max_overhead": None}
OPTIONS: dict[str, dict[str, Any]] = {"high rate from the start, at chance": MEASURED_AT_THE_START}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def recorded(case: tuple[Any, Fault, int, tuple[str, ...]], folder: Path, **options: Any) -> Verdict:
    make, fault, every, _ = case
    train(make(), fault, folder, log_every=every, **options)
    return judge(read_run(folder))


@pytest.mark.parametrize("name", DESTROYED)
def test_a_destroyed_run_is_called_that_first(name: str, tmp_path: Path) -> None:
    found = recorded(DESTROYED[name], tmp_path, **OPTIONS.get(name, {}))
    assert found.failed
    assert found.fate in DESTROYED[name][3]
    assert found.sentences[0].startswith("This run is destroyed: ")
    assert found.do.startswith("Start again")
    assert "may be lower than it need be" not in found.do
    assert "Nothing has to be done" not in found.do
    alone = judge(read_run(tmp_path / "history.jsonl"))  # nothing was logged
    assert alone.failed, alone.summary


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_called_destroyed(name: str, tmp_path: Path) -> None:
    found = recorded(HEALTHY[name], tmp_path)
    assert not found.failed
    assert found.fate in HEALTHY[name][3]
    assert "destroyed" not in " ".join(found.sentences)
    assert "Start again" not in found.do
    alone = judge(read_run(tmp_path / "history.jsonl"))
    assert alone.fate == found.fate
    assert alone.course.start == pytest.approx(read_run(tmp_path / "history.jsonl").training_loss.values[0])


def test_every_format_says_it_first(tmp_path: Path) -> None:
    recorded(DESTROYED["half recovered"], tmp_path / "run")
    said = "This run is destroyed: its loss ended at "
    for ending in ("html", "md", "json", "svg", "png"):
        done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / f"r.{ending}")])
        assert done.exit_code == 0, done.output
        assert done.output.startswith(said)
    page = (tmp_path / "r.html").read_text()
    assert page.index(said) < page.index("he early warning raised")
    assert (tmp_path / "r.md").read_text().split("\n\n")[1].startswith(said)
    held = json.loads((tmp_path / "r.json").read_text())["verdict"]
    assert (held["failed"], held["fate"]) == (True, "lost")
    assert held["summary"].startswith(said)
    assert 0.25 < held["course"]["lost"] < 1
    assert held["course"]["best_step"] < held["course"]["since"] + 20
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_destroyed_runs_count_as_failed_in_a_comparison(tmp_path: Path) -> None:
    for i, (name, faults) in enumerate({"plain": Fault(), "jump": jump(30.0, 0.4, 0.45)}.items()):
        for seed in range(2):
            train(TANH(), faults, tmp_path / name / f"seed-{seed}", log_every=5, seed=seed + i)
    made = compare([str(tmp_path / "plain"), str(tmp_path / "jump")])
    assert [s.failed for s in made.sets] == [0, 2]
    assert made.status == 1


def test_runs_that_log_their_loss_differently_are_compared_by_what_the_monitors_saw(tmp_path: Path) -> None:
    for name, logged in (("plain", True), ("jump", False)):
        fault = jump(30.0, 0.4, 0.45) if name == "jump" else Fault()
        train(TANH(), fault, tmp_path / name / "seed-0", logged=logged)
    made = compare([str(tmp_path / "plain"), str(tmp_path / "jump")])
    assert made.metric == "gfs/training_loss"
    assert [s.failed for s in made.sets] == [0, 1]
    assert made.sets[0].results[0].final == pytest.approx(0.03, abs=0.03)


class Digits(L.LightningModule):
    """The rate jumps by a factor half-way."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.factor = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), factor

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.optimizers().param_groups[0]["lr"] = 3e-3 * (self.factor if self.global_step >= 140 else 1)  # type: ignore

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


@pytest.mark.parametrize(("factor", "failed"), [(1.0, False), (300.0, True)])
def test_through_lightning_logged_now_and_then(tmp_path: Path, factor: float, failed: bool) -> None:
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_steps=280, logger=CSVLogger(tmp_path, name="", version=""), callbacks=[GFSCallback()], log_every_n_steps=10,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(factor), DataLoader(TensorDataset(*digits(1437)), 64, shuffle=True))
    found = judge(read_run(tmp_path))
    assert found.failed is failed
    assert found.summary.startswith("This run is destroyed" if failed else "This run went well")


def test_through_transformers_a_rate_that_ends_at_chance(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from hf_gfs import GFSCallback as HFCallback

    torch.manual_seed(0)
    (x, _), letters = text(200, 16)
    config = GPT2Config(
        vocab_size=letters, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=3.0, lr_scheduler_type="constant",
        logging_steps=2, save_steps=60, report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in x]
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[HFCallback()]).train()
    found = judge(read_run(tmp_path))
    assert found.failed, found.sentences
    assert "may be lower" not in found.do


# --- the rules, each where it decides -------------------------------------------------------------------------------


def curve(values: Any) -> Curve:
    return Curve(np.arange(len(values)), np.asarray(values, float))


def falling(count: int, noise: float = 0.02, seed: int = 0) -> Any:
    steps = np.arange(count)
    return 2.3 * np.exp(-steps / (count / 6)) + 0.1 + noise * np.random.default_rng(seed).standard_normal(count)


def test_the_end_is_held_against_the_best_in_units_of_the_progress() -> None:
    for part, fate in ((0.2, "fell"), (0.3, "lost"), (0.9, "lost")):
        values = falling(400)
        values[300:] += part * 2.3
        found = course(curve(values))
        assert found.fate == fate
        assert found.lost == pytest.approx(part, abs=0.03)
        assert found.since is None or abs(found.since - 300) <= 5


def test_a_run_that_blew_up_at_first_is_not_called_well() -> None:
    values = np.concatenate([[4.8, 16, 14, 9.4, 7], np.linspace(6, 3, 55)])
    found = judge(Run("r", logged={"loss": curve(values)}))
    assert (found.fate, found.course.since) == ("shaken", 1)
    assert found.summary == "The loss of this run went from 4.8 to 3.14, but it blew up first, about step 1."
    assert "lower learning rate" in found.do
    spike = falling(400)
    spike[200:202] = 40.0  # in the midst of the run it is a spike
    assert course(curve(spike)).fate == "fell"


def test_a_loss_that_stops_early_is_not_called_well() -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(100)
    stopped = np.concatenate([[4.96, 3.5, 2.8, 2.5], np.full(96, 2.35)]) + noise
    found = judge(Run("r", logged={"loss": curve(stopped)}))
    assert found.fate == "stalled"
    assert "has hardly fallen since about step" in found.summary
    assert "best constant answer" in found.do
    fitted = 2.3 * np.exp(-np.arange(100) / 5)  # most of the fall is early, and yet it goes on
    assert course(curve(fitted)).fate == "fell"


def test_a_fall_within_the_scatter_is_none() -> None:
    values = 0.7 + 0.5 * np.random.default_rng(0).standard_normal(46)
    values[0], values[-5:] = 0.73, 0.66
    found = judge(Run("r", logged={"loss": curve(values)}))
    assert found.fate == "flat"
    assert found.summary.startswith("This run has learnt next to nothing: its loss went from 0.73 to 0.66")
    small = judge(Run("r", logged={"loss": curve(np.linspace(2.5, 2.3, 100))}))
    assert small.summary == "The loss of this run fell by 8%: it went from 2.5 to 2.31."


def test_a_run_that_was_past_the_edge_when_last_measured_is_not_called_well() -> None:
    long_ago = {"running_stability_ratio": Curve(np.array([10, 25]), np.array([120.0, 100.0]))}
    found = judge(Run("r", logged={"loss": curve(falling(250))}, gfs=long_ago))
    assert found.summary.endswith("but its steps were, when last measured, past the edge.")
    assert found.do.startswith("Lower the learning rate")


def test_means_over_all_steps_count_beside_a_median_that_hides_a_few_huge_losses() -> None:
    means = Curve(np.arange(0, 500, 10), np.concatenate([np.linspace(2.3, 0.5, 25), np.full(25, 3e6)]))
    single = np.where(np.arange(500) % 10 == 0, 3e7, 0.0)
    single[:250] = np.linspace(2.3, 0.5, 250)
    run = Run("r", logged={"loss": curve(single)}, training_loss=means)
    assert course(run.logged["loss"]).fate == "fell"
    assert judge(run).fate == "lost"


def test_a_nan_that_was_skipped_is_none_at_the_end() -> None:
    values = falling(200)
    values[[20, 150, 195]] = math.nan
    assert course(curve(values)).fate == "fell"
    values[199] = math.nan
    found = course(curve(values))
    assert (found.fate, found.since) == ("not finite", 199)


def test_noise_and_chance_starts_are_no_harm() -> None:
    rng = np.random.default_rng(0)
    fates = [course(curve(rng.exponential(1.0, count))).fate for count in (8, 20, 100, 1000) for _ in range(100)]
    harmed = [fate in FAILED for fate in fates]
    assert sum(harmed) <= 16  # 4 % of 400, of losses that say nothing …
    assert sum(harmed[200:]) <= 2  # … and 1 % where there are 100 and more


def test_a_few_losses_say_little() -> None:
    assert course(curve([2.3, 1.0, 2.2])).fate == "unknown"
    assert course(curve([2.3, 2.6])).fate == "worse"
    assert course(curve([2.3])).fate == "unknown"


def test_a_slow_rise_is_excused_only_below_the_edge() -> None:
    values = 0.7 + np.linspace(0, 1.5, 300) + 0.05 * np.random.default_rng(0).standard_normal(300)
    below, past = curve(np.full(300, 0.3)), curve(np.full(300, 1.3))
    assert judge(Run("a", logged={"loss": curve(values)}, gfs={"stability_ratio": below})).fate == "drifted"
    assert judge(Run("b", logged={"loss": curve(values)}, gfs={"stability_ratio": past})).failed
    assert judge(Run("c", logged={"loss": curve(values)})).failed


def test_the_loss_on_the_probe_tells_where_the_logged_one_cannot() -> None:
    probe = Curve(np.arange(0, 200, 10), np.array([2.3, 1.0, 0.5, 0.3, *[2.3] * 16]))
    late = Curve(np.array([100, 200]), np.array([2.3, 2.3]))
    assert judge(Run("r", logged={"loss": late}, gfs={"loss_probe": probe})).fate == "lost"


def test_a_ratio_from_long_before_the_end_is_not_that_of_the_end() -> None:
    old = Curve(np.array([0]), np.array([0.01]))
    found = judge(Run("r", logged={"loss": curve(falling(300))}, gfs={"stability_ratio": old}))
    assert found.standing == "unknown"
    assert "last measured at step 0 of 299" in found.where
    assert "may be lower" not in found.do


# --- rates ----------------------------------------------------------------------------------------------------------


def rated(values: Any, rate: float = 0.1) -> Run:
    gfs = {"running_stability_ratio": curve(values), "learning_rate": curve(np.full(len(values), rate))}
    return Run("r", gfs=gfs, logged={"loss": curve(falling(len(values)))})


def test_a_lower_rate_comes_with_its_range_or_not_at_all() -> None:
    rng = np.random.default_rng(0)
    found = lower_rate(rated(2 * np.exp(0.2 * rng.standard_normal(100))))
    assert found.measurements == 50
    assert found.rate == pytest.approx(0.025, rel=0.1)
    assert 0.015 < found.low < found.rate < found.high < 0.04
    assert "50 measurements of the running stability ratio" in judge(rated(np.full(100, 2.0))).do
    assert lower_rate(rated(np.full(18, 2.0))).why_not.startswith("there are 9 measurements")
    assert "further apart" in lower_rate(rated(2 * np.exp(1.5 * rng.standard_normal(100)))).why_not
    assert "not surely below" in lower_rate(rated(np.full(100, 0.4))).why_not


def test_a_higher_rate_is_spoken_of_only_where_all_agree() -> None:
    said = "may be lower than it need be"
    steady = 0.1 * np.exp(0.1 * np.random.default_rng(0).standard_normal(100))
    assert said in judge(rated(steady)).do
    assert said not in judge(rated(steady[:18])).do  # too few
    scattered = np.where(np.arange(100) % 2, 0.02, 0.2)
    assert said not in judge(rated(scattered)).do
    noisy = rated(steady)
    noisy.gfs["mean_square_stability_ratio"] = curve(np.full(100, 0.6))
    assert said not in judge(noisy).do
    rung = rated(steady)
    rung.gfs["alarm"] = curve(np.where(np.arange(100) < 50, 0, 2))
    assert said not in judge(rung).do
    assert "alarm is still on" in judge(rung).do


def test_trainings_that_differ_in_their_seed_alone_get_rates_that_agree_or_none(tmp_path: Path) -> None:
    named = []
    for seed in range(4):
        torch.manual_seed(seed)
        task = RELU()
        for group in task.optimizer.param_groups:
            group["lr"] = 0.03
        train(task, Fault(), tmp_path / str(seed), seed=seed, tier="running", every=5, max_overhead=None)
        found = lower_rate(read_run(tmp_path / str(seed)))
        assert (found.rate is None) == bool(found.why_not)
        if found.rate is not None:
            assert found.measurements >= 10
            assert found.low <= found.rate <= found.high < 0.03
            named.append(found.rate)
    assert not named or max(named) < 3 * min(named)
