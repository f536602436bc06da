"""Which loss the callback measures: one that is given, and what is said where it cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import gfs_core as gfs
from hf_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.hf.clients import ALPHABET, Characters, arguments, outcome, train, train_and_hear

OPTIONS: dict[str, Any] = {
    "every": 2, "max_overhead": None, "tier": "sharpness", "running_every": None,
}  # fmt: skip
MODES = ("add_callback", "set_trainer")


class Small(nn.Module):
    """Predicts a character from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(len(ALPHABET), 4), nn.Dropout(0.1), nn.Linear(4, len(ALPHABET))

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": self.loss(input_ids, labels, "mean")}

    def loss(self, input_ids: Tensor, labels: Tensor, reduction: str) -> Tensor:
        logits = self.head(self.drop(self.embed(input_ids[:, :-1]))).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction=reduction)


class Shares(Small):
    """The loss of a micro-batch is its share of the mean over all items of the step."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return {"loss": self.loss(input_ids, labels, "sum") / kwargs["num_items_in_batch"]}


def run(
    make: Callable[[], Trainer], callback: GFSCallback, mode: str, tol: float = 0.5, max_hvps: int = 10
) -> tuple[Trainer, list[str]]:
    """The trained trainer and what was told."""
    tuned_callback(callback, tol=tol, max_hvps=max_hvps)
    return train_and_hear(make, callback.set_trainer if mode == "set_trainer" else lambda t: t.add_callback(callback))


def steps(trainer: Trainer) -> list[int]:
    return [row["step"] for row in trainer.state.log_history if "gfs/sharpness" in row]


def history(folder: Path) -> list[gfs.Measurement]:
    return gfs.read_history(folder / "history.jsonl")


def language(folder: Path, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    return kind(model=Small(), args=arguments(folder, **options), train_dataset=Characters())


class OwnStep(Trainer):
    """Never calls ``compute_loss``; takes its inputs apart; its loss has a term of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        labels = inputs.pop("labels")
        loss = penalised(model, {**inputs, "labels": labels})
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        inputs["input_ids"].zero_()
        return loss.detach() / self.current_gradient_accumulation_steps


def penalised(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)["loss"] + 0.01 * model.embed.weight.square().sum()


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)["loss"]


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_given_loss_is_measured_where_the_step_has_one_of_its_own(tmp_path: Path, pieces: int) -> None:
    options = {"gradient_accumulation_steps": pieces}
    without = outcome(train(lambda: language(tmp_path / "plain", OwnStep, **options)))
    trained: list[float] = []

    def make() -> Trainer:
        trainer = language(tmp_path / "measured", OwnStep, **options)
        step = trainer.training_step

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            trained.append(step(*args, **kwargs).item())
            return torch.tensor(trained[-1])

        trainer.training_step = recorded
        return trainer

    callback = GFSCallback(loss_fn=penalised, **OPTIONS)
    trainer, told = run(make, callback, "set_trainer")
    assert told == []
    assert_same(without, outcome(trainer))
    assert vars(trainer)["training_step"].__name__ == "recorded"  # what was there before is there again
    assert [m.step for m in history(tmp_path / "measured")] == steps(trainer) == [0, 2, 4]
    for m in history(tmp_path / "measured"):
        assert m.loss_probe == pytest.approx(sum(trained[m.step * pieces : (m.step + 1) * pieces]), rel=3e-7)


