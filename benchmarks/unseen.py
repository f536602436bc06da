"""Trainings as in ``exam.py``, that were first run when every rule of the report stood as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.destroyed import classes, dense
from benchmarks.exam import Way, by_lightning, by_trainer
from benchmarks.lib.data import digits, text
from benchmarks.lib.harmed import Batch, Fault, Task, jump, ramp, task_of
from benchmarks.lib.models import Characters


def counts(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-density of counts, without the part that the model has no part in: it may be negative."""
    return nn.functional.poisson_nll_loss(model(batch[0])[:, 0], batch[1])


def hinge(model: nn.Module, batch: Batch) -> Tensor:
    """Multi-class hinge loss: 0 once all margins are kept."""
    return nn.functional.multi_margin_loss(model(batch[0]), batch[1])


class Autoencoder(nn.Module):
    """A variational one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = dense(64, 48, 12, act=nn.Tanh), dense(6, 48, 64, act=nn.Tanh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is seen, means and log-deviations of the code."""
        mean, log_deviation = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + log_deviation.exp() * torch.randn_like(mean)), mean, log_deviation


def evidence(model: nn.Module, batch: Batch) -> Tensor:
    """Negative evidence bound."""
    seen, mean, log_deviation = model(batch[0])
    divergence = 0.5 * (mean.square() + (2 * log_deviation).exp() - 1) - log_deviation
    return 0.5 * (seen - batch[1]).square().sum(1).mean() + divergence.sum(1).mean()


def _arrivals() -> Batch:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(800, 6, generator=draws)
    rate = (1.0 + x[:, 0].sin() + 0.5 * x[:, 1] * x[:, 2]).clamp(-3, 3).exp()
    return x, torch.poisson(rate, generator=draws)


def _twice() -> Batch:
    x = digits()[0]
    return x, x


def _characters() -> Task:
    data, alphabet = text(400, 24)
    return task_of(lambda: Characters(alphabet, 24, 24), 45, torch.optim.AdamW, 2e-3, classes, data, 16, 250, clip=1.0)


_BAD_BATCH = Fault(0.5, 0.502, inputs=30.0)
TASKS: dict[str, tuple[Way, bool, Callable[[], Task]]] = {
    "ELU, Adadelta, batch of 8": (by_lightning, False, lambda: task_of(
        lambda: dense(64, 40, 40, 10, act=nn.ELU), 41, torch.optim.Adadelta, 0.5, classes, digits(), 8, 400)),
    "counts, RAdam, batch of 4": (by_lightning, True, lambda: task_of(
        lambda: dense(6, 32, 32, 1, act=nn.SiLU), 42, torch.optim.RAdam, 3e-3, counts, _arrivals(), 4, 500)),
    "hinge, SGD": (by_lightning, False, lambda: task_of(
        lambda: dense(64, 32, 10, act=nn.LeakyReLU), 43, torch.optim.SGD, 0.5, hinge, digits(), 24, 400)),
    "variational autoencoder, Adam": (by_trainer, False, lambda: task_of(
        Autoencoder, 44, torch.optim.Adam, 3e-3, evidence, _twice(), 32, 300)),
    "transformer, AdamW, clipped": (by_trainer, False, _characters),
}  # fmt: skip
WRONG: dict[str, dict[str, Fault]] = {
    "ELU, Adadelta, batch of 8": {
        "rate ×200": jump(200.0), "labels shuffled": Fault(0.5, labels=True), "one bad batch": _BAD_BATCH,
    },
    "counts, RAdam, batch of 4": {
        "rate ×100": jump(100.0), "jump ×100 at half": jump(100.0, 0.5), "inputs blank": Fault(0.5, inputs=0.0),
        "NaN batch": Fault(0.95, 0.952, inputs=math.nan),
    },
    "hinge, SGD": {
        "rate ×200": jump(200.0), "ramp 3 %": ramp(3.0), "dead from the start": Fault(bias=-1e4),
        "jump ×60 for a while": jump(60.0, 0.4, 0.45),
    },
    "variational autoencoder, Adam": {
        "rate ×100": jump(100.0), "weights ×20": Fault(0.8, weights=20.0), "one bad batch": _BAD_BATCH,
    },
    "transformer, AdamW, clipped": {
        "rate ×150": jump(150.0), "ramp 4 %": ramp(4.0), "labels shuffled": Fault(0.6, labels=True),
        "jump ×100 late": jump(100.0, 0.92),
    },
}  # fmt: skip
