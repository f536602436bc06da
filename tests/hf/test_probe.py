"""A fixed probe: its micro-batches are measured with all that belonged to them in their own step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

import gfs_core as gfs
from hf_gfs import GFSCallback
from tests.core.reference import dense_hessian
from tests.hf.clients import Characters, arguments
from tests.hf.test_loss import MODES, Shares, Small, run

OPTIONS: dict[str, Any] = {
    "every": 1, "max_overhead": None, "tier": "sharpness", "running_every": None, "probe": "fixed"
}  # fmt: skip


def recorded(model: Small) -> Small:
    """Keeps what its first forward passes get, and the random state that they begin with."""
    model.first = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(model.first) < 2:
            model.first.append((torch.get_rng_state(), copy.deepcopy(kwargs)))

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return model


class Weights(TrainerCallback):
    """Keeps the weights before each step."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append({k: v.clone() for k, v in kwargs["model"].state_dict().items()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Small, Shares])
def test_the_value_is_that_of_the_loss_evaluated_by_hand(tmp_path: Path, kind: type[Small], mode: str) -> None:
    """Two micro-batches with dropout and unequal numbers of items, in one step."""
    weights = Weights()

    def make() -> Trainer:
        options = {"gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 0.1}
        return Trainer(
            model=recorded(kind()), args=arguments(tmp_path, **options), train_dataset=Characters(), callbacks=[weights]
        )

    trainer, _ = run(make, GFSCallback(probe_size=8, **OPTIONS), mode, tol=1e-3, max_hvps=100)
    found = [m for m in gfs.read_history(tmp_path / "history.jsonl") if m.sharpness is not None]
    assert [m.step for m in found] == [0, 1, 2, 3]
    model = trainer.model
    for measurement in found:
        model.load_state_dict(weights.before[measurement.step])
        model.train()

        def loss() -> Tensor:
            total = torch.zeros(())
            for random, inputs in model.first:
                torch.set_rng_state(random)
                part = model(**inputs)["loss"]
                total = total + (part if kind is Shares else part / 2)
            return total

        truth = torch.linalg.eigvalsh(dense_hessian(loss, list(model.parameters())))[-1].item()
        assert measurement.loss_probe == pytest.approx(loss().item(), rel=1e-6)
        assert measurement.sharpness == pytest.approx(truth, rel=3e-3)
