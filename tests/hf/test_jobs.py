"""Ways to train with the Trainer beside those of `test_clients`: other optimizers, adapters, restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import gfs_core as gfs
from hf_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.hf.clients import Characters, adapted, arguments, bert, gpt2, outcome, train, train_and_hear

MODES = ["add_callback", "set_trainer"]
OPTIONS: dict[str, Any] = {"every": 2, "running_every": 2, "max_overhead": None, "tier": "sharpness"}


def attached(mode: str, max_hvps: int = 60, **how: Any) -> Callable[[Trainer], None]:
    def attach(trainer: Trainer) -> None:
        callback = tuned_callback(GFSCallback(**OPTIONS), max_hvps=max_hvps, **how)
        if mode == "add_callback":
            trainer.add_callback(callback)
        else:
            callback.set_trainer(trainer)

    return attach


def sharpness(trainer: Trainer) -> dict[int, float]:
    return {row["step"]: row["gfs/sharpness"] for row in trainer.state.log_history if "gfs/sharpness" in row}


def reasons(trainer: Trainer) -> list[str]:
    return [r for m in gfs.read_history(Path(trainer.args.output_dir) / "history.jsonl") for r in m.reasons]


def language(folder: Path, model: Callable[[], Any] = gpt2, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    return kind(model=model(), args=arguments(folder, **options), train_dataset=Characters())


@pytest.mark.parametrize("optim", ["adafactor", "schedule_free_adamw"])
def test_an_optimizer_of_unknown_threshold_has_the_exact_sharpness(optim: str, tmp_path: Path) -> None:
    if optim == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    exact: list[float] = []

    class Solved(Trainer):
        """Finds the largest eigenvalue at step 4 by 300 iterations of its own."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 4 and model.training and not exact:
                params = [p for p in model.parameters() if p.requires_grad]
                slope = torch.autograd.grad(loss, params, create_graph=True)
                v = [torch.randn_like(p) for p in params]
                for _ in range(300):
                    length = torch.cat([x.reshape(-1) for x in v]).norm()
                    v = [x / length for x in v]
                    product = torch.autograd.grad(slope, params, v, retain_graph=True)
                    value = float(sum((x * y).sum() for x, y in zip(v, product, strict=True)))
                    v = [y + 5.0 * x for x, y in zip(v, product, strict=True)]  # none below −5
                exact.append(value)
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss

    def quiet() -> Any:
        return gpt2(dropout=0.0)

    train(lambda: language(tmp_path / "exact", quiet, Solved, optim=optim, lr_scheduler_type="constant"))
    make = lambda: language(tmp_path / "gfs", quiet, optim=optim, lr_scheduler_type="constant")  # noqa: E731
    trainer, _ = train_and_hear(make, attached("add_callback", tol=1e-3, max_hvps=200))
    assert sharpness(trainer)[4] == pytest.approx(exact[0], rel=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_layerwise_steps_are_told_by_their_cause(mode: str, tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        model = bert()
        each = {p: torch.optim.AdamW([p], 1e-2) for p in model.parameters()}

        def step(param: torch.Tensor) -> None:
            each[param].step()
            each[param].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        optimizer = LayerWiseDummyOptimizer(optimizer_dict=each)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        args, table = arguments(tmp_path / folder, max_grad_norm=0.0), Characters(labels="class")
        return Trainer(model=model, args=args, train_dataset=table, optimizers=(optimizer, scheduler))

    plain = outcome(train(lambda: make("plain")))
    trainer, [text] = train_and_hear(lambda: make("gfs"), attached(mode))
    assert_same(plain, outcome(trainer))
    assert "transformers.trainer_pt_utils.LayerWiseDummyOptimizer is layer-wise" in text
    assert text.endswith("Choose an optimizer that is not layer-wise; nothing is measured in this run")


def test_what_holds_gradients_back_is_not_advised_what_it_refuses(tmp_path: Path) -> None:
    """DoRA takes the norms of its weights for constants: its curvature is not symmetric."""
    pytest.importorskip("peft")
    make = lambda folder: language(tmp_path / folder, lambda: adapted(gpt2(), use_dora=True), max_steps=8)  # noqa: E731
    plain = outcome(train(lambda: make("plain")))
    trainer, told = train_and_hear(lambda: make("gfs"), attached("set_trainer"))
    assert_same(plain, outcome(trainer))
    [text] = told
    assert "the curvature is not symmetric" in text
    assert any("no eigenvalue of a curvature that is not symmetric was found" in r for r in reasons(trainer))
    assert not any("hvp='exact'" in text for text in [*told, *reasons(trainer)])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_size_that_is_found_by_trying_starts_anew(mode: str, tmp_path: Path) -> None:
    class Narrow(Trainer):
        """Has no room for four examples at the fourth step."""

        steps = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) > 2:
                self.steps += 1
                if self.steps == 4:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(model, inputs, *args, **kwargs)

    def make(folder: str) -> Trainer:
        return language(tmp_path / folder, kind=Narrow, auto_find_batch_size=True)

    plain = outcome(train(lambda: make("plain")))
    trainer, told = train_and_hear(lambda: make("gfs"), attached(mode))
    assert trainer._train_batch_size < 4
    assert told == []
    assert_same(plain, outcome(trainer))
    parts = gfs.history_parts(tmp_path / "gfs" / "history.jsonl")
    assert [[m.step for m in part.measurements if m.sharpness is not None] for part in parts] == [[0, 2], [0, 2, 4]]
    assert "compute_loss" not in vars(trainer)
    assert not trainer.model._forward_pre_hooks
