"""Each training writes its own part of a history; a resumed one goes on with its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.run import history


class Training:
    """A small training whose steps, from ``first``, are measured each."""

    def __init__(self, path: Path, rate: float = 0.1, name: str = "") -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), rate)
        config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None, history=str(path))
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config, name=name)

    def train(self, first: int, end: int) -> Training:
        x = torch.ones(4, 3)
        for step in range(first, end):
            assert self.monitor.step(lambda b: self.model(b).square().mean(), x, step) is not None
        return self


def rates(measurements: list[gfs.Measurement]) -> list[tuple[int, float | None]]:
    return [(m.step, m.learning_rate) for m in measurements]


def test_a_second_training_has_a_part_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    Training(path, 0.1).train(0, 4)
    Training(path, 0.2).train(0, 2)
    first, second = gfs.history_parts(path)
    assert rates(first.measurements) == [(i, 0.1) for i in range(4)]
    assert rates(second.measurements) == [(0, 0.2), (1, 0.2)]
    assert gfs.read_history(path) == gfs.read_history(path, part=1) == second.measurements
    assert gfs.read_history(path, part=0) == first.measurements
    assert first.run != second.run
    assert first.resumed_at == second.resumed_at == ()
    assert first.settings["optimizer"] == "SGD"
    assert first.began[:2] == "20"
    with pytest.raises(gfs.ConfigError, match=r"holds 2 part\(s\), and there is no part 2"):
        gfs.read_history(path, part=2)


def test_trainings_that_write_at_once_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    one, two = Training(path, 0.1), Training(path, 0.2)
    for step in range(3):
        one.train(step, step + 1)
        two.train(step, step + 1)
    assert [rates(p.measurements) for p in gfs.history_parts(path)] == [[(i, r) for i in range(3)] for r in (0.1, 0.2)]


def test_a_resumed_training_goes_on_with_its_part_and_voids_the_stretch_that_was_given_up(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    whole = Training(path, 0.1).train(0, 3)
    state = whole.monitor.state_dict()
    whole.train(3, 6)
    Training(path, 0.2).train(0, 1)  # another one in between
    resumed = Training(path, 0.3)
    resumed.monitor.load_state_dict(state)
    resumed.train(3, 5)
    other, part = gfs.history_parts(path)  # the one that was resumed is the latest
    assert rates(other.measurements) == [(0, 0.2)]
    assert rates(part.measurements) == [(0, 0.1), (1, 0.1), (2, 0.1), (3, 0.3), (4, 0.3)]
    assert part.resumed_at == (3,)
    assert sum('"step"' in line for line in path.read_text().splitlines()) == 9  # nothing is deleted from the file
    again = Training(path, 0.4)
    again.monitor.load_state_dict(resumed.monitor.state_dict())
    again.train(5, 6)
    assert gfs.history_parts(path)[-1].resumed_at == (3, 5)
    assert [m.step for m in gfs.read_history(path)] == list(range(6))


def test_a_state_that_is_loaded_without_another_step_begins_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    training = Training(path).train(0, 2)
    before = path.read_text()
    Training(path).monitor.load_state_dict(training.monitor.state_dict())
    assert path.read_text() == before


def test_several_optimizers_of_a_training_share_a_part(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for rate in (0.1, 0.2):
        pair = [Training(path, rate, name) for name in ("gen", "disc")]
        states = [t.train(0, 2).monitor.state_dict() for t in pair]
    first, second = gfs.history_parts(path)
    for part, rate in ((first, 0.1), (second, 0.2)):
        found = sorted((m.optimizer_name, m.step) for m in part.measurements if m.learning_rate == rate)
        assert found == [("disc", 0), ("disc", 1), ("gen", 0), ("gen", 1)]
        assert len(part.measurements) == 4
    resumed = Training(path, 0.3, "disc")
    resumed.monitor.load_state_dict(states[1])
    resumed.train(1, 2)
    found = [(m.optimizer_name, m.step, m.learning_rate) for m in gfs.read_history(path)]
    assert sorted(found) == [("disc", 0, 0.2), ("disc", 1, 0.3), ("gen", 0, 0.2), ("gen", 1, 0.2)]


def test_a_file_that_names_no_runs_is_one_part(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for step in (0, 1):
        history.begin(path, {"every": step})
        history.append(path, gfs.Measurement(step))
    [part] = gfs.history_parts(path)
    assert [m.step for m in part.measurements] == [0, 1]
    assert (part.run, part.began, part.settings) == ("", "", {"every": 1})


def test_the_settings_are_those_of_the_part(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for run in ("a", "b"):
        history.begin(path, {"of": run}, run)
        history.append(path, gfs.Measurement(0), run)
    history.begin(path, {"of": "c"}, "c")  # killed before its first measurement
    assert history.read_settings(path) == {"of": "b"}
    assert history.read_settings(path, 0) == {"of": "a"}
    assert history.read_settings(path, 2) == {}
    assert [json.loads(line).get("run") for line in path.read_text().splitlines()] == ["a", "a", "b", "b", "c"]


def trained_with_losses(path: Path, losses: list[float], every: int = 1000) -> gfs.StabilityMonitor:
    training = Training(path)
    config = gfs.GFSConfig(tier="sharpness", every=every, running_every=None, max_overhead=None, history=str(path))
    monitor = gfs.StabilityMonitor(training.model, training.optimizer, config)
    for step, loss in enumerate(losses):
        monitor.step(lambda b: training.model(b).square().mean(), torch.ones(4, 3), step, loss=loss)
    return monitor


def test_the_history_holds_the_training_loss_of_every_step(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    given = [5.0, *np.linspace(4, 1, 26)]
    monitor = trained_with_losses(path, given)
    [before] = gfs.history_parts(path)
    assert [m.step for m in before.losses] == [0, 10, 20]
    monitor.close()
    [part] = gfs.history_parts(path)
    assert [m.step for m in part.losses] == [0, 10, 20, 26]
    assert [m.value for m in part.losses] == pytest.approx(
        [5.0, np.mean(given[1:11]), np.mean(given[11:21]), np.mean(given[21:])]
    )
    assert part.losses[0].spread is None
    assert part.losses[1].spread == pytest.approx(np.std(given[1:11], ddof=1))
    assert [m.step for m in part.measurements] == [0]  # a line for the loss alone is no measurement
    monitor.close()
    assert gfs.history_parts(path) == [part]


def test_a_measurement_has_the_mean_since_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    trained_with_losses(path, [4.0, 3.0, 2.0, 1.0, 0.0], every=2).close()
    [part] = gfs.history_parts(path)
    assert [(m.step, m.value) for m in part.losses] == [(0, 4.0), (2, 2.5), (4, 0.5)]
    assert [m.step for m in part.measurements] == [0, 2, 4]


def test_losses_that_are_not_finite_are_null_once_most_of_them_are(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    losses = [2.0] * 21
    losses[5] = math.inf  # one of ten
    trained_with_losses(path, losses + [math.nan] * 10).close()
    held = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["training_loss"] for row in held if "training_loss" in row][-1] is None
    [part] = gfs.history_parts(path)
    assert {m.value for m in part.losses if m.step <= 20} == {2.0}
    assert math.isnan(part.losses[-1].value)
    assert part.losses[-1].step == 30


def test_a_resumed_training_goes_on_with_its_losses(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    monitor = trained_with_losses(path, [9.0] + [1.0] * 14)
    state = monitor.state_dict()
    monitor.close()
    assert [m.step for m in gfs.history_parts(path)[-1].losses] == [0, 10, 14]
    training = Training(path)
    config = gfs.GFSConfig(history=str(path), every=1000, alarm="off")  # its changes are lines too
    resumed = gfs.StabilityMonitor(training.model, training.optimizer, config)
    resumed.load_state_dict(torch.load(saved(state, tmp_path), weights_only=True))
    for step in range(15, 26):
        resumed.record_loss(3.0)
        resumed.update_detectors(step)
    [part] = gfs.history_parts(path)
    assert [(m.step, m.value) for m in part.losses] == [(0, 9.0), (10, 1.0), (14, 1.0), (24, 3.0)]


def saved(state: dict[str, object], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_a_training_that_was_not_measured_has_its_losses(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.append(path, gfs.Measurement(3, "SGD"), "a", (0.5, None))
    [part] = gfs.history_parts(path)
    assert part.losses == [history.MeanOfLosses(3, 0.5, None, "SGD")]
    assert part.measurements == []


def test_a_history_without_losses_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"settings": {"every": 10}}\n{"step": 0, "sharpness": 2.0}\n')
    [part] = gfs.history_parts(path)
    assert (part.losses, part.measurements) == ([], [gfs.Measurement.of(0, sharpness=2.0)])
