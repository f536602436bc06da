from __future__ import annotations

import csv
import dataclasses
import inspect
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_type_hints

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from gfs_core.config import Off, may_be_off
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import NOT_DEFAULT, tuned_callback
from tests.frames import measured
from tests.lightning.trainers import quiet
from tests.log_keys import documented
from tests.wandb_files import logged


def digits(count: int = 160) -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:count] / 16 - 0.3, dtype=torch.float32), torch.tensor(y[:count]))


LAST_WEIGHT: list[torch.Tensor] = []  # outside the module, where nothing is put back


class Net(L.LightningModule):
    """Dropout, BatchNorm, metrics, lists and a counter: everything a second run could disturb."""

    def __init__(self, optimizer: str = "sgd", fail: str = "", at: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 10))
        self.mean, self.outs, self.calls, self.kind = torchmetrics.MeanMetric(), [], 0, optimizer
        self.fail, self.at = fail, at

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.calls += 1
        again = measured()
        if again and self.fail == "raise" and self.global_step >= self.at:
            raise OSError("cannot be run twice")
        if again and self.fail == "memory" and self.global_step >= self.at:
            raise torch.OutOfMemoryError("no room")
        if again and self.fail == "nan" and self.global_step == self.at:
            loss = loss * float("nan")
        if not again:
            LAST_WEIGHT[:] = [self.net[0].weight.detach().clone()]
        elif (
            self.fail == "midway" and self.global_step >= self.at and not torch.equal(*LAST_WEIGHT, self.net[0].weight)
        ):
            raise OSError("fails while the weights are elsewhere")
        self.outs.append(loss.item())
        self.mean(loss.detach())
        self.log("loss", loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.logger.experiment  # noqa: B018
        return loss

    def configure_optimizers(self):
        if self.kind == "adamax":
            return torch.optim.Adamax(self.parameters(), lr=0.01)
        if self.kind == "groups":
            first, last = [p for n, p in self.named_parameters() if "4" not in n], list(self.net[4].parameters())
            return torch.optim.AdamW([{"params": first, "lr": 1e-3}, {"params": last, "lr": 3e-3}])
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(folder: Path, callbacks=(), model=None, workers=0, batch=32, shuffle=True, logger=None, **options):
    L.seed_everything(0, verbose=False)
    model = (model or Net)()  # built after seeding
    logger = TensorBoardLogger(folder, name="tb", version="") if logger is None else logger
    trainer = quiet(folder, callbacks, **{"max_epochs": 2, "logger": logger} | options)
    loader = DataLoader(digits(), batch_size=batch, shuffle=shuffle, num_workers=workers)
    trainer.fit(model, loader)
    return model, trainer


def state(model, trainer) -> list:
    optimizer = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
    own = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("gfs/")}
    return [
        model.state_dict(),
        optimizer,
        own,
        model.outs,
        model.calls,
        torch.get_rng_state(),
        random.random(),
        np.random.rand(),
    ]


def every(n: int, **options) -> GFSCallback:
    return GFSCallback(every=n, max_overhead=None, **{"running_every": None, **options})


def history(trainer) -> list[gfs.Measurement]:
    return gfs.read_history(Path(trainer.log_dir) / "history.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"model": "groups"},
        {"precision": "bf16-mixed"},
    ],
    ids=["workers", "accumulate-clip", "groups", "bf16"],
)
def test_training_is_bitwise_the_same(tmp_path: Path, options: dict) -> None:
    kind = options.pop("model", "sgd")
    plain = state(*train(tmp_path / "a", model=lambda: Net(kind), **options))
    model, trainer = train(tmp_path / "b", [every(1)], model=lambda: Net(kind), **options)
    assert len(history(trainer)) == trainer.global_step
    assert_same(plain, state(model, trainer))


