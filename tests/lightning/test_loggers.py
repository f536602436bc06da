"""What the loggers are told to draw: TensorBoard's layout, W&B's panels, MLflow's metrics."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

import gfs_core as gfs
from gfs_core.charts import CHARTS, WandbPanel, add_to_tensorboard, layout
from tests.bitwise import assert_same
from tests.charts import OfflineRun, drawn, layouts
from tests.lightning.test_callback import Gan, Linear, Net, every, history, state, train
from tests.wandb_files import logged


def test_every_key_of_the_layout_is_logged() -> None:
    keys = {f"gfs/{key}" for keys in CHARTS.values() for key in keys}
    assert keys <= gfs.log_keys().keys()
    assert {"gfs/sharpness", "gfs/gfs_sharpness", "gfs/threshold", "gfs/stability_ratio", "gfs/alarm"} <= keys


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_tensorboard_draws_the_charts_by_itself(tmp_path: Path, prefix: str) -> None:
    logger = TensorBoardLogger(tmp_path, name="tb", version="", prefix=prefix)
    callbacks = [every(5, control="cap"), LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)]
    _, trainer = train(tmp_path, callbacks, model=Linear, logger=logger)
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    [event] = events.Tensors("custom_scalars__config__")
    written = Layout.FromString(event.tensor_proto.string_val[0])
    tags = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in written.category}
    assert tags == layout()

    def with_prefix(*keys: str) -> set[str]:
        return {f"{prefix}-{key}" if prefix else key for key in keys}

    assert drawn(tmp_path) == {
        "gfs": {
            "Sharpness and threshold": with_prefix("gfs/sharpness", "gfs/gfs_sharpness", "gfs/threshold"),
            "Stability ratio and alarm": with_prefix("gfs/stability_ratio", "gfs/gfs_stability_ratio", "gfs/alarm"),
            "Learning rate": with_prefix("gfs/lr_effective", "lr-SGD"),
            "Overhead": with_prefix("gfs/overhead"),
        }
    }


class OwnLayout(L.Callback):
    """A user who lays his own chart, at ``when``."""

    def __init__(self, when: str) -> None:
        self.when = when

    def lay(self, when: str, trainer: L.Trainer) -> None:
        if when == self.when:
            trainer.logger.experiment.add_custom_scalars({"mine": {"my loss": ["Multiline", ["loss$"]]}})

    def setup(self, trainer, module, stage) -> None:
        self.lay("setup", trainer)

    def on_train_start(self, trainer, module) -> None:
        self.lay("on_train_start", trainer)

    def on_train_end(self, trainer, module) -> None:
        self.lay("on_train_end", trainer)


@pytest.mark.parametrize("when", ["setup", "on_train_start", "on_train_end"])
def test_a_layout_of_the_users_own_is_kept(tmp_path: Path, when: str) -> None:
    _, trainer = train(tmp_path, [every(5, tier="sharpness"), OwnLayout(when)])
    assert trainer.global_step == 10
    assert drawn(tmp_path) == {"mine": {"my loss": {"loss"}}}


def test_a_resumed_run_is_laid_out_once(tmp_path: Path) -> None:
    def callbacks() -> list:
        return [every(2, tier="sharpness"), ModelCheckpoint(dirpath=tmp_path, save_last=True)]

    train(tmp_path, callbacks(), max_epochs=1)
    _, trainer = train(tmp_path, callbacks(), max_epochs=1)  # trained once more in the same folder
    assert layouts(tmp_path) == 1
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, trainer.train_dataloader, ckpt_path=tmp_path / "last.ckpt")
    assert history(trainer)[-1].step > 5
    assert layouts(tmp_path) == 1
    assert drawn(tmp_path)["gfs"]["Sharpness and threshold"] == {"gfs/sharpness", "gfs/threshold"}


def test_several_optimizers_have_a_category_each(tmp_path: Path, offline) -> None:
    losses = {"gen (A)": lambda m, batch, i: m.g_loss(batch), "disc": lambda m, batch, i: m.d_loss(batch)}
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=""), WandbLogger(save_dir=tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path, [every(4, tier="sharpness", loss_fn=losses)], model=Gan, logger=loggers)
    charts = drawn(tmp_path / "tb")
    assert list(charts) == ["gfs/gen (A)", "gfs/disc"]
    for name in losses:
        shown = charts[f"gfs/{name}"]["Sharpness and threshold"]
        assert shown == {f"gfs/{name}/sharpness", f"gfs/{name}/threshold"}
    offline.finish()
    run = OfflineRun(tmp_path)
    assert run.tables.keys() == {f"gfs/{name}/sharpness_and_threshold" for name in losses}
    assert run.tables["gfs/disc/sharpness_and_threshold"]["threshold"] == [(s, pytest.approx(10)) for s in (0, 4, 8)]


def test_a_folder_that_cannot_be_looked_into_gets_no_layout(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "run")) as writer:
        (tmp_path / "run" / "events.out.tfevents.0").touch()  # empty
        writer.log_dir = "s3://bucket/run"
        add_to_tensorboard(writer)
        writer.flush()
        assert layouts(tmp_path) == 0
        writer.log_dir = str(tmp_path / "run")
        add_to_tensorboard(writer)
        add_to_tensorboard(writer)
    assert layouts(tmp_path) == 1
    add_to_tensorboard(None)


def test_wandb_has_a_section_and_a_chart(tmp_path: Path, offline) -> None:
    offline.init(dir=tmp_path)  # the user's own run: Lightning defines nothing there
    offline.run.define_metric("gfs/threshold", step_metric="epoch")
    with pytest.warns(UserWarning, match="wandb run already in progress"):
        _, trainer = train(tmp_path, [every(3)], logger=WandbLogger(save_dir=tmp_path))
    found = history(trainer)
    offline.finish()
    run = OfflineRun(tmp_path)
    assert run.metrics == {"gfs/threshold": "epoch", "gfs/*": "trainer/global_step"}
    assert [row["trainer/global_step"] for row in run.rows if "gfs/sharpness" in row] == [0, 3, 6, 9]
    chart = run.charts["gfs/sharpness_and_threshold"]
    assert chart["panelDefId"] == "wandb/lineseries/v0"
    assert chart["stringSettings"] == {"title": "Sharpness and threshold", "xname": "step"}
    [lines] = run.tables.values()
    assert lines == {
        key: [(m.step, getattr(m, key)) for m in found] for key in ("sharpness", "threshold", "gfs_sharpness")
    }


def test_wandb_draws_the_sharpness_that_belongs_to_the_threshold(tmp_path: Path, offline) -> None:
    _, trainer = train(
        tmp_path, [every(3, tier="sharpness")], model=lambda: Net("groups"), logger=WandbLogger(save_dir=tmp_path)
    )
    offline.finish()
    [lines] = OfflineRun(tmp_path).tables.values()
    assert lines.keys() == {"preconditioned_sharpness", "threshold"}
    assert lines["preconditioned_sharpness"] == [
        (m.step, m.preconditioned_sharpness) for m in history(trainer) if m.preconditioned_sharpness is not None
    ]


def test_a_long_run_makes_a_small_chart_without_losing_a_spike(tmp_path: Path, offline) -> None:
    panel = WandbPanel(offline.init(dir=tmp_path), "step")
    values = [float(i % 7) for i in range(10_001)]
    spikes = {1: 90.0, 4322: 91.0, 7655: 92.0, 9998: 93.0}
    for step, value in spikes.items():
        values[step] = value
    for step, value in enumerate(values):
        panel.add({"gfs/sharpness": value, "gfs/overhead": 0.1}, step)
    panel.draw()
    panel.draw()
    offline.finish()
    run = OfflineRun(tmp_path)
    [lines] = run.tables.values()
    points = lines["sharpness"]
    assert 500 < len(points) <= 1000
    assert spikes.items() <= set(points)
    assert points == sorted(points)
    assert all(values[step] == value for step, value in points)
    assert len(run.rows) == 1


def test_a_run_that_breaks_off_is_drawn_up_to_there(tmp_path: Path, offline) -> None:
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 5:
                raise OSError("no more data")

    with pytest.raises(OSError, match="no more data"):
        train(tmp_path, [every(3, tier="sharpness"), Break()], logger=WandbLogger(save_dir=tmp_path))
    offline.finish()
    [lines] = OfflineRun(tmp_path).tables.values()
    assert [step for step, _ in lines["sharpness"]] == [0, 3]


def test_a_finished_wandb_run_costs_a_warning(tmp_path: Path, offline) -> None:
    class Finish(L.Callback):
        def on_train_end(self, trainer, module) -> None:
            offline.finish()

    with pytest.warns(gfs.GFSWarning, match="W&B did not take a panel"):
        _, trainer = train(tmp_path, [every(3, tier="sharpness"), Finish()], logger=WandbLogger(save_dir=tmp_path))
    assert trainer.state.finished
    assert len([row for row in logged(tmp_path) if "gfs/sharpness" in row]) == 4


def test_training_is_bitwise_the_same_with_charts(tmp_path: Path, offline) -> None:
    def loggers(folder: Path) -> list:
        return [WandbLogger(save_dir=folder), TensorBoardLogger(folder, name="tb", version=""), CSVLogger(folder)]

    plain = state(*train(tmp_path / "a", logger=loggers(tmp_path / "a")))
    offline.finish()
    watched = state(*train(tmp_path / "b", [every(1)], logger=loggers(tmp_path / "b")))
    offline.finish()
    assert "gfs/sharpness_and_threshold" in OfflineRun(tmp_path / "b").tables
    assert drawn(tmp_path / "b" / "tb")["gfs"]["Overhead"] == {"gfs/overhead"}
    assert_same(plain, watched)


@pytest.mark.parametrize("kind", ["none", "csv", "fast_dev_run", "disabled"])
def test_loggers_that_draw_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = {"none": False, "csv": CSVLogger(tmp_path), "disabled": WandbLogger(save_dir=tmp_path, mode="disabled")}
    options = {"fast_dev_run": 3} if kind == "fast_dev_run" else {"logger": loggers[kind]}
    model = Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error", gfs.GFSWarning)
        _, trainer = train(tmp_path, [every(2, tier="sharpness")], model=model, **options)
    assert float(trainer.callback_metrics["gfs/stability_ratio"]) > 0
    assert layouts(tmp_path) == 0


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_gets_the_values(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not among the packages that the tests install")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny alone has no database store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"file:{tmp_path}/store" if store == "file" else f"sqlite:///{tmp_path}/mlflow.db"
    callback = every(3, history=str(tmp_path / "history.jsonl"))
    train(tmp_path, [callback], logger=MLFlowLogger(tracking_uri=uri, artifact_location=str(tmp_path)))
    expected = [(m.step, m.stability_ratio) for m in gfs.read_history(tmp_path / "history.jsonl")]
    if store == "file":
        [path] = tmp_path.rglob("metrics/gfs/stability_ratio")
        rows = [line.split() for line in path.read_text().splitlines()]
        found = [(int(step), float(value)) for _, value, step in rows]
    else:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            query = "select step, value from metrics where key = 'gfs/stability_ratio' order by step"
            found = database.execute(query).fetchall()
    assert [step for step, _ in expected] == [0, 3, 6, 9]
    assert found == [(step, pytest.approx(value)) for step, value in expected]
