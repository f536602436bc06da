"""A second data set under Lightning: its batches reach the module as training's do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gfs_core as gfs
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.core.test_second_data import OPTIONS, A, B
from tests.lightning.trainers import quiet


class Net(L.LightningModule):
    """Scales its batches in a hook, and counts that."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10))
        self.moved, self.seen = 0, list[dict[str, Tensor]]()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return 2 * batch[0], batch[1]

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(
    folder: Path,
    callback: GFSCallback | None,
    loader: Any = None,
    dropout: float = 0.0,
    checkpoint: Path | None = None,
    **options: Any,
) -> tuple[Net, L.Trainer]:
    L.seed_everything(0, verbose=False)
    model = Net(dropout)
    options = {"max_steps": 10, "logger": CSVLogger(folder, name="", version="")} | options
    trainer = quiet(folder, [] if callback is None else [callback], **options)
    trainer.fit(model, DataLoader(B, 32, shuffle=True) if loader is None else loader, ckpt_path=checkpoint)
    return model, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_value_is_the_sharpness_of_the_second_data_set(tmp_path: Path, accumulate: int) -> None:
    callback = GFSCallback(probe=DataLoader(A, 32, shuffle=True), strict=True, **OPTIONS)
    tuned_callback(callback, tol=1e-4, max_hvps=500)
    model, _ = train(tmp_path / "with", callback, accumulate_grad_batches=accumulate)
    found = [m for m in gfs.read_history(tmp_path / "with" / "history.jsonl") if m.sharpness is not None]
    assert [m.step for m in found] == [0, 4, 8]
    [batch] = callback.monitors[""].measuring.probe.second.batches
    assert 5 <= batch[1].min() <= batch[1].max() <= 9
    assert batch[0].max() == pytest.approx(1.4)  # the module's hook has doubled 0.7
    for m in found:
        model.load_state_dict(model.seen[m.step * accumulate])
        truth = gfs.sharpness(model, Net.loss_of, [batch], tol=1e-4, max_hvps=500)
        assert m.sharpness == pytest.approx(truth.value, rel=1e-3)
        assert m.loss_probe == pytest.approx(model.loss_of(batch).item(), rel=1e-5)


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    loader = DataLoader(A, 32, shuffle=True, generator=torch.Generator().manual_seed(1))
    held = loader.generator.get_state()
    options = {"tier": "gfs", "running_every": 1, "probe_size": 50}
    callback = GFSCallback(probe=loader, strict=True, **OPTIONS | options)
    model, trainer = train(tmp_path / "with", callback, dropout=0.2)
    random = torch.get_rng_state()
    without, other = train(tmp_path / "without", None, dropout=0.2)
    assert_same(random, torch.get_rng_state())
    assert_same(loader.generator.get_state(), held)
    assert_same(model.state_dict(), without.state_dict())
    assert_same(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert model.moved == without.moved == 10


def test_the_training_loader_is_left_alone(tmp_path: Path) -> None:
    loader = DataLoader(B, 32)
    with pytest.warns(gfs.GFSWarning, match="is the one that training takes its batches from") as told:
        model, _ = train(tmp_path, GFSCallback(probe=loader, **OPTIONS), loader)
    assert len([w for w in told if "takes its batches from" in str(w.message)]) == 1
    assert_same(model.state_dict(), train(tmp_path / "without", None, loader)[0].state_dict())


def test_batches_that_the_module_cannot_take_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(gfs.GFSWarning, match="no batches could be taken from the loader of `probe=`: IndexError"):
        model, _ = train(tmp_path, GFSCallback(probe=[[A[:8][0]]], **OPTIONS))
    assert_same(model.state_dict(), train(tmp_path / "without", None)[0].state_dict())


def test_a_resumed_fit_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    def callback() -> GFSCallback:
        return GFSCallback(probe=DataLoader(A, 32, shuffle=True), strict=True, **OPTIONS)

    first = callback()
    _, trainer = train(tmp_path / "first", first)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    second = callback()
    train(tmp_path / "second", second, checkpoint=tmp_path / "at.ckpt", max_steps=14)
    batches = [c.monitors[""].measuring.probe.second.batches for c in (first, second)]
    assert_same(*batches)
    assert [m.step for m in gfs.read_history(tmp_path / "second" / "history.jsonl") if m.sharpness] == [12]


def test_a_word_is_an_option_as_before_and_other_data_is_refused() -> None:
    assert GFSCallback(probe="fixed").config.probe == "fixed"
    with pytest.raises(gfs.ConfigError, match="`probe` must be one of 'batch', 'fixed'; got 'loader'"):
        GFSCallback(probe="loader")
    with pytest.raises(gfs.ConfigError, match="got a data set, a TensorDataset"):
        GFSCallback(probe=A)
