"""A second data set: the curvature of its loss at the weights that are trained on other data."""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gfs_core as gfs
from gfs_core.run.second_data import REMARK, SecondData
from tests.bitwise import assert_same
from tests.core import processes
from tests.core.options import tuned

OPTIONS: dict[str, Any] = {"tier": "sharpness", "every": 4, "running_every": None, "max_overhead": None}


def digits(low: int, high: int) -> TensorDataset:
    """The digits from ``low`` to below ``high``."""
    x, y = load_digits(return_X_y=True)
    keep = (y >= low) & (y < high)
    return TensorDataset(torch.tensor(x[keep] / 16 - 0.3, dtype=torch.float32), torch.tensor(y[keep]))


A, B = digits(5, 10), digits(0, 5)


class Run:
    """A plain loop on digits 0 to 4, whose batches and dropout masks come from the global stream."""

    def __init__(self, probe: Any = None, measures: bool = True, strict: bool = True, **options: Any) -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        config = gfs.GFSConfig(**{**OPTIONS, "strict": strict} | options)
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config, probe=probe) if measures else None
        self.found: list[gfs.Measurement] = []
        self.weights: list[dict[str, Tensor]] = []
        self.random: list[Tensor] = []

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def train(self, steps: int = 12) -> Run:
        for _ in range(steps):
            batch = B[torch.randint(len(B), (32,))]
            self.optimizer.zero_grad()
            loss = self.loss_of(batch)
            loss.backward()
            self.weights.append(copy.deepcopy(self.model.state_dict()))
            self.random.append(torch.get_rng_state())
            if self.monitor is not None:
                found = self.monitor.step(self.loss_of, batch, loss=loss)
                if found is not None:
                    self.found.append(found)
            self.optimizer.step()
        return self

    def state(self) -> list[Any]:
        streams = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
        return [self.model.state_dict(), self.optimizer.state_dict(), streams]


@pytest.mark.parametrize("size", [None, 100])
def test_the_value_is_the_sharpness_of_the_second_data_set(size: int | None) -> None:
    run = Run(DataLoader(A, batch_size=48), probe_size=size)
    tuned(run.monitor, tol=1e-4, max_hvps=500)
    run.train()
    assert [m.step for m in run.found] == [0, 4, 8]
    batches = [A[:48]] if size is None else [A[:48], A[48:96], A[96:100]]
    for m in run.found:
        run.model.load_state_dict(run.weights[m.step])
        torch.set_rng_state(run.random[m.step])  # the dropout masks of the measurement
        truth = gfs.sharpness(run.model, lambda _, b: run.loss_of(b), batches, tol=1e-4, max_hvps=500)
        assert m.sharpness == pytest.approx(truth.value, rel=1e-3)
        losses = []
        for b in batches:
            torch.set_rng_state(run.random[m.step])
            losses.append(run.loss_of(b).item())
        assert m.loss_probe == pytest.approx(sum(losses) / len(losses), rel=0.05 if size else 1e-5)
        assert REMARK in m.reasons


def test_every_signal_is_what_a_monitor_finds_that_is_handed_that_data() -> None:
    run = Run([A[:32]], tier="gfs", every=2, running_every=1)
    other = gfs.StabilityMonitor(run.model, run.optimizer, run.monitor.config)
    found: list[gfs.Measurement] = []
    step = run.monitor.step

    def both(loss_fn: Any, batch: Any, loss: Tensor) -> gfs.Measurement | None:
        if (measured := other.step(loss_fn, A[:32])) is not None:
            found.append(measured)
        return step(loss_fn, batch, loss=loss)

    run.monitor.step = both  # type: ignore[method-assign]
    for monitor in (run.monitor, other):
        tuned(monitor, beside={"directional": 2, "batch_sharpness": 2, "midpoint": 2}, whole=True)
    run.train(9)
    left_out = ("mean_square_stability_ratio", "mean_square_bound", "seconds", "overhead", "hvps", "grad_evals")
    # Exact ones of the second data set, and differences of gradients where `.grad` is there to go by.
    differ = ("directional_sharpness", "batch_sharpness", "critical_lr")
    values = [{k: v for k, v in m.values().items() if k not in left_out} for m in run.found]
    handed = [{k: v for k, v in m.values().items() if k not in left_out} for m in found]
    for ours, theirs in zip(values, handed, strict=True):
        for name in differ:
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs.pop(name), rel=5e-2), name
        assert {k: v for k, v in ours.items() if k not in differ} == theirs
    names = {
        "sharpness",
        "running_sharpness",
        "gfs_sharpness",
        "directional_sharpness",
        "batch_sharpness",
        "midpoint_sharpness",
    }
    assert names <= set().union(*values)


