"""A learning rate found before `fit`, with the trainer's own loop; everything is as it was afterwards."""

from __future__ import annotations

import copy
import importlib
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import gfs_core
from gfs_core import ConfigError, FoundRate
from gfs_core.search.trial import Trial
from lightning_gfs import GFSCallback, find_rate
from lightning_gfs.rate import _Fit
from tests.bitwise import assert_same

EPOCHS, BATCHES, SIZE = 5, 22, 64
STEPS = EPOCHS * BATCHES
HELD_OUT = 360
FLAVOURS = ["lightning", "pytorch_lightning"]
Batch = tuple[Tensor, Tensor]


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 10))


def training(generator: torch.Generator | None = None) -> DataLoader[Any]:
    x, y = digits()
    data = TensorDataset(x[HELD_OUT:], y[HELD_OUT:])
    return DataLoader(data, SIZE, shuffle=True, drop_last=True, generator=generator)


def validation() -> DataLoader[Any]:
    x, y = digits()
    return DataLoader(TensorDataset(x[:HELD_OUT], y[:HELD_OUT]), 60)


def module(flavour: Any = L, base: type | None = None, **options: Any) -> Any:
    """A classifier of digits."""

    class Net(base or flavour.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.02, schedule: str = "step", every: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.seen, self.means = net(), 0, list[Tensor]()

        def training_step(self, batch, batch_idx):
            self.seen += 1
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.means.append(loss.detach())
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_callbacks(self):
            return [flavour.pytorch.callbacks.EarlyStopping("val_loss")] if flavour is L else []

        def configure_optimizers(self):
            given = self.hparams
            optimizer = torch.optim.SGD(self.parameters(), given.lr, momentum=0.9)
            steps = self.trainer.estimated_stepping_batches
            scheduler = {
                "step": lambda: OneCycleLR(optimizer, given.lr, total_steps=steps),
                "epoch": lambda: StepLR(optimizer, 2, 0.3),
                "cosine": lambda: CosineAnnealingLR(optimizer, steps),
                "plateau": lambda: ReduceLROnPlateau(optimizer),
            }[given.schedule]()
            interval = "epoch" if given.schedule == "epoch" else "step"
            held = {"scheduler": scheduler, "interval": interval, "frequency": given.every, "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": held}

    return Net(**options)


class Data(L.LightningDataModule):
    """Loaders with a generator, and a count of how often they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.generator = 0, torch.Generator().manual_seed(1)

    def setup(self, stage: str) -> None:
        self.ready = True

    def train_dataloader(self) -> DataLoader[Any]:
        self.asked += 1
        return training(self.generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return validation()


class Rates(L.Callback):
    """The rate of each optimizer step."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def trainer(folder: Path, flavour: Any = L, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    held = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **quiet, **options}
    return flavour.Trainer(accelerator="cpu", default_root_dir=folder, **held)


def streams() -> list[Any]:
    return [random.getstate(), np.random.get_state(), torch.get_rng_state()]


def held(trainer: Any, module: Any, data: Any) -> list[Any]:
    """Everything that a search could leave behind."""
    loops = [trainer.fit_loop.state_dict(), trainer.should_stop, trainer.global_step, trainer.current_epoch]
    own = {k: v for k, v in vars(module).items() if not isinstance(v, dict) and k not in ("_jit_internal",)}
    datas = {k: v for k, v in vars(data).items() if k != "generator"}
    trainers = {k: id(v) for k, v in vars(trainer).items()}
    parts = [id(c) for c in (*trainer.callbacks, *trainer.loggers)] + [trainer.limit_val_batches, str(trainer.state)]
    modes = [m.training for m in module.modules()]
    grads = [p.grad for p in module.parameters()]
    values = [module.state_dict(), dict(module.hparams), data.generator.get_state(), streams()]
    return copy.deepcopy([loops, sorted(own), datas, trainers, parts, modes, grads, module.seen, module.means, values])


@pytest.mark.parametrize(
    ("flavour", "schedule", "options"),
    [
        ("lightning", "step", {"gradient_clip_val": 1.0, "precision": "bf16-mixed"}),
        ("lightning", "epoch", {"accumulate_grad_batches": 2, "max_epochs": 10, "num_sanity_val_steps": 2}),
        ("pytorch_lightning", "step", {"check_val_every_n_epoch": 2, "min_epochs": 4}),
    ],
)
def test_everything_is_as_it_was_and_fit_is_the_same(
    tmp_path: Path, flavour: str, schedule: str, options: dict[str, Any]
) -> None:
    root = importlib.import_module(flavour)

    def fitted(found: bool) -> list[Any]:
        folder = tmp_path / str(found)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model, data = module(root, schedule=schedule), Data()
        logger = CSVLogger(folder) if root is L else True
        more = {
            "logger": logger,
            "enable_checkpointing": True,
            "callbacks": [] if root is L else [GFSCallback()],
            **options,
        }
        run = trainer(folder, root, **more)
        if found:
            before = held(run, model, data)
            made = find_rate(run, model, datamodule=data if root is L else None, **_loaders(root, data))
            assert made.judged_on == "validation"
            assert not list(folder.rglob("*"))
            assert_same(held(run, model, data), before)
        run.fit(model, datamodule=data if root is L else None, **_loaders(root, data))
        logged = (folder / "lightning_logs/version_0/metrics.csv").read_text() if root is L else ""
        metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith("gfs/")}  # they hold times
        return [model.state_dict(), metrics, run.global_step, model.seen, logged, streams()]

    assert_same(fitted(True), fitted(False))


