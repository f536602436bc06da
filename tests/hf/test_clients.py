"""Real trainers, each trained with and without the callback."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import Trainer

import gfs_core as gfs
from hf_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.hf.clients import (
    Characters,
    adapted,
    arguments,
    bert,
    cross_encoder_trainer,
    dpo_trainer,
    gpt2,
    grpo_trainer,
    kto_trainer,
    outcome,
    reward_trainer,
    sentence_trainer,
    sft_trainer,
    sparse_encoder_trainer,
    train,
)

os.environ["HF_HUB_OFFLINE"] = "1"


class Penalty(Trainer):
    """A loss with a term of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.01 * model.transformer.wte.weight.square().sum()


class Doubled(Trainer):
    """Points where the plain loss points, and is twice as long."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    flat = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    summed = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    return summed / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def language(
    folder: Path,
    attention: str = "eager",
    kind: type[Trainer] = Trainer,
    loss: Any = None,
    lora: bool = False,
    **options: Any,
):
    extra = {} if loss is None else {"compute_loss_func": loss}
    model: Any = gpt2(
        attention, dropout=0.0 if attention == "sdpa" else 0.1
    )  # with dropout CPUs have no fused attention
    if lora:
        model = adapted(model)
    return kind(model=model, args=arguments(folder, **STEPS, **options), train_dataset=Characters(), **extra)


def classifier(folder: Path, **options: Any) -> Trainer:
    return Trainer(model=bert(), args=arguments(folder, **STEPS, **options), train_dataset=Characters(labels="class"))


STEPS = {"max_steps": 4}  # two that measure, and one after each
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NOT_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

# name: the trainer, its options, what add_callback alone does (works, or the words it refuses with), and what a
# measurement says about its products
CASES: dict[str, tuple[Callable[..., Trainer], dict[str, Any], str, str]] = {
    "GPT-2": (language, {}, "works", ""),
    "GPT-2, accumulation": (language, {"gradient_accumulation_steps": 3}, "works", ""),
    "GPT-2, bf16 autocast": (language, {"bf16": True}, "works", ""),
    "GPT-2, SDPA attention": (language, {"attention": "sdpa"}, "works", ""),
    "GPT-2, checkpointing": (language, NOT_REENTRANT, "works", ""),
    "GPT-2, re-entrant checkpointing": (language, REENTRANT, "works", "differences of gradients"),
    "GPT-2, torch_compile": (
        language,
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "works",
        "",
    ),
    "GPT-2, clipped hard": (language, {"max_grad_norm": 0.1}, "works", ""),
    "GPT-2, loader workers": (language, {"dataloader_num_workers": 2}, "works", ""),
    "GPT-2, sorted by length": (language, {"train_sampling_strategy": "group_by_length"}, "works", ""),
    "GPT-2, noise on the embeddings": (language, {"neftune_noise_alpha": 5.0}, "works", ""),
    "GPT-2, PEFT LoRA, checkpointing": (language, {"lora": True, **NOT_REENTRANT}, "works", ""),
    "GPT-2, label smoothing": (language, {"label_smoothing_factor": 0.1}, "returns no loss", ""),
    "GPT-2, compute_loss_func": (language, {"loss": own_loss}, "returns no loss", ""),
    "GPT-2, overridden compute_loss": (language, {"kind": Penalty}, "gradients point apart", ""),
    "GPT-2, scaled compute_loss": (language, {"kind": Doubled}, "its gradient is 0.5 times as long", ""),
    "BERT classifier": (classifier, {}, "works", ""),
    "BERT, accumulation": (classifier, {"gradient_accumulation_steps": 2}, "works", ""),
    "TRL SFTTrainer": (sft_trainer, {}, "could not be evaluated again", "differences of gradients"),
    "TRL SFTTrainer, accumulation": (
        sft_trainer,
        {"gradient_accumulation_steps": 2},
        "could not be evaluated again",
        "differences of gradients",
    ),
    "TRL SFTTrainer with PEFT LoRA": (
        sft_trainer,
        {"lora": True},
        "could not be evaluated again",
        "differences of gradients",
    ),
    "TRL DPOTrainer": (dpo_trainer, {}, "could not be evaluated again", "differences of gradients"),
    "TRL DPOTrainer, accumulation": (
        dpo_trainer,
        {"gradient_accumulation_steps": 2},
        "could not be evaluated again",
        "differences of gradients",
    ),
    "TRL RewardTrainer": (reward_trainer, {}, "returns no loss", ""),
    "TRL KTOTrainer": (kto_trainer, {}, "could not be evaluated again", "differences of gradients"),
    "TRL GRPOTrainer": (grpo_trainer, {}, "could not be evaluated again", "differences of gradients"),
    "SentenceTransformerTrainer": (sentence_trainer, {}, "returns no loss", ""),
    "CrossEncoderTrainer": (cross_encoder_trainer, {}, "returns no loss", ""),
    "SparseEncoderTrainer": (sparse_encoder_trainer, {}, "returns no loss", ""),
}
_plain: dict[str, dict[str, Any]] = {}


def run(name: str, folder: Path, mode: str) -> tuple[Trainer, list[str], list[float], list[float]]:
    """The trained trainer, what it was told, the losses that it differentiated, and those that the monitor saw."""
    make, options, _, _ = CASES[name]
    large = make is sentence_trainer
    callback = GFSCallback(
        every=2,
        running_every=2,
        max_overhead=None,
        tier="sharpness" if large else "gfs",
    )
    tuned_callback(callback, max_hvps=30 if large else 100, tol=0.05)
    true: list[float] = []

    def attach(trainer: Trainer) -> None:
        backward = trainer.accelerator.backward

        def recorded(loss: torch.Tensor, **kwargs: Any) -> None:
            true.append(loss.item())
            backward(loss, **kwargs)

        trainer.accelerator.backward = recorded
        if mode == "add_callback":
            trainer.add_callback(callback)
        elif mode == "set_trainer":
            callback.set_trainer(trainer)

    seen: list[float] = []
    record_loss = gfs.StabilityMonitor.record_loss

    def recorded(monitor: gfs.StabilityMonitor, loss: torch.Tensor, examples: int | None) -> None:
        seen.append(loss.item())
        record_loss(monitor, loss, examples)

    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.object(gfs.StabilityMonitor, "record_loss", recorded),
    ):
        warnings.simplefilter("always")
        trainer = train(lambda: make(folder, **options), attach)
    told = [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]
    return trainer, told, true, seen


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
@pytest.mark.parametrize("name", CASES)
def test_training_is_bitwise_the_same_and_the_loss_is_the_trainers(name: str, mode: str, tmp_path: Path) -> None:
    if name not in _plain:
        _plain[name] = outcome(run(name, tmp_path / "plain", "without")[0])
    trainer, told, true, seen = run(name, tmp_path / "measured", mode)
    assert_same(_plain[name], outcome(trainer))
    assert "compute_loss" not in vars(trainer)
    assert not trainer.model._forward_pre_hooks
    assert not trainer.model._forward_hooks
    rows = [row for row in trainer.state.log_history if "gfs/sharpness" in row]
    expected, products = CASES[name][2:]
    if mode == "add_callback" and expected != "works":
        assert rows == []
        [text] = told
        assert expected in text
        assert "use `GFSCallback(...).set_trainer(trainer)`" in text
        return
    assert [row["step"] for row in rows] == list(range(0, trainer.state.max_steps, 2))
    pieces = trainer.args.gradient_accumulation_steps
    assert seen == pytest.approx([pieces * share for share in true], rel=1e-6)
    for row in rows:
        share = true[row["step"] * pieces : (row["step"] + 1) * pieces]
        if pieces == 1:
            assert row["gfs/loss_probe"] == share[0]  # to the last bit
        else:
            assert row["gfs/loss_probe"] == pytest.approx(sum(share), rel=3e-7)
    history = gfs.read_history(Path(trainer.args.output_dir) / "history.jsonl")
    assert [m.sharpness for m in history] == [row["gfs/sharpness"] for row in rows]
    assert any(products in reason for m in history for reason in m.reasons) or not products
