"""What looks for a rate before the training: Lightning's finder, and ``find_rate``."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

import gfs_core as gfs
from benchmarks.control.methods import FINDER, METHODS, SEARCH
from benchmarks.control.training import Training, trained
from benchmarks.lib.data import Batch
from benchmarks.lib.store import Row, rounded
from benchmarks.lib.trainings import epochs
from benchmarks.rate import Batches, Workload, validation_of


class _Endless(IterableDataset[Batch]):
    def __init__(self, workload: Workload, seed: int) -> None:
        super().__init__()
        self.workload, self.seed = workload, seed

    def __iter__(self) -> Iterator[Batch]:
        return epochs(self.workload.data()[0], self.workload.batch, torch.Generator().manual_seed(self.seed))


def lightning_finder(workload: Workload, rate: float, seed: int) -> Row:
    """The rate that ``Tuner.lr_find`` of Lightning suggests, with its defaults, and the training at that rate."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.model, self.lr = workload.model(), rate

        def training_step(self, batch: Any, index: int) -> Any:
            return workload.loss(self.model, batch)

        def configure_optimizers(self) -> Any:
            return workload.optimizer(self.model, self.lr)

        def train_dataloader(self) -> Any:
            return DataLoader(_Endless(workload, seed), batch_size=None)

    began = time.thread_time()
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, max_steps=workload.steps,
        )  # fmt: skip
        finder = lightning.pytorch.tuner.Tuner(trainer).lr_find(Module())
    assert finder is not None
    found = finder.suggestion()
    cost = {"cost": len(finder.results["lr"]) / workload.steps, "search_seconds": round(time.thread_time() - began, 2)}
    row = trained(workload, METHODS[FINDER], rate if found is None else found, seed, workload.steps)
    return {**row, **cost}


def searched(workload: Workload, rate: float, seed: int) -> Row:
    """The rate that ``find_rate`` recommends from this one on, and the training at that rate."""
    training = Training(workload, METHODS[SEARCH], rate, seed, workload.steps)
    began = time.thread_time()
    try:
        found = gfs.find_rate(
            training.model, training.optimizer, training.loss_of, Batches(workload.data()[0], workload.batch, seed),
            workload.steps, scheduler=training.schedule, validation=validation_of(workload),
        )  # fmt: skip
    except gfs.MeasurementError as error:
        return {"loss": None, "rate": None, "error": str(error)[:80]}
    cost = {
        "cost": found.cost.steps / workload.steps,
        "search_seconds": round(time.thread_time() - began, 2),
        "low": found.range[0],
        "high": found.range[1],
    }
    row: Row = trained(workload, METHODS[SEARCH], found.rate, seed, workload.steps)
    return {**row, **rounded(cost, 4)}
