"""How networks are trained: losses, optimizers, the order of the batches, and one training that several measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, digits, fashion_mnist, text
from benchmarks.lib.models import Characters, cnn, mlp

# --- losses ---------------------------------------------------------------------------------------------------------


def squared(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared distance of outputs (n, classes) to targets of that shape, mean over the batch."""
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()
    return loss


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of logits (…, classes) and classes (…)."""
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


class Entropy(nn.CrossEntropyLoss):
    """Mean over all that is classified: examples, or tokens."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Of logits (…, classes) and classes (…)."""
        return super().forward(output.flatten(0, -2), target.flatten())


class Squared(nn.Module):
    """Half the squared distance to the one-hot target, mean over the batch."""

    reduction = "mean"  # curvlinops asks for it

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Of outputs (n, classes) and classes (n,)."""
        return (output - nn.functional.one_hot(target, output.shape[1])).square().sum(1).mean() / 2


# --- steps ----------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with torch's defaults."""
    return torch.optim.AdamW(model.parameters(), rate)


def gradient(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """The gradient of this loss, and of nothing before it."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of this loss."""
    gradient(optimizer, loss)
    optimizer.step()


def epochs(data: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end: each epoch in a new order, what is left over at its end dropped."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.randperm(len(data[1]), generator=generator)
        rows, order = order[:size], order[size:]
        yield data[0][rows], data[1][rows]


def draw(data: Batch, size: int, generator: torch.Generator) -> Batch:
    """A batch of different examples, drawn anew from all the data."""
    rows = torch.randperm(len(data[1]), generator=generator)[:size]
    return data[0][rows], data[1][rows]


# --- one training ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training, and the data that the exact ratio is measured on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Batch
    batch: int
    schedule: bool
    squared: bool = False

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""
        if self.squared:
            return squared(self.model, (batch[0], nn.functional.one_hot(batch[1], 10)))
        return entropy(self.model, batch)

    def steps(self, count: int, seed: int) -> Iterator[tuple[int, Batch, Tensor]]:
        """Step, batch and loss of each step, its gradient computed; it is taken when the next one is asked for.

        A schedule warms up over an eighth of the steps and follows a cosine.
        """
        rates = [g["lr"] for g in self.optimizer.param_groups]
        batches = epochs(self.data, self.batch, torch.Generator().manual_seed(seed))
        for step in range(count):
            falling = 0.5 * (1 + math.cos(math.pi * step / count))
            factor = min(1.0, (step + 1) / (count / 8)) * falling if self.schedule else 1.0
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            batch = next(batches)
            loss = self.loss(batch)
            gradient(self.optimizer, loss)
            yield step, batch, loss
            self.optimizer.step()


def of(model: Callable[[], nn.Module], optimizer: Any, rate: float, data: Batch, batch: int, *more: bool) -> Run:
    """A run of a fresh model; ``more``: whether there is a schedule, and whether the loss is squared."""
    made = model()
    return Run(made, optimizer(made, rate), data, batch, *more)


def tanh() -> nn.Module:
    """The network for digits with tanh."""
    return mlp(nn.Tanh)


def relu() -> nn.Module:
    """The network for digits with ReLU."""
    return mlp(nn.ReLU)


def characters(schedule: bool) -> Run:
    """A transformer over characters with AdamW."""
    data, alphabet = text(400)
    return of(lambda: Characters(alphabet, 48), adamw, 3e-3, data, 32, schedule)


# The trainings that are measured in more than one benchmark.
RUNS: dict[str, Callable[[], Run]] = {
    "digits, MLP, momentum 0.1": lambda: of(tanh, sgd, 0.1, digits(1437), 256, True),
    "digits, MLP, AdamW 3e-3, constant rate": lambda: of(relu, adamw, 3e-3, digits(1437), 64, False),
    "Fashion-MNIST, CNN, momentum 0.03, constant rate": lambda: of(cnn, sgd, 0.03, fashion_mnist(2000), 256, False),
    "text, transformer, AdamW 3e-3": lambda: characters(True),
}
