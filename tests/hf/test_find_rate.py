"""A learning rate found before `train`, with the trainer's own loop; everything is as it was afterwards."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

import gfs_core
from gfs_core import ConfigError
from gfs_core.search.trial import Trial
from hf_gfs import GFSCallback, find_rate
from hf_gfs.callback import _measured
from hf_gfs.rate import _Train
from tests.bitwise import assert_same

STEPS, HELD_OUT, SIZE, WARMUP = 110, 360, 32, 10


class Net(nn.Module):
    """A classifier of digits that counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 10))
        self.seen = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen += self.training
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def digits() -> list[dict[str, Any]]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16 - 0.3, dtype=torch.float32)
    return [{"x": a, "labels": int(b)} for a, b in zip(x, labels, strict=True)]


DIGITS = digits()


def text() -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 30, (64, 12), generator=torch.Generator().manual_seed(2)).cumsum(1) % 30
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, kind: str = "digits", rate: float = 1e-3, **options: Any) -> Trainer:
    set_seed(0)
    quiet = {"disable_tqdm": True, "report_to": [], "logging_steps": 20, "save_strategy": "no"}
    size = {"max_steps": STEPS, "per_device_train_batch_size": SIZE, "warmup_steps": WARMUP, "use_cpu": True}
    callbacks = options.pop("callbacks", None)
    arguments = TrainingArguments(str(folder), **{"learning_rate": rate, **size, **quiet, **options})
    if kind == "text":
        config = GPT2Config(
            vocab_size=30, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return Trainer(GPT2LMHeadModel(config), arguments, train_dataset=text(), callbacks=callbacks)
    model, pair = Net(), (None, None)
    if kind == "own optimizer":
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        pair = (optimizer, OneCycleLR(optimizer, 0.02, total_steps=STEPS + 1))  # type: ignore[assignment]
    data = {"train_dataset": DIGITS[HELD_OUT:], "eval_dataset": DIGITS[:HELD_OUT]}
    return Trainer(model, arguments, optimizers=pair, callbacks=callbacks, **data)


def held(trainer: Trainer) -> list[Any]:
    """Everything that a search could leave behind."""
    own = {k: id(v) for k, v in vars(trainer).items()}
    parts = [vars(trainer.args), vars(trainer.control), vars(trainer.state), trainer.accelerator.step]
    lists = [list(map(id, trainer.callback_handler.callbacks)), len(trainer.accelerator._models)]
    model = trainer.model
    attributes = sorted(k for m in model.modules() for k in vars(m))
    config = str(getattr(model, "config", ""))
    grads, modes = [p.grad for p in model.parameters()], [m.training for m in model.modules()]
    optimizer = None if trainer.optimizer is None else trainer.optimizer.state_dict()
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    streams = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    plain = copy.deepcopy([str(parts), lists, attributes, config, grads, modes, optimizer, scheduler, streams])
    return [own, plain, copy.deepcopy(model.state_dict())]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "digits",
            {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps"},
        ),
        ("text", {"bf16": True, "num_train_epochs": 50, "max_steps": -1, "weight_decay": 0.1}),
        ("own optimizer", {"max_grad_norm": 0.0, "dataloader_num_workers": 1}),
    ],
)
def test_everything_is_as_it_was_and_train_is_the_run_of_a_new_trainer(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    measuring = GFSCallback(tier="running", every=20, max_overhead=None)
    used = trainer(tmp_path / "found", kind, **options, callbacks=[measuring])
    before = held(used)
    found = find_rate(used)
    assert_same(held(used), before)
    assert not list(tmp_path.rglob("*.*"))
    assert found.judged_on == ("training" if kind == "text" else "validation")
    assert used.model not in _measured
    used.args.learning_rate *= found.factor
    used.train()
    new = trainer(tmp_path / "new", kind, **options, rate=1e-3 * found.factor)
    new.train()
    assert_same(used.model.state_dict(), new.model.state_dict())
    assert logged(used) == logged(new)
    assert measuring.monitor is None
    assert any("gfs/running_stability_ratio" in row for row in used.state.log_history)


def logged(trainer: Trainer) -> list[Any]:
    return [
        {k: v for k, v in row.items() if not k.endswith(("runtime", "second"))}
        for row in trainer.state.log_history
        if not any(k.startswith("gfs/") for k in row)
    ]


class InOrder(Trainer):  # type: ignore[misc]
    """A trainer that does not shuffle."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("rate", [1e-4, 0.3])
def test_the_rate_is_that_of_the_same_training_as_a_plain_loop(tmp_path: Path, rate: float) -> None:
    base = trainer(tmp_path, rate=rate)
    found = find_rate(InOrder(base.model, base.args, train_dataset=base.train_dataset, eval_dataset=base.eval_dataset))
    set_seed(0)
    model = Net()
    set_seed(base.args.seed)  # as train does, for the same dropout
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    batches: DataLoader[Any] = DataLoader(DIGITS[HELD_OUT:], SIZE)  # type: ignore[arg-type]
    other = gfs_core.find_rate(
        model,
        optimizer,
        lambda batch: model(**batch)["loss"],
        batches,
        STEPS,
        scheduler=get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
        validation=DataLoader(DIGITS[:HELD_OUT], 8),  # type: ignore[arg-type]
        before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    )
    assert (found.steps, found.users) == (other.steps, other.users) == (STEPS, rate)
    losses = [[p.loss for p in each.ramp.points][:10] for each in (found, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert found.rate == pytest.approx(other.rate, rel=0.1)  # of a few steps at high rates, which are chaotic
    assert sum(p.ratio is not None for p in found.ramp.points) > len(found.ramp.points) / 3
    assert all(p.gradient is not None and p.gradient > 0 for p in found.ramp.points if p.ratio is not None)
    assert other.range[0] < found.rate < other.range[1]
    assert 3e-3 < found.rate < 0.1

    def trained(rate: float) -> float:
        run = trainer(tmp_path, rate=rate)
        run.train()
        return float(run.evaluate()["eval_loss"])

    assert trained(found.rate) < 0.3 < trained(rate)


def test_a_pilot_has_the_schedule_in_its_shape_and_accumulates(tmp_path: Path) -> None:
    used = trainer(tmp_path, gradient_accumulation_steps=2)
    train = _Train(used)
    train.look()
    assert [s.rate for s in train.schedule[:3]] == pytest.approx([0, 1e-4, 2e-4])
    used = trainer(tmp_path, gradient_accumulation_steps=2)
    shape = train.schedule[::3][:20]
    trial = Trial("pilot", shape, [3.0] * 20, False, lambda what, step: None)
    rates: list[tuple[float, int]] = []
    step = torch.optim.AdamW.step

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append((float(self.param_groups[0]["lr"]), used.model.seen))
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = seen  # type: ignore[method-assign]
    try:
        _Train(used).run(trial)
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    assert [rate for rate, _ in rates] == pytest.approx([3 * s.rate for s in shape])
    assert [count for _, count in rates] == list(range(2, 41, 2))
    assert trial.points[0].loss == pytest.approx(2.4, abs=0.3)  # log 10, and not half of it
    assert trial.judged is not None
    assert len(trial.judged) == 32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 60}, "≥ 100, .* got 60"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "ReduceLROnPlateau goes by a metric"),
        ({"learning_rate": 0.0}, "must be > 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    used = trainer(tmp_path, **options)
    before = held(used)
    with pytest.raises(ConfigError, match=text):
        find_rate(used)
    assert_same(held(used), before)


def test_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a Trainer of transformers, got Net"):
        find_rate(Net())
    used = trainer(tmp_path, max_steps=2)
    used.train()
    with pytest.raises(ConfigError, match="taken 2 steps already"):
        find_rate(used)


def test_code_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    used = trainer(tmp_path, "own optimizer")
    compute_loss = used.compute_loss

    def fails(model: Any, inputs: Any, **kwargs: Any) -> Any:
        if used.model.seen == 20:
            raise KeyError("in the user's own code")
        return compute_loss(model, inputs, **kwargs)

    used.compute_loss = fails
    before = held(used)
    with pytest.raises(KeyError):
        find_rate(used)
    assert_same(held(used), before)
    assert not used.optimizer._optimizer_step_pre_hooks


class Penalised(Trainer):  # type: ignore[misc]
    """A trainer with a loss of its own, and a scheduler that it makes itself."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.01 * model.net[0].weight.square().sum()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = CosineAnnealingLR(self.optimizer, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def test_the_loss_and_the_schedule_are_those_of_the_trainer(tmp_path: Path) -> None:
    base = trainer(tmp_path)
    used = Penalised(base.model, base.args, train_dataset=base.train_dataset, eval_dataset={"a": base.eval_dataset})
    train = _Train(used)
    train.look()
    assert [s.rate for s in train.schedule] == pytest.approx(
        [1e-3 * (1 + np.cos(np.pi * i / STEPS)) / 2 for i in range(STEPS)]
    )
    used.optimizer = used.lr_scheduler = None
    penalty = 0.01 * float(base.model.net[0].weight.detach().square().sum())
    trial = Trial("pilot", train.schedule[:1], [1.0], False, lambda what, step: None)
    train.run(trial)
    assert trial.judged is not None
    assert 2.1 + penalty < trial.points[0].loss < 2.7 + penalty
    assert 2.1 + penalty < np.mean(trial.judged) < 2.7 + penalty