def test_the_early_warning_sees_the_losses_of_a_given_loss_that_is_the_trained_one(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}
    for loss_fn in (penalised, plain):
        held = seen[loss_fn.__name__] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                gfs.StabilityMonitor, "record_loss", lambda self, loss, examples, held=held: held.append(float(loss))
            )
            callback = GFSCallback(loss_fn=loss_fn, **OPTIONS)
            trainer, _ = run(
                lambda: language(tmp_path, OwnStep, gradient_accumulation_steps=3), callback, "set_trainer"
            )
    assert seen["plain"] == []
    assert len(seen["penalised"]) == 3 * trainer.state.max_steps
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    means = [sum(seen["penalised"][i : i + 6]) / 6 for i in range(0, 18, 6)]
    assert means == pytest.approx(logged, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_another_loss_than_the_trained_one_is_measured_and_told_once(tmp_path: Path, mode: str) -> None:
    without = outcome(train(lambda: language(tmp_path / "plain", OwnStep)))
    trainer, told = run(lambda: language(tmp_path, OwnStep), GFSCallback(loss_fn=plain, **OPTIONS), mode)
    [text] = told
    assert "`loss_fn` is not the loss that is trained here (gradients point apart, cosine 0.7" in text
    assert_same(without, outcome(trainer))
    assert steps(trainer) == [0, 2, 4]
    assert all(any("`loss_fn` is not the loss that is trained" in r for r in m.reasons) for m in history(tmp_path))


class ByPosition(Trainer):
    """Gives the model its inputs without their names."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("kind", [Trainer, ByPosition])
def test_add_callback_alone_gives_the_loss_what_the_model_gets(tmp_path: Path, kind: type[Trainer]) -> None:
    asked: list[set[str]] = []

    def loss_fn(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        asked.append(set(inputs))
        return plain(model, inputs)

    trainer, told = run(lambda: language(tmp_path, kind), GFSCallback(loss_fn=loss_fn, **OPTIONS), "add_callback")
    assert told == []
    assert steps(trainer) == [0, 2, 4]
    assert all(names == {"input_ids", "attention_mask", "labels"} for names in asked)


@pytest.mark.parametrize("mode", MODES)
def test_a_generator_that_the_given_loss_holds_is_put_back(tmp_path: Path, mode: str) -> None:
    stream = torch.Generator()

    def loss_fn(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return plain(model, inputs) * (1 + 0.0 * torch.rand((), generator=stream))

    stream.manual_seed(1)
    before = stream.get_state()
    trainer, told = run(lambda: language(tmp_path), GFSCallback(loss_fn=loss_fn, **OPTIONS), mode)
    assert told == []
    assert steps(trainer) == [0, 2, 4]
    assert torch.equal(stream.get_state(), before)


def test_a_resumed_run_knows_that_the_given_loss_is_another(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    run(lambda: language(tmp_path, **options), GFSCallback(loss_fn=penalised, **OPTIONS), "set_trainer")
    callback = GFSCallback(loss_fn=penalised, **OPTIONS)
    train(lambda: language(tmp_path, **options), callback.set_trainer, resume=str(tmp_path / "checkpoint-3"))
    assert [m.step for m in history(tmp_path)] == [0, 2, 4]
    assert all("`loss_fn` is not the loss that is trained" in m.reasons[-1] for m in history(tmp_path))


def test_a_wrong_loss_fn_is_named(tmp_path: Path) -> None:
    with pytest.raises(gfs.ConfigError, match="`loss_fn` must be a function of the model and its inputs, got 3"):
        GFSCallback(loss_fn=3)
    trainer, told = run(lambda: language(tmp_path), GFSCallback(loss_fn=lambda model: 0, **OPTIONS), "set_trainer")
    [text] = told
    assert "`loss_fn` could not be evaluated again (TypeError: " in text
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_calls_neither_is_told_with_the_way_out(tmp_path: Path, mode: str) -> None:
    class Aside(OwnStep):
        """Trains by functions of the model's parts."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = model.head(model.embed(inputs["input_ids"])).square().mean()
            self.accelerator.backward(loss)
            return loss.detach()

    trainer, [text] = run(lambda: language(tmp_path, Aside), GFSCallback(**OPTIONS), mode)
    assert trainer.state.global_step == 6
    if mode == "set_trainer":
        assert "`compute_loss` was not called during the step" in text
        assert "`GFSCallback(loss_fn=...)`" in text
        assert "training_step" not in vars(trainer)
    else:
        assert "no forward pass of the model was seen during the step" in text
        assert "use `GFSCallback(...).set_trainer(trainer)`" in text
    with pytest.raises(gfs.MeasurementError, match=r"`compute_loss` was not called|no forward pass"):
        run(lambda: language(tmp_path, Aside), GFSCallback(strict=True, **OPTIONS), mode)


class Failing(Trainer):
    """Its loss fails when it is evaluated beside training, ``times`` times."""

    times, error = 0, RuntimeError("busy")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if type(self).evaluated_beside_training() and Failing.times > 0:
            Failing.times -= 1
            if isinstance(Failing.error, float):
                return loss * Failing.error
            raise Failing.error
        return loss

    @staticmethod
    def evaluated_beside_training() -> bool:
        return Failing.beside

    beside = False

    def training_step(self, *args, **kwargs):
        Failing.beside = False
        try:
            return super().training_step(*args, **kwargs)
        finally:
            Failing.beside = True


@pytest.mark.parametrize("error", [RuntimeError("busy"), torch.OutOfMemoryError("none"), math.inf])
@pytest.mark.parametrize(("times", "measured"), [(1, [2, 4, 6]), (2, [4, 6]), (3, [])])
def test_a_loss_that_fails_for_a_while_is_tried_again(
    tmp_path: Path, error: Any, times: int, measured: list[int]
) -> None:
    Failing.times, Failing.error = times, error
    trainer, [text] = run(lambda: language(tmp_path, Failing, max_steps=8), GFSCallback(**OPTIONS), "set_trainer")
    assert "could not be evaluated again (" in text
    assert "It is tried at 3 due steps before nothing is measured any more" in text
    assert steps(trainer) == measured
    assert trainer.state.global_step == 8


class Careful(torch.optim.SGD):
    """Leaves out what is not finite in a gradient."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        super().step(closure)


def test_a_gradient_that_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    class Broken(Trainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 0:
                model.head.weight.grad[0, 0] = math.inf
            return loss

    def make() -> Trainer:
        model = Small()
        return Broken(
            model=model, args=arguments(tmp_path, max_grad_norm=0.0), train_dataset=Characters(),
            optimizers=(Careful(model.parameters(), 0.1), None),
        )  # fmt: skip

    trainer, told = run(make, GFSCallback(**OPTIONS), "set_trainer")
    assert "(the gradient of the training step is not finite)" in " ".join(told)
    assert steps(trainer) == [2, 4]


class InBackward(torch.optim.SGD):
    """Steps inside of the backward pass, as LOMO does, by hooks that torch calls before it accumulates, or after."""

    def __init__(self, model: nn.Module, lr: float, after: bool) -> None:
        super().__init__(model.parameters(), lr)
        for p in model.parameters():
            if after:
                p.register_post_accumulate_grad_hook(self.update)
            else:
                p.register_hook(self.update_all)

    def update(self, p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        p.grad = None

    def update_all(self, grad: Tensor) -> Tensor:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.update(p)
        return grad

    def step(self, closure: Any = None) -> None:
        pass


class Fused(Trainer):
    """The last gradient that came is used at the end of the backward pass."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.optimizer.optimizer.update_all(loss)
        return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", [True, False], ids=["after accumulation", "before"])
def test_steps_inside_of_the_backward_pass(tmp_path: Path, mode: str, after: bool) -> None:
    def make(folder: Path) -> Trainer:
        model = Small()
        optimizer = InBackward(model, 0.05, after)
        return Fused(
            model=model, args=arguments(folder, max_grad_norm=0.0), train_dataset=Characters(),
            optimizers=(optimizer, None),
        )  # fmt: skip

    without = outcome(train(lambda: make(tmp_path / "plain")))
    trainer, told = run(lambda: make(tmp_path), GFSCallback(**OPTIONS), mode)
    assert_same(without, outcome(trainer))
    assert any("no gradient is left when the optimizer is called" in text for text in told)
    assert all("measurement" in text or "no gradient is left" in text for text in told)
    if mode == "add_callback":  # the model's loss may be another than the trainer's
        assert steps(trainer) == []
        return
    assert steps(trainer) == [0, 2, 4]
    assert all("the values belong to the weights after the step" in m.reasons[-1] for m in history(tmp_path))


class SomeInBackward(torch.optim.SGD):
    """Steps one weight inside of the backward pass, and leaves the others to ``step``."""

    def __init__(self, model: nn.Module, lr: float, name: str) -> None:
        super().__init__(model.parameters(), lr)
        model.get_parameter(name).register_post_accumulate_grad_hook(self.update)

    def update(self, p: Tensor) -> None:
        p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        p.grad = None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [1e-6, 0.5])  # the gradient that is left is the trainer's, or is not
