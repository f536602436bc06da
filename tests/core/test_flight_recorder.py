"""At an alarm everything that was read in the last steps is written beside the history."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.run import alarm_record
from gfs_core.run.flight_recorder import AFTER, FILES, STEPS, FlightRecorder
from gfs_core.run.journal import Journal
from gfs_core.run.notices import Notices
from gfs_core.signals.base import Reading
from gfs_core.signals.gradients import GRAD_NORM

FAULT = 150  # step at which the last layer's weights are multiplied


class Digits:
    """A training on digits that keeps what it sees, and breaks at :data:`FAULT`."""

    def __init__(self, path: Path | None, factor: float = 300.0, **options: Any) -> None:
        x, y = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(y)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.factor = factor
        given = {"tier": "running", "max_overhead": None, "history": None if path is None else str(path)}
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, gfs.GFSConfig(**{**given, **options}))
        self.losses: dict[int, float] = {}
        self.gradients: dict[int, dict[str, float]] = {}
        self.told: list[gfs.Measurement] = []

    def loss_of(self, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def train(self, first: int, end: int, fault: int = FAULT) -> Digits:
        for step in range(first, end):
            rows = torch.randint(1797, (64,), generator=torch.Generator().manual_seed(step))
            if step == fault:
                with torch.no_grad():
                    self.model[2].weight.mul_(self.factor)
            self.optimizer.zero_grad()
            loss = self.loss_of(rows)
            loss.backward()
            self.losses[step] = loss.item()
            self.gradients[step] = {
                name: math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.model[int(name)].parameters()))
                for name in ("0", "2")
            }
            if (measured := self.monitor.step(self.loss_of, rows, step, loss=loss)) is not None:
                self.told.append(measured)
            self.optimizer.step()
        return self


def files(path: Path) -> list[Path]:
    return sorted((path.parent / "alarms").glob("*"))


def test_an_alarm_leaves_what_was_read_in_the_last_steps_and_what_came_of_it(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    run = Digits(path).train(0, 200)
    [alarm] = [m for m in run.told if m.alarm == 2 and any("what to do" in reason for reason in m.reasons)]
    [file] = files(path)
    record = gfs.read_alarm(file)
    assert record.step == alarm.step
    assert FAULT <= record.step <= FAULT + 2
    assert record.alert.level is AlertLevel.ALARM
    assert record.alert.text in alarm.reasons
    assert (record.run, record.optimizer_name) == (gfs.history_parts(path)[-1].run, "SGD")
    assert file.name == f"step-{record.step:08d}-{record.run}.jsonl"
    held = {m.step: m for m in record.measurements}
    assert list(held) == list(range(record.step - STEPS + 1, record.step + AFTER + 1))
    for step, m in held.items():
        assert m.values()["loss"] == run.losses[step]
        assert m.layers("grad_norm") == pytest.approx(run.gradients[step], rel=1e-5)
        assert set(m.layers("weight_norm")) == {"0", "2"}
    before, after = held[FAULT - 1], held[FAULT]
    assert after.layers("weight_norm")["2"] > 100 * before.layers("weight_norm")["2"]
    assert after.layers("weight_norm")["0"] == pytest.approx(before.layers("weight_norm")["0"], rel=0.1)
    assert {m.values().get("step_rate") for m in held.values()} == {0.1}
    measured = {m.step: m for m in run.told if m.running_stability_ratio is not None and m.step in held}
    assert len(measured) > 5
    for step, m in measured.items():
        assert held[step].running_stability_ratio == m.running_stability_ratio
        assert held[step].layers("running_curvature_share") == m.layers("running_curvature_share")


def test_the_file_is_there_at_once_and_completed_at_the_end_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    run = Digits(path).train(0, FAULT + 3)
    [file] = files(path)
    early = gfs.read_alarm(file)
    assert early.measurements[-1].step == early.step  # in case the process ends here
    run.train(FAULT + 3, FAULT + 6)
    run.monitor.close()
    assert files(path) == [file]
    assert gfs.read_alarm(file).measurements[-1].step == FAULT + 5
    completed = gfs.read_alarm(file).measurements
    assert completed[: STEPS - 1] == early.measurements[:-1]  # the update of the last step was still to come


@pytest.mark.filterwarnings("ignore:gfs. stability measurement. the loss on the probe is not finite")
def test_values_that_are_not_finite_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    Digits(path, math.inf).train(0, FAULT + 12)
    [file] = files(path)
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    at = {m.step: m for m in gfs.read_alarm(file).measurements}
    assert math.isfinite(at[FAULT - 1].values()["loss"])
    assert not math.isfinite(at[FAULT].values()["loss"])
    assert at[FAULT].layers("weight_norm")["2"] == math.inf
    assert math.isfinite(at[FAULT].layers("weight_norm")["0"])
    assert at[FAULT].layers("nonfinite")["2"] > 0


@pytest.mark.parametrize(("history", "alarm"), [(False, "log"), (True, "off")])
def test_without_a_history_or_an_early_warning_nothing_is_written(tmp_path: Path, history: bool, alarm: str) -> None:
    run = Digits(tmp_path / "history.jsonl" if history else None, alarm=alarm).train(0, FAULT + 12)
    run.monitor.close()
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"] * history
    assert not run.monitor.recorder._held


def test_a_healthy_run_leaves_no_record(tmp_path: Path) -> None:
    run = Digits(tmp_path / "history.jsonl").train(0, 200, fault=-1)
    run.monitor.close()
    assert not (tmp_path / "alarms").exists()


def test_a_run_that_is_resumed_counts_on_and_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    whole = Digits(path).train(0, 140)
    state = whole.monitor.state_dict()
    weights = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.train(140, FAULT + 12)
    [first] = files(path)
    text = first.read_text()
    resumed = Digits(path)
    resumed.monitor.load_state_dict(torch.load(saved(state, tmp_path), weights_only=True))
    resumed.model.load_state_dict(weights)
    resumed.train(140, FAULT + 12)
    again = [file for file in files(path) if file != first]
    assert [file.name for file in again] == [first.name.replace(".jsonl", "-2.jsonl")]
    assert first.read_text() == text
    record = gfs.read_alarm(again[0])
    assert record.step == gfs.read_alarm(first).step
    assert [m.step for m in record.measurements] == list(range(140, record.step + AFTER + 1))  # what it saw itself


def test_a_state_that_is_loaded_into_the_same_monitor_begins_a_new_past_too(tmp_path: Path) -> None:
    run = Digits(tmp_path / "history.jsonl").train(0, 140)
    run.monitor.load_state_dict(run.monitor.state_dict())
    run.train(140, FAULT + 12)
    [file] = files(tmp_path / "history.jsonl")
    assert gfs.read_alarm(file).measurements[0].step == 140


def test_a_state_that_was_saved_during_an_alarm_records_it_no_second_time(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    run.recorder.forget(AlertLevel.ALARM)
    run.step(5, level=2, rises=True)
    assert files(run.path) == []


def saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_a_folder_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "alarms").write_text("a file is here already")
    run = Digits(tmp_path / "history.jsonl")
    with pytest.warns(gfs.GFSWarning, match="the record of an alarm cannot be written .*alarms") as told:
        run.train(0, FAULT + 12)
    assert len([w for w in told if "record" in str(w.message)]) == 1
    assert len(run.losses) == FAULT + 12


class Recording:
    """A recorder by itself, told of steps and levels by hand."""

    def __init__(self, folder: Path) -> None:
        notices = Notices(strict=True, ranks=None)
        self.journal = Journal(dict, lambda: "SGD", notices)
        self.journal.path = folder / "history.jsonl"
        self.recorder = FlightRecorder(self.journal, lambda: "SGD", notices)
        self.path = folder / "history.jsonl"

    def step(self, step: int, level: int = 0, value: float = 1.0, rises: bool = False) -> None:
        self.recorder.take(step, [(step, value, 64)], None, None, [Reading(GRAD_NORM, step, value, "0")])
        alerts = [Alert(step, AlertLevel(level), f"at {step}", "test")] if rises else []
        self.recorder.look(step, alerts, level)

    def records(self) -> list[gfs.AlarmRecord]:
        return [gfs.read_alarm(file) for file in files(self.path)]


def test_a_stretch_of_alarm_is_recorded_once_and_the_next_again(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    run.step(0)
    run.step(1, level=1, rises=True)  # watch
    run.step(2, level=2, rises=True)
    run.step(3, level=2, rises=True)  # rises again while it lasts
    run.step(4, level=2)
    run.step(5)  # quiet
    run.step(6, level=2, rises=True)
    run.recorder.finish()
    assert [r.step for r in run.records()] == [2, 6]
    assert [r.alert.reason for r in run.records()] == ["at 2", "at 6"]


def test_the_latest_records_of_a_run_are_kept_and_those_of_others(tmp_path: Path) -> None:
    other = Recording(tmp_path)
    other.step(0, level=2, rises=True)
    other.recorder.finish()
    run = Recording(tmp_path)
    for step in range(FILES + 3):
        run.step(2 * step, level=2, rises=True)
        for file in files(run.path):  # a clock of the file system may be coarse
            os.utime(file, ns=(file.stat().st_atime_ns, int(file.name[5:13]) * 10**9))
        run.step(2 * step + 1)
    held = run.records()
    assert [r.step for r in held if r.run == run.journal.run] == [2 * s for s in range(3, FILES + 3)]
    assert [r.step for r in held if r.run == other.journal.run] == [0]


def test_steps_that_are_gone_through_again_are_not_mixed_with_the_first_pass(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    for step in range(50):
        run.step(step, value=1.0)
    run.step(50, level=2, rises=True)
    for step in range(40, 46):  # training went back to step 40
        run.step(step, value=2.0)
    run.step(46, level=2, value=2.0, rises=True)
    second, first = run.records()
    assert {m.values()["loss"] for m in first.measurements} == {1.0}
    assert [m.step for m in first.measurements] == list(range(51))
    assert [m.values()["loss"] for m in second.measurements] == [1.0] * 40 + [2.0] * 7


def test_memory_is_bounded(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    for step in range(1000):
        run.step(step)
    assert len(run.recorder._held) == run.recorder._held.maxlen <= 120


def test_a_run_named_by_a_foreign_state_stays_in_the_folder(tmp_path: Path) -> None:
    run = Recording(tmp_path / "runs")
    run.journal.load_state_dict({"run": "../../../*[a]", "loss_seen": None})
    run.step(0, level=2, rises=True)
    assert [file.name for file in files(run.path)] == ["step-00000000-a.jsonl"]


def test_a_record_that_cannot_be_written_whole_leaves_the_one_before(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    run.step(3, level=2, rises=True)
    [file] = files(run.path)
    before = gfs.read_alarm(file)
    broken = gfs.Measurement(4, "SGD", (Reading(GRAD_NORM, 4, torch.ones(())),))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        alarm_record.write(file, dataclasses.replace(before, measurements=[*before.measurements, broken]))
    assert files(run.path) == [file]
    assert gfs.read_alarm(file) == before


def damaged(change: Callable[[str], str]) -> Any:
    return pytest.param(change)


@pytest.mark.parametrize(
    "change",
    [
        damaged(lambda text: ""),
        damaged(lambda text: "\n".join(text.splitlines()[1:])),
        damaged(lambda text: text.replace('"level": 2', '"level": 7')),
        damaged(lambda text: text.replace('"alarm": {', '"alarm": [{').replace("}}}", "}}]}")),
        damaged(lambda text: "\x00" * 100),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    run = Recording(tmp_path)
    run.step(3, level=2, rises=True)
    [file] = files(run.path)
    file.write_text(change(file.read_text()))
    with pytest.raises(gfs.ConfigError, match="is no record of an alarm"):
        gfs.read_alarm(file)
    with pytest.raises(gfs.ConfigError, match="they lie in the folder `alarms` beside a history"):
        gfs.read_alarm(tmp_path / "absent.jsonl")


def test_lines_that_cannot_be_parsed_are_skipped(tmp_path: Path) -> None:
    run = Recording(tmp_path)
    for step in range(3):
        run.step(step)
    run.step(3, level=2, rises=True)
    [file] = files(run.path)
    file.write_text(file.read_text() + '{"step": "4"}\n{"step": 5, "loss": "x"\nnull\n{"step": 9, "loss": "nan"}\n')
    record = gfs.read_alarm(file)
    assert [m.step for m in record.measurements] == [0, 1, 2, 3, 9]
    assert math.isnan(record.measurements[-1].values()["loss"])
    alarm_record.write(tmp_path / "copy.jsonl", record)
    assert [m.step for m in gfs.read_alarm(tmp_path / "copy.jsonl").measurements] == [0, 1, 2, 3, 9]
