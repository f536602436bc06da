"""A lower rate where the loss rests: tried out, kept where it helps, let up where it does not."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.actions.plateau import Plateau
from tests.bitwise import assert_same
from tests.rates import tell_rates


def run(plateau: Plateau, steps: int, loss: Callable[[float], float], rate: float = 0.1) -> list[tuple[int, str]]:
    """Steps at a user's rate; a step's loss follows from the share that it was taken at."""
    said = []
    for step in range(steps):
        share = plateau.step(rate)
        if text := plateau.add(loss(share)):
            said.append((step, text))
    return said


def noisy(level: Callable[[float], float], spread: float = 0.1, seed: int = 0) -> Callable[[float], float]:
    """Losses about a level that the share sets."""
    draws = random.Random(seed)
    return lambda share: level(share) * (1 + spread * draws.uniform(-1, 1))


def falling(start: float, by: float, seed: int = 0) -> Callable[[float], float]:
    """Losses that fall by a part in each step, whatever the share."""
    draws, now = random.Random(seed), [start]

    def loss(share: float) -> float:
        now[0] *= 1 - by
        return now[0] * (1 + 0.1 * draws.uniform(-1, 1))

    return loss


def test_a_lower_rate_is_kept_where_the_loss_rests_higher_the_higher_the_rate_is() -> None:
    plateau = Plateau()
    said = run(plateau, 700, noisy(lambda share: 1.0 + share))
    assert said == [
        (414, "the mean loss rests at 2.01: 0.333 of the user's rate is tried out"),
        (494, "the mean loss fell from 2.01 to 1.35: the lower rate is kept"),
    ]
    assert plateau.share == pytest.approx(1 / 3)
    run(plateau, 20_000, noisy(lambda share: 1.0 + share))
    assert plateau.share == pytest.approx(1 / 81)  # a gain of 2 % is told from the noise


def test_a_rate_that_is_not_to_blame_is_let_up_and_tries_become_rare() -> None:
    plateau = Plateau()
    said = run(plateau, 20_000, noisy(lambda share: 1.0))
    assert plateau.share == 1.0
    assert {text.split(":")[1] for _, text in said if "stayed near" in text} == {" the rate is 1 of the user's again"}
    starts = [step for step, text in said if "tried out" in text]
    assert starts == [414, 1632, 13921]


def test_a_loss_that_falls_is_left_alone() -> None:
    for seed in range(5):
        plateau = Plateau()
        assert run(plateau, 2000, falling(5.0, 0.002, seed)) == []
        assert plateau.share == 1.0


def test_a_slow_rise_is_no_reason_to_keep_a_lower_rate() -> None:
    plateau = Plateau()
    run(plateau, 3000, falling(1.0, -0.0005))
    assert plateau.state_dict()["_thirds"] == 0


def test_a_schedule_of_the_users_own_is_left_alone() -> None:
    plateau = Plateau()
    for step in range(5000):
        plateau.step(0.1 * 0.9 ** (step // 250))
        assert not plateau.add(1.0 + 0.01 * (step % 7))
        assert plateau.share == 1.0


def test_a_warm_up_is_no_schedule_that_falls() -> None:
    plateau, losses = Plateau(), noisy(lambda share: 1.0 + share)
    for step in range(450):
        share = plateau.step(0.1 * min(1.0, (step + 1) / 50))
        plateau.add(losses(share))
    assert plateau.share == pytest.approx(1 / 3)


def test_a_try_ends_with_the_stretch_at_one_rate() -> None:
    plateau = Plateau()
    run(plateau, 450, noisy(lambda share: 1.0 + share))
    assert plateau.share == pytest.approx(1 / 3)
    plateau.step(0.05)
    assert plateau.share == 1.0


def test_a_gain_that_is_small_beside_what_the_loss_has_fallen_is_none() -> None:
    plateau = Plateau()
    run(plateau, 50_000, noisy(lambda share: share, spread=0.01))  # gains 2/3, 2/9, 2/27, 2/81; then 0.008 of 1
    assert plateau.state_dict()["_thirds"] == 4


def test_losses_that_are_not_finite_are_passed_over() -> None:
    plateau = Plateau()
    values = iter([float("nan"), float("inf")] * 50 + [1.0] * 100)
    run(plateau, 200, lambda share: next(values))
    assert plateau.share == 1.0
    assert plateau.state_dict()["_taken"] == 100


def test_the_state_goes_on_at_any_step() -> None:
    for cut in (3, 300, 450, 500, 1200):
        whole, first, then = Plateau(), Plateau(), Plateau()
        losses = noisy(lambda share: 1.0 + share, seed=3)
        expected = run(whole, 1500, losses)
        losses = noisy(lambda share: 1.0 + share, seed=3)
        said = run(first, cut, losses)
        then.load_state_dict(first.state_dict())
        said += [(cut + step, text) for step, text in run(then, 1500 - cut, losses)]
        assert said == expected
        assert then.state_dict() == whole.state_dict()


class Digits:
    """Digits in batches of 16 at a constant rate that is far too high to end at."""

    def __init__(self, control: str) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.15, momentum=0.9)
        config = gfs.GFSConfig(tier="running", control=control, alarm="log", max_overhead=None)  # type: ignore[arg-type]
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        self.losses: list[float] = []
        self.used: list[float] = []
        self.said: list[str] = []
        tell_rates(self.optimizer, self.used)

    def run(self, start: int, stop: int) -> Digits:
        for step in range(start, stop):
            rows = torch.randint(len(self.y), (16,), generator=torch.Generator().manual_seed(step))
            loss = self.loss_of((self.x[rows], self.y[rows]))
            self.optimizer.zero_grad()
            loss.backward()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                self.monitor.step(self.loss_of, (self.x[rows], self.y[rows]), step, loss=loss)
            self.said += [str(w.message) for w in seen if "mean loss" in str(w.message)]
            self.optimizer.step()
            self.losses.append(loss.item())
        return self

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


def test_a_run_whose_rate_is_too_high_to_end_at_ends_lower_and_the_users_rate_stays_his() -> None:
    alone, run = (Digits(control).run(0, 700) for control in ("guard", "plateau"))
    assert fmean(run.losses[-100:]) < 0.5 * fmean(alone.losses[-100:])
    assert run.used[-1] <= 0.15 / 3 * 1.001
    assert run.optimizer.param_groups[0]["lr"] == 0.15
    assert "0.333 of the user's rate is tried out" in run.said[0]


def test_a_run_is_resumed_in_the_middle_of_a_try() -> None:
    whole, first, then = Digits("plateau").run(0, 540), Digits("plateau").run(0, 460), Digits("plateau")
    assert first.used[-1] < 0.15  # it is trying
    then.model.load_state_dict(first.model.state_dict())
    then.optimizer.load_state_dict(first.optimizer.state_dict())
    then.monitor.load_state_dict(first.monitor.state_dict())
    then.run(460, 540)
    assert then.used == whole.used[460:]
    assert_same(then.model.state_dict(), whole.model.state_dict())
