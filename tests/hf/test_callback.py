"""Logging, checkpoints, options and what bad input gets."""

from __future__ import annotations

import dataclasses
import gc
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import gfs_core as gfs
from gfs_core.config import may_be_off
from hf_gfs import GFSArguments, GFSCallback
from tests.core.options import NOT_DEFAULT, tuned_callback
from tests.hf.clients import ALPHABET, Characters, arguments, gpt2, train, train_and_hear
from tests.log_keys import documented
from tests.wandb_files import logged


def language(folder: Path, **options: Any) -> Trainer:
    return Trainer(model=gpt2(dropout=0.0), args=arguments(folder, **options), train_dataset=Characters())


def every(n: int, **options: Any) -> GFSCallback:
    return GFSCallback(**({"every": n, "max_overhead": None, "tier": "sharpness", "running_every": None} | options))


def rows(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "gfs/sharpness" in row]


def attached(callback: GFSCallback, mode: str):
    return (lambda t: t.add_callback(callback)) if mode == "add_callback" else callback.set_trainer


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_tensorboard_has_the_values_beside_the_trainers_own(tmp_path: Path, mode: str) -> None:
    train(lambda: language(tmp_path / "plain", report_to=["tensorboard"]))
    trainer = train(lambda: language(tmp_path / "run", report_to=["tensorboard"]), attached(every(2), mode))

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        [run] = (folder / "runs").iterdir()
        events = EventAccumulator(str(run))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    with_callback, without = read(tmp_path / "run"), read(tmp_path / "plain")
    own = {tag: values for tag, values in with_callback.items() if not tag.startswith("gfs/")}
    assert own.keys() == without.keys()
    assert own["train/loss"] == without["train/loss"]
    assert [step for step, _ in own["train/loss"]] == [2, 4, 6]
    assert [step for step, _ in with_callback["gfs/sharpness"]] == [0, 2, 4]
    expected = [row["gfs/sharpness"] for row in rows(trainer)]
    assert [value for _, value in with_callback["gfs/sharpness"]] == pytest.approx(expected, rel=1e-6)
    assert documented(with_callback.keys() - own.keys()) <= gfs.log_keys().keys()
    assert [m.step for m in gfs.read_history(tmp_path / "run" / "history.jsonl")] == [0, 2, 4]


def test_wandb_gets_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.init(dir=tmp_path, mode="offline")  # transformers goes on with a run that is there
    trainer = train(lambda: language(tmp_path / "run", report_to=["wandb"]), lambda t: t.add_callback(every(2)))
    wandb.finish()
    written = [row for row in logged(tmp_path) if "gfs/sharpness" in row]
    assert [row["gfs/sharpness"] for row in written] == [row["gfs/sharpness"] for row in rows(trainer)]
    assert [row["train/global_step"] for row in written] == [0, 2, 4]