_FAILING = {
    "raise": "OSError: cannot be run twice",
    "midway": "OSError: fails while the weights are elsewhere",
    "nan": "not finite",
    "memory": "out of memory; the next one is on half",
}


@pytest.mark.parametrize(
    ("fail", "text", "options"),
    [
        *((fail, text, options) for fail, text in _FAILING.items() for options in ({}, {"accumulate_grad_batches": 2})),
        ("midway", _FAILING["midway"], {"workers": 2, "accumulate_grad_batches": 2}),
    ],
)
def test_a_failing_measurement_changes_nothing_and_is_told_once(
    tmp_path: Path, fail: str, text: str, options: dict
) -> None:
    def failing() -> Net:
        return Net(fail=fail)

    plain = state(*train(tmp_path / "a", **options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, trainer = train(tmp_path / "b", [every(2)], model=failing, **options)
    assert_same(plain, state(model, trainer))
    assert [text in str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)] == [True]
    due = list(range(0, trainer.global_step, 2))
    assert [m.step for m in history(trainer)] == ([s for s in due if s != 4] if fail == "nan" else [0, 2])
    with pytest.raises((OSError, gfs.MeasurementError, torch.OutOfMemoryError)):
        train(tmp_path / "c", [every(2, strict=True)], model=failing, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_running_estimate_on_every_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    seen: list[float] = []
    record_loss = gfs.StabilityMonitor.record_loss
    monkeypatch.setattr(
        gfs.StabilityMonitor, "record_loss", lambda m, loss, *n: (seen.append(loss.item()), record_loss(m, loss, *n))[1]
    )
    plain = state(*train(tmp_path / "a", accumulate_grad_batches=accumulate, max_epochs=4))
    callback = tuned_callback(every(1, tier="running", progress_bar=True), whole=True)
    model, trainer = train(tmp_path / "b", [callback], accumulate_grad_batches=accumulate, max_epochs=4)
    assert_same(plain, state(model, trainer))
    assert seen == pytest.approx(model.outs, rel=1e-6)  # the losses of training, each once and undivided
    found = history(trainer)
    assert [m.step for m in found] == list(range(trainer.global_step))
    settled = [m for m in found if m.running_sharpness is not None]
    assert settled[0].step == 7
    assert settled[-1].step == trainer.global_step - 1
    assert all(m.running_stability_ratio == pytest.approx(m.running_sharpness / 38) for m in settled)
    assert {m.hvps for m in found} == {0.0}
    ratio = trainer.progress_bar_metrics["gfs/running_stability_ratio"]
    assert ratio == pytest.approx(found[-1].running_stability_ratio)


class Linear(L.LightningModule):
    """Least squares: the Hessian is XᵀX/n, whatever the weights."""

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.w, self.momentum = nn.Linear(64, 1, bias=False), momentum

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.w(batch[0]).squeeze() - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_logged_values_are_right(tmp_path: Path, momentum: float) -> None:
    x = digits().tensors[0].double()
    expected = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()
    _, trainer = train(
        tmp_path, [tuned_callback(every(5), tol=1e-5)], model=lambda: Linear(momentum), batch=160, max_epochs=11
    )
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    threshold = (2 + 2 * momentum) / 0.05
    assert [step for step, _ in read["gfs/sharpness"]] == [0, 5, 10]
    for tag, value in (
        ("gfs/sharpness", expected),
        ("gfs/gfs_sharpness", expected),
        ("gfs/threshold", threshold),
        ("gfs/stability_ratio", expected / threshold),
    ):
        assert [v for _, v in read[tag]] == pytest.approx([value] * 3, rel=1e-4), tag
    assert [m.sharpness for m in history(trainer)] == pytest.approx([v for _, v in read["gfs/sharpness"]], rel=1e-6)
    assert {f"gfs/{name}" for name in ("preconditioned_sharpness", "gfs_sharpness_full")}.isdisjoint(read)
    assert documented(read.keys() - {"epoch"}) <= gfs.log_keys().keys()


def test_csv_wandb_and_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [CSVLogger(tmp_path, name="csv"), WandbLogger(save_dir=tmp_path, offline=True)]
    _, trainer = train(tmp_path, [every(3, progress_bar=True)], logger=loggers, accumulate_grad_batches=2)
    with open(Path(loggers[0].log_dir) / "metrics.csv") as file:
        rows = [r for r in csv.DictReader(file) if r.get("gfs/stability_ratio")]
    assert [int(r["step"]) for r in rows] == [0, 3]
    ratio = trainer.progress_bar_metrics["gfs/stability_ratio"]
    assert ratio == pytest.approx(float(rows[-1]["gfs/stability_ratio"]))
    import wandb

    wandb.finish()
    written = [row["gfs/stability_ratio"] for row in logged(tmp_path) if "gfs/stability_ratio" in row]
    assert written == [float(r["gfs/stability_ratio"]) for r in rows]


def test_lightnings_own_wrappers_are_seen_through() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    for wrapped in (LightningOptimizer(optimizer), L.Fabric(accelerator="cpu").setup_optimizers(optimizer)):
        assert wrapped is not optimizer
        assert gfs.stability_of(wrapped, [weight]).threshold == pytest.approx(20.0)


def test_an_optimizer_that_is_not_analysed_gets_an_empirical_ratio_and_one_warning(tmp_path: Path) -> None:
    with pytest.warns(gfs.GFSWarning, match="threshold of Adamax is not known") as caught:
        _, trainer = train(tmp_path, [every(4)], model=lambda: Net("adamax"))
    assert len([w for w in caught if w.category is gfs.GFSWarning]) == 1
    first, *later = history(trainer)
    assert first.stability_ratio is None  # no step was taken yet
    for m in later:
        assert m.sharpness > 0
        assert m.threshold is None
        assert m.stability_ratio == pytest.approx(m.learning_rate / m.critical_lr)


class Gan(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d, self.outs, self.calls = nn.Linear(8, 64), nn.Linear(64, 1), [], 0

    def d_loss(self, batch):
        fake = self.g(torch.ones(len(batch[0]), 8)).detach()
        return (nn.functional.softplus(self.d(fake)) + nn.functional.softplus(-self.d(batch[0]))).mean()

    def g_loss(self, batch):
        return nn.functional.softplus(-self.d(self.g(torch.ones(len(batch[0]), 8)))).mean()

    def training_step(self, batch, batch_idx):
        self.calls += 1
        for optimizer, loss in zip(self.optimizers(), (self.g_loss, self.d_loss), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.g.parameters(), 0.1), torch.optim.SGD(self.d.parameters(), 0.2)


def test_several_optimizers_are_measured_by_name(tmp_path: Path) -> None:
    losses = {"gen": lambda m, batch, i: m.g_loss(batch), "disc": lambda m, batch, i: m.d_loss(batch)}
    plain = state(*train(tmp_path / "a", model=Gan))
    model, trainer = train(tmp_path / "b", [every(2, loss_fn=losses)], model=Gan)
    logged = trainer.callback_metrics
    assert logged["gfs/gen/threshold"] == pytest.approx(20)
    assert logged["gfs/disc/threshold"] == pytest.approx(10)
    assert [m.step for m in gfs.read_history(Path(trainer.log_dir) / "history-gen.jsonl")] == [0, 2, 4, 6, 8]
    assert_same(plain, state(model, trainer))


class NoOptimizer(Linear):
    def configure_optimizers(self):
        return None


class Manual(Linear):
    """Takes its steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Frozen(Linear):
    """Trains what its optimizer does not hold, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.shift = torch.zeros(1, requires_grad=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.shift.square().sum()


class FromTheLoader(Linear):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


REFUSED = [
    (Gan, "there are 2 optimizers (SGD, SGD); pass `GFSCallback(loss_fn="),
    (Manual, "this module uses manual optimization"),
    (NoOptimizer, "`configure_optimizers` returned no optimizer"),
    (Frozen, "nothing to measure: the optimizer holds no parameter with `requires_grad=True`"),
    (FromTheLoader, "`training_step(dataloader_iter)` takes its batches from the loader itself"),
]


@pytest.mark.parametrize(("model", "text"), REFUSED, ids=[m.__name__ for m, _ in REFUSED])
def test_what_cannot_be_measured_is_told_once_and_trains(tmp_path: Path, model, text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trainer = train(tmp_path, [GFSCallback()], model=model)
    [told] = [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]
    assert told.startswith(f"gfs: {text}")
    assert told.endswith("; nothing is measured in this run")
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 9  # two epochs of five batches
    assert not (Path(trainer.log_dir) / "history.jsonl").exists()
    with pytest.raises(gfs.MeasurementError, match=re.escape(text)):
        train(tmp_path / "strict", [GFSCallback(strict=True)], model=model)


def test_an_option_that_does_not_fit_the_optimizers_is_an_error(tmp_path: Path) -> None:
    class Searching(Linear):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    for model, options, text in (
        (Gan, {"loss_fn": {"one": lambda m, b, i: m.g_loss(b)}}, "names 1 losses \\(one\\) for 2 optimizers"),
        (Linear, {"max_memory": 1e-9}, "`max_memory` is 1e-09 GiB"),
        (Searching, {"control": "cap"}, "LBFGS evaluates the loss several times"),
    ):
        with pytest.raises(gfs.ConfigError, match=text):
            train(tmp_path, [GFSCallback(**options)], model=model)


class Deterministic(Linear):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("probe", ["batch", "fixed"])
def test_resumed_values_are_the_same_to_the_bit(tmp_path: Path, probe: str) -> None:
    def callback() -> GFSCallback:
        return every(2, probe=probe, probe_size=None if probe == "batch" else 100)

    def fit(folder: str, epochs: int, *more, checkpoint: Path | None = None) -> L.Trainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gfs.GFSWarning)  # that a small fixed probe misleads
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                callbacks=[callback(), *more],
                enable_progress_bar=False,
                enable_model_summary=False,
                logger=TensorBoardLogger(tmp_path / folder, name="tb", version=""),
            )
            L.seed_everything(0, verbose=False)
            model = Deterministic()
            if checkpoint is not None:  # other data first: the probe must be the saved one
                model.w.weight.data.zero_()
            data = digits()
            if probe == "fixed" and checkpoint is not None:
                data = TensorDataset(data.tensors[0].flip(0), data.tensors[1].flip(0))
            trainer.fit(model, DataLoader(data, batch_size=160), ckpt_path=checkpoint)
        return trainer

    def numbers(of: L.Trainer) -> list:
        return [m.having(seconds=None, overhead=None) for m in history(of)]

    whole = fit("a", 40)
    fit("b", 21, ModelCheckpoint(dirpath=tmp_path, save_last=True))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["GFSCallback"]
    assert saved[""]["measuring"]["count"] == 11
    resumed = fit("b", 40, checkpoint=tmp_path / "last.ckpt")  # in the same folder: the history goes on
    assert [m.step for m in numbers(resumed)] == list(range(0, 40, 2))
    if probe == "batch":
        assert numbers(resumed) == numbers(whole)
    else:  # trained on the data in another order, so the weights differ in their last bits
        ours, theirs = ([m.sharpness for m in numbers(t)] for t in (resumed, whole))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_second_fit_writes_a_part_of_its_own_and_starts_anew(tmp_path: Path) -> None:
    fits = []
    callback = every(2)
    for part, epochs in enumerate((8, 12)):
        model, checkpoint = Linear(), ModelCheckpoint(dirpath=tmp_path, filename=f"{part}", save_last=False)
        _, trainer = train(tmp_path, [callback, checkpoint], model=lambda m=model: m, batch=160, max_epochs=epochs)
        fits.append([m.step for m in history(trainer)])
    assert fits == [list(range(0, 8, 2)), list(range(0, 12, 2))]
    trainer = quiet(tmp_path, [callback], max_epochs=16, logger=trainer.logger)
    loader = DataLoader(digits(), batch_size=160)
    trainer.fit(Linear(), loader, ckpt_path=tmp_path / "0.ckpt")
    resumed = gfs.history_parts(Path(trainer.log_dir) / "history.jsonl")[-1]
    assert resumed.resumed_at == (8,)
    assert [m.step for m in resumed.measurements] == list(range(0, 16, 2))
    trainer.fit_loop.max_epochs = 20
    trainer.fit(Linear(), loader)  # not from the checkpoint: none of its state
    parts = gfs.history_parts(Path(trainer.log_dir) / "history.jsonl")
    assert [p.resumed_at for p in parts] == [(), (8,), ()]
    assert [m.step for m in parts[-1].measurements] == [16, 18]


def test_options_are_those_of_the_config() -> None:
    hints = get_type_hints(gfs.GFSConfig)
    parameters = inspect.signature(GFSCallback).parameters
    for f in dataclasses.fields(gfs.GFSConfig):
        assert parameters[f.name].default == f.default
        hint = hints[f.name]
        assert parameters[f.name].annotation == (hint | Off if may_be_off(hint) else hint)
        assert gfs.GFSConfig.help()[f.name] in GFSCallback.__doc__
    assert set(NOT_DEFAULT) == {f.name for f in dataclasses.fields(gfs.GFSConfig)}


def cli(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["run"])
    argv = [*args, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    return LightningCLI(Linear, args=argv, run=False, seed_everything_default=0, save_config_callback=None)


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_every_option_arrives_from_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    value = NOT_DEFAULT[name]
    text = str(value).lower() if isinstance(value, bool) else value
    path = tmp_path / "run.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_gfs.GFSCallback\n      init_args:\n"
        + f"        {name}: {text}\n"
    )
    callback = next(
        c for c in cli(monkeypatch, tmp_path, f"--config={path}").trainer.callbacks if isinstance(c, GFSCallback)
    )
    assert getattr(callback.config, name) == value
    assert callback.config != gfs.GFSConfig()


def test_the_command_line_helps_and_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit) as stop:
        LightningCLI(Linear, args=["--trainer.callbacks.help=lightning_gfs.GFSCallback"], run=False)
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, text in gfs.GFSConfig.help().items():
        assert f"--trainer.callbacks.{name}" in printed
        assert " ".join(text.split())[:40] in printed
    with pytest.raises(SystemExit) as stop:
        cli(monkeypatch, tmp_path, "--trainer.callbacks+=lightning_gfs.GFSCallback", "--trainer.callbacks.evry=3")
    assert stop.value.code == 2
    with pytest.raises(gfs.ConfigError, match="unknown option `evry`; the options are"):
        GFSCallback(evry=3)


PYTORCH_LIGHTNING = """
import sys, warnings
import pytorch_lightning as pl, torch
from lightning_gfs import GFSCallback
from tests.log_keys import documented
from pytorch_lightning.demos.boring_classes import BoringModel
assert isinstance(GFSCallback(), pl.Callback)
class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
trainer = pl.Trainer(max_steps=4, callbacks=[GFSCallback(every=2, max_overhead=None)], accelerator="cpu", logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0)
trainer.fit(Model())
assert float(trainer.callback_metrics["gfs/stability_ratio"]) > 0
"""


def test_works_with_pytorch_lightning(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PYTORCH_LIGHTNING], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_core_imports_no_framework() -> None:
    code = (
        "import sys, gfs_core; "
        "print([m for m in ('lightning', 'pytorch_lightning', 'transformers', 'bokeh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
