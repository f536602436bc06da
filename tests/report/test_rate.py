"""`gfs rate` on real jobs of both frameworks, each run in a process of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from typer.testing import CliRunner

from gfs_core import ConfigError
from gfs_report import jobs
from gfs_report.cli import app
from gfs_report.rate.search import _Jobs, points_of
from gfs_report.runs import read_run
from tests.report.browser import look_at, needs_chromium

STEPS, LR = 110, 0.01
LIGHTNING = """
import sys
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(y)
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", enable_progress_bar=False)
    held = DataLoader(TensorDataset(x[:360], y[:360]), 60)
    trainer.fit(Net(float(sys.argv[1])), DataLoader(TensorDataset(x[360:], y[360:]), 64, drop_last=True), held)
    Path("after").touch()
"""
HUGGING_FACE = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


x, y = load_digits(return_X_y=True)
rows = [{"x": torch.tensor(a / 16, dtype=torch.float32), "labels": int(b)} for a, b in zip(x, y)]
arguments = TrainingArguments(
    "out", max_steps=120, learning_rate=0.01, warmup_steps=12, per_device_train_batch_size=32, use_cpu=True
)
Trainer(Net(), arguments, train_dataset=rows[:1400], eval_dataset=rows[1400:]).train()
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after `gfs rate` on a Lightning script, and what was printed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "train.py").write_text(LIGHTNING)
    here = Path.cwd()
    os.chdir(folder)
    try:
        ended = CliRunner().invoke(app, ["rate", "train.py", "--", str(LR)])
    finally:
        os.chdir(here)
    assert ended.exit_code == 0, ended.output
    return folder, ended.output


def held(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gfs-rate/rate.json").read_text())
    return found


def schedule(peak: float) -> list[float]:
    """The rates of the job's own schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cycle, rates = OneCycleLR(optimizer, peak, total_steps=STEPS, cycle_momentum=False), []
    for _ in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        cycle.step()
    return rates


def test_a_rate_far_above_the_jobs_own_is_found(searched: tuple[Path, str]) -> None:
    found = held(searched[0])
    assert (found["steps"], found["judged_on"]) == (STEPS, "validation")
    assert found["users"] == pytest.approx(LR, rel=1e-3)
    assert 0.05 < found["rate"] < 2  # at 0.01 hardly anything is learnt in 110 steps, and at 5 it is lost
    assert found["range"][0] <= found["rate"] <= found["range"][1]
    best = min(p["loss"] for p in found["pilots"] if p["loss"] is not None)
    assert best < 0.6 < 2.3  # log 10, where it begins
    assert f"{found['rate']:.2g}" in " ".join(searched[1].split())
    assert found["cost"]["steps"] == len(found["ramp"]) + sum(p["taken"] for p in found["pilots"])


def test_a_ramp_rises_and_has_ratio_and_gradient(searched: tuple[Path, str]) -> None:
    points = points_of(read_run(searched[0] / "gfs-rate/ramp"))
    rates = [p.rate for p in points]
    assert rates[0] == pytest.approx(LR / 100, rel=1e-3)
    np.testing.assert_allclose(np.divide(rates[1:], rates[:-1]), 1.12, rtol=1e-6)
    measured = [p for p in points if p.ratio is not None]
    assert len(measured) > len(points) / 3
    assert all(p.gradient is not None and p.gradient > 0 for p in measured)
    early = [p for p in measured if p.rate < LR]  # where nothing has been learnt yet, the ratio follows the rate
    slope = math.log(early[-1].ratio / early[0].ratio) / math.log(early[-1].rate / early[0].rate)
    assert 0.8 < slope < 1.3


def test_a_pilot_has_the_schedule_in_its_shape(searched: tuple[Path, str]) -> None:
    first = held(searched[0])["pilots"][0]
    run = read_run(searched[0] / f"gfs-rate/pilot-{first['rate']:.3g}-{first['steps']}")
    whole = schedule(first["rate"])
    wanted = [whole[i * STEPS // first["steps"]] for i in range(first["taken"])]
    np.testing.assert_allclose(run.logged["learning_rate"].values[: first["taken"]], wanted, rtol=1e-3)


def test_nothing_of_the_job_is_left_or_run_afterwards(searched: tuple[Path, str]) -> None:
    assert {p.name for p in searched[0].iterdir()} - {"__pycache__"} == {"train.py", "gfs-rate"}


def test_the_page_shows_ramp_and_pilots(searched: tuple[Path, str]) -> None:
    needs_chromium()
    assert look_at(searched[0] / "gfs-rate/index.html", "rate") == 4


def test_the_trainer_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf.py").write_text(HUGGING_FACE)
    monkeypatch.chdir(tmp_path)
    runs = _Jobs(jobs.target("hf.py"), None, Path("out"), 100.0, lambda what, step, of: None)
    assert (runs.steps, runs.users, runs.judged_on) == (120, 0.01, "validation")
    assert runs.schedule[:3] == pytest.approx([0, 0.01 / 12, 0.02 / 12])
    pilot = runs.pilot(0.1, 60, 1.0)
    assert (pilot.taken, pilot.steps, pilot.share) == (60, 60, 1.0)
    assert pilot.loss < 1.2 < pilot.first
    rates = read_run(tmp_path / "out/pilot-0.1-60-all-data").logged["learning_rate"].values
    np.testing.assert_allclose(rates, [10 * runs.schedule[2 * i] for i in range(60)])


@pytest.mark.parametrize(
    ("target", "steps", "text"),
    [("package:Net", None, "give --steps"), ("package:Net", 20, "≥ 100"), ("no.py", None, "there is no file")],
)
def test_what_cannot_be_searched_is_said(target: str, steps: int | None, text: str) -> None:
    from gfs_report.rate.search import find

    with pytest.raises(ConfigError, match=text):
        find(jobs.target(target), steps=steps)


@pytest.mark.parametrize("framework", ["lightning", "hugging face"])
def test_a_pilot_of_a_job_sees_a_part_of_its_data_again_and_again(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "print('seen', sorted({}[:, 20].tolist()))"
    if framework == "lightning":  # 22 batches, shuffled, for 5 epochs
        script = LIGHTNING.replace("64, drop_last=True", "64, drop_last=True, shuffle=True")
        call = "        return nn.functional.cross_entropy(self.net(batch[0])"
        script = script.replace(call, f"        {note.format('batch[0]')}\n{call}")
    else:  # 44 batches of 32, for 120 steps
        call = "        logits = self.net(x)"
        script = HUGGING_FACE.replace(call, f"        {note.format('x')}\n{call}")
    (tmp_path / "train.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    runs = _Jobs(jobs.target("train.py", [str(LR)]), None, Path("out"), 100.0, lambda what, step, of: None)
    steps = 40
    assert runs.pilot(0.05, steps, 0.18).taken == steps
    lines = (tmp_path / "out/pilot-0.05-40/output.txt").read_text().splitlines()
    seen = [line for line in lines if line.startswith("seen")][:steps]
    count = 4 if framework == "lightning" else 8
    assert len(set(seen)) == count
    assert seen == seen[:count] * (steps // count)
