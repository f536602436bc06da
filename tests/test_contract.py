"""One contract for the adapters: a plain loop, Lightning and the Trainer measure the same of the same training.

Each adapter trains the same network on the same micro-batches, once for every accumulation and precision, with every
signal on. What they find is compared value by value, and to the last bit: the arithmetic is the same, in the same
order, and a tolerance would only hide a batch, a weight of a micro-batch or a random state that is not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
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
from tests.core.options import tuned, tuned_callback
from tests.lightning.trainers import quiet

STEPS, SIZE = 24, 8
RATE, RISE = 0.2, 22  # the learning rate, and the step from which on it is 2.5 times that: the early warning says so
OPTIONS: dict[str, Any] = {"tier": "gfs_full", "every": STEPS, "running_every": 1, "max_overhead": None}
BESIDE = {"gfs": 8, "midpoint": 4, "sharpness": 4, "batch_sharpness": 4, "directional": 4}
SETTLED = 7  # the step of the running estimate's first value
SIGNALS = {
    "directional": ("directional_sharpness", "critical_lr"),
    "running": ("running_sharpness", "running_stability_ratio", "mean_square_stability_ratio", "mean_square_bound"),
    "batch_sharpness": ("batch_sharpness",),
    "sharpness": ("sharpness", "preconditioned_sharpness", "threshold", "stability_ratio", "loss_probe"),
    "midpoint": ("midpoint_sharpness", "midpoint_stability_ratio"),
    "gfs": ("gfs_sharpness", "gfs_stability_ratio"),
    "gfs_full": ("gfs_sharpness_full",),
    "gradients": ("grad_norm", "nonfinite", "weight_norm", "update_ratio", "rms_ratio"),
}


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


class Net(nn.Module):
    """Gives its loss where it is given labels, as models of transformers do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        loss = (logits.float() - nn.functional.one_hot(labels, 10)).square().mean()
        decay = sum(p.square().sum() for p in self.parameters())  # for a minimum that the full flow reaches soon
        return {"loss": loss + 0.04 * decay, "logits": logits}

    def descent(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < RISE else 2.5)


def tuning(count: int) -> dict[str, Any]:
    """The running estimate is by products on parts, or by one gradient each, however long either takes."""
    return {"beside": BESIDE} | ({"parts": 2} if count == 2 else {"whole": True})


def history(folder: Path) -> gfs.HistoryPart:
    [part] = gfs.history_parts(folder / "history.jsonl")
    return part


def plain(folder: Path, count: int, precision: str, size: int = SIZE) -> gfs.HistoryPart:
    model = Net()
    optimizer = model.descent()
    scheduler = schedule(optimizer)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**OPTIONS, history=str(folder / "history.jsonl")))
    tuned(monitor, **tuning(count))

    def loss_of(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(*batch)["loss"]

    x, y = digits()
    batches = list(zip(x.split(size), y.split(size), strict=True))
    for step in range(STEPS):
        micro = batches[step * count : (step + 1) * count]
        optimizer.zero_grad()
        loss = torch.zeros(())
        for batch in micro:
            part = loss_of(batch) / count
            part.backward()
            loss += part.detach()
        monitor.step(loss_of, micro, step, micro_batches=True, loss=loss)
        optimizer.step()
        scheduler.step()
    monitor.close()
    return history(folder)


class Module(L.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = Net(dropout)
        self.seen: list[tuple[int, int]] = []  # of each training batch, outside of measuring: index and global step

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, self.global_step))
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> Any:
        optimizer = self.net.descent()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def lightning(folder: Path, count: int, precision: str) -> gfs.HistoryPart:
    callback = lightning_gfs.GFSCallback(**OPTIONS, history=str(folder / "history.jsonl"))
    tuned_callback(callback, **tuning(count))
    trainer = quiet(
        folder,
        [callback],
        max_steps=STEPS,
        accumulate_grad_batches=count,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*digits()), SIZE))
    return history(folder)


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def hugging_face(folder: Path, count: int, precision: str, own: bool = True) -> gfs.HistoryPart:
    model = Net()
    optimizer = model.descent()
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=count,
        bf16=precision == "bf16",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(*digits(), strict=True)]
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule(optimizer)))
    callback = tuned_callback(hf_gfs.GFSCallback(**OPTIONS), **tuning(count))
    if own:
        callback.set_trainer(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train()
    return history(folder)


ADAPTERS: dict[str, Callable[..., gfs.HistoryPart]] = {
    "plain": plain,
    "Lightning": lightning,
    "Trainer": hugging_face,
    "Trainer, add_callback": lambda *a: hugging_face(*a, own=False),
}
FOUND = Callable[..., gfs.HistoryPart]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> FOUND:
    """What an adapter has found: ``found(adapter, count, precision)``; it trains once."""

    @cache
    def train(adapter: str, *how: Any) -> gfs.HistoryPart:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", gfs.GFSWarning)
            return ADAPTERS[adapter](tmp_path_factory.mktemp("run"), *how)

    return train


accumulations = pytest.mark.parametrize("count", [1, 2, 4])
precisions = pytest.mark.parametrize("precision", ["float32", "bf16"])
adapters = pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "plain"])


def values(part: gfs.HistoryPart, *names: str) -> dict[str, dict[int, float]]:
    """Of each name the values that were had, by step."""
    return {n: {m.step: v for m in part.measurements if (v := getattr(m, n)) is not None} for n in names}


