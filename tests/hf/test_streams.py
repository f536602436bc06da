"""Random streams and iterators that a trainer or its model holds, wherever: training sees what it would have seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.hf.clients import Characters, arguments, outcome, train
from tests.hf.test_loss import MODES, OPTIONS, Small, run, steps

SHARED = torch.Generator()


@dataclass
class Noise:
    """An object of the user's that holds a stream, two levels down."""

    stream: Any

    def __post_init__(self) -> None:
        self.inner = {"all": [self.stream]}

    def draw(self) -> float:
        stream = self.inner["all"][0]
        if isinstance(stream, torch.Generator):
            return float(torch.rand(1, generator=stream))
        return float(next(stream)) if hasattr(stream, "__next__") else float(stream.random())


class OfTheClass:
    """A stream that all objects of a class share, drawn from in a method beside ``forward``."""

    stream = torch.Generator()

    def draw(self) -> float:
        return float(torch.rand(1, generator=self.stream)) + float(torch.rand(1, generator=SHARED))


STREAMS: dict[str, Callable[[], Any]] = {
    "torch": lambda: Noise(torch.Generator().manual_seed(1)),
    "numpy": lambda: Noise(np.random.default_rng(1)),
    "legacy numpy": lambda: Noise(np.random.RandomState(1)),
    "python": lambda: Noise(random.Random(1)),
    "count": lambda: Noise(itertools.count()),
    "class": OfTheClass,
}


class Noisy(Small):
    """Its loss is multiplied by what the stream gives."""

    def __init__(self, noise: Any) -> None:
        super().__init__()
        self.config_of_mine = {"noise": (noise,)}

    def loss(self, input_ids: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return super().loss(input_ids, labels, reduction) * (1 + 0.1 * self.config_of_mine["noise"][0].draw())


class NoisyTrainer(Trainer):
    """The same in ``compute_loss``."""

    def __init__(self, noise: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.noise = noise

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return self.scaled(super().compute_loss(model, inputs, **kwargs))

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * (1 + 0.1 * self.noise.draw())


def built(where: str, noise: Any, folder: Path) -> Trainer:
    OfTheClass.stream.manual_seed(1)
    SHARED.manual_seed(2)
    data, args = Characters(), arguments(folder)
    if where == "model":
        return Trainer(model=Noisy(noise), args=args, train_dataset=data)
    return NoisyTrainer(noise, model=Small(), args=args, train_dataset=data)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("where", "mode"), [("model", MODES[0]), ("model", MODES[1]), ("trainer", "set_trainer")])
def test_streams_go_on_as_if_nothing_had_happened(tmp_path: Path, where: str, mode: str, stream: str) -> None:
    without = outcome(train(lambda: built(where, STREAMS[stream](), tmp_path / "plain")))
    trainer, _ = run(lambda: built(where, STREAMS[stream](), tmp_path), GFSCallback(**OPTIONS), mode)
    assert_same(without, outcome(trainer))


@pytest.mark.parametrize(("where", "mode"), [("model", "set_trainer"), ("trainer", "set_trainer")])
def test_a_loader_that_cannot_be_put_back_is_left_alone(tmp_path: Path, where: str, mode: str) -> None:
    def loader() -> Noise:
        return Noise(iter(DataLoader([float(i) for i in range(50)], batch_size=1)))

    without = outcome(train(lambda: built(where, loader(), tmp_path / "plain")))
    trainer, told = run(lambda: built(where, loader(), tmp_path), GFSCallback(**OPTIONS), mode)
    assert_same(without, outcome(trainer))
    assert steps(trainer) == []
    assert any("takes from `" in text and "which cannot be put back: it was left alone" in text for text in told)
