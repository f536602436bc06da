"""An alarm says what to do: in the warning, the history, its record and the report; and doing it helps."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import gfs_core as gfs
from gfs_core.detectors.advice import BACK, WHAT_TO_DO, advice
from gfs_report.report import make_report, markdown
from gfs_report.runs import read_run

SINCE = 120  # step from which on the rate grows


class Ramp:
    """A training on digits whose rate grows by a twentieth at each step, until it is taken in hand."""

    def __init__(self, **options: Any) -> None:
        x, y = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(y)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9)
        config = gfs.GFSConfig(tier="running", max_overhead=None, **options)
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config, on_alarm=self.alarmed)
        self.alerts: list[gfs.Alert] = []
        self.losses: list[float] = []
        self.kept: dict[int, Any] = {}  # a checkpoint from before each step
        self.highest = math.inf

    def alarmed(self, alert: gfs.Alert) -> None:
        self.alerts += [alert] if alert.level is gfs.AlertLevel.ALARM else []

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def train(self, first: int, end: int) -> Ramp:
        for step in range(first, end):
            self.kept[step] = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
            self.optimizer.param_groups[0]["lr"] = min(0.03 * 1.05 ** max(step - SINCE, 0), self.highest)
            rows = torch.randint(1797, (64,), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = self.loss(rows)
            loss.backward()
            self.losses.append(loss.item())
            self.monitor.step(self.loss, rows, step, loss=loss)
            self.optimizer.step()
        return self


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ramp, Path, list[str]]:
    path = tmp_path_factory.mktemp("ramp") / "history.jsonl"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = Ramp(alarm="warn", history=str(path)).train(0, 260)
        run.monitor.close()
    return run, path, [str(w.message) for w in told if WHAT_TO_DO in str(w.message)]


def test_the_advice_is_in_the_warning_the_history_the_record_and_the_report(
    ramp: tuple[Ramp, Path, list[str]],
) -> None:
    run, path, warned = ramp
    alert = run.alerts[0]
    assert alert.advice == advice(alert.rule, alert.step) != ""
    assert f"before step {alert.step - BACK}" in alert.advice
    assert warned[0].endswith(f"alarm at step {alert.step}: {alert.reason}{WHAT_TO_DO}{alert.advice}")
    assert any(alert.text in m.reasons for m in gfs.read_history(path))
    file = min((path.parent / "alarms").iterdir())
    assert json.loads(file.read_text().splitlines()[0])["alarm"]["alert"]["advice"] == alert.advice
    assert gfs.read_alarm(file).alert == alert
    read = read_run(path)
    assert read.records[0].alert == alert  # it is found by the reason in the history, which the advice follows
    report = make_report(read)
    assert alert.advice in markdown(report)
    assert alert.reason in report.verdict.what
    assert alert.advice not in report.verdict.what  # the verdict says itself what to do


def test_a_run_that_does_what_it_is_told_learns_on_and_one_that_does_not_is_lost(
    ramp: tuple[Ramp, Path, list[str]],
) -> None:
    run = ramp[0]
    alert = run.alerts[0]
    assert "stay at its learning rate" in alert.advice
    before = sorted(run.losses[: alert.step])[0]
    assert not min(run.losses[-20:]) < 2.0  # chance is 2.3
    healed, back = Ramp(alarm="off"), alert.step - BACK
    model, optimizer = run.kept[back]
    healed.model.load_state_dict(model)
    healed.optimizer.load_state_dict(optimizer)
    healed.highest = optimizer["param_groups"][0]["lr"]
    healed.train(alert.step, 260)
    assert max(healed.losses[-20:]) < before + 0.3


def test_what_is_only_watched_or_over_needs_no_advice() -> None:
    for level in (gfs.AlertLevel.QUIET, gfs.AlertLevel.WATCH):
        alert = gfs.Alert(300, level, "the loss is 3", "loss")
        assert (alert.advice, alert.text) == ("", "the loss is 3")


def test_an_alarm_that_comes_before_any_checkpoint_and_a_rule_that_was_not_tried() -> None:
    assert "start again" in advice("not finite", BACK)
    assert "before step 1," in advice("not finite", BACK + 1)
    assert advice("a rule of one's own", 300) == ""
    alert = gfs.Alert(300, gfs.AlertLevel.ALARM, "it is hot", "a rule of one's own")
    assert alert.text == "it is hot"
