"""What is trained: a problem with an optimizer and a batch size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, split, text
from benchmarks.lib.models import Characters, cnn, dense, digits_cnn
from benchmarks.lib.trainings import entropy, squared
from benchmarks.rate import Data, Workload, alphabet, bn_cnn, digits_data, fashion_data, slopes_data, text_data
from benchmarks.zoo.parts import Recurrent

BETA = 0.9  # of momentum and of Adam's mean gradient
REFERENCE_STEPS = 400
USERS, ITEMS, RANK = 200, 150, 8


@functools.cache
def short_text() -> Data:
    """Rows of 12 characters."""
    return split(text(6000, 12)[0], 600)


class Factors(nn.Module):
    """A matrix as the product of two thin ones: rows and columns are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(USERS, RANK), nn.Embedding(ITEMS, RANK)
        for factor in (self.rows, self.columns):
            nn.init.normal_(factor.weight, std=0.3)

    def forward(self, places: Tensor) -> Tensor:
        """Entries (n, 1) of the matrix at these places (n, 2)."""
        return (self.rows(places[:, 0]) * self.columns(places[:, 1])).sum(1, keepdim=True)


@functools.cache
def matrix_data() -> Data:
    """Noisy entries of a matrix of rank 4, a third of it."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(USERS, 4, generator=generator), torch.randn(ITEMS, 4, generator=generator)
    at = torch.randperm(USERS * ITEMS, generator=generator)[:10_000]
    places = torch.stack([at // ITEMS, at % ITEMS], 1)
    noise = 0.3 * torch.randn(len(at), 1, generator=generator)
    return split((places, (left @ right.T / 2)[places[:, 0], places[:, 1]].unsqueeze(1) + noise), 2000)


def one_hot(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared distance to the one-hot label."""
    return squared(model, (batch[0], nn.functional.one_hot(batch[1], 10).float()))


class Problem(NamedTuple):
    """Data, a network, and a loss.

    Attributes:
        data: gives training and validation data.
        model: makes the network.
        loss: of a batch.
        sample: examples of the training data that the curvature is solved on.
        rates: by optimizer, the base rates: a guess at a good one, in whose hundredth a ramp begins.
    """

    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    sample: int
    rates: dict[str, float]


class Kind(NamedTuple):
    """An optimizer.

    Attributes:
        make: of a network and a rate.
        edge: its threshold for the (preconditioned) sharpness times the rate, as the stability ratio has it.
        beta: of its momentum.
    """

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    edge: float
    beta: float


def _torch(kind: type[torch.optim.Optimizer], model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return kind(model.parameters(), lr=rate)  # type: ignore[call-arg]


KINDS = {
    "SGD": Kind(partial(_torch, torch.optim.SGD), 2.0, 0.0),
    "momentum": Kind(lambda m, rate: torch.optim.SGD(m.parameters(), rate, momentum=BETA), 2 + 2 * BETA, BETA),
    "Adam": Kind(partial(_torch, torch.optim.Adam), (2 + 2 * BETA) / (1 - BETA), BETA),
    "AdamW": Kind(partial(_torch, torch.optim.AdamW), (2 + 2 * BETA) / (1 - BETA), BETA),
    "RMSprop": Kind(partial(_torch, torch.optim.RMSprop), 2.0, 0.0),
}
_USUAL = {"SGD": 0.3, "momentum": 0.05, "Adam": 3e-3, "AdamW": 3e-3, "RMSprop": 1e-3}
PROBLEMS = {
    "digits, MLP": Problem(digits_data, lambda: dense(64, 100, 100, 10, act=nn.ReLU), entropy, 1437, _USUAL),
    "digits, CNN": Problem(digits_data, digits_cnn, entropy, 512, _USUAL),
    "digits, BatchNorm CNN": Problem(digits_data, bn_cnn, entropy, 512, _USUAL),
    "Fashion-MNIST, CNN": Problem(fashion_data, cnn, entropy, 512, _USUAL),
    "characters, GRU": Problem(
        short_text, lambda: Recurrent(nn.GRU, alphabet(), 48), entropy, 128,
        {"SGD": 1.0, "momentum": 0.3, "AdamW": 1e-2},
    ),
    "characters, transformer": Problem(
        text_data, lambda: Characters(alphabet(), 24, 32), entropy, 64,
        {"SGD": 0.3, "momentum": 0.1, "AdamW": 3e-3},
    ),
    "digits, deep tanh, squared": Problem(digits_data, lambda: dense(64, *[40] * 6, 10), one_hot, 1437, _USUAL),
    "matrix factors, squared": Problem(
        matrix_data, Factors, squared, 2000, {"SGD": 10.0, "momentum": 1.0, "AdamW": 2e-2}
    ),
    "linear regression, squared": Problem(
        slopes_data, lambda: nn.Linear(40, 3), squared, 1600, {"SGD": 0.1, "momentum": 0.01}
    ),
}  # fmt: skip
CONSTANT = "linear regression, squared"  # its curvature does not change: there is no knee to be found
_BATCHES = {
    "digits, MLP": {"SGD": (16, 64, 512, 0), "momentum": (16, 64, 512, 0), "AdamW": (16, 64, 512), "RMSprop": (64,)},
    "digits, CNN": {"SGD": (64,), "momentum": (16, 64, 512), "AdamW": (16, 64, 512), "Adam": (64,)},
    "digits, BatchNorm CNN": {"SGD": (64,), "momentum": (64, 256), "AdamW": (64,)},
    "Fashion-MNIST, CNN": {"SGD": (64,), "momentum": (64,), "AdamW": (64,)},
    "characters, GRU": {"momentum": (32,), "AdamW": (32,)},
    "characters, transformer": {"SGD": (32,), "momentum": (32,), "AdamW": (32,)},
    "digits, deep tanh, squared": {"SGD": (64, 0), "momentum": (64, 0)},
    "matrix factors, squared": {"SGD": (64,), "momentum": (64,), "AdamW": (64,)},
    CONSTANT: {"SGD": (64,), "momentum": (64,)},
}  # 0: all the training data


@dataclass(frozen=True)
class Combination:
    """A problem, an optimizer and a batch size; 0: all the training data."""

    problem: str
    optimizer: str
    batch: int

    @property
    def key(self) -> tuple[str, str, str]:
        """Its name in the results."""
        return self.problem, self.optimizer, str(self.batch or "all")

    @property
    def kind(self) -> Kind:
        """Its optimizer."""
        return KINDS[self.optimizer]

    @property
    def rate(self) -> float:
        """The base rate."""
        return PROBLEMS[self.problem].rates[self.optimizer]

    def workload(self) -> Workload:
        """Its training with warm-up and cosine."""
        problem = PROBLEMS[self.problem]
        return Workload(
            problem.data, problem.model, self.kind.make, self.rate, self.batch or len(problem.data()[0][1]),
            REFERENCE_STEPS, problem.loss,
        )  # fmt: skip

    def sample(self) -> Batch:
        """The training data that the curvature is solved on."""
        (x, y), _ = PROBLEMS[self.problem].data()
        size = PROBLEMS[self.problem].sample
        return x[:size], y[:size]


def combinations() -> list[Combination]:
    """All of them, those first that a page should not be without."""
    made = [Combination(p, o, b) for p, kinds in _BATCHES.items() for o, sizes in kinds.items() for b in sizes]
    return sorted(made, key=lambda c: c.batch not in (32, 64))
