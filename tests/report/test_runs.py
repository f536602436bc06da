from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

import gfs_core as gfs
from gfs_core.run import history
from gfs_report.runs import read_run


def written(path: Path, *measurements: gfs.Measurement, **settings: Any) -> Path:
    history.begin(path, settings)
    for m in measurements:
        history.append(path, m)
    return path


def test_a_history_is_read_with_alarms_reasons_and_settings(tmp_path: Path) -> None:
    path = written(
        tmp_path / "history.jsonl",
        gfs.Measurement.of(0, "SGD", sharpness=2.0, stability_ratio=0.5, alarm=0, reasons=("no flow",)),
        gfs.Measurement.of(10, "SGD", sharpness=3.0, alarm=1, reasons=("no flow", "the ratio rose")),
        gfs.Measurement.of(20, "SGD", sharpness=4.0, alarm=2, reasons=("it rose more",)),
        gfs.Measurement.of(30, "SGD", sharpness=1.0, alarm=1, reasons=("calmer",)),
        gfs.Measurement.of(40, "SGD", alarm=1, reasons=("no flow",)),
        every=10,
        margin=None,
    )
    run = read_run(path)
    assert run.optimizer == "SGD"
    assert run.gfs["sharpness"].steps.tolist() == [0, 10, 20, 30]
    assert run.gfs["sharpness"].values.tolist() == [2.0, 3.0, 4.0, 1.0]
    assert run.gfs["stability_ratio"].values.tolist() == [0.5]
    assert [tuple(m) for m in run.marks] == [(10, 1, "the ratio rose"), (20, 2, "it rose more")]
    assert run.reasons == {"no flow": 2}
    assert run.settings == {"every": 10, "margin": None}


def test_a_running_ratio_that_stands_in_for_a_solved_one_is_not_read_as_solved(tmp_path: Path) -> None:
    path = written(
        tmp_path / "history.jsonl",
        gfs.Measurement.of(0, "SGD", sharpness=2.0, stability_ratio=0.5, running_stability_ratio=0.25),
        gfs.Measurement.of(5, "SGD", running_stability_ratio=0.375).with_ratio(),
        gfs.Measurement.of(10, "SGD", directional_sharpness=3.0, stability_ratio=0.75, running_stability_ratio=0.4),
    )
    run = read_run(path)
    assert run.gfs["running_stability_ratio"].values.tolist() == [0.25, 0.375, 0.4]
    assert run.gfs["stability_ratio"].steps.tolist() == [0, 10]
    (tmp_path / "b").mkdir()
    alone = written(tmp_path / "b" / "history.jsonl", gfs.Measurement.of(5, running_stability_ratio=0.3).with_ratio())
    assert set(read_run(alone).gfs) == {"running_stability_ratio"}
    (tmp_path / "metrics.csv").write_text(
        "step,gfs/stability_ratio,gfs/running_stability_ratio\n3,0.5,0.5\n4,0.6,0.5\n"
    )
    assert read_run(tmp_path / "metrics.csv").gfs["stability_ratio"].steps.tolist() == [4]


def test_a_killed_run_and_other_versions_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    path = written(tmp_path / "history.jsonl", gfs.Measurement.of(5, sharpness=1.0))
    with path.open("a") as file:
        file.write('{"step": 6, "sharpness": 2.0, "of_a_later_version": [1]}\n')
        file.write('{"step": "7", "sharpness": 3.0}\n[]\nnull\n{"settings": 3}\n')
        file.write('{"step": 8, "sharpness": NaN, "threshold": "4", "loss_probe": true}\n{"step": 9, "sharp')
    run = read_run(path)
    assert run.gfs["sharpness"].steps.tolist() == [5, 6]
    assert set(run.gfs) == {"sharpness"}


def test_keys_of_a_later_version_are_kept_and_layers_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "history.jsonl", gfs.Measurement.of(5, sharpness=1.0))
    with path.open("a") as file:
        file.write('{"step": 6, "sharpness": 2.0, "of_a_later_version": 7, "layers": {"sharpness": {"net.0": 3.0}}}\n')
        file.write('{"step": 7, "layers": {"of_a_later_version": {"net.0": 1.0, "net.1": 2.0}}}\n')
    run = read_run(path)
    assert set(run.gfs) == {"sharpness", "of_a_later_version"}
    assert run.gfs["sharpness"].values.tolist() == [1.0, 2.0]
    assert run.gfs["of_a_later_version"].values.tolist() == [7.0]
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for step in (1, 2):
            writer.add_scalar("gfs/sharpness", 4.0, step)
            writer.add_scalar("gfs/sharpness/net.0.loss", 3.0, step)
    logged = read_run(tmp_path / "events")
    assert set(logged.gfs) == {"sharpness"}
    assert logged.loss_key() is None  # a layer of that name is no training loss