def _loaders(root: Any, data: Data) -> dict[str, Any]:
    return {} if root is L else {"train_dataloaders": training(data.generator), "val_dataloaders": validation()}


class Averages(L.Callback):
    """An average of the weights."""


def plain(lr: float) -> FoundRate:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = OneCycleLR(optimizer, lr, total_steps=STEPS)
    loss_of = lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return gfs_core.find_rate(model, optimizer, loss_of, training(), STEPS, scheduler=schedule, validation=validation())


@pytest.mark.parametrize("lr", [3e-3, 3.0])
def test_the_rate_is_that_of_the_same_training_as_a_plain_loop(tmp_path: Path, lr: float) -> None:
    torch.manual_seed(0)
    model = module(lr=lr)
    found = find_rate(trainer(tmp_path, callbacks=[Averages(), GFSCallback()]), model, training(), validation())
    other = plain(lr)
    assert [s for s in found.unsure if "Callbacks" in s] == [
        "Callbacks took no part, and may change what is trained: Averages."
    ]
    assert found.steps == other.steps == STEPS
    assert found.users == pytest.approx(other.users)
    assert [p.loss for p in found.ramp.points] == pytest.approx([p.loss for p in other.ramp.points], rel=1e-4)
    assert [p.ratio is None for p in found.ramp.points] == [p.ratio is None for p in other.ramp.points]
    assert found.rate == pytest.approx(other.rate, rel=0.01 if lr < 1 else 0.1)  # at higher rates runs are chaotic
    assert other.range[0] < found.rate < other.range[1]

    def trained(rate: float) -> float:
        torch.manual_seed(0)
        run, again = trainer(tmp_path), module(lr=rate)
        run.fit(again, training(), validation())
        return float(run.callback_metrics["val_loss"])

    assert trained(found.rate) < 0.25 < 0.5 < trained(lr)  # .17 at the best rate of all


@pytest.mark.parametrize(
    ("schedule", "every", "accumulate"),
    [("step", 1, 1), ("epoch", 1, 1), ("epoch", 2, 4), ("cosine", 1, 3), ("cosine", 4, 2)],
)
def test_the_schedule_is_the_one_that_fit_uses(tmp_path: Path, schedule: str, every: int, accumulate: int) -> None:
    rates = Rates()
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0, "max_epochs": 20}
    model, run = module(schedule=schedule, every=every), trainer(tmp_path, callbacks=[rates], **options)
    fit = _Fit(run, model, (training(), None, None))
    fit.look()
    assert not fit.validated
    run = trainer(tmp_path, callbacks=[rates], **options)
    model = module(schedule=schedule, every=every)
    model.configure_callbacks = list
    run.fit(model, training())
    assert [s.rate for s in fit.schedule] == pytest.approx(rates.used)
    assert len(set(rates.used)) > 3


