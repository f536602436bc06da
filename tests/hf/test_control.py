"""The controlled learning rate and the early warning under the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import gfs_core as gfs
from hf_gfs import GFSCallback
from tests.core.options import tuned_callback
from tests.hf.clients import Characters, arguments, gpt2, train
from tests.rates import tell_rates


class Used(TrainerCallback):
    """The rate that each step really uses."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell_rates(kwargs["optimizer"].optimizer, self.rates)


def language(folder: Path, **options: Any) -> Trainer:
    return Trainer(model=gpt2(dropout=0.0), args=arguments(folder, **options), train_dataset=Characters())


def control(policy: str = "cap", **options: Any) -> GFSCallback:
    """One whose products are on whole steps in every run: two that time them may choose differently."""
    callback = GFSCallback(tier="running", every=5, max_overhead=None, control=policy, **options)
    return tuned_callback(callback, whole=True)


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_uses_the_scaled_rate_and_the_log_has_the_users(tmp_path: Path, mode: str, accumulate: int) -> None:
    options = {
        "learning_rate": 0.05,
        "max_steps": 20,
        "logging_steps": 1,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
    }
    used, free = Used(), Used()
    callback = control()

    def attach(trainer: Trainer) -> None:
        trainer.add_callback(used)
        trainer.add_callback(callback) if mode == "add_callback" else callback.set_trainer(trainer)

    trainer = train(lambda: language(tmp_path / "a", **options), attach)
    plain = train(lambda: language(tmp_path / "b", **options), lambda t: t.add_callback(free))
    assert len(used.rates) == 20
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    steps = [row["step"] for row in trainer.state.log_history if "gfs/lr_scale" in row]
    effective, scales = logged(trainer, "gfs/lr_effective"), logged(trainer, "gfs/lr_scale")
    # AdamW has no threshold before its first step, eight products settle, and the first has no spread: the fourth ratio
    # with one comes at step 12.
    assert steps == [*range(13), 15, 18]
    assert effective == pytest.approx([used.rates[s] for s in steps])
    assert effective == pytest.approx([scale * free.rates[s] for s, scale in zip(steps, scales, strict=True)])
    assert used.rates[6] < 0.1 * free.rates[6]
    assert used.rates[12] < 0.2 * free.rates[12]  # the first that measurements decide


def test_a_resumed_run_uses_the_same_rates(tmp_path: Path) -> None:
    options = {"learning_rate": 0.05, "max_steps": 12, "save_strategy": "steps", "save_steps": 7}
    whole, second = Used(), Used()

    def attach(used: Used):
        def add(trainer: Trainer) -> None:
            trainer.add_callback(used)
            trainer.add_callback(control("follow"))

        return add

    train(lambda: language(tmp_path, **options), attach(whole))
    trainer = language(tmp_path, **options)
    attach(second)(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert second.rates == whole.rates[7:]


def test_the_scheduler_fits_the_trainers_optimizers(tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "no", "logging_steps": 1}
    used, by_option = Used(), Used()

    def scheduled() -> Trainer:
        model = gpt2(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), 5.0, momentum=0.9)
        base = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        scheduler = gfs.EdgeOfStabilityLR(optimizer, base) if not used.rates else base
        args = arguments(tmp_path, **options)
        return Trainer(model=model, args=args, train_dataset=Characters(), optimizers=(optimizer, scheduler))

    def attach(seen: Used, policy: str):
        return lambda t: [t.add_callback(seen), t.add_callback(control(policy))]

    trainer = train(scheduled, attach(used, "observe"))
    train(scheduled, attach(by_option, "cap"))
    assert used.rates == by_option.rates
    assert used.rates[-1] < 5.0
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(used.rates[-1], rel=0.05)


def test_an_alarm_saves_and_stops(tmp_path: Path) -> None:
    class Spiking(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * 100 if self.state.global_step == 30 else loss

    events: list[gfs.Alert] = []
    callback = GFSCallback(tier="running", every=5, max_overhead=None, alarm="stop", on_alarm=events.append)
    options = {"max_steps": 40, "learning_rate": 1e-4, "save_strategy": "no", "max_grad_norm": 1.0}

    def spiking() -> Trainer:
        return Spiking(model=gpt2(dropout=0.0), args=arguments(tmp_path, **options), train_dataset=Characters())

    with pytest.warns(gfs.GFSWarning, match="alarm at step 30: the loss is"):
        trainer = train(spiking, callback.set_trainer)
    assert trainer.state.global_step == 31
    assert (events[-1].step, events[-1].level) == (30, gfs.AlertLevel.ALARM)
    assert (tmp_path / "checkpoint-31" / "gfs_state.pt").is_file()
    row = [r for r in trainer.state.log_history if "gfs/alarm" in r][-1]
    assert (row["step"], row["gfs/alarm"]) == (30, 2.0)
