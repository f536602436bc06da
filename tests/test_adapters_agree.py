"""Lightning, the Hugging Face Trainer and a plain loop measure the same on the same data, with the same weights."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset
from transformers import Trainer, TrainingArguments

import gfs_core as gfs
import hf_gfs
import lightning_gfs
from tests.lightning.trainers import quiet

OPTIONS: dict[str, Any] = {
    "tier": "gfs",
    "every": 3,
    "running_every": 1,
    "running_parts": 2,
    "max_overhead": None,
    "tol": 1e-3,
}
SIGNALS = (
    "sharpness",
    "stability_ratio",
    "running_stability_ratio",
    "mean_square_stability_ratio",
    "gfs_sharpness",
    "loss_probe",
)
STEPS = 7
RATE = 0.05


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


class Net(nn.Module):
    """Gives its loss where it is given labels, as models of transformers do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def descent(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


def micro_batches(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits()
    return list(zip(x[: size * (len(x) // size)].split(size), y.split(size), strict=False))


def plain(folder: Path, size: int, count: int) -> list[gfs.Measurement]:
    model = Net()
    optimizer = model.descent()
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**OPTIONS, history=str(folder / "history.jsonl")))

    def loss_of(batch: Any) -> torch.Tensor:
        return model(*batch)["loss"]

    batches = micro_batches(size)
    for step in range(STEPS):
        micro = batches[step * count : (step + 1) * count]
        optimizer.zero_grad()
        loss = sum(loss_of(b) for b in micro) / count
        loss.backward()
        monitor.step(loss_of, micro, step, micro_batches=True, loss=loss)
        optimizer.step()
    return gfs.read_history(folder / "history.jsonl")


class Module(L.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = Net(dropout)
        self.seen: list[tuple[int, int]] = []  # of each training batch, outside of measuring: index and global step

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, self.global_step))
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.net.descent()


def lightning(folder: Path, size: int, count: int) -> list[gfs.Measurement]:
    callback = lightning_gfs.GFSCallback(**OPTIONS, history=str(folder / "history.jsonl"))
    trainer = quiet(folder, [callback], max_steps=STEPS, accumulate_grad_batches=count, logger=False)
    trainer.fit(Module(), DataLoader(TensorDataset(*digits()), size))
    return gfs.read_history(folder / "history.jsonl")


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def hugging_face(folder: Path, size: int, count: int, own: bool = True) -> list[gfs.Measurement]:
    model = Net()
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(*digits(), strict=True)]
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(model.descent(), None))
    callback = hf_gfs.GFSCallback(**OPTIONS)
    if own:
        callback.set_trainer(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train()
    return gfs.read_history(folder / "history.jsonl")


ADAPTERS = {
    "Lightning": lightning,
    "Trainer": hugging_face,
    "Trainer, add_callback": lambda *a: hugging_face(*a, own=False),
}


@cache
def by(adapter: str, size: int, count: int) -> list[gfs.Measurement]:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", gfs.GFSWarning)
        return (plain if adapter == "plain" else ADAPTERS[adapter])(Path(folder), size, count)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("size", "count"), [(64, 1), (16, 4)])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_gives_the_values_of_a_plain_loop(adapter: str, size: int, count: int, signal: str) -> None:
    def values(found: list[gfs.Measurement]) -> dict[int, float]:
        return {m.step: v for m in found if (v := getattr(m, signal)) is not None}

    expected, found = values(by("plain", size, count)), values(by(adapter, size, count))
    every = 1 if signal.startswith(("running", "mean")) else 3
    assert list(expected) == [s for s in range(STEPS) if s % every == 0 and (s or not signal.startswith("mean"))]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("signal", ["sharpness", "stability_ratio", "gfs_sharpness", "loss_probe"])
def test_one_batch_and_its_micro_batches_give_the_same(signal: str) -> None:
    whole, pieces = ([getattr(m, signal) for m in by("plain", *how)] for how in ((64, 1), (16, 4)))
    assert [v for v in pieces if v is not None] == pytest.approx([v for v in whole if v is not None], rel=1e-3)


class Counted(L.Callback):
    """The mean loss of each optimizer step, and how many micro-batches it has."""

    def __init__(self) -> None:
        self.open: list[float] = []
        self.steps: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.open.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.global_step > len(self.steps):
            self.steps.append((math.fsum(self.open) / len(self.open), len(self.open)))
            self.open = []


class Stream(IterableDataset[Any]):
    """Batches without a length."""

    def __iter__(self) -> Any:
        return iter(micro_batches(16)[:10])


@pytest.mark.parametrize("case", ["rest", "stream", "limited", "scheduled"])
def test_each_step_is_measured_on_its_own_micro_batches_with_their_masks(tmp_path: Path, case: str) -> None:
    """The measured loss is that of the step: the mean over its micro-batches, however many they are."""
    counted, extra = Counted(), []
    options: dict[str, Any] = {"accumulate_grad_batches": 4, "limit_train_batches": 10}
    if case == "scheduled":
        options.pop("accumulate_grad_batches")
        extra = [GradientAccumulationScheduler({0: 4, 1: 2, 2: 5})]
    data: Any = DataLoader(TensorDataset(*digits()), 16)
    if case == "stream":
        data = DataLoader(Stream(), batch_size=None)
        options.pop("limit_train_batches")
    elif case == "rest":
        data = DataLoader(TensorDataset(*(t[: 16 * 10] for t in digits())), 16)
        options.pop("limit_train_batches")
    path = tmp_path / "history.jsonl"
    callback = lightning_gfs.GFSCallback(
        tier="sharpness", every=1, running_every=None, max_overhead=None, history=str(path)
    )
    torch.manual_seed(0)
    module = Module(dropout=0.3)
    trainer = quiet(tmp_path, [*extra, counted, callback], max_epochs=3, logger=False, **options)
    trainer.fit(module, data)
    sizes = [count for _, count in counted.steps]
    assert sizes == ([4, 4, 2, 2, 2, 2, 2, 2, 5, 5] if case == "scheduled" else [4, 4, 2] * 3)
    found = {m.step: m.loss_probe for m in gfs.read_history(path)}
    short = {i for i, n in enumerate(sizes) if n == 2 and case != "scheduled"}  # half of the usual examples: not less
    assert set(found) >= set(range(len(sizes))) - short
    assert found == pytest.approx({step: counted.steps[step][0] for step in found}, rel=1e-5)
    assert module.seen == [(i, step) for i, step in zip(_indices(sizes), _steps(sizes), strict=True)]


def _indices(sizes: list[int]) -> list[int]:
    return [i % 10 for i in range(sum(sizes))]


def _steps(sizes: list[int]) -> list[int]:
    return [step for step, size in enumerate(sizes) for _ in range(size)]


def test_the_batch_index_of_each_micro_batch_is_its_own(tmp_path: Path) -> None:
    asked: list[int] = []

    def loss_fn(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        asked.append(batch_idx)
        return module.net(*batch)["loss"]

    callback = lightning_gfs.GFSCallback(
        loss_fn=loss_fn, tier="sharpness", every=2, running_every=None, max_overhead=None
    )
    trainer = quiet(tmp_path, [callback], max_steps=4, accumulate_grad_batches=3, logger=False)
    trainer.fit(Module(), DataLoader(TensorDataset(*digits()), 16))
    assert set(asked) == {0, 1, 2, 6, 7, 8}
    assert asked[:3] == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_the_history_holds_the_same_training_losses(tmp_path: Path, count: int) -> None:
    found = {}
    for name, run in {"plain": plain, **ADAPTERS}.items():
        folder = tmp_path / name.replace(" ", "-")
        run(folder, 16, count)
        [part] = gfs.history_parts(folder / "history.jsonl")
        steps = [-1, *(m.step for m in part.losses)]
        assert (steps[1], steps[-1]) == (0, STEPS - 1)
        means = [m.value for m in part.losses]
        found[name] = [means[0], sum(m * (b - a) for m, a, b in zip(means, steps, steps[1:], strict=False))]
    assert all(values == pytest.approx(found["plain"], rel=1e-5) for values in found.values()), found
    assert found["plain"][0] == pytest.approx(2.3, abs=0.1)
    assert 0 < found["plain"][1] < STEPS * found["plain"][0]
