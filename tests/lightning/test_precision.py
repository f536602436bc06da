from __future__ import annotations

from pathlib import Path
from statistics import fmean

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gfs_core as gfs
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.lightning.test_callback import digits
from tests.lightning.trainers import quiet


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.BatchNorm1d(24), nn.Linear(24, 10))
        self.types: set[torch.dtype] = set()

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0] @ torch.eye(64))  # of the default type, which Lightning sets
        self.types.add(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(folder: Path, kind: str, measure: bool = True, **options) -> tuple[Plain, list[gfs.Measurement]]:
    model = Plain()
    callback = GFSCallback(
        tier="gfs", every=4, max_overhead=None, running_every=2, history=str(folder / "h"), **options
    )
    trainer = quiet(folder, [callback] if measure else [], max_steps=20, precision=kind, logger=False)
    trainer.fit(model, DataLoader(digits(), batch_size=32))
    return model, gfs.read_history(folder / "h") if measure else []


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_every_precision_of_lightning(tmp_path: Path, precision: str) -> None:
    _, like = train(tmp_path / "float32", "32-true")
    model, found = train(tmp_path / "it", precision)
    assert model.types == {
        "bf16": {torch.bfloat16}, "16": {torch.float16}, "64": {torch.float64}
    }[precision.split("-")[0]]  # fmt: skip
    solved = [(a, b) for a, b in zip(found, like, strict=True) if a.sharpness is not None]
    assert len(solved) == 5
    first, true = solved[0]  # later on the runs themselves go apart
    loose = 0.03 if precision.startswith("bf16") else 2e-3
    assert first.sharpness == pytest.approx(true.sharpness, rel=loose)
    assert first.gfs_sharpness == pytest.approx(true.gfs_sharpness, rel=loose)
    settled = next(m for m in found if m.running_sharpness is not None)
    assert settled.step == (16 if precision == "bf16-true" else 14)  # it first finds out that steps are lost
    if precision == "bf16-true":  # by products on parts, whose quotient is held against float32 at the same direction
        assert 0 < settled.precision_error < loose
    else:
        # In half precision the error changes its sign from one product to the next.
        ratio, true_ratio = (
            fmean(m.running_stability_ratio for m in ms if m.running_sharpness) for ms in (found, like)
        )
        assert ratio == pytest.approx(true_ratio, rel=2 * loose)
    alone = {m.hvps for m in found if m.sharpness is None}
    assert alone == {float(precision == "bf16-true")}  # by one gradient, but where a short step of the weights is lost
    assert all(a.gfs_stability_ratio is not None for a, _ in solved)
    assert (first.precision_error is not None) == precision.startswith("bf16")
    plain, _ = train(tmp_path / "plain", precision, measure=False)
    assert_same(model.state_dict(), plain.state_dict())
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in plain.parameters()}


def test_precision_as_asked_for(tmp_path: Path) -> None:
    _, like = train(tmp_path / "float32", "32-true")
    model, found = train(tmp_path / "it", "bf16-mixed", precision="float32")
    assert model.types == {torch.bfloat16}  # training's own
    assert found[0].sharpness == pytest.approx(like[0].sharpness, rel=1e-5)
    assert found[0].precision_error is None
    found = train(tmp_path / "training", "bf16-mixed", precision="training")[1]
    assert found[0].sharpness != pytest.approx(like[0].sharpness, rel=1e-5)
