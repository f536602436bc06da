"""Packages that bring their own modules, batches and trainers: each trained without and with the callback.

A package that is not installed is passed over; `nox -s trainers` installs all of them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from transformers import Trainer

import gfs_core as gfs
from hf_gfs import GFSCallback as TrainerGFSCallback
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.hf.clients import outcome, train_and_hear
from tests.trainers.jobs import LIGHTNING, OPTIMIZERS, Weights, classifier, setfit


class Losses(pl.Callback):
    """What training computed, by optimizer step; of the class, as some packages copy their callbacks."""

    by_step: ClassVar[dict[int, float]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.by_step[trainer.global_step - 1] = float(outputs["loss"])


def measured(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, list[gfs.Measurement], list[str]]:
    """The weights of a job trained with the callback, what was measured, and the warnings."""
    found: list[gfs.Measurement] = []
    update_detectors = gfs.StabilityMonitor.update_detectors

    def kept(monitor: gfs.StabilityMonitor, step: int, measurement: gfs.Measurement | None = None) -> Any:
        found.extend([measurement] if measurement is not None else [])
        return update_detectors(monitor, step, measurement)

    monkeypatch.setattr(gfs.StabilityMonitor, "update_detectors", kept)
    Losses.by_step.clear()
    callback = GFSCallback(every=4, running_every=2, max_overhead=None, tier="sharpness")
    tuned_callback(callback, max_hvps=30, tol=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = LIGHTNING[name].train([callback, Losses()])
    return weights, found, [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]


@pytest.mark.parametrize("name", LIGHTNING)
def test_training_is_the_same_and_the_loss_is_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(LIGHTNING[name].package)
    plain = LIGHTNING[name].train([])
    weights, found, _ = measured(name, monkeypatch)
    assert_same(plain, weights)
    solved = {m.step: m.loss_probe for m in found if m.sharpness is not None}
    assert len(solved) >= 2
    assert solved == {step: pytest.approx(Losses.by_step[step], rel=1e-6) for step in solved}
    assert sum(m.running_sharpness is not None for m in found) >= 2


def optimized(name: str, folder: Path, mode: str) -> tuple[dict[str, object], list[dict[str, Any]], list[str]]:
    """What a training with an optimizer of :data:`OPTIMIZERS` leaves, what was logged of it, and the warnings."""

    def attach(trainer: Trainer) -> None:
        callback = TrainerGFSCallback(every=2, running_every=2, max_overhead=None, tier="sharpness")
        if mode == "add_callback":
            trainer.add_callback(callback)
        elif mode == "set_trainer":
            callback.set_trainer(trainer)

    trainer, told = train_and_hear(lambda: classifier(folder, name), attach)
    rows = [row for row in trainer.state.log_history if "gfs/sharpness" in row]
    left = outcome(trainer)
    left["optimizer"] = [value for value in left["optimizer"] if isinstance(value, torch.Tensor)]  # not the projectors
    return left, rows, told


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_the_trainers_other_optimizers(name: str, mode: str, tmp_path: Path) -> None:
    pytest.importorskip(OPTIMIZERS[name][0])
    plain, _, _ = optimized(name, tmp_path / "plain", "without")
    left, rows, told = optimized(name, tmp_path / "gfs", mode)
    assert_same(plain, left)
    if "layer-wise" in name:
        [text] = told
        assert "is layer-wise, steps inside of the backward pass" in text
    elif name == "LOMO" and mode == "add_callback":
        assert rows == []
        assert sum("no gradient is left when the optimizer is called" in text for text in told) == 1
    else:
        assert [row["step"] for row in rows] == [0, 2, 4]
        assert sum("is not known; its stability ratio is empirical" in text for text in told) == 1
        assert len(told) == 1 + (name == "LOMO")


def measured_setfit() -> tuple[Weights, list[str]]:
    """The weights of SetFit's training with the callback, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = setfit([TrainerGFSCallback(max_overhead=None)])
    return weights, [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]


def test_setfit_trains_on() -> None:
    pytest.importorskip("setfit")
    weights, told = measured_setfit()
    assert_same(setfit([]), weights)
    [text] = told
    assert "SetFitModel" in text