def test_a_target_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    class Reporting(Trainer):
        """As if this machine had the package that ``report_to`` names."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.args.report_to = ["clearml"]

    def make() -> Trainer:
        return Reporting(model=gpt2(), args=arguments(tmp_path), train_dataset=Characters())

    with pytest.warns(gfs.GFSWarning, match="`add_callback` alone cannot reach clearml; use `GFSCallback"):
        train(make, lambda t: t.add_callback(every(2)))


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


def test_other_callbacks_are_not_disturbed(tmp_path: Path) -> None:
    recorder = Recorder()
    train(lambda: language(tmp_path), lambda t: (t.add_callback(recorder), t.add_callback(every(1))))
    assert not [k for logs in recorder.seen for k in logs if k.startswith("gfs/")]
    assert sum("loss" in logs for logs in recorder.seen) == 3


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
@pytest.mark.parametrize("probe", ["batch", "fixed"])
def test_resumed_values_are_the_same_to_the_bit(tmp_path: Path, mode: str, probe: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}

    def callback() -> GFSCallback:
        return every(1, probe=probe, tier="gfs")

    def numbers(folder: str) -> list[gfs.Measurement]:
        found = gfs.read_history(tmp_path / folder / "history.jsonl")
        return [m.having(seconds=None, overhead=None) for m in found]

    train(lambda: language(tmp_path / "whole", **options), attached(callback(), mode))
    whole = numbers("whole")
    assert [m.step for m in whole] == list(range(6))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (tmp_path / "whole" / "history.jsonl").unlink()
    train(lambda: language(tmp_path / "whole", **options), attached(callback(), mode), resume=str(checkpoint))
    assert numbers("whole") == whole[3:]


def test_a_checkpoint_without_the_callbacks_state_starts_cold_and_says_so(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    train(lambda: language(tmp_path, **options))
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.warns(gfs.GFSWarning, match=r"no gfs_state.pt in the checkpoint of step 3; measuring starts cold"):
        trainer = train(
            lambda: language(tmp_path, **options), lambda t: t.add_callback(every(1)), resume=str(checkpoint)
        )
    assert [row["step"] for row in rows(trainer)] == [3, 4, 5]
    (checkpoint / "gfs_state.pt").write_bytes(b"not a state")
    with pytest.warns(gfs.GFSWarning, match=r"gfs_state.pt cannot be used \(.*; measuring starts cold"):
        train(lambda: language(tmp_path, **options), lambda t: t.add_callback(every(1)), resume=str(checkpoint))


def test_options_are_those_of_the_config() -> None:
    hints = get_type_hints(gfs.GFSConfig)
    fields = {f.name: f for f in dataclasses.fields(GFSArguments)}
    assert list(fields) == [f"gfs_{f.name}" for f in dataclasses.fields(gfs.GFSConfig)]
    for f in dataclasses.fields(gfs.GFSConfig):
        assert fields[f"gfs_{f.name}"].default == f.default
        if not may_be_off(hints[f.name]):  # those are read by a function that knows the words for off
            assert fields[f"gfs_{f.name}"].type == hints[f.name]
        assert fields[f"gfs_{f.name}"].metadata["help"] == gfs.GFSConfig.help()[f.name]
        assert gfs.GFSConfig.help()[f.name] in GFSCallback.__doc__


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_every_option_arrives_from_a_flag(name: str, tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, GFSArguments))
    flags = [f"--gfs_{name}", str(NOT_DEFAULT[name])]
    _, arguments = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])
    callback = GFSCallback(arguments.config())
    assert getattr(callback.config, name) == NOT_DEFAULT[name]
    assert callback.config != gfs.GFSConfig()


def test_help_and_wrong_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(GFSArguments)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    printed = "".join(capsys.readouterr().out.split())
    for name, text in gfs.GFSConfig.help().items():
        assert f"--gfs_{name}" in printed
        assert "".join(text.split()) in printed
    [arguments] = parser.parse_args_into_dataclasses(["--gfs_margin", "-1"])
    with pytest.raises(gfs.ConfigError, match=r"`margin` must be in \(0, 1\], the edge of stability; got -1"):
        arguments.config()


def test_wrong_options_are_named() -> None:
    with pytest.raises(gfs.ConfigError, match="unknown option `evry`"):
        GFSCallback(evry=3)
    with pytest.raises(gfs.ConfigError, match="either a config or options by name, not both \\(every\\)"):
        GFSCallback(gfs.GFSConfig(), every=3)
    with pytest.raises(gfs.ConfigError, match="must be a GFSConfig, got GFSArguments"):
        GFSCallback(GFSArguments())
    with pytest.raises(gfs.ConfigError, match="needs a transformers Trainer, got Linear"):
        GFSCallback().set_trainer(nn.Linear(1, 1))


def test_several_callbacks_at_once(tmp_path: Path) -> None:
    with pytest.warns(gfs.GFSWarning, match="a second GFSCallback on this trainer; it does nothing") as caught:
        trainer = train(lambda: language(tmp_path), lambda t: (t.add_callback(every(2)), every(1).set_trainer(t)))
    assert len([w for w in caught if w.category is gfs.GFSWarning]) == 1
    assert [row["step"] for row in rows(trainer)] == [0, 2, 4]


def test_a_trainer_that_is_never_trained(tmp_path: Path) -> None:
    callback = every(1)
    trainer = language(tmp_path)
    assert callback.set_trainer(trainer) is callback
    assert callback.set_trainer(trainer) is callback
    assert [c for c in trainer.callback_handler.callbacks if c is callback] == [callback]
    assert "compute_loss" not in vars(trainer)
    del trainer
    gc.collect()
    assert callback._trainer() is None


def test_trained_twice(tmp_path: Path) -> None:
    callback = every(2)
    trainer = train(lambda: language(tmp_path), callback.set_trainer)
    trainer.train()
    assert [row["step"] for row in rows(trainer)] == [0, 2, 4]
    assert "compute_loss" not in vars(trainer)
    parts = gfs.history_parts(tmp_path / "history.jsonl")
    assert [[m.step for m in part.measurements] for part in parts] == [[0, 2, 4], [0, 2, 4]]
    assert parts[0].measurements != parts[1].measurements  # the second goes on from the first's weights


class NoLoss(nn.Module):
    """Gives logits; the trainer makes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(len(ALPHABET), 8), nn.Linear(8, len(ALPHABET))

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.head(self.embed(input_ids))}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs)["logits"]
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), inputs["labels"].reshape(-1))


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_a_model_without_a_loss(tmp_path: Path, mode: str) -> None:
    def make() -> Trainer:
        return OwnLoss(model=NoLoss(), args=arguments(tmp_path), train_dataset=Characters())

    trainer, told = train_and_hear(make, attached(every(2), mode))
    assert trainer.state.global_step == 6
    if mode == "add_callback":
        assert len(told) == 1
        assert "the model returns no loss" in told[0]
        assert rows(trainer) == []
        with pytest.raises(gfs.MeasurementError, match="the model returns no loss"):
            train(make, attached(every(2, strict=True), mode))
    else:
        assert [row["step"] for row in rows(trainer)] == [0, 2, 4]


