"""What `report_to` is told to draw: TensorBoard's layout, W&B's panels, the scalars of MLflow and trackio."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

import gfs_core as gfs
from tests.bitwise import assert_same
from tests.charts import OfflineRun, drawn, layouts
from tests.hf.clients import Characters, arguments, gpt2, outcome, train
from tests.hf.test_callback import Trainer, attached, every, language, rows

MODES = pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])


@pytest.fixture(scope="session")
def trackio_folder() -> Path:
    """Where all runs of trackio are kept: it asks for the folder once, when it is imported, maybe by other tests."""
    import trackio  # importing it draws random numbers, and training would be the first to do so

    return Path(trackio.utils.TRACKIO_DIR)


def column(trainer: Trainer, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows(trainer) if key in row]


@MODES
def test_tensorboard_draws_the_charts_by_itself(tmp_path: Path, mode: str) -> None:
    callback = every(2, control="cap", tier="gfs")
    trainer = train(lambda: language(tmp_path, report_to=["tensorboard"], max_steps=3), attached(callback, mode))
    charts = drawn(tmp_path / "runs")
    assert charts.keys() == {"gfs"}
    assert charts["gfs"]["Learning rate"] == {"gfs/lr_effective", "train/learning_rate"}
    assert charts["gfs"]["Overhead"] == {"gfs/overhead"}
    assert {"gfs/stability_ratio", "gfs/alarm"} <= charts["gfs"]["Stability ratio and alarm"]
    sharpness = {"gfs/sharpness", "gfs/preconditioned_sharpness", "gfs/gfs_sharpness", "gfs/threshold"}
    assert charts["gfs"]["Sharpness and threshold"] == sharpness
    trainer.train()  # once more, in the same folder
    assert layouts(tmp_path) == 1


@MODES
def test_a_layout_of_the_users_own_is_kept(tmp_path: Path, mode: str) -> None:
    writer = SummaryWriter(str(tmp_path / "runs" / "mine"))
    writer.add_custom_scalars({"mine": {"my loss": ["Multiline", ["train/loss$"]]}})

    def make() -> Trainer:
        return Trainer(
            model=gpt2(),
            args=arguments(tmp_path),
            train_dataset=Characters(),
            callbacks=[TensorBoardCallback(writer)],
        )

    def attach(trainer: Trainer) -> None:
        trainer.args.report_to = ["tensorboard"]  # the user's callback is the one that reports
        attached(every(2), mode)(trainer)

    train(make, attach)
    assert drawn(tmp_path / "runs") == {"mine": {"my loss": {"train/loss"}}}
    assert layouts(tmp_path) == 1


@MODES
def test_wandb_has_a_section_and_a_chart(tmp_path: Path, offline: Any, mode: str) -> None:
    offline.init(dir=tmp_path)
    trainer = train(lambda: language(tmp_path / "run", report_to=["wandb"]), attached(every(2), mode))
    offline.finish()
    run = OfflineRun(tmp_path)
    assert run.metrics["gfs/*"] == "train/global_step"
    [lines] = run.tables.values()
    assert lines == {key: column(trainer, f"gfs/{key}") for key in ("preconditioned_sharpness", "threshold")}
    assert [step for step, _ in lines["threshold"]] == [2, 4]  # at 0 Adam has no preconditioner yet


def test_a_finished_wandb_run_costs_a_warning(tmp_path: Path, offline: Any) -> None:
    from transformers import TrainerCallback

    class Finish(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            offline.finish()

    offline.init(dir=tmp_path)
    with pytest.warns(gfs.GFSWarning, match="W&B did not take a panel"):
        trainer = train(
            lambda: language(tmp_path / "run", report_to=["wandb"]),
            lambda t: (t.add_callback(Finish()), t.add_callback(every(2))),
        )
    assert trainer.state.global_step == 6


def test_training_is_bitwise_the_same_with_charts(tmp_path: Path, offline: Any, trackio_folder: Path) -> None:
    def run(name: str, attach: Any) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        offline.init(dir=folder)
        targets = ["tensorboard", "wandb", "trackio"]
        options = {"report_to": targets, "run_name": name, "project": "bitwise", "trackio_space_id": None}
        trainer = train(lambda: language(folder, **options), attach)
        offline.finish()
        return outcome(trainer)

    plain = run("a", None)
    watched = run("b", lambda t: t.add_callback(every(1)))
    assert "gfs/sharpness_and_threshold" in OfflineRun(tmp_path / "b").tables
    assert layouts(tmp_path / "b") == 1
    assert_same(plain, watched)


@MODES
def test_trackio_gets_the_values_under_their_own_keys(tmp_path: Path, mode: str, trackio_folder: Path) -> None:
    # in transformers 5.0 the default is a Space on the Hub, which asks for an account
    options = {"report_to": ["trackio"], "run_name": "run", "project": mode, "trackio_space_id": None}
    trainer = train(lambda: language(tmp_path, **options), attached(every(2), mode))
    with sqlite3.connect(trackio_folder / f"{mode}.db") as database:
        stored = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    found = [row for row in stored if "gfs/sharpness" in row]
    assert [(row["train/global_step"], row["gfs/sharpness"]) for row in found] == column(trainer, "gfs/sharpness")
    assert len(found) == 3
    assert not [key for row in stored for key in row if key.startswith("train/gfs/")]
    assert [row["train/global_step"] for row in stored if "train/loss" in row] == [2, 4, 6]


@MODES
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_gets_the_values(tmp_path: Path, mode: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not among the packages that the tests install")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny alone has no database store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/store" if store == "file" else f"sqlite:///{tmp_path}/mlflow.db")
    trainer = train(lambda: language(tmp_path, report_to=["mlflow"]), attached(every(2), mode))
    if store == "file":
        [path] = tmp_path.rglob("metrics/gfs/sharpness")
        lines = [line.split() for line in path.read_text().splitlines()]
        found = [(int(step), float(value)) for _, value, step in lines]
    else:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            query = "select step, value from metrics where key = 'gfs/sharpness' order by step"
            found = database.execute(query).fetchall()
    assert found == [(step, pytest.approx(value)) for step, value in column(trainer, "gfs/sharpness")]
    assert [step for step, _ in found] == [0, 2, 4]
