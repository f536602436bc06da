"""What the report says came first before an alarm."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from bokeh.models import Span
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import gfs_core as gfs
from gfs_core.run import alarm_record, history
from gfs_core.signals.base import Key, Reading
from gfs_report.cli import app
from gfs_report.first import came_first, departures
from gfs_report.page import Notes, Table
from gfs_report.plots import Picture, draw
from gfs_report.report import make_report
from gfs_report.runs import read_run
from lightning_gfs import GFSCallback
from tests.core.test_flight_recorder import FAULT, Digits, files
from tests.lightning.trainers import quiet
from tests.report.test_report import HOSTILE

ALARM = 100
Values = Callable[[int], float | None]


def noise(seed: int, spread: float = 0.1) -> list[float]:
    return np.exp(spread * np.random.default_rng(seed).standard_normal(ALARM + 1)).tolist()


def record(**signals: Values) -> gfs.AlarmRecord:
    """A record of steps 1 to 100; a signal is named ``key`` or ``key__layer``."""
    measurements = []
    for step in range(1, ALARM + 1):
        readings = []
        for name, value in signals.items():
            key, _, layer = name.partition("__")
            if (found := value(step)) is not None:
                readings.append(Reading(Key(key, ""), step, found, layer))
        measurements.append(gfs.Measurement.from_readings(step, "SGD", readings))
    alert = gfs.Alert(ALARM, gfs.AlertLevel.ALARM, "the loss is 9", "spike")
    return gfs.AlarmRecord(ALARM, alert, "abc", "SGD", measurements)


def test_signals_that_leave_their_past_are_named_in_their_order() -> None:
    a, b, c = noise(0), noise(1), noise(2)
    found = departures(
        record(
            grad_norm__first=lambda s: a[s] * (4.0 if s >= 90 else 1.0),
            grad_norm__second=lambda s: 1e-6 * b[s],
            rms_ratio__first=lambda s: c[s] * (0.1 if s >= 85 else 1.0),
            loss=lambda s: c[s] * (20.0 if s >= 99 else 1.0),
        )
    )
    assert [(d.key, d.layer, d.step) for d in found] == [
        ("rms_ratio", "first", 85),
        ("grad_norm", "first", 90),
        ("loss", "", 99),
    ]
    assert found[1].times == pytest.approx(4.0, rel=0.4)
    assert found[0].times == pytest.approx(0.1, rel=0.4)
    assert found[0].name == "gradient / its usual size (RMS_t)"


def test_of_one_step_the_weights_come_before_the_loss_and_the_loss_before_the_gradient() -> None:
    a = noise(0)
    found = departures(
        record(
            update_ratio=lambda s: a[s] * (0.01 if s >= 95 else 1),
            running_sharpness=lambda s: a[s] * (50 if s >= 95 else 1),
            grad_norm__small=lambda s: a[s] * (5 if s >= 95 else 1),
            grad_norm__large=lambda s: a[s] * (9 if s >= 95 else 1),
            loss=lambda s: a[s] * (3 if s >= 95 else 1),
            weight_norm=lambda s: a[s] * (4 if s >= 95 else 1),
        )
    )
    assert [d.key for d in found] == [
        "weight_norm", "loss", "grad_norm", "grad_norm", "running_sharpness", "update_ratio",
    ]  # fmt: skip
    assert [d.layer for d in found if d.key == "grad_norm"] == ["large", "small"]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("a trend", lambda s: 1.02**s, None),
        ("one that falls", lambda s: 1 / s, None),
        ("noise", lambda s: noise(3, 0.5)[s], None),
        ("a constant", lambda s: 0.1, None),
        ("a spike that was over long before", lambda s: 50.0 if 60 <= s < 64 else noise(4)[s], None),
        ("a spike that lasts into the alarm", lambda s: 50.0 if s >= 97 else noise(4)[s], (97, 50.0)),
        ("a spike with quiet steps in between", lambda s: 50.0 if s in (92, 95, 98) else noise(4)[s], (92, 50.0)),
        ("a constant that changes", lambda s: 0.1 if s < 95 else 0.2, (95, 2.0)),
        ("zeros", lambda s: 0.0, None),
        ("no zero any more", lambda s: 0.0 if s < 98 else 0.25, (98, math.inf)),
        ("a negative loss", lambda s: -3 + noise(5)[s], None),
        ("a negative loss that rises", lambda s: (-3 if s < 96 else 20) + noise(5)[s], (96, None)),
        (
            "one that falls after a single rise",
            lambda s: noise(4)[s] * (9 if s == 93 else 0.1 if s > 94 else 1),
            (95, 0.1),
        ),
        ("steady growth that is multiplied", lambda s: 1.003**s * (1.5 if s >= 95 else 1), (95, 1.5)),
        ("a constant that wobbles", lambda s: 0.1 if s < 95 else 0.101, None),
        ("a negative constant that wobbles", lambda s: -0.1 if s < 95 else -0.101, None),
        ("not finite", lambda s: math.nan if s >= 99 else noise(6)[s], (99, math.nan)),
        ("infinite", lambda s: math.inf if s >= 99 else noise(6)[s], (99, math.inf)),
        ("read at some steps only", lambda s: (1.0 if s < 94 else 90.0) if s % 10 == 4 else None, (94, 90.0)),
        ("read too seldom to say", lambda s: (1.0 if s < 94 else 90.0) if s % 30 == 4 else None, None),
        ("there from the last steps on only", lambda s: 1.0 if s > 97 else None, None),
    ],
)
def test_what_counts_as_leaving_the_past(name: str, values: Values, expected: tuple[int, float | None] | None) -> None:
    found = departures(record(signal=values))
    assert [d.step for d in found] == ([] if expected is None else [expected[0]])
    if expected is not None and expected[1] is not None:
        assert found[0].times == pytest.approx(expected[1], rel=0.3, nan_ok=True)


def test_counts_and_costs_are_no_signals() -> None:
    jump = dict.fromkeys(("overhead", "seconds", "hvps", "grad_evals", "alarm"), lambda s: 1.0 if s < 95 else 90.0)
    assert departures(record(**jump)) == []


def test_the_section_says_what_was_first_and_shows_the_five_earliest() -> None:
    signals = {f"grad_norm__layer{i}": lambda s, i=i: noise(i)[s] * (9 if s >= 98 - i else 1) for i in range(10)}
    table, picture = came_first(record(**signals))
    assert isinstance(table, Table)
    assert table.heading == "What came first before the alarm at step 100"
    assert table.rows[0][:4] == ["gradient norm", "layer9", "89", "11"]
    assert [row[1] for row in table.rows] == [f"layer{i}" for i in range(9, 1, -1)]
    assert table.caption.endswith(" 2 more left it later, or at the same step.")
    assert isinstance(picture, Picture)
    assert [line.name for line in picture.lines] == [f"gradient norm, layer{i}" for i in range(9, 4, -1)]
    assert (picture.step, picture.edge, picture.log, picture.linked) == (100, 1.0, True, False)
    drawn = draw(picture)
    assert drawn is not None
    assert {(span.dimension, span.location) for span in drawn.select(Span)} >= {("height", 100), ("width", 1.0)}
    usual, away = (picture.lines[0].curve.values[part] for part in (slice(0, 80), slice(-5, None)))
    assert np.median(usual) == pytest.approx(1.0, rel=0.05)
    assert np.median(away) == pytest.approx(9.0, rel=0.2)


def test_it_is_said_where_nothing_left_its_past_or_nothing_can_be_said() -> None:
    [calm] = came_first(record(loss=lambda s: noise(0)[s]))
    assert isinstance(calm, Notes)
    assert calm.heading == "What came first before the alarm at step 100"
    assert "No signal left its own past" in calm.items[0]
    [young] = came_first(record(loss=lambda s: 1.0 if s > 97 else None))
    assert "too few values to say" in young.items[0]


def invoke(*given: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, given)])


def test_the_report_on_a_training_that_breaks_names_the_layer_in_which_it_began(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    Digits(path).train(0, FAULT + 20).monitor.close()
    for ending in ("html", "md", "json", "svg"):
        assert invoke(path, "-o", tmp_path / f"r.{ending}").exit_code == 0
    held = json.loads((tmp_path / "r.json").read_text())
    [first] = held["came_first"]
    [alarm] = [a["step"] for a in held["alarms"] if a["state"] == 2]
    assert first["alarm"] == alarm
    assert {(s["signal"], s["step"]) for s in first["signals"][:2]} == {("weight_norm", FAULT)}
    assert {s["layer"] for s in first["signals"][:2]} == {"", "2"}
    assert max(s["times"] for s in first["signals"][:2]) > 100
    text = (tmp_path / "r.md").read_text()
    assert f"## What came first before the alarm at step {alarm}" in text
    assert f"| norm of the weights | 2 | {FAULT} |" in text
    assert files(path)[0].name in text  # among what was read


def test_an_alarm_at_which_a_step_is_skipped_is_shown_with_its_own_reason_and_record(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    Digits(path, alarm="skip").train(0, FAULT + 20).monitor.close()
    run = read_run(path)
    [alarm] = [mark for mark in run.marks if mark.state == 2]
    [held] = run.records
    assert (held.step, held.alert.text) == (alarm.step, alarm.reason)
    assert any("the step was skipped" in reason for m in gfs.read_history(path) for reason in m.reasons)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step >= 120:
            with torch.no_grad():
                self.net[2].weight.mul_(1.5)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_lightning_run_leaves_the_record_beside_its_history(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(y))
    callback = GFSCallback(tier="running", max_overhead=None)
    trainer = quiet(tmp_path, [callback], max_steps=150, enable_checkpointing=False, logger=True)
    trainer.fit(Net(), DataLoader(data, 64, shuffle=True))
    folder = Path(trainer.log_dir or "")
    [file] = (folder / "alarms").iterdir()
    held = gfs.read_alarm(file)
    assert 120 <= held.step < 135
    weights = {m.step: m.layers("weight_norm")["net.2"] for m in held.measurements if m.layers("weight_norm")}
    # Lightning tells of a step when its gradients are there: the factor of a step is in them already.
    assert weights[125] / weights[119] > 1.4**5
    run = read_run(folder)
    assert [r.step for r in run.records] == [held.step]
    first = [d for d in departures(run.records[0]) if d.layer][:2]
    assert first[0].step == 120  # its gradient falls at once; its weights have been growing, and stand out a step later
    assert {d.layer for d in first} == {"net.2"}
    assert {d.key for d in first} <= {"grad_norm", "update_ratio", "weight_norm"}
    assert f"What came first before the alarm at step {held.step}" in [s.heading for s in make_report(run).sections()]


def test_what_a_record_holds_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    loud = record(**{f"grad_norm__{HOSTILE}": lambda s: noise(0)[s] * (9 if s >= 98 else 1)})
    alarm_record.write(tmp_path / "alarms" / f"step-{ALARM:08d}-abc.jsonl", loud)
    history.begin(path, {}, "abc")
    history.append(path, gfs.Measurement.of(0, "SGD", stability_ratio=0.5, alarm=0), "abc")
    history.append(path, gfs.Measurement.of(ALARM, "SGD", alarm=2, reasons=(loud.alert.reason,)), "abc")
    for ending in ("html", "md"):
        assert invoke(path, "-o", tmp_path / f"r.{ending}").exit_code == 0
        text = (tmp_path / f"r.{ending}").read_text()
        assert "What came first" in text
        assert "<script>alert(1)" not in text
        assert "<img src=x" not in text


@pytest.mark.parametrize("change", ["another step", "another optimizer", "another reason", "damaged"])
def test_a_record_of_something_else_is_not_shown(tmp_path: Path, change: str) -> None:
    path = tmp_path / "history.jsonl"
    held = record(loss=lambda s: noise(0)[s])
    step = 99 if change == "another step" else ALARM
    file = tmp_path / "alarms" / f"step-{step:08d}-abc.jsonl"
    alarm_record.write(file, held)
    if change == "damaged":
        file.write_text("{}\n")
    name = "Adam" if change == "another optimizer" else "SGD"
    reason = "it is another" if change == "another reason" else held.alert.reason
    history.append(path, gfs.Measurement.of(ALARM, name, alarm=2, stability_ratio=2.0, reasons=(reason,)))
    run = read_run(path)
    assert run.records == []
    assert [note for note in run.notes if "was left out" in note] == ([] if change != "damaged" else run.notes)
    assert ("is no record of an alarm" in "".join(run.notes)) is (change == "damaged")


def test_of_a_step_that_was_gone_through_twice_the_later_record_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for name, level, age in (("abc-2", 2.0, 5), ("abc", 1.0, 9)):
        file = tmp_path / "alarms" / f"step-{ALARM:08d}-{name}.jsonl"
        alarm_record.write(file, record(loss=lambda s, level=level: level))
        os.utime(file, (1000 - age, 1000 - age))
    history.append(path, gfs.Measurement.of(ALARM, "SGD", alarm=2, stability_ratio=2.0, reasons=("the loss is 9",)))
    [held] = read_run(path).records
    assert held.measurements[0].values()["loss"] == 2.0
