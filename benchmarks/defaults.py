"""What a training of 2,000 steps gets with every default: how many stability ratios, from which step on, at what price.

The time that the callback takes is measured from outside, around each of its hooks, and held against `gfs/overhead`.
Adds the jobs of this machine's device to defaults.json, and writes defaults.md from all of them.
Run (CPU: eight minutes): OMP_NUM_THREADS=1 python -m benchmarks.defaults [JOB …]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from benchmarks.lib.data import digits, fashion_mnist, text_bytes
from benchmarks.lib.models import dense, digits_cnn, gpt2, seeded
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import entropy, epochs
from gfs_core.run.free import FreeSignals

STEPS = 2000
CUDA = torch.cuda.is_available()
_CALLED = ("before_training_step", "_read_gradients")


class Stopwatch:
    """Adds up the wall time of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            if CUDA:
                torch.cuda.synchronize()  # what training has still to compute is not the callback's
            self._inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - began

        return timed

    def hooks_of(self, callback: Any) -> None:
        """Time every hook of a callback, and what it has the frameworks call beside them."""
        for name in dir(callback):
            hook = name.startswith("on_") and name != "on_alarm"
            if (hook or name in _CALLED) and callable(getattr(callback, name)):
                setattr(callback, name, self.around(getattr(callback, name)))

    def hooks_of_optimizers(self) -> contextlib.AbstractContextManager[Any]:
        """A context; what a monitor that is made in it does in its optimizer's hooks is timed."""
        stack = contextlib.ExitStack()
        for name in ("_before", "_after"):
            timed = self.around(getattr(FreeSignals, name))
            stack.enter_context(mock.patch.object(FreeSignals, name, timed))
        return stack


class Seen:
    """What the monitor has returned."""

    def __init__(self, monitor: gfs.StabilityMonitor) -> None:
        self.monitor, self.found = monitor, list[gfs.Measurement]()
        update = monitor.update_detectors

        def heard(*args: Any, **kwargs: Any) -> gfs.Measurement | None:
            measurement = update(*args, **kwargs)
            self.found += [] if measurement is None else [measurement]
            return measurement

        monitor.update_detectors = heard  # type: ignore[method-assign]


def row(seen: Seen, stopwatch: Stopwatch, seconds: float) -> Row:
    """What a job got."""
    ratios = [m for m in seen.found if m.stability_ratio is not None]
    solved = [m for m in ratios if m.sharpness is not None]
    return {
        "ratios": len(ratios),
        "first": ratios[0].step if ratios else None,
        "solved": len(solved),
        "told": seen.monitor.schedule.budget.overhead(),
        "outside": stopwatch.seconds / seconds,
        "step_ms": 1e3 * (seconds - stopwatch.seconds) / STEPS,
    }


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Any], Tensor], data: Iterator[Any]
) -> Row:
    """A plain loop."""
    stopwatch = Stopwatch()
    began = time.perf_counter()
    with stopwatch.hooks_of_optimizers():
        monitor = stopwatch.around(gfs.StabilityMonitor)(model, optimizer)
    seen, measured = Seen(monitor), stopwatch.around(monitor.step)
    for _ in range(STEPS):
        batch = next(data)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        measured(loss_of, batch, loss=loss.detach())
        optimizer.step()
    return row(seen, stopwatch, time.perf_counter() - began)


