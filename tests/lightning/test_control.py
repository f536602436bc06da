"""The controlled learning rate and the early warning under Lightning."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from lightning_gfs import GFSCallback
from tests.core.options import tuned_callback
from tests.lightning.trainers import quiet
from tests.rates import tell_rates

LABELS = torch.randint(4, (256,), generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(nn.functional.one_hot(LABELS, 8) + 0.5 * torch.randn(256, 8), LABELS)


class Net(L.LightningModule):
    def __init__(self, rate: float = 2.0, spike: int | None = None, edge: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.rate, self.spike, self.edge = rate, spike, edge
        self.seen: list[float] = []
        self.used: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen.append(float(self.optimizers().param_groups[0]["lr"]))
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * 100 if self.global_step == self.spike else loss

    def on_train_start(self) -> None:
        """Have the optimizer's own code tell the rate that it uses."""
        tell_rates(self.trainer.optimizers[0], self.used)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        base = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        scheduler = gfs.EdgeOfStabilityLR(optimizer, base) if self.edge else base
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, model: Net, *callbacks: Any, resume: Any = None, **options: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    defaults = {"max_epochs": 3, "logger": False, "enable_checkpointing": False}
    trainer = quiet(folder, callbacks, **defaults | options)
    trainer.fit(model, DataLoader(DATA, batch_size=32, shuffle=False), ckpt_path=resume)
    return trainer


def cosine(step: int) -> float:
    """The user's rate at a step."""
    return 2.0 * 0.5 * (1 + math.cos(math.pi * step / 100))


def control(policy: str = "cap", **options: Any) -> GFSCallback:
    """One whose products are on whole steps in every run: two that time them may choose differently."""
    callback = GFSCallback(tier="running", every=5, max_overhead=None, control=policy, **options)
    return tuned_callback(callback, whole=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_uses_the_scaled_rate_and_everything_else_sees_the_users(tmp_path: Path, accumulate: int) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    model, free = Net(), Net()
    trainer = fit(tmp_path, model, control(), LearningRateMonitor(), logger=logger, accumulate_grad_batches=accumulate)
    fit(tmp_path, free, accumulate_grad_batches=accumulate)
    assert model.seen == free.seen  # in training_step, inside the optimizer's closure
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {int(r["step"]): float(r["lr-SGD"]) for r in rows if r["lr-SGD"]}
    assert [logged[step] for step in range(len(free.used))] == pytest.approx(free.used)  # what Lightning logs
    keys = ("gfs/lr_scale", "gfs/lr_effective")
    scaled = [(int(r["step"]), *(float(r[key]) for key in keys)) for r in rows if r["gfs/lr_scale"]]
    assert len(scaled) >= 24 // accumulate // 5
    for step, scale, effective in scaled:
        assert effective == pytest.approx(model.used[step])
        assert effective == pytest.approx(scale * free.used[step])
    assert min(s for _, s, _ in scaled) < 0.5
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(cosine(len(model.used)))


@pytest.mark.parametrize("edge", [False, True])
def test_a_resumed_run_uses_the_same_rates(tmp_path: Path, edge: bool) -> None:
    def callback() -> GFSCallback:
        return control("observe" if edge else "follow")

    whole, first, second = Net(edge=edge), Net(edge=edge), Net(edge=edge)
    fit(tmp_path / "a", whole, callback())
    saver = ModelCheckpoint(tmp_path / "b", every_n_train_steps=16, save_top_k=-1)
    fit(tmp_path / "b", first, callback(), saver, max_epochs=2, enable_checkpointing=True)
    fit(tmp_path / "b", second, callback(), resume=next((tmp_path / "b").glob("*.ckpt")))
    assert first.used + second.used == whole.used
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_scheduler_from_configure_optimizers_holds_the_rate(tmp_path: Path) -> None:
    edge, by_option = Net(edge=True), Net()
    fit(tmp_path, edge, control("observe"))
    fit(tmp_path, by_option, control("cap"))
    assert edge.used == by_option.used


def test_an_alarm_saves_and_stops(tmp_path: Path) -> None:
    events: list[gfs.Alert] = []
    model = Net(rate=0.05, spike=40)
    callback = GFSCallback(tier="running", every=5, max_overhead=None, alarm="stop", on_alarm=events.append)
    with pytest.warns(gfs.GFSWarning, match="alarm at step 40: the loss is"):
        trainer = fit(tmp_path, model, callback, max_epochs=20)
    assert trainer.global_step == 41
    assert (events[-1].step, events[-1].level) == (40, gfs.AlertLevel.ALARM)
    [saved] = tmp_path.glob("**/gfs-alarm-step=40.ckpt")
    held = torch.load(saved, weights_only=False)
    assert held["global_step"] == 41
    again = Net(rate=0.05)
    trainer = fit(tmp_path, again, GFSCallback(tier="running", max_overhead=None), resume=saved, max_epochs=6)
    assert trainer.global_step == 48
    assert len(again.used) == 7


def test_the_hooks_are_gone_after_an_exception(tmp_path: Path) -> None:
    class Breaking(Net):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if self.trainer.global_step == 5:
                raise RuntimeError("the user's own")
            return super().training_step(batch, index)

    model = Breaking()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, model, control())
    optimizer = model.trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine(5))


class TwoOptimizers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def loss(self, part: int, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.parts[part](batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> None:
        for part, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.loss(part, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(p.parameters(), rate) for p, rate in zip(self.parts, (50.0, 0.01), strict=True)]


def test_each_of_two_optimizers_has_its_own_scale(tmp_path: Path) -> None:
    model = TwoOptimizers()
    losses = {name: (lambda m, b, i, part=part: m.loss(part, b)) for part, name in enumerate(("fast", "slow"))}
    callback = control("cap", loss_fn=losses)
    fit(tmp_path, model, callback)
    scales = {name: monitor.control.scale(monitor.rates.base_lr()) for name, monitor in callback.monitors.items()}
    assert scales["fast"] < 0.3
    assert scales["slow"] == 1.0