def test_a_ratio_in_the_mean_square_needs_the_noise_of_the_steps() -> None:
    own = Run(tier="running", every=1).train(20).found[-1]
    other = Run(DataLoader(A, batch_size=32), tier="running", every=1).train(20).found[-1]
    assert own.mean_square_stability_ratio is not None
    assert other.running_stability_ratio is not None
    assert other.mean_square_stability_ratio is None
    assert "mean_square_bound" not in other.values()


class Augmented(Dataset):
    """Adds noise of a stream of its own and of the global ones; counts what was taken."""

    def __init__(self) -> None:
        self.random, self.torch, self.taken = np.random.default_rng(0), torch.Generator().manual_seed(0), 0

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.taken += 1
        noise = self.random.random() + torch.rand((), generator=self.torch) + random.random() + np.random.rand()
        return A[i][0] + 0.01 * noise + 0.01 * torch.rand(64), A[i][1]


def test_training_and_the_loader_are_left_as_they_were() -> None:
    data, generator = Augmented(), torch.Generator().manual_seed(3)
    loader = DataLoader(data, 32, shuffle=True, generator=generator)
    streams = [generator.get_state(), data.random.bit_generator.state, data.torch.get_state()]
    options = {"tier": "gfs", "running_every": 1, "probe_size": 64, "alarm": "warn"}
    run = Run(loader, **options).train()
    assert len([m for m in run.found if m.sharpness is not None]) == 3
    assert data.taken == 64  # the batches are taken once, and kept
    assert_same([generator.get_state(), data.random.bit_generator.state, data.torch.get_state()], streams)
    assert_same(run.state(), Run(measures=False).train().state())


def test_a_loader_with_workers_that_is_in_use_goes_on_where_it_was() -> None:
    loader = DataLoader(A, 16, num_workers=1, persistent_workers=True, timeout=30)
    batches = iter(loader)
    seen = [next(batches), next(batches)]
    [worker] = batches._workers  # type: ignore[attr-defined]
    run = Run(loader).train(2)
    assert len(run.found) == 1
    seen.append(next(batches))
    assert loader._iterator is batches  # type: ignore[attr-defined]
    assert batches._workers == [worker]  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([x for x, _ in seen]), A[:48][0])


def test_the_batches_are_a_copy() -> None:
    x, y = (t.clone() for t in A[:32])
    run = Run([(x, y)]).train(1)
    x.zero_()
    again = Run([A[:32]]).train(1)
    assert run.monitor is not None
    assert_same(run.monitor.measuring.probe.second.batches, [A[:32]])
    assert run.found[0].sharpness == again.found[0].sharpness


def test_a_resumed_run_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(A, 32, shuffle=True)  # draws other batches at another time

    whole = Run(loader(), tier="gfs", running_every=1).train(12).found
    first = Run(loader(), tier="gfs", running_every=1).train(5)
    saved, stream = [first.model.state_dict(), first.optimizer.state_dict()], torch.get_rng_state()
    torch.save(first.monitor.state_dict(), tmp_path / "state.pt")
    second = Run(loader(), tier="gfs", running_every=1)
    second.monitor.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    torch.set_rng_state(stream)
    found = [*first.found, *second.train(7).found]
    price = ("seconds", "overhead")
    values = [[{k: v for k, v in m.values().items() if k not in price} for m in run] for run in (found, whole)]
    assert_same(*values)


