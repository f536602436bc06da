"""A learning rate found before a training, by trying it out; everything is as it was afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import gfs_core
from gfs_core import FoundRate
from gfs_core.search.pilots import APART
from tests.bitwise import assert_same

STEPS = 300
HELD_OUT = 360
Batch = tuple[Tensor, Tensor]


class Loader:
    """Batches of digits in an order that its own generator draws."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 64) -> None:
        self.x, self.y, self.size = x, y, size
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.x), generator=self.generator)
        for rows in order.split(self.size)[:-1]:
            yield self.x[rows], self.y[rows]


class Job:
    """A small training on digits."""

    def __init__(self, rate: float, *, adaptive: bool = False, scheduled: bool = True, norm: bool = False) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
        self.loader = Loader(x[HELD_OUT:], y[HELD_OUT:])
        self.validation = [(x[i : i + 60], y[i : i + 60]) for i in range(0, HELD_OUT, 60)]
        middle: list[nn.Module] = [nn.BatchNorm1d(48)] if norm else []
        self.model = nn.Sequential(nn.Linear(64, 48), *middle, nn.Tanh(), nn.Dropout(0.1), nn.Linear(48, 10))
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), rate, momentum=0.9)
        if adaptive:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), rate)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS) if scheduled else None

    def loss_of(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def find(self, **more: Any) -> FoundRate:
        given = {"scheduler": self.scheduler, "validation": self.validation, **more}
        return gfs_core.find_rate(self.model, self.optimizer, self.loss_of, self.loader, STEPS, **given)

    def train(self, factor: float = 1.0) -> float:
        """Loss on the validation data after the whole training."""
        if self.scheduler is not None:
            self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        step = 0
        while step < STEPS:
            for batch in self.loader:
                self.optimizer.zero_grad()
                self.loss_of(batch).backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
                step += 1
        self.model.eval()
        with torch.no_grad():
            return sum(float(self.loss_of(b)) for b in self.validation) / len(self.validation)

    def state(self) -> list[Any]:
        modes = [m.training for m in self.model.modules()]
        grads = [p.grad for p in self.model.parameters()]
        held = [self.model.state_dict(), self.optimizer.state_dict(), modes, grads, self.loader.generator.get_state()]
        if self.scheduler is not None:
            held.append(self.scheduler.state_dict())
        return copy.deepcopy([*held, random.getstate(), np.random.get_state(), torch.get_rng_state()])


@pytest.mark.parametrize("adaptive", [False, True], ids=["momentum", "AdamW"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_everything_is_as_it_was(adaptive: bool, used: bool) -> None:
    job = Job(0.02 if not adaptive else 1e-3, adaptive=adaptive, norm=True)
    if used:  # it has a state, gradients and a place in its schedule, and goes on from there
        for batch in [next(iter(job.loader)) for _ in range(3)]:
            job.loss_of(batch).backward()  # type: ignore[no-untyped-call]
            job.optimizer.step()
            assert job.scheduler is not None
            job.scheduler.step()
        job.model[1].eval()
    before = job.state()
    grads = [p.grad for p in job.model.parameters()]
    job.find()
    assert_same(job.state(), before)
    assert all(p.grad is g for p, g in zip(job.model.parameters(), grads, strict=True))


def test_a_search_that_fails_leaves_everything_as_it_was() -> None:
    job = Job(0.02)
    before, calls = job.state(), 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls == 130:
            raise KeyError("in the user's own code")

    with pytest.raises(KeyError):
        job.find(before_step=fails)
    assert_same(job.state(), before)


@pytest.mark.parametrize(
    ("adaptive", "rates"), [(False, (0.01, 0.1, 3.0)), (True, (1e-4, 3e-3, 0.1))], ids=["momentum", "AdamW"]
)
def test_from_rates_far_too_low_and_too_high_the_training_ends_near_the_best(
    adaptive: bool, rates: tuple[float, ...]
) -> None:
    base = 3e-3 if adaptive else 0.1
    tuned = min(Job(base, adaptive=adaptive).train(APART**i) for i in range(-2, 4))
    for rate in rates:
        found = Job(rate, adaptive=adaptive).find()
        assert found.range[0] <= found.rate <= found.range[1]
        assert found.factor == pytest.approx(found.rate / rate)
        assert Job(rate, adaptive=adaptive).train(found.factor) < 1.3 * tuned  # seeds alone scatter by a tenth
