"""Real trainings that are harmed half-way: the alarm ends when the run is back, and not before."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import gfs_core as gfs
from gfs_core import AlertLevel, EarlyWarning
from tests.core.observed import observe_loss

HARM, STEPS = 300, 700


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class Training:
    """A classifier of digits with what its monitor says."""

    model: nn.Sequential = field(init=False)
    states: list[AlertLevel] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-3)
        config = gfs.GFSConfig(tier="running", every=25, max_overhead=None)  # what is read depends on no clock
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        self.draws = torch.Generator().manual_seed(0)
        x, y = load_digits(return_X_y=True)
        self.data = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def train(self, first: int, last: int, inputs: float = 1.0, shuffled: float = 0.0) -> None:
        for step in range(first, last):
            pick = torch.randint(len(self.data[0]), (64,), generator=self.draws)
            x, y = self.data[0][pick] * inputs, self.data[1][pick]
            some = int(64 * shuffled)
            y = torch.cat([y[:some][torch.randperm(some, generator=self.draws)], y[some:]])
            loss = self.loss((x, y))
            self.optimizer.zero_grad()
            loss.backward()
            self.monitor.step(self.loss, (x, y), step, loss=loss.detach())
            self.optimizer.step()
            assert self.monitor.watch.warning is not None
            self.states.append(self.monitor.watch.warning.level)
            self.losses.append(loss.item())

    def change(self, how: Callable[[nn.Linear], None]) -> None:
        with torch.no_grad():
            for layer in self.model[:-1]:
                if isinstance(layer, nn.Linear):
                    how(layer)

    def late(self, where: int) -> float:
        """The mean of 50 losses."""
        return sum(self.losses[where : where + 50]) / 50


@pytest.fixture
def well() -> Training:
    training = Training()
    training.train(0, HARM)
    assert AlertLevel.ALARM not in training.states
    return training


def kill(layer: nn.Linear) -> None:
    layer.bias -= 100


def halve(layer: nn.Linear) -> None:
    layer.weight *= 0.2


def test_a_run_that_is_back_soon(well: Training) -> None:
    well.train(HARM, HARM + 1, inputs=-8.0)
    well.train(HARM + 1, STEPS)
    assert well.states[HARM] is AlertLevel.ALARM
    assert AlertLevel.ALARM not in well.states[HARM + 150 :]


def test_a_run_that_takes_its_time(well: Training) -> None:
    before = well.late(HARM - 50)
    well.change(halve)
    well.train(HARM, STEPS)
    assert well.states[HARM + 2] is AlertLevel.WATCH  # its ratio is at the edge now …
    assert well.states[HARM + 6] is AlertLevel.ALARM  # … and the mean loss beyond half of what it had fallen
    ends = next(i for i in range(HARM + 6, STEPS) if well.states[i] is not AlertLevel.ALARM)
    assert well.late(HARM) > 4 * before
    assert well.late(ends - 50) < 2 * before  # not earlier …
    assert well.late(ends - 25) < 1.6 * before  # what is more is small beside the 2.2 that it has fallen
    assert AlertLevel.ALARM not in well.states[ends:]  # … and it does end


def test_a_run_that_never_comes_back(well: Training) -> None:
    well.change(kill)
    well.train(HARM, STEPS)
    assert AlertLevel.QUIET not in well.states[HARM:]
    assert set(well.states[HARM + 5 :]) == {AlertLevel.ALARM}  # losses have a heavy tail here


def test_a_run_that_comes_back_in_part(well: Training) -> None:
    before = well.late(HARM - 50)
    well.train(HARM, STEPS, shuffled=0.3)
    assert 2 * before < well.late(STEPS - 50) < 0.7 * 2.3
    assert set(well.states[HARM + 2 :]) == {AlertLevel.ALARM}


def test_a_run_that_goes_on_from_its_checkpoint(well: Training) -> None:
    held = {"model": well.model, "optimizer": well.optimizer, "monitor": well.monitor}
    state = {name: {**part.state_dict()} for name, part in held.items()}
    weights = {name: value.clone() for name, value in well.model.state_dict().items()}
    moments = torch.optim.AdamW(well.model.parameters()).state_dict()  # begun anew
    well.change(kill)
    well.train(HARM, HARM + 100)
    assert well.states[-1] is AlertLevel.ALARM
    well.model.load_state_dict(weights)
    well.optimizer.load_state_dict({**moments, "param_groups": state["optimizer"]["param_groups"]})
    well.monitor.load_state_dict(state["monitor"])
    well.train(HARM, HARM + 200)
    assert AlertLevel.ALARM not in well.states[-100:]


def test_losses_with_a_heavy_tail_end_an_alarm_when_they_are_as_before() -> None:
    """Their mean lies far above their median, before a rise as after it."""
    lasted = []
    for seed in range(8):
        draws, alarm = torch.Generator().manual_seed(seed), EarlyWarning()
        losses = (0.01 * torch.empty(900).log_normal_(0, 1.5, generator=draws)).clamp(max=0.2).tolist()
        for step, loss in enumerate([*losses[:200], 5.0]):
            observe_loss(alarm, step, loss)
        assert alarm.level is AlertLevel.ALARM
        for step, loss in enumerate(losses[200:], 1):
            observe_loss(alarm, 200 + step, loss)
            if alarm.level is not AlertLevel.ALARM:
                break
        lasted.append(step)
    assert 40 < statistics.median(lasted) < 80
