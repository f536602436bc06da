"""Steps that are skipped, and ways back, under Lightning."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from gfs_core.actions.start import FIRST, GROWTH
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.lightning.trainers import quiet
from tests.rates import tell_rates

BATCHES = 90
X = torch.randn(BATCHES * 16, 8, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.randn(8, 3, generator=torch.Generator().manual_seed(2))).argmax(1)


class Net(L.LightningModule):
    """A classifier whose loss is not finite on some batches, or whose weights break before some."""

    def __init__(self, bad: tuple[int, ...] = (), breaks: int = -1, accumulate: int = 1, scaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.bad, self.breaks, self.accumulate, self.scaled = bad, breaks, accumulate, scaled
        self.kept: dict[int, Any] = {}
        self.used: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == self.breaks:
            with torch.no_grad():
                self.net[0].weight.fill_(math.nan)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if index not in self.bad:
            return loss
        # A gradient scaler skips a gradient that is not finite; it cannot see that a loss is far too high.
        return loss * 0 + 1e6 if self.scaled else loss * math.nan

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        [optimizer] = self.trainer.optimizers
        if index % self.accumulate == 0:
            state = {i: optimizer.state.get(p) for i, p in enumerate(self.parameters())}
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            weights = {k: v for k, v in self.state_dict().items()}
            self.kept[index // self.accumulate] = copy.deepcopy([weights, state, groups[0].get("momentum")])

    def on_train_start(self) -> None:
        """Have the optimizer's own code tell the rate that it uses."""
        [optimizer] = self.trainer.optimizers
        tell_rates(optimizer, self.used)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), "interval": "step"}]


def fit(
    folder: Path, model: L.LightningModule, alarm: str = "rescue", control: str = "observe", **options: Any
) -> L.Trainer:
    watching = {"alarm": alarm, "control": control, "history": str(folder / "h")}
    callback = GFSCallback(tier="running", every=5, max_overhead=None, **watching)
    trainer = quiet(folder, [callback], max_epochs=1, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=False))
    return trainer


def reasons(folder: Path) -> dict[int, str]:
    return {m.step: "; ".join(m.reasons) for m in gfs.read_history(folder / "h")}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_skipped_step_updates_nothing(tmp_path: Path, accumulate: int, clip: float | None) -> None:
    model = Net(bad=(60,), accumulate=accumulate)
    with pytest.warns(gfs.GFSWarning, match="the loss is nan"):
        trainer = fit(tmp_path, model, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    step = 60 // accumulate
    assert_same(model.kept[step], model.kept[step + 1])
    assert not torch.equal(model.kept[step + 1][0]["net.0.weight"], model.kept[step + 2][0]["net.0.weight"])
    assert "the step was skipped" in reasons(tmp_path)[step]
    assert trainer.global_step == BATCHES // accumulate  # Lightning counts it
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradient_scaling_takes_a_skipped_step_for_a_usual_one(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=20)
    model = Net(bad=(50,), scaled=True)
    with pytest.warns(gfs.GFSWarning, match="alarm at step 50: the loss is"):
        fit(tmp_path, model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same(model.kept[50], model.kept[51])
    assert scaler.get_scale() == 2.0 ** (8 + BATCHES // 20)  # not halved, and the skipped step was counted
    assert "the step was skipped" in reasons(tmp_path)[50]
    history = gfs.read_history(tmp_path / "h", part=0)
    assert all(0 < m.loss_probe < 3 for m in history if m.loss_probe is not None)


@pytest.mark.parametrize("options", [{"alarm": "rescue"}, {"alarm": "log", "control": "guard"}])
def test_where_the_weights_break_the_run_goes_back(tmp_path: Path, options: dict[str, str]) -> None:
    model = Net(breaks=60)
    with pytest.warns(gfs.GFSWarning, match="went back at step 63 to the weights of step 50"):
        fit(tmp_path, model, **options)
    # A snapshot is taken just before the step, when the forward pass has updated the buffers.
    trained = dict(model.named_parameters())
    for now, then in zip(model.kept[64][1:], model.kept[50][1:], strict=True):
        assert_same(now, then)
    assert all(torch.equal(model.kept[64][0][name], model.kept[50][0][name]) for name in trained)
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert model.used[64:80] == [0.01 * 3**-1.0] * 16  # a third of the user's, whose rate is told to be what it was
    assert reasons(tmp_path)[63].count("went back") == 1


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}, {}])
def test_under_guard_a_healthy_run_is_the_same_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    accumulate = options.get("accumulate_grad_batches", 1)
    models = [Net(accumulate=accumulate), Net(accumulate=accumulate)]
    for model, control in zip(models, ("observe", "guard"), strict=True):
        fit(tmp_path / control, model, "log", control, **options)
    assert_same(models[0].kept, models[1].kept)
    assert models[0].used == models[1].used == [0.01] * (BATCHES // accumulate)
    logged = [m.lr_scale for m in gfs.read_history(tmp_path / "guard" / "h") if m.lr_scale is not None]
    assert len(logged) > 3
    assert set(logged) == {1.0}


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed", "gradient_clip_val": 1.0}, {}])
def test_a_start_rises_to_the_users_rate(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Net()
    trainer = fit(tmp_path, model, "log", "start", **options)
    assert model.used == pytest.approx([0.01 * min(FIRST * GROWTH**i, 1.0) for i in range(BATCHES)])
    assert model.used[45:] == [0.01] * (BATCHES - 45)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    logged = {m.step: m.lr_effective for m in gfs.read_history(tmp_path / "h") if m.lr_effective is not None}
    assert all(rate == pytest.approx(model.used[step], rel=1e-4) for step, rate in logged.items())


def test_a_start_ends_below_the_rate_at_which_the_loss_is_lost(tmp_path: Path) -> None:
    class High(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 100.0, momentum=0.9)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), "interval": "step"}]

    model = High()
    with pytest.warns(gfs.GFSWarning, match="the loss was lost at step .* the run went back to the weights of step"):
        fit(tmp_path, model, "log", "start")
    limit = 0.1 * max(model.used)
    assert model.used[-30:] == pytest.approx([limit] * 30)
    assert all(p.isfinite().all() for p in model.state_dict().values())


def test_without_it_the_run_is_lost(tmp_path: Path) -> None:
    model = Net(breaks=60)
    fit(tmp_path, model, "log")
    assert not model.net[0].weight.isfinite().any()


def test_under_manual_optimization_one_message_says_that_nothing_is_done(tmp_path: Path) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = super().training_step(batch, index)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def loss_of(module: Any, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    callback = GFSCallback(loss_fn=loss_of, tier="running", alarm="rescue")
    trainer = quiet(tmp_path, [callback], max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.warns(gfs.GFSWarning, match="there is no way back: under manual optimization") as told:
        trainer.fit(Manual(), DataLoader(TensorDataset(X, Y), batch_size=16))
    assert sum("no way back" in str(w.message) for w in told) == 1