def plain() -> Row:
    """An MLP with momentum."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(784, 256, 256, 10, act=nn.ReLU)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    data = epochs(fashion_mnist(20_000), 256, torch.Generator().manual_seed(0))
    return loop(model, optimizer, lambda b: entropy(model, b), data)


def accelerator() -> Row:
    """A byte-level GPT of 11 M weights in bfloat16 autocast."""
    model = seeded(lambda: gpt2(384, 6, 256, 256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    ids = text_bytes(4096, 256)
    data = (tuple(t.cuda() for t in b) for b in epochs(ids, 64, torch.Generator().manual_seed(0)))

    def loss_of(batch: Any) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out: Tensor = model(input_ids=batch[0], labels=batch[0]).loss
        return out

    return loop(model, optimizer, loss_of, data)


def lightning() -> Row:
    """A CNN with AdamW under Lightning, its loggers and its hooks as they come."""
    import lightning as L

    from lightning_gfs import GFSCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(digits_cnn)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = entropy(self.net, batch)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    callback, stopwatch = GFSCallback(), Stopwatch()
    stopwatch.hooks_of(callback)
    start, held = callback.on_fit_start, list[Seen]()

    def started(*args: Any) -> None:
        start(*args)
        held.append(Seen(callback.monitors[""]))

    callback.on_fit_start = started  # type: ignore[method-assign]
    loader = DataLoader(TensorDataset(*digits()), 128, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=STEPS, max_epochs=-1, accelerator="cpu", default_root_dir=folder, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        began = time.perf_counter()
        with stopwatch.hooks_of_optimizers():
            trainer.fit(Module(), loader)
        seconds = time.perf_counter() - began
    return row(held[0], stopwatch, seconds)


def hugging_face() -> Row:
    """A small BERT on text under the Trainer, clipping by norm as it comes."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from hf_gfs import GFSCallback

    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    ids, _ = text_bytes(2048, 64)
    rows = [{"input_ids": x, "labels": int((x == 101).sum() > 5)} for x in ids[:, :64]]
    callback, stopwatch = GFSCallback(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=3e-4, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_steps=100,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        stopwatch.hooks_of(callback)
        begin, held = callback.on_train_begin, list[Seen]()

        def started(*args: Any, **kwargs: Any) -> None:
            begin(*args, **kwargs)
            assert callback.monitor is not None
            held.append(Seen(callback.monitor))

        callback.on_train_begin = started  # type: ignore[method-assign]
        callback.set_trainer(trainer)
        began = time.perf_counter()
        with stopwatch.hooks_of_optimizers():
            trainer.train()
        seconds = time.perf_counter() - began
    return row(held[0], stopwatch, seconds)


JOBS: dict[str, tuple[str, Callable[[], Row]]] = {
    "plain": ("plain loop: MLP of 270 k weights, Fashion-MNIST, momentum 0.05, batch 256", plain),
    "lightning": ("Lightning: CNN, digits, AdamW 1e-3, batch 128", lightning),
    "hugging_face": ("Trainer: BERT of 2 layers × 64, bytes of text, AdamW 3e-4, batch 16, clipped", hugging_face),
    "gpu": ("plain loop on a GPU: GPT of 11 M weights, 64 × 256 bytes, AdamW 1e-3, bfloat16", accelerator),
}
HEAD = ("job", "step, ms", "ratios", "first at step", "of them solved", "overhead told", "timed from outside")
INTRODUCTION = f"""\
# Every default, {STEPS} steps

    OMP_NUM_THREADS=1 python -m benchmarks.defaults

*Ratios*: measurements with a `gfs/stability_ratio`; *solved*: those for which an eigenvalue was solved, the others are
of the running estimate. *Overhead told*: `gfs/overhead` at the end. *Timed from outside*: wall time of all hooks of the
callback, of the monitor in a plain loop, over that of the whole training. The budget is `max_overhead=0.05`; the first
measurement, and those by which the running estimate settles, are not charged to it, and are in both figures.
"""


def render(results: Row) -> str:
    """The page."""
    cells = [
        [
            JOBS[name][0], f"{r['step_ms']:.3g}", r["ratios"], r["first"], r["solved"], f"{r['told']:.2%}",
            f"{r['outside']:.2%}",
        ]
        for name, r in results.items()
        if name in JOBS
    ]  # fmt: skip
    missing = [] if "gpu" in results else ["", "No GPU was at hand: its job is written, and has not run yet."]
    return "\n".join([INTRODUCTION, *table(HEAD, cells), *missing, ""])


def main() -> None:
    """Run the jobs that are named, or all that this machine can run, and write the page."""
    parser = argparse.ArgumentParser("benchmarks.defaults", description=__doc__.splitlines()[0] if __doc__ else "")
    usual = ["gpu"] if CUDA else ["plain", "lightning", "hugging_face"]
    parser.add_argument("jobs", nargs="*", default=usual, metavar="JOB", help=", ".join(JOBS))
    store = Store("defaults")
    for name in parser.parse_args().jobs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store.put(name, JOBS[name][1]())
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