def test_a_data_set_without_labels_is_the_trainers_error(tmp_path: Path) -> None:
    def make() -> Trainer:
        return Trainer(model=gpt2(), args=arguments(tmp_path), train_dataset=Characters(labels=None))

    with pytest.raises(ValueError, match="did not return a loss from the inputs"):
        train(make, lambda t: t.add_callback(every(1)))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Broken(OwnLoss):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.inf if self.state.global_step == 2 else loss

    def make() -> Trainer:
        return Broken(model=NoLoss(), args=arguments(tmp_path), train_dataset=Characters())

    with pytest.warns(gfs.GFSWarning, match="not finite") as caught:
        trainer = train(make, every(2).set_trainer)
    assert len([w for w in caught if w.category is gfs.GFSWarning]) == 1
    assert trainer.state.global_step == 6
    assert [row["step"] for row in rows(trainer)][:1] == [0]


def test_a_frozen_model_is_told_once_and_trains(tmp_path: Path) -> None:
    def make() -> Trainer:
        model = gpt2().requires_grad_(False)
        model.lm_head.bias = nn.Parameter(torch.zeros(len(ALPHABET)))  # trained by nobody, so that there is a graph
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1), requires_grad=False)], 0.1)
        return Trainer(
            model=model, args=arguments(tmp_path), train_dataset=Characters(), optimizers=(optimizer, None)
        )  # fmt: skip

    with pytest.warns(gfs.GFSWarning, match=r"no parameter with `requires_grad=True`.*nothing is measured in this run"):
        trainer = train(make, lambda t: t.add_callback(every(1)))
    assert trainer.state.global_step == 6
    with pytest.raises(gfs.MeasurementError, match="no parameter with `requires_grad=True`"):
        train(make, lambda t: t.add_callback(every(1, strict=True)))


class Wrapped(Trainer):
    """Hands its callbacks a model class of its own, as SetFit's trainer does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        handler = self.callback_handler
        call = type(handler).call_event

        class Body:
            model_body = self.model

        def other(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            held, handler.model = handler.model, Body()
            try:
                return call(handler, event, args, state, control, **kwargs)
            finally:
                handler.model = held

        handler.call_event = other


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_a_model_that_is_no_module(tmp_path: Path, mode: str) -> None:
    def make() -> Trainer:
        return Wrapped(model=gpt2(), args=arguments(tmp_path), train_dataset=Characters())

    trainer, told = train_and_hear(make, attached(every(2), mode))
    assert trainer.state.global_step == 6
    if mode == "add_callback":
        assert len(told) == 1
        assert "the model is no torch.nn.Module, but" in told[0]
        assert rows(trainer) == []
    else:
        assert told == []
        assert [row["step"] for row in rows(trainer)] == [0, 2, 4]


def test_part_of_a_batch(tmp_path: Path) -> None:
    trainer = train(lambda: language(tmp_path), every(2, probe_size=2).set_trainer)
    assert [row["step"] for row in rows(trainer)] == [0, 2, 4]


def test_differences_of_gradients_agree_with_exact_products(tmp_path: Path) -> None:
    found = {}
    for hvp in ("exact", "gradients"):
        trainer = train(lambda: language(tmp_path), tuned_callback(every(2, hvp=hvp), tol=1e-3).set_trainer)
        found[hvp] = [row["gfs/sharpness"] for row in rows(trainer)]
    assert found["gradients"] == pytest.approx(found["exact"], rel=2e-3)


class Sums(nn.Module):
    """The mean embedding of a text, its class and the loss."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(len(ALPHABET), 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        logits = self.out(torch.tanh(self.embed(input_ids)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithoutGradientNorm(Trainer):
    """The Trainer's own takes the norm of the gradient at each step, which torch has not for sparse ones."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_sparse_gradients_are_measured_as_dense_ones(tmp_path: Path, mode: str) -> None:
    seen, weights = [], []
    for sparse in (True, False):
        args = arguments(tmp_path / f"{sparse}", optim="sgd", max_grad_norm=0.0, learning_rate=0.3)
        trainer = train(
            lambda s=sparse, a=args: WithoutGradientNorm(
                model=Sums(s), args=a, train_dataset=Characters(labels="class")
            ),
            attached(tuned_callback(every(2), tol=1e-4), mode),
        )
        seen.append([(row["gfs/sharpness"], row["gfs/stability_ratio"]) for row in rows(trainer)])
        weights.append(trainer.model.embed.weight.detach().clone())
    assert len(seen[0]) == 3
    assert [v for row in seen[0] for v in row] == pytest.approx([v for row in seen[1] for v in row], rel=1e-3)
    assert torch.allclose(*weights, rtol=0, atol=1e-5)
