"""Streams of trainings that the benchmarks record: the losses of the training, and the ratios of a monitor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.lib.data import digits
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.trainings import entropy
from benchmarks.zoo import record
from benchmarks.zoo.parts import adversaries, drawn, linear, restarts_that_double, stepped, trapezoid
from benchmarks.zoo.rules import early_warning
from benchmarks.zoo.training import EVERY, Stream, Training, plain, recorded
from gfs_core.signals.gradients import KEYS

STEPS = 60


def dropped_out() -> Training:
    """It draws at each loss, and has buffers that each loss changes."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.Linear(24, 10)), 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return plain(model, optimizer, lambda b: entropy(model, b), drawn(digits(200), 16, 3), STEPS)


def played(critic_watched: bool) -> Training:
    torch.manual_seed(3)
    maker, critic = dense(4, 16, 64), dense(64, 16, 1)
    optimizers = torch.optim.Adam(maker.parameters(), 1e-2), torch.optim.Adam(critic.parameters(), 1e-2)
    draws, data = torch.Generator().manual_seed(3), digits(200)[0]
    return adversaries(
        maker, critic, optimizers, lambda: data[torch.randint(200, (16,), generator=draws)],
        lambda: torch.randn(16, 4, generator=draws), STEPS, critic if critic_watched else maker,
    )  # fmt: skip


@pytest.mark.parametrize("make", [dropped_out, lambda: played(True), lambda: played(False)])
def test_measuring_changes_no_loss(make: object) -> None:
    assert callable(make)
    alone = [step.loss for step in make().steps]
    stream = recorded(make())
    assert stream.loss.tolist() == alone
    measured = np.flatnonzero(np.isfinite(stream.ratio))
    assert set(range(EVERY * (STEPS // EVERY - 1), STEPS, EVERY)) <= set(measured)
    assert (stream.ratio[measured] > 0).all()


def test_the_loss_of_a_step_is_that_of_its_batch() -> None:
    for training in (played(True), played(False)):
        for step in itertools.islice(training.steps, 3):
            assert step.loss_of(step.batch).item() == step.loss


def test_the_ratio_is_that_of_full_batch_descent() -> None:
    """Of a quadratic its largest curvature, here 4 beside 1, over 2 / rate."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = torch.tensor([[2.0, 0.0], [0.0, 1.0]] * 4), torch.ones(8, 1)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return out

    stream = recorded(plain(model, optimizer, loss, drawn(data, None, 0), 30))
    measured = stream.ratio[np.isfinite(stream.ratio)]
    assert len(measured) > 3
    assert measured == pytest.approx(4 * 0.1 / 2, rel=1e-2)


def test_a_training_ends_with_a_loss_that_is_not_finite() -> None:
    model = nn.Linear(64, 10)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step, (x, y) in enumerate(drawn(digits(200), 16, 0)):
            yield x * (math.nan if step == 12 else 1.0), y

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stream = recorded(plain(model, optimizer, lambda b: entropy(model, b), batches(), STEPS))
    assert len(stream.loss) == len(stream.ratio) == 13
    assert math.isnan(stream.loss[12])
    assert math.isnan(stream.ratio[12])


def test_a_file_without_ratios_is_read(tmp_path: Path) -> None:
    stream = recorded(dropped_out())
    record.saved(stream, tmp_path / "new.npz")
    assert np.array_equal(record.loaded(tmp_path / "new.npz").ratio, stream.ratio, equal_nan=True)
    with np.load(tmp_path / "new.npz") as held:
        np.savez(tmp_path / "old.npz", **{name: held[name] for name in held.files if name != "ratio"})
    old = record.loaded(tmp_path / "old.npz")
    assert np.isnan(old.ratio).all()
    assert old.ratio.shape == old.loss.shape
    assert np.array_equal(old.loss, stream.loss)


def test_the_early_warning_reads_the_ratios() -> None:
    """A rate that rises is no alarm where the ratio is far below the edge; who does not read it cannot know."""
    rate, ratio = np.full(300, 1e-3), np.full(300, math.nan)
    rate[200:], ratio[::EVERY] = 1e-2, 1e-6
    none = np.full(300, math.nan)
    whole, by_layer = {key.name: none for key in KEYS}, {key.name: np.empty((300, 0)) for key in KEYS}
    stream = Stream([], np.tile([0.9, 1.0, 1.1], 100), rate, ratio, whole, by_layer)
    assert early_warning(stream) == []
    assert [(a.start, a.rule) for a in early_warning(stream, curvature=False)] == [(200, "rate")]


def test_no_two_sets_share_a_seed() -> None:
    seeds = [range(record.FIRST[kind], record.FIRST[kind] + record.SEEDS[kind]) for kind in record.SETS]
    by_set = {kind.split(",")[0]: set[int]() for kind in record.SETS}
    for kind, own in zip(record.SETS, seeds, strict=True):
        by_set[kind.split(",")[0]] |= set(own)
    for a, b in itertools.combinations(by_set.values(), 2):
        assert not a & b


def test_schedules_at_their_corners() -> None:
    doubling = restarts_that_double(200)
    assert [doubling(step) for step in (0, 200, 600, 1400)] == [1.0] * 4
    assert doubling(199) < 1e-3
    assert doubling(400) == pytest.approx(0.5)
    assert doubling(2999) < 1e-5
    assert [linear(1000, 100)(step) for step in (0, 99, 550, 1000)] == pytest.approx([0.01, 1.0, 0.5, 0.0])
    assert [stepped(10, 20)(step) for step in (9, 10, 20)] == pytest.approx([1.0, 0.1, 0.01])
    assert [trapezoid(100, 10, 20)(step) for step in (0, 50, 80, 90)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