def test_a_pilot_has_the_schedule_in_its_shape_and_accumulates(tmp_path: Path) -> None:
    model = module(schedule="cosine")
    fit = _Fit(trainer(tmp_path, accumulate_grad_batches=2, max_epochs=10), model, (training(), validation(), None))
    fit.look()
    shape = fit.schedule[::2][:50]
    trial = Trial("pilot", shape, [3.0] * 50, False, lambda what, step: None)
    used: list[tuple[float, int]] = []
    step = torch.optim.SGD.step

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        used.append((self.param_groups[0]["lr"], model.seen))
        return out

    torch.optim.SGD.step = seen  # type: ignore[method-assign]
    try:
        fit.run(trial)
    finally:
        torch.optim.SGD.step = step  # type: ignore[method-assign]
    assert [rate for rate, _ in used] == pytest.approx([3 * s.rate for s in shape])
    assert [count for _, count in used] == list(range(2, 101, 2))
    assert len(trial.points) == 50
    assert trial.points[0].loss == pytest.approx(2.4, abs=0.3)  # log 10, and not half of it
    assert trial.judged is not None
    assert len(trial.judged) == 6


def manual(base: Any = L.LightningModule) -> Any:
    model = module()
    model.automatic_optimization = False
    return model


class WarmsUp(L.LightningModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, self.trainer.global_step / 50)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


class Steps(L.LightningModule):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


@pytest.mark.parametrize(
    ("made", "options", "text"),
    [
        (manual, {}, "manual optimization"),
        (lambda: module(schedule="plateau"), {}, "ReduceLROnPlateau goes by a metric"),
        (lambda: module(base=Steps), {}, "lr_scheduler_step"),
        (lambda: module(base=WarmsUp), {}, "within a step the learning rate is set"),
        (module, {"max_epochs": 4}, "≥ 100, .* got 88"),
        (lambda: module(schedule="epoch"), {"max_epochs": -1}, "no end"),
        (module, {"fast_dev_run": True}, "fast_dev_run"),
        (module, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler changes"),
        (lambda: module(lr=0.0, schedule="epoch"), {}, "must be > 0"),
        (lambda: nn.Linear(2, 2), {}, "must be a LightningModule, got Linear"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, made: Any, options: dict[str, Any], text: str) -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, **options)
    callbacks = list(run.callbacks)
    with pytest.raises(ConfigError, match=text):
        find_rate(run, model, training(), validation())
    assert_same(model.state_dict(), before)
    assert run.callbacks == callbacks


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    model = module()
    with pytest.raises(ConfigError, match="iterator"):
        find_rate(trainer(tmp_path), model, iter(training()))
    with pytest.raises(ConfigError, match="Trainer of Lightning, got str"):
        find_rate("trainer", model)  # type: ignore[arg-type]
    model.configure_optimizers = lambda: None
    with pytest.raises(ConfigError, match="0 optimizers"):
        find_rate(trainer(tmp_path), model, training())
    used = trainer(tmp_path, max_epochs=1)
    used.fit(module(), training(), validation())
    with pytest.raises(ConfigError, match="taken 22 steps already"):
        find_rate(used, module(), training())


def test_code_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model, data = module(), Data()
    step = model.training_step

    def fails(batch: Batch, batch_idx: int) -> Tensor:
        if model.seen == 30:
            raise KeyError("in the user's own code")
        return step(batch, batch_idx)

    model.training_step = fails
    run = trainer(tmp_path)
    before = held(run, model, data)
    with pytest.raises(KeyError):
        find_rate(run, model, datamodule=data)
    assert_same(held(run, model, data), before)


def test_code_that_fails_at_a_high_rate_is_a_lost_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, raised = module(schedule="epoch", lr=10.0), 0
    model.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def step(batch: Batch, batch_idx: int) -> Tensor:
        nonlocal raised
        out = model.net(batch[0])
        if out.abs().max() > 50:  # as distributions do with what is no parameter of theirs
            raised += 1
            raise ValueError("not a distribution")
        return (out - batch[1][:, None]).square().mean()

    model.training_step = step
    found = find_rate(trainer(tmp_path), model, training())
    assert raised > 0
    assert 1e-3 < found.rate < 1
    assert found.judged_on == "training"
    assert any("failed, and counts as lost: ValueError: not a distribution" in text for text in found.unsure)