@precisions
@accumulations
@pytest.mark.parametrize("signal", SIGNALS)
@adapters
def test_every_adapter_finds_the_values_of_a_plain_loop(
    found: FOUND, adapter: str, signal: str, count: int, precision: str
) -> None:
    expected = values(found("plain", count, precision), *SIGNALS[signal])
    assert values(found(adapter, count, precision), *SIGNALS[signal]) == expected


@precisions
@accumulations
@adapters
def test_every_adapter_says_what_a_plain_loop_says(found: FOUND, adapter: str, count: int, precision: str) -> None:
    def said(part: gfs.HistoryPart) -> list[Any]:
        return [(m.step, m.alarm, m.reasons, m.learning_rate, m.hvps, m.grad_evals) for m in part.measurements]

    assert said(found(adapter, count, precision)) == said(found("plain", count, precision))


@precisions
@accumulations
def test_the_plain_loop_measures_every_signal_when_it_is_due(found: FOUND, count: int, precision: str) -> None:
    part = found("plain", count, precision)
    steps = {name: list(held) for name, held in values(part, *(n for of in SIGNALS.values() for n in of)).items()}
    solved = [s for s in range(STEPS) if s % 4 == 0]
    assert steps.pop("gfs_sharpness_full") == [0]
    assert steps.pop("gfs_sharpness") == steps.pop("gfs_stability_ratio") == [0, 8, 16]
    assert steps.pop("sharpness") == steps.pop("loss_probe") == solved
    settled = list(range(SETTLED, STEPS))
    assert steps.pop("running_sharpness") == steps.pop("running_stability_ratio") == settled
    assert steps.pop("mean_square_bound") == settled[1:]
    assert steps.pop("mean_square_stability_ratio") == settled[1 if count == 2 else 2 :]  # a pair of parts, three steps
    assert steps.pop("stability_ratio") == sorted({*solved, *settled})  # the running one, where none is solved
    assert steps.pop("batch_sharpness") == solved
    assert steps.pop("directional_sharpness") == solved[1:]  # no step was taken before
    assert steps.pop("midpoint_sharpness") == steps.pop("midpoint_stability_ratio") == solved[1:]
    assert solved[1:5] == steps.pop("critical_lr")[:4]  # of the last step the direction may be one that climbs
    assert steps.pop("threshold") == list(range(STEPS))
    # The first step shows whether gradients are scaled. An update is known after its step.
    assert all(steps.pop(name) == list(range(1, STEPS)) for name in ("grad_norm", "weight_norm", "update_ratio"))
    assert steps.pop("nonfinite") == list(range(1, STEPS))
    assert steps == {"preconditioned_sharpness": [], "rms_ratio": []}  # SGD has none
    assert [m.alarm for m in part.measurements] == [0] * RISE + [2] * (STEPS - RISE)
    assert [m.step for m in part.measurements if m.reasons] == [0, RISE]
    assert part.measurements[0].reasons == ("midpoint left out: the weights before the last 2 steps were not kept",)


def test_the_table_tells_precisions_and_accumulations_apart(found: FOUND) -> None:
    runs = [found("plain", count, precision) for count in (1, 2, 4) for precision in ("float32", "bf16")]
    for name in (
        n
        for of in SIGNALS.values()
        for n in of
        if n not in ("preconditioned_sharpness", "threshold", "rms_ratio", "nonfinite")
    ):
        every = [tuple(values(run, name)[name].values()) for run in runs]
        assert len(set(every)) == len(every), name


@precisions
@accumulations
@adapters
def test_the_history_holds_the_same_training_losses(found: FOUND, adapter: str, count: int, precision: str) -> None:
    """The first, and their sum: frameworks tell some losses a step later, so that a mean stands for other steps."""

    def first_and_sum(part: gfs.HistoryPart) -> list[float]:
        steps, means = [-1, *(m.step for m in part.losses)], [m.value for m in part.losses]
        assert (steps[1], steps[-1]) == (0, STEPS - 1)
        return [means[0], math.fsum(m * (b - a) for m, a, b in zip(means, steps, steps[1:], strict=False))]

    theirs, ours = (first_and_sum(found(name, count, precision)) for name in (adapter, "plain"))
    assert theirs == pytest.approx(ours, rel=1e-6)
    assert ours[0] == pytest.approx(0.5, abs=0.02)
    assert 0 < ours[1] < STEPS * ours[0]


@pytest.mark.parametrize("name", ["sharpness", "running_sharpness", "gfs_sharpness", "loss_probe"])
def test_one_batch_and_its_micro_batches_give_the_same(found: FOUND, name: str) -> None:
    """Within rounding, which the solver's stopping rule enlarges."""
    whole, pieces = (values(found("plain", *run), name)[name] for run in ((1, "float32", 4 * SIZE), (4, "float32")))
    assert pieces == pytest.approx(whole, rel=1e-3)


def test_the_stability_ratio_is_the_solved_one_or_else_the_running_one(found: FOUND) -> None:
    part = found("plain", 4, "float32")
    ratios = values(part, "stability_ratio", "running_stability_ratio")
    solved = {m.step: m.sharpness / m.threshold for m in part.measurements if m.sharpness is not None}
    assert ratios["stability_ratio"] == pytest.approx(ratios["running_stability_ratio"] | solved, rel=1e-12)


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
        return iter(list(zip(*(t.split(16) for t in digits()), strict=True))[:10])


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