class Pair:
    """A batch of a class of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __getitem__(self, i: int) -> Tensor:
        return (self.x, self.y)[i]


def test_batches_that_cannot_be_saved_are_taken_anew() -> None:
    saved = Run([Pair(*A[:32])], strict=False).train(1).monitor.state_dict()
    run = Run([Pair(*A[:32])], strict=False)
    with pytest.warns(gfs.GFSWarning, match="the second data set was not saved.*it is collected anew"):
        run.monitor.load_state_dict(saved)
    run.monitor.count = 0
    assert len(run.train(1).found) == 1
    unused = Run([A[:32]])  # nothing was taken, so nothing is missing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run([A[:32]]).monitor.load_state_dict(unused.monitor.state_dict())
        Run([A[:32]]).monitor.load_state_dict(Run().monitor.state_dict())  # saved without a second data set


def endless() -> Iterator[Any]:
    while True:
        yield A[:8]


class Endless:
    def __iter__(self) -> Iterator[Any]:
        return endless()


@pytest.mark.parametrize(("size", "batches"), [(None, 1), (8, 1), (9, 2), (30, 4)])
def test_an_endless_loader_is_read_as_far_as_is_needed(size: int | None, batches: int) -> None:
    run = Run(Endless(), probe_size=size).train(1)
    assert len(run.monitor.measuring.probe.second.batches) == batches
    assert len(run.found) == 1


def test_examples_that_cannot_be_counted_are_one_batch() -> None:
    class Blind:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield "a", "b"

    second = SecondData(Blind())
    model = nn.Linear(1, 1)
    second.take(100, model, list(model.parameters()))
    assert second.batches == [("a", "b")]


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (A, "got a data set, a TensorDataset: give a `DataLoader` of it"),
        (iter(DataLoader(A, 8)), "got a _SingleProcessDataLoaderIter, which is used up once it was read"),
        (endless(), "got a generator, which is used up once"),
        (A[:8], r"got a single batch, a tuple: give a list of batches, `\[batch\]`"),
        (A[:8][0], "got a single batch, a Tensor"),
        ({"x": A[:8][0]}, "got a single batch, a dict"),
        ("fixed", "got 'fixed'"),
        (3, "got 3"),
        (nn.Sequential(nn.Linear(1, 1)), r"got Sequential\("),
    ],
)
def test_what_is_no_loader_is_refused(probe: Any, text: str) -> None:
    with pytest.raises(gfs.ConfigError, match=text):
        Run(probe)


def test_a_loader_beside_a_fixed_probe_is_refused() -> None:
    run = Run(measures=False)
    with pytest.raises(gfs.ConfigError, match="the config says probe='fixed'; leave one out"):
        gfs.StabilityMonitor(run.model, run.optimizer, gfs.GFSConfig(probe="fixed"), probe=DataLoader(A, 8))


def raises() -> Iterator[Any]:
    raise OSError("no such shard")
    yield


class Raising:
    def __iter__(self) -> Iterator[Any]:
        return raises()


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        ([], "the loader of `probe=` is empty"),
        (DataLoader(TensorDataset(A[:5][0]), 8, drop_last=True), "the loader of `probe=` is empty"),
        (Raising(), "no batches could be taken from the loader of `probe=`: OSError: no such shard"),
        ([[iter([1])]], "the batch is or holds an iterator"),
        ([(A[:8][0][:, :5], A[:8][1])], "the loss failed on a batch from the loader of `probe=`: RuntimeError"),
        ([(A[:8][0] * math.inf, A[:8][1])], "the loss on the probe is not finite"),
    ],
)
def test_a_loader_that_fails_is_told_of_once_and_training_goes_on(probe: Any, text: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = Run(probe, strict=False).train()
    assert [str(w.message).count(text.split(":")[0]) for w in told] == [1]
    assert text in str(told[0].message)
    assert [m.sharpness for m in run.found] == []
    assert_same(run.state(), Run(measures=False).train().state())
    with pytest.raises(gfs.MeasurementError if "RuntimeError" not in text else RuntimeError):
        Run(probe).train()


class Stream(IterableDataset):
    """Goes on where the last pass has stopped."""

    def __init__(self) -> None:
        self.rows = iter(range(len(A)))

    def __iter__(self) -> Iterator[Any]:
        for i in self.rows:
            yield A[i]


def test_a_loader_that_training_takes_from_is_left_alone() -> None:
    loader, stream = DataLoader(A, 8), Stream()
    model = nn.Linear(1, 1)
    for own, training in ((loader, loader), (DataLoader(stream, 8), DataLoader(stream, 4))):
        second = SecondData(own, training=lambda training=training: [training])
        with pytest.raises(gfs.MeasurementError, match="is the one that training takes its batches from"):
            second.take(None, model, list(model.parameters()))
    assert next(stream.rows) == 0
    SecondData(loader, training=lambda: [DataLoader(A, 8)]).take(None, model, list(model.parameters()))


@pytest.mark.parametrize("control", ["cap", "follow", "warmup", "cdat"])
def test_no_control_goes_by_other_data(control: str) -> None:
    with pytest.raises(gfs.ConfigError, match=f"control='{control}' goes by the curvature of the loss that is trained"):
        Run(DataLoader(A, 8), control=control)
    run = Run(measures=False)
    scheduler = gfs.EdgeOfStabilityLR(run.optimizer, policy=control)  # type: ignore[arg-type]
    assert scheduler.control.policy == control
    with pytest.raises(gfs.ConfigError, match=f"control='{control}' goes by"):
        gfs.StabilityMonitor(run.model, run.optimizer, probe=DataLoader(A, 8))
    Run(DataLoader(A, 8), control="guard")


@pytest.mark.parametrize("probe", [None, [A[:8]]])
def test_the_early_warning_does_not_go_by_other_data(probe: Any) -> None:
    monitor = Run(probe).monitor
    for step in range(60):
        ratio = 0.2 if step < 50 else 0.9
        told = monitor.update_detectors(step, gfs.Measurement.of(step, running_stability_ratio=ratio))
        assert told.running_stability_ratio == ratio
    assert told.alarm == (1 if probe is None else 0)
    monitor.record_loss(math.nan)
    assert monitor.update_detectors(60, gfs.Measurement(60, "")).alarm == 2  # by the losses it does


def test_the_history_says_what_was_measured(tmp_path: Path) -> None:
    Run([A[:32]], history=str(tmp_path / "history.jsonl")).train(5)
    [part] = gfs.history_parts(tmp_path / "history.jsonl")
    assert part.settings["probe"] == "loader"
    assert all(REMARK in m.reasons for m in part.measurements)


ASKED: list[int] = []  # outside the loader, whose attributes are put back


def fixed(rank: int, size: int) -> list[float | None]:
    """Sharpness on a fixed probe of 32 examples, where rank 1 has 12 in place of 16 at step 1, and needs one more."""
    model = processes.net()
    config = gfs.GFSConfig(**OPTIONS | {"every": 1, "probe": "fixed", "probe_size": 32})
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    found = []
    for step in range(4):
        x, y = (t[rank::size][: 12 if (rank, step) == (1, 1) else 16] for t in processes.examples(step))
        m = monitor.step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), (x, y))
        found.append(None if m is None else m.sharpness)
    monitor.close()
    return found


@pytest.mark.filterwarnings("ignore")
def test_processes_wait_until_a_fixed_probe_is_complete_on_each(tmp_path: Path) -> None:
    ours, theirs = processes.run(fixed, 2, tmp_path)
    assert ours == theirs
    assert [value is None for value in ours] == [True, True, False, False]


class OwnPart:
    """Each process's own batches; rank 1 has one less, and cannot read them at first."""

    def __init__(self, rank: int, size: int) -> None:
        x, y = processes.examples(99)
        batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
        self.batches = batches[:3][rank::size] if size > 1 else batches[:2]
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        if self.rank == 1 and not ASKED:
            ASKED.append(self.rank)
            raise OSError("no such shard")
        return iter(self.batches)


def test_processes_measure_the_mean_over_their_parts(tmp_path: Path) -> None:
    """The batch that one of them lacks is left out on the other; where one fails, both take theirs at the next try."""
    options = {**OPTIONS, "probe_size": 16, "tuned": {"tol": 1e-8, "max_hvps": 500}}
    alone = processes.train(0, 1, "sgd", options, 9, second=OwnPart)
    ranks = processes.run(functools.partial(processes.train, second=OwnPart), 2, tmp_path, "sgd", options, 9)
    (tmp_path / "without").mkdir()
    without = processes.run(processes.train, 2, tmp_path / "without", "sgd", options, 9)
    expected = [pytest.approx(m["sharpness"], rel=1e-6) for m in alone["found"]]
    assert [m["step"] for m in alone["found"]] == [0, 4, 8]
    for rank, other in zip(ranks, without, strict=True):
        assert [m["step"] for m in rank["found"]] == [4, 8]
        assert [m["sharpness"] for m in rank["found"]] == expected[1:]
        assert [m["sharpness"] for m in other["found"]] != expected
        assert_same(rank["weights"], other["weights"])