def test_a_tensorboard_log_holds_both_kinds_of_values(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in ((1, 2.0), (2, math.nan), (3, 1.0)):
            writer.add_scalar("train_loss", loss, step)
            writer.add_scalar("gfs/stability_ratio", 0.25 * step, step)
            writer.add_scalar("gfs/alarm", float(step == 2), step)
    run = read_run(tmp_path)
    assert run.gfs["stability_ratio"].values.tolist() == [0.25, 0.5, 0.75]
    loss = run.loss()
    assert loss is not None
    assert math.isnan(loss.values[1])
    assert loss.last == 1.0
    assert [(m.step, m.state) for m in run.marks] == [(2, 1)]


def test_lightnings_csv_log(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_metrics({"train/loss": 3.0, "gfs/sharpness": 7.0}, step=0)
    logger.log_metrics({"train/loss": 2.0}, step=4)
    logger.log_metrics({"val_loss": 9.0}, step=4)
    logger.save()
    run = read_run(tmp_path)
    assert run.loss_key() == "train/loss"
    assert run.logged["train/loss"].steps.tolist() == [0, 4]
    assert run.gfs["sharpness"].values.tolist() == [7.0]
    assert run.loss("val_loss").last == 9.0  # type: ignore[union-attr]
    with pytest.raises(gfs.ConfigError, match=r"holds no `loss`; it holds train/loss, val_loss"):
        run.loss("loss")


def test_the_trainers_state_adds_the_loss_to_a_history(tmp_path: Path) -> None:
    written(tmp_path / "history.jsonl", gfs.Measurement.of(1, "AdamW", sharpness=5.0))
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"loss": 30.0 - step, "step": step, "epoch": 0.1}, {"gfs/sharpness": 1.0, "step": 1}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (tmp_path / "checkpoint-10" / "trainer_state.json").touch()
    os.utime(tmp_path / "checkpoint-10" / "trainer_state.json", (1, 1))
    run = read_run(tmp_path)
    assert run.gfs["sharpness"].last == 5.0
    assert run.logged["loss"].values.tolist() == [10.0]
    assert [s.name for s in run.sources] == ["history.jsonl", "trainer_state.json"]


def test_of_several_one_has_to_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a" / "history.jsonl", gfs.Measurement.of(1, "g", sharpness=1.0))
    history.append(path, gfs.Measurement.of(1, "d", sharpness=2.0))
    with pytest.raises(gfs.ConfigError, match="several optimizers, 'd', 'g'"):
        read_run(path)
    assert read_run(path, "d").gfs["sharpness"].last == 2.0
    with pytest.raises(gfs.ConfigError, match="no optimizer 'x'"):
        read_run(path, "x")
    assert read_run(tmp_path, "g").sources == [path]
    written(tmp_path / "b" / "history.jsonl", gfs.Measurement.of(1, sharpness=1.0))
    with pytest.raises(gfs.ConfigError, match=r"holds several runs: .*a, .*b; give one"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("history.jsonl", "", "holds no measurement"),
        ("history.jsonl", "\x00\xff{", "holds no measurement"),
        ("metrics.csv", "", "no column `step`"),
        ("metrics.csv", "a,b\n1,2\n", "no column `step`, but a, b"),
        ("metrics.csv", "step,loss\nx,1\n", "holds no logged value"),
        ("trainer_state.json", "{", "trainer_state.json: "),
        ("trainer_state.json", "[1]", "no `log_history`"),
        ("events.out.tfevents.1", "rubbish", "holds no logged value"),
        ("notes.txt", "hello", "not a history.jsonl"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(gfs.ConfigError, match=said):
        read_run(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(gfs.ConfigError, match="nothing at"):
        read_run(tmp_path / "missing")
    with pytest.raises(gfs.ConfigError, match=r"holds no history\.jsonl"):
        read_run(tmp_path)


def test_a_broken_log_beside_a_good_one_is_left_out_and_said(tmp_path: Path) -> None:
    written(tmp_path / "history.jsonl", gfs.Measurement.of(1, "SGD", sharpness=1.0))
    (tmp_path / "metrics.csv").write_text("a\n1\n")
    run = read_run(tmp_path)
    assert run.gfs["sharpness"].last == 1.0
    assert run.notes == ["metrics.csv was left out: it has no column `step`, but a"]


def two_trainings(tmp_path: Path) -> Path:
    """A history of two trainings, and beside it the losses of the second."""
    path = tmp_path / "history.jsonl"
    for run, ratio in (("a", 0.2), ("b", 0.9)):
        history.begin(path, {"every": 1 if run == "a" else 2}, run=run)
        for step in (0, 10):
            history.append(path, gfs.Measurement.of(step, "SGD", stability_ratio=ratio + step / 100), run=run)
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,2\n10,1\n")
    return path


def test_the_latest_training_of_a_history_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    two_trainings(tmp_path)
    run = read_run(tmp_path)
    assert (run.part, run.parts) == (2, 2)
    assert run.gfs["stability_ratio"].values.tolist() == [0.9, 1.0]
    assert run.settings == {"every": 2}
    assert run.logged["train_loss"].values.tolist() == [2.0, 1.0]
    assert any("holds 2 trainings; this is part 2, begun 20" in note for note in run.notes)


def test_an_earlier_training_is_read_without_the_losses_of_a_later_one(tmp_path: Path) -> None:
    path = two_trainings(tmp_path)
    for place in (tmp_path, path):
        run = read_run(place, part=1)
        assert run.gfs["stability_ratio"].values.tolist() == [0.2, pytest.approx(0.3)]
        assert run.settings == {"every": 1}
        assert run.logged == {}
    with pytest.raises(gfs.ConfigError, match="there is no part 3; it holds 2"):
        read_run(tmp_path, part=3)
    with pytest.raises(gfs.ConfigError, match="only a history has parts"):
        read_run(tmp_path / "metrics.csv", part=1)
