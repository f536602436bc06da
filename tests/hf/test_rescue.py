"""Steps that are skipped, and ways back, under the Trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import gfs_core as gfs
from gfs_core.actions.start import FIRST, GROWTH
from hf_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.hf.rows import Rows
from tests.rates import tell_rates

STEPS, SIZE = 80, 8


class Model(nn.Module):
    """Its loss is not finite at some steps of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.bad = False

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(self.net(x), labels)
        return {"loss": loss * math.nan if self.bad else loss}


class Watching(TrainerCallback):
    """Keeps what a step updates, and disturbs the model at some steps."""

    def __init__(self, bad: int = -1, breaks: int = -1) -> None:
        self.bad, self.breaks = bad, breaks
        self.kept: list[Any] = []
        self.used: list[float] = []
        self.told: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn the rates that are used."""
        tell_rates(kwargs["optimizer"].optimizer, self.used)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        model.bad = state.global_step == self.bad
        if state.global_step == self.breaks:
            with torch.no_grad():
                model.net[0].weight.fill_(math.nan)
        held = {i: optimizer.state.get(p) for i, p in enumerate(model.parameters())}
        self.kept.append(copy.deepcopy([model.state_dict(), held]))
        self.told.append(optimizer.param_groups[0]["lr"])


def train(
    folder: Path,
    watching: Watching,
    mode: str = "set_trainer",
    alarm: str = "rescue",
    control: str = "observe",
    **options: Any,
) -> Model:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=SIZE,
        max_steps=STEPS,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **{"learning_rate": 0.01, **options},
    )
    model = Model()
    trainer = Trainer(model, arguments, train_dataset=Rows(SIZE * STEPS * arguments.gradient_accumulation_steps))
    trainer.add_callback(watching)
    asked = {"alarm": alarm, "control": control, "history": str(folder / "h")}
    callback = GFSCallback(tier="running", every=5, max_overhead=None, **asked)
    trainer.add_callback(callback) if mode == "add_callback" else callback.set_trainer(trainer)
    trainer.train()
    return model


def reasons(folder: Path) -> dict[int, str]:
    return {m.step: "; ".join(m.reasons) for m in gfs.read_history(folder / "h")}


@pytest.mark.parametrize(("mode", "accumulate"), [("add_callback", 1), ("set_trainer", 1), ("set_trainer", 3)])
def test_a_skipped_step_updates_nothing(tmp_path: Path, mode: str, accumulate: int) -> None:
    watching = Watching(bad=60)
    with pytest.warns(gfs.GFSWarning, match="the loss is nan"):
        model = train(tmp_path, watching, mode, gradient_accumulation_steps=accumulate)
    assert_same(watching.kept[60], watching.kept[61])
    assert not torch.equal(watching.kept[61][0]["net.0.weight"], watching.kept[62][0]["net.0.weight"])
    assert "the step was skipped" in reasons(tmp_path)[60]
    assert len(watching.kept) == STEPS
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert watching.told[61] < watching.told[60]  # the schedule goes on


@pytest.mark.parametrize("options", [{"alarm": "rescue"}, {"alarm": "log", "control": "guard"}])
def test_where_the_weights_break_the_run_goes_back(tmp_path: Path, options: dict[str, str]) -> None:
    watching = Watching(breaks=60)
    with pytest.warns(gfs.GFSWarning, match="went back at step 63 to the weights of step 50"):
        model = train(tmp_path, watching, **options)
    # A snapshot is taken just before the step, when the forward pass has updated the buffers.
    assert_same(watching.kept[64][1], watching.kept[50][1])
    trained = dict(model.named_parameters())
    assert all(torch.equal(watching.kept[64][0][name], watching.kept[50][0][name]) for name in trained)
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert watching.told[64:70] == pytest.approx(watching.told[51:57])  # the schedule went back too
    assert watching.used[64:] == pytest.approx([rate / 3 for rate in watching.told[64:]])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_guard_a_healthy_run_is_the_same_to_the_bit(tmp_path: Path, accumulate: int) -> None:
    runs = {control: Watching() for control in ("observe", "guard")}
    for control, watching in runs.items():
        folder = tmp_path / control
        train(folder, watching, alarm="log", control=control, gradient_accumulation_steps=accumulate)
    assert_same(runs["observe"].kept, runs["guard"].kept)
    assert runs["observe"].used == runs["guard"].used == runs["guard"].told
    logged = [m.lr_scale for m in gfs.read_history(tmp_path / "guard" / "h") if m.lr_scale is not None]
    assert len(logged) > 3
    assert set(logged) == {1.0}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_start_rises_to_the_users_rate(tmp_path: Path, accumulate: int) -> None:
    watching = Watching()
    train(tmp_path, watching, alarm="log", control="start", gradient_accumulation_steps=accumulate)
    shares = [used / told for used, told in zip(watching.used, watching.told, strict=True)]
    assert shares[:35] == pytest.approx([FIRST * GROWTH**i for i in range(35)])
    assert watching.used[45:] == watching.told[45:]
    logged = {m.step: m.lr_effective for m in gfs.read_history(tmp_path / "h") if m.lr_effective is not None}
    assert all(rate == pytest.approx(watching.used[step], rel=1e-4) for step, rate in logged.items())


def test_a_start_ends_below_the_rate_at_which_the_loss_is_lost(tmp_path: Path) -> None:
    watching = Watching()
    options = {"learning_rate": 1e4, "optim": "sgd", "warmup_steps": 10}
    with pytest.warns(gfs.GFSWarning, match="the loss was lost at step .* the run went back to the weights of step"):
        model = train(tmp_path, watching, alarm="log", control="start", **options)
    shares = [used / told for used, told in zip(watching.used, watching.told, strict=True) if told]
    assert shares[-10:] == pytest.approx([shares[-1]] * 10)
    assert shares[-1] < 0.1
    assert max(watching.used[-10:]) <= 0.11 * max(watching.used)
    assert all(p.isfinite().all() for p in model.state_dict().values())


def test_without_it_the_run_is_lost(tmp_path: Path) -> None:
    assert not train(tmp_path, Watching(bad=60), alarm="log").net[0].weight.isfinite().any()
