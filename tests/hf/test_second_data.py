"""A second data set under the Trainer: text that is not trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, default_data_collator

import gfs_core as gfs
from hf_gfs import GFSArguments, GFSCallback
from tests.bitwise import assert_same
from tests.hf.clients import Characters, arguments, outcome, train
from tests.hf.test_loss import MODES, OPTIONS, OwnStep, Small, penalised, run
from tests.hf.test_probe import Weights

A = Subset(Characters(96), range(48, 96))


GIVEN = ("compute_loss_func", "callbacks", "train_dataset")


class Logits(Small):
    """Leaves its loss to the trainer, where that keeps the labels for itself."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.drop(self.embed(input_ids[:, :-1])))
        return {"logits": logits} if labels is None else super().forward(input_ids, attention_mask, labels)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(A, 16, collate_fn=default_data_collator, **options)  # type: ignore[arg-type]


def trainer(folder: Path, kind: type[Trainer] = Trainer, dropout: float = 0.0, **options: Any) -> Trainer:
    given = {name: options.pop(name) for name in GIVEN if name in options}
    given = {"train_dataset": Subset(Characters(96), range(48))} | given
    model = Logits()
    model.drop.p = dropout
    return kind(
        model=model,
        args=arguments(folder, **{"max_steps": 6, "learning_rate": 0.1} | options),
        **given,
    )


def per_item(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss function that needs the number of items; twice the mean."""
    logits = outputs["logits"].flatten(0, 1)
    return 2 * nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def of_the_model(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def by_items(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return per_item(model(batch["input_ids"]), batch["labels"], (batch["labels"] != -100).sum())


WAYS: dict[str, tuple[str, dict[str, Any], Callable[..., Any] | None, Callable[..., Tensor]]] = {
    "the model's loss": ("add_callback", {}, None, of_the_model),
    "the trainer's loss": ("set_trainer", {"gradient_accumulation_steps": 2}, None, of_the_model),
    "a loss function of the trainer's": ("set_trainer", {"compute_loss_func": per_item}, None, by_items),
    "a given loss": ("set_trainer", {"kind": OwnStep}, penalised, penalised),
    "a given loss of the model's inputs": ("add_callback", {}, penalised, penalised),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_value_is_the_sharpness_of_the_second_data_set(tmp_path: Path, way: str) -> None:
    mode, options, given, loss = WAYS[way]
    weights = Weights()
    callback = GFSCallback(probe=loader(), probe_size=20, loss_fn=given, **OPTIONS)
    own, _ = run(lambda: trainer(tmp_path, callbacks=[weights], **options), callback, mode, tol=1e-4, max_hvps=500)
    found = [m for m in gfs.read_history(tmp_path / "history.jsonl") if m.sharpness is not None]
    assert [m.step for m in found] == [0, 2, 4]
    first, second = list(loader())[:2]
    batches = [first, {k: v[:4] for k, v in second.items()}]  # 20 examples
    own.model.train()
    for m in found:
        own.model.load_state_dict(weights.before[m.step])
        truth = gfs.sharpness(own.model, loss, batches, tol=1e-4, max_hvps=500)
        assert m.sharpness == pytest.approx(truth.value, rel=2e-3)
        assert m.loss_probe == pytest.approx(sum(loss(own.model, b).item() for b in batches) / 2, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_to_the_bit(tmp_path: Path, mode: str) -> None:
    without = outcome(train(lambda: trainer(tmp_path / "without", dropout=0.1)))
    mine = loader(shuffle=True, num_workers=1, persistent_workers=True)
    callback = GFSCallback(probe=mine, **OPTIONS | {"tier": "gfs", "running_every": 1})
    own, told = run(lambda: trainer(tmp_path / "with", dropout=0.1), callback, mode)
    assert told == []
    assert_same(outcome(own), without)
    assert mine._iterator is None  # type: ignore[attr-defined]
    assert [m.step for m in gfs.read_history(tmp_path / "with" / "history.jsonl") if m.sharpness] == [0, 2, 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("probe", "text"),
    [
        ([(torch.zeros(2, 3), torch.zeros(2))], "is a tuple, and the model takes its inputs by name"),
        ([{"pixels": torch.zeros(2, 3)}], "the loss failed on a batch from the loader of `probe=`: TypeError"),
        ([], "the loader of `probe=` is empty"),
    ],
)
def test_batches_that_the_model_cannot_take_are_told_of(tmp_path: Path, probe: Any, text: str, mode: str) -> None:
    without = outcome(train(lambda: trainer(tmp_path / "without")))
    own, told = run(lambda: trainer(tmp_path / "with"), GFSCallback(probe=probe, **OPTIONS), mode)
    assert [text in t for t in told] == [True]
    assert_same(outcome(own), without)


class Stream(IterableDataset):
    """Goes on where the last pass has stopped."""

    def __init__(self) -> None:
        self.rows = iter(Characters(96))  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def test_a_stream_that_training_takes_from_is_left_alone(tmp_path: Path) -> None:
    stream = Stream()
    mine = DataLoader(stream, 16, collate_fn=default_data_collator)
    without = outcome(train(lambda: trainer(tmp_path / "without", train_dataset=Stream())))
    make = functools.partial(trainer, tmp_path / "with", train_dataset=stream)
    own, told = run(make, GFSCallback(probe=mine, **OPTIONS), "add_callback")
    assert ["is the one that training takes its batches from" in t for t in told] == [True]
    assert_same(outcome(own), without)


def test_the_options_of_the_command_line_go_with_a_loader(tmp_path: Path) -> None:
    config = GFSArguments(gfs_tier="sharpness", gfs_every=2, gfs_max_overhead=None, gfs_running_every=None).config()
    run(lambda: trainer(tmp_path), GFSCallback(config, probe=loader()), "add_callback")
    [part] = gfs.history_parts(tmp_path / "history.jsonl")
    assert part.settings["probe"] == "loader"
    with pytest.raises(gfs.ConfigError, match=r"not both \(probe\)"):
        GFSCallback(config, probe="fixed")


def test_a_resumed_training_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    def make(steps: int) -> Trainer:
        return trainer(tmp_path, max_steps=steps, save_strategy="steps", save_steps=3, num_train_epochs=9)

    kept: list[Any] = []

    class Kept(GFSCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            assert self.monitor is not None
            kept.append(self.monitor.measuring.probe.second.batches)  # type: ignore[union-attr]
            super().on_train_end(*args, **kwargs)

    for steps, resume in ((3, None), (6, True)):
        own = make(steps)
        own.add_callback(Kept(probe=loader(shuffle=True), **OPTIONS))
        torch.manual_seed(steps)  # a shuffling loader would draw other examples
        own.train(resume_from_checkpoint=resume)
    assert_same(*kept)
