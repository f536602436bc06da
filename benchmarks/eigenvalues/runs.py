"""The trainings along which eigenvalues are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, digits
from benchmarks.lib.models import Rows, dense, digits_cnn, seeded
from benchmarks.lib.trainings import Squared, draw
from benchmarks.lib.trainings import step as take_step

DISTANCES = (1, 5, 20, 50)  # steps between the states of a sequence
STATES = 8  # measured after the first one of each sequence


@dataclass
class Run:
    """A training run, and the probe that is measured."""

    name: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    examples: int
    batch: int
    probe: int
    first: int

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch."""
        return self.criterion(model(batch[0]), batch[1])

    def states(self) -> tuple[Batch, dict[int, dict[str, Tensor]]]:
        """The probe, and the weights at every step that is measured."""
        x, y = digits(self.examples, centre=0.0)
        wanted = {self.first + d * i for d in DISTANCES for i in range(STATES + 1)}
        order, states = torch.Generator().manual_seed(0), {}
        for step in range(max(wanted) + 1):
            if step in wanted:
                states[step] = copy.deepcopy(self.model.state_dict())
            take_step(self.optimizer, self.loss(self.model, draw((x, y), self.batch, order)))
        return (x[: self.probe], y[: self.probe]), states


def runs() -> Iterator[Run]:
    """Five trainings; the third has its two largest eigenvalues close together."""
    entropy, sgd = nn.CrossEntropyLoss(), torch.optim.SGD
    model = seeded(lambda: dense(64, 32, 10))
    yield Run("MLP, GD 0.5", model, entropy, sgd(model.parameters(), 0.5), 1500, 1500, 1500, 300)
    model = seeded(lambda: dense(64, 32, 10))
    yield Run("MLP, SGD 0.1", model, entropy, sgd(model.parameters(), 0.1), 1500, 64, 256, 300)
    model = seeded(lambda: dense(64, 32, 10))
    rate = sgd(model.parameters(), 0.2)
    yield Run("MLP, squared loss, GD 0.2, at the edge", model, Squared(), rate, 200, 200, 200, 700)
    model = seeded(digits_cnn)
    momentum = sgd(model.parameters(), 0.05, momentum=0.9)
    yield Run("CNN, SGD 0.05, momentum 0.9", model, entropy, momentum, 1500, 64, 256, 200)
    model = seeded(lambda: Rows("relu", places=True))
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    yield Run("transformer, Adam 1e-3", model, entropy, adam, 1500, 64, 256, 300)