@pytest.mark.parametrize("name", ["embed.weight", "head.bias"])
def test_steps_of_some_weights_inside_of_the_backward_pass(tmp_path: Path, name: str, rate: float, mode: str) -> None:
    def make(folder: Path) -> Trainer:
        model = Small()
        return Trainer(
            model=model, args=arguments(folder, max_grad_norm=0.0), train_dataset=Characters(),
            optimizers=(SomeInBackward(model, rate, name), None),
        )  # fmt: skip

    without = outcome(train(lambda: make(tmp_path / "plain")))
    trainer, told = run(lambda: make(tmp_path), GFSCallback(**OPTIONS), mode)
    assert_same(without, outcome(trainer))
    assert any(f"no gradient is left for `{name}` when the optimizer is called" in text for text in told)
    assert steps(trainer) == ([] if mode == "add_callback" else [0, 2, 4])
    assert all("after the step, which some have taken" in m.reasons[-1] for m in history(tmp_path) if m.sharpness)


@pytest.mark.parametrize("mode", MODES)
def test_the_losses_of_the_rest_of_an_epoch(tmp_path: Path, mode: str) -> None:
    """8 batches in windows of 3: the last window has two, and each micro-batch's loss is its share of the window's."""
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gfs.StabilityMonitor, "record_loss", lambda self, loss, examples: seen.append(float(loss)))

        def make() -> Trainer:
            options = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 1}
            return Trainer(model=Shares(), args=arguments(tmp_path, **options), train_dataset=Characters(32))

        trainer, told = run(make, GFSCallback(**OPTIONS | {"every": 1}), mode)
    assert told == []
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(seen) == 8
    windows = [seen[:3], seen[3:6], seen[6:]]
    assert [sum(w) / len(w) for w in windows] == pytest.approx(logged, rel=1e-4)
    assert [m.loss_probe for m in history(tmp_path)] == pytest.approx(logged, rel=1e-4)
