"""A learning rate found before a training, by trying it out; everything is as it was afterwards."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import gfs_core
from gfs_core import ConfigError, FoundRate, MeasurementError
from gfs_core.search.pilots import APART, DRIFT, MARGIN, Pilot, choose, search
from gfs_core.search.ramp import Point, Ramp, is_lost
from gfs_core.search.schedule import recorded
from tests.bitwise import assert_same

STEPS = 300
HELD_OUT = 360
Batch = tuple[Tensor, Tensor]


class Loader:
    """Batches of digits in an order that its own generator draws."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 64) -> None:
        self.x, self.y, self.size = x, y, size
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.x) // self.size

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


def test_a_tensor_rate_and_a_loader_with_workers_are_as_they_were() -> None:
    job = Job(0.02, scheduled=False)
    rate = torch.tensor(1e-3)
    job.optimizer = torch.optim.Adam(job.model.parameters(), rate, foreach=False)
    loader = DataLoader(TensorDataset(job.loader.x, job.loader.y), 64, shuffle=True, num_workers=1)
    before = job.state()
    found = gfs_core.find_rate(job.model, job.optimizer, job.loss_of, loader, STEPS)
    assert_same(job.state(), before)
    assert found.factor > 3
    assert job.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-3)


def test_a_step_of_several_batches_is_that_of_one_large_batch() -> None:
    whole, parts = Job(0.05), Job(0.05)
    parts.loader.size = whole.loader.size // 2
    for job in (whole, parts):
        job.model[2].p = 0.0
        job.loader = [*job.loader]  # type: ignore[assignment]  # in one order
    found = whole.find()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
    before = scaler.state_dict()
    again, scaled = parts.find(accumulate=2), whole.find(scaler=scaler)
    assert scaler.state_dict() == before
    for other in (again, scaled):
        losses = [[p.loss for p in each.ramp.points] for each in (found, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert other.ramp.points[50].gradient == pytest.approx(found.ramp.points[50].gradient, rel=1e-3)
    ratios = [[p.ratio for p in each.ramp.points if p.ratio is not None] for each in (found, again)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)
    assert again.rate == pytest.approx(found.rate, rel=0.05)


def test_weights_that_are_not_trained_and_streams_of_the_data_are_as_they_were() -> None:
    job = Job(0.02, scheduled=False)
    teacher = copy.deepcopy(job.model).requires_grad_(False)
    model = nn.ModuleList([job.model, teacher])

    class Noisy(torch.utils.data.Dataset[Batch]):
        def __init__(self) -> None:
            self.stream = np.random.default_rng(4)

        def __len__(self) -> int:
            return 600

        def __getitem__(self, i: int) -> Batch:
            return job_x[i] + 0.1 * float(self.stream.normal()), job_y[i]

    job_x, job_y = job.loader.x, job.loader.y
    data = Noisy()
    loader = DataLoader(data, 64, shuffle=True)

    def average() -> None:
        for held, p in zip(teacher.parameters(), job.model.parameters(), strict=False):
            held.lerp_(p.detach(), 0.1)

    before = copy.deepcopy([model.state_dict(), data.stream.bit_generator.state, torch.get_rng_state()])
    gfs_core.find_rate(model, job.optimizer, job.loss_of, loader, STEPS, before_step=average)
    assert_same([model.state_dict(), data.stream.bit_generator.state, torch.get_rng_state()], before)


def test_an_error_at_one_rate_alone_is_a_lost_run() -> None:
    job = Job(0.02)

    def checked(batch: Batch) -> Tensor:
        out = job.model(batch[0])
        if out.abs().max() > 40:
            raise ValueError("no probabilities")
        return nn.functional.cross_entropy(out, batch[1])

    found = gfs_core.find_rate(job.model, job.optimizer, checked, job.loader, STEPS, scheduler=job.scheduler)
    assert 0.03 < found.rate < 2
    assert any("counts as lost: ValueError: no probabilities" in text for text in found.unsure)


def test_a_pretrained_model_is_not_destroyed() -> None:
    """At high rates the losses are alike, above that at the start; the pilots go down until they are below it."""

    def pretrained(rate: float, steps: int, share: float) -> Pilot:
        least, at = (1.1, 0.03) if rate > 2e-4 else (0.8, 1e-4)
        end = least + 0.1 * math.log10(rate / at) ** 2
        return Pilot.of(rate, steps, [2.0] * steps, [end], start=1.0, share=share)

    tried = search(pretrained, 0.03, 1000, lambda more: more <= 2000)
    assert {p.share for p in tried} == {0.1}
    choice = choose(tried, 100)
    assert choice is not None
    assert choice.rate == pytest.approx(MARGIN * 0.03 / APART**5)
    assert choice.cliff == pytest.approx(0.03 / APART**4)


def test_pilots_begin_where_the_validation_data_say() -> None:
    job = Job(0.02)
    job.model.eval()
    with torch.no_grad():
        start = np.mean([float(job.loss_of(batch)) for batch in job.validation])
    job.model.train()
    found = job.find()
    assert [p.first for p in found.pilots] == pytest.approx([start] * len(found.pilots))
    assert job.find(validation=None).pilots[0].first == pytest.approx(found.ramp.points[0].loss)


def test_a_search_that_fails_leaves_everything_as_it_was() -> None:
    job = Job(0.02)
    before, calls = job.state(), 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls >= 130:  # at whatever rate
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


def test_two_searches_of_other_seeds_agree_within_their_ranges() -> None:
    rates = (0.02, 0.3)
    first, second = (Job(rate).find() for rate in rates)  # other ramps, and pilots at other rates
    assert first.range[0] < second.rate < first.range[1]
    assert second.range[0] < first.rate < second.range[1]


def test_the_same_search_finds_the_same() -> None:
    assert Job(0.02).find().to_dict() | {"cost": 0} == Job(0.02).find().to_dict() | {"cost": 0}


def test_all_groups_are_scaled_and_the_schedule_keeps_its_shape() -> None:
    job = Job(0.05, scheduled=False)
    first, *rest = job.model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": rest}], 0.05, momentum=0.9)
    schedule = OneCycleLR(optimizer, [0.01, 0.05], total_steps=STEPS)
    used: list[tuple[float, float, float]] = []

    def seen() -> None:
        a, b = optimizer.param_groups
        used.append((a["lr"], b["lr"], b["momentum"]))

    found = gfs_core.find_rate(
        job.model, optimizer, job.loss_of, job.loader, STEPS, scheduler=schedule, before_step=seen
    )
    assert found.users == pytest.approx(0.05, rel=1e-3)
    assert all(a == pytest.approx(b / 5) for a, b, _ in used)
    pilot = found.pilots[0]
    ran = used[found.cost.ramp_steps :][: pilot.steps]
    assert max(b for _, b, _ in ran) == pytest.approx(pilot.rate, rel=0.02)
    assert np.argmax([b for _, b, _ in ran]) == pytest.approx(0.3 * pilot.steps, abs=2)  # as in the whole cycle
    assert min(m for _, _, m in ran) == pytest.approx(0.85, abs=0.01)
    assert found.judged_on == "training"
    assert any("training data" in sentence for sentence in found.unsure)


def test_a_wrong_argument_is_said() -> None:
    job = Job(0.02)
    with pytest.raises(ConfigError, match="iterator"):
        gfs_core.find_rate(job.model, job.optimizer, job.loss_of, iter(job.loader), STEPS)
    with pytest.raises(ConfigError, match="accumulate"):
        job.find(accumulate=0)
    with pytest.raises(ConfigError, match="no batch"):
        gfs_core.find_rate(job.model, job.optimizer, job.loss_of, [], STEPS)
    with pytest.raises(ConfigError, match="≥ 100"):
        gfs_core.find_rate(job.model, job.optimizer, job.loss_of, job.loader, 20)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau"):
        job.find(scheduler=ReduceLROnPlateau(job.optimizer))
    edge = gfs_core.EdgeOfStabilityLR(Job(0.02).optimizer)
    lazy = torch.optim.SGD(nn.LazyLinear(10).parameters(), 0.1)
    for optimizer, text in (
        (torch.optim.LBFGS(job.model.parameters()), "LBFGS"),
        (lazy, "without a shape"),
        (edge.optimizer, "EdgeOfStabilityLR"),
    ):
        with pytest.raises(ConfigError, match=text):
            gfs_core.find_rate(job.model, optimizer, job.loss_of, job.loader, STEPS)
    job.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ConfigError, match="got 0"):
        job.find(scheduler=None)


def test_no_rate_at_which_anything_is_learnt() -> None:
    job = Job(0.02)
    bad = [(x * math.nan, y) for x, y in job.loader]
    with pytest.raises(MeasurementError, match="lost in all pilots"):
        gfs_core.find_rate(job.model, job.optimizer, job.loss_of, bad, STEPS)


def test_scatter_of_batches_is_no_loss() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    healthy = 10 - 0.002 * np.arange(400) + noise  # falls slowly, and scatters by more than it has gained
    assert not any(is_lost(healthy[:n].tolist()) for n in range(1, 400))
    back = [*np.linspace(10, 2, 100), *np.linspace(2, 9, 20)]
    assert is_lost(back)
    assert not is_lost([*back[:105], 50.0])  # one bad batch
    assert is_lost([1.0, math.nan])


@pytest.mark.parametrize("growth", [1.03, 1.12])
def test_the_knee_is_where_the_ratio_stops_following(growth: float) -> None:
    rates = 1e-4 * growth ** np.arange(0, math.log(1e4) / math.log(growth))
    noise = np.exp(0.1 * np.random.default_rng(1).normal(size=len(rates)))
    ratios = noise * 0.4 * np.minimum(rates / 0.03, (rates / 0.03) ** 0.1)
    ramp = Ramp.of([Point(r, 1.0, None, v) for r, v in zip(rates, ratios, strict=True)])
    assert ramp.knee is not None
    assert ramp.knee.rate == pytest.approx(0.03, rel=0.3)
    assert ramp.knee.ratio == pytest.approx(0.4, rel=0.2)
    straight = Ramp.of([Point(r, 1.0, None, r * n) for r, n in zip(rates, noise, strict=True)])
    assert straight.knee is None
    assert "stopped following" in straight.why
    few = Ramp.of([Point(r, 1.0) for r in rates])
    assert few.why == "only 0 ratios were measured"


def pilots(losses: dict[float, float], steps: int = 100) -> list[Pilot]:
    return [Pilot(rate, steps, steps, 2.3, (v,) if v < math.inf else (), 0.1) for rate, v in losses.items()]


def test_the_parabola_has_its_lowest_point_where_the_losses_say() -> None:
    curve = {
        0.1 * APART**i: 0.1 * math.exp(0.15 * (math.log(0.1 * APART**i) - math.log(0.15)) ** 2) for i in (-1, 0, 1)
    }
    choice = choose(pilots(curve), 100)
    assert choice is not None
    assert choice.rate == pytest.approx(0.15)
    assert choice.parabola == pytest.approx((0.15, math.log(0.15), math.log(0.1)))
    reach = math.exp(math.sqrt(0.05 / 0.15))
    assert (choice.low, choice.high) == pytest.approx((0.15 / reach, 0.15 * reach))
    assert choice.cliff is None


def test_below_a_rate_that_was_lost_the_best_one_is_lowered() -> None:
    for above in (math.inf, 1.9):  # lost outright, or a run that has gained less than half
        choice = choose(pilots({0.1: 0.3, 0.316: 0.2, 1.0: above}), 100)
        assert choice is not None
        assert choice.rate == pytest.approx(MARGIN * 0.316)
        assert choice.cliff == 1.0
        assert choice.high <= 0.316
    assert choose(pilots({0.1: math.inf}), 100) is None


def test_of_a_longer_training_the_rate_is_lower() -> None:
    three = pilots({0.1: 0.3, 0.316: 0.2, 1.0: 0.4})
    short, long = choose(three, 100), choose(three, 1000)
    assert short is not None
    assert long is not None
    assert long.rate == pytest.approx(0.71 * short.rate, rel=0.01)
    assert (long.low, long.high) == pytest.approx((short.low / 10**DRIFT, short.high / 10**DRIFT))
    assert long.parabola == short.parabola  # of the pilots themselves


def searched(loss: Callable[[float, float], float], steps: int, budget: float = math.inf) -> list[Pilot]:
    """The pilots of a search whose losses are told by rate and share."""
    spent: list[int] = []

    def run(rate: float, taken: int, share: float) -> Pilot:
        spent.append(taken)
        return replace(pilots({rate: loss(rate, share)}, taken)[0], share=share)

    return search(run, 0.1, steps, lambda more: sum(spent) + more <= budget)


def test_pilots_enclose_the_best_rate() -> None:
    def least_at(best: float) -> list[Pilot]:
        return searched(lambda rate, share: 0.5 + 0.1 * abs(math.log10(rate / best)), 2000)

    for best, count in ((0.1, 3), (0.01, 4), (1.0, 5)):
        tried = least_at(best)
        assert {(p.steps, p.share) for p in tried} == {(200, 0.1)}
        assert len(tried) == count
        rates = sorted(p.rate for p in tried)
        assert rates[0] < 0.9 * best < 1.1 * best < rates[-1]


def test_a_rate_that_teaches_nothing_is_too_low() -> None:
    tried = searched(lambda rate, share: 2.31 - 0.01 * rate if rate < 0.5 else 0.4 + abs(math.log(rate)), 2000)
    assert min((p.loss, p.rate) for p in tried)[1] == pytest.approx(1.0)
    assert min(p.rate for p in tried) == pytest.approx(0.1)


def test_where_a_part_of_the_data_teaches_nothing_pilots_go_through_all() -> None:
    tried = searched(lambda rate, share: 2.4 if share < 1 else 0.3 + 0.1 * abs(math.log(rate / 0.03)), 1000)
    shares = [p.share for p in tried]
    assert shares == sorted(shares)
    assert set(shares) == {0.1, 1.0}
    choice = choose([p for p in tried if p.share == 1], 100)
    assert choice is not None
    assert choice.rate == pytest.approx(0.0316, rel=0.2)


def test_a_search_stops_at_the_cost_of_a_training() -> None:
    falls = lambda rate, share: 2.0 / (1 + rate)  # noqa: E731
    assert len(searched(falls, 1000)) == 8
    assert len(searched(falls, 1000, 550)) == 5
    assert len(searched(falls, 1000, 0)) == 3


@pytest.mark.parametrize("loader", [False, True], ids=["own", "DataLoader"])
def test_a_pilot_sees_a_part_of_the_data_as_often_as_the_training_sees_all(loader: bool) -> None:
    job = Job(0.02)
    batches: Any = Loader(job.loader.x, job.loader.y, 36)  # 39 batches: 300 steps are 7.7 passes
    if loader:
        batches = DataLoader(TensorDataset(job.loader.x, job.loader.y), 36, shuffle=True, drop_last=True)
    seen: list[tuple[float, ...]] = []

    def loss_of(batch: Batch) -> Tensor:
        if job.model.training:
            seen.append(tuple(batch[0][:, 20].tolist()))
        return job.loss_of(batch)

    found = gfs_core.find_rate(
        job.model, job.optimizer, loss_of, batches, STEPS, scheduler=job.scheduler, validation=job.validation
    )
    assert [(p.steps, p.share) for p in found.pilots] == [(40, 40 / STEPS)] * len(found.pilots)
    taken = [p.taken for p in found.pilots]
    of_pilots = seen[-sum(taken) - 1 :]
    del of_pilots[taken[0]]  # the one step after which the loss at the start is known
    assert of_pilots[: taken[0]] == of_pilots[:5] * 8
    assert len(set(of_pilots)) == 5  # the same ones in all of them
    assert len(batches) == 39
    assert len(set(seen)) > 39  # all of the data in the ramp


def test_where_few_examples_are_learnt_by_heart_the_rate_is_not_that_of_their_first_passes() -> None:
    def job(rate: float) -> Job:
        made = Job(rate, adaptive=True)
        torch.manual_seed(0)
        made.model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
        made.optimizer = torch.optim.AdamW(made.model.parameters(), rate)
        made.scheduler = CosineAnnealingLR(made.optimizer, STEPS)
        made.loader = Loader(made.loader.x[:320], made.loader.y[:320], 32)
        return made

    tuned = min(job(3e-3 * APART**i).train() for i in (-1, 0, 1))
    assert job(0.03).train(job(0.03).find().factor) < 1.15 * tuned  # 1.4 with pilots that see all of the data


def test_a_schedule_is_read_off_and_put_back() -> None:
    job = Job(0.02, scheduled=False)
    schedule = OneCycleLR(job.optimizer, 0.02, total_steps=STEPS)
    before = job.state(), copy.deepcopy(schedule.state_dict())
    settings = recorded(job.optimizer, [schedule], STEPS, lambda step: schedule.step())
    assert_same((job.state(), schedule.state_dict()), before)
    assert len(settings) == STEPS
    assert max(s.rate for s in settings) == pytest.approx(0.02)
    assert settings[-1].rate < 1e-6
    assert settings[0].other[0]["momentum"] == pytest.approx(0.95)
