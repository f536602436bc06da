"""The demo: digits, full-batch gradient descent, one callback, and the edge of stability in under a minute."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gfs_core import Measurement, read_history
from gfs_core.signals.lab import Accuracy
from gfs_report.page import write_page
from gfs_report.report import make_report
from gfs_report.runs import read_run
from lightning_gfs import GFSCallback

RATE = 0.2
EXAMPLES = 50
_ERROR_BAR = 0.003  # of a full solution here: the change when the tolerance is made 100 times smaller is up to 0.17 %


@dataclass(frozen=True)
class Scale:
    """How long the demo runs, in optimizer steps and measurements, and how closely it follows flows."""

    steps: int
    every: int
    full_every: int
    accuracy: Accuracy


FULL = Scale(steps=1000, every=10, full_every=250, accuracy=Accuracy(tol=1e-3, rtol=1e-3))
QUICK = Scale(steps=60, every=10, full_every=1000, accuracy=Accuracy())


class Classifier(LightningModule):
    """A tanh network with squared loss: the setting in which the paper's claim is about gradient descent itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)).double()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Half the squared distance to the one-hot label."""
        x, y = batch
        loss: Tensor = 0.5 * (self.net(x) - nn.functional.one_hot(y, 10)).square().sum(1).mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


class _Closely(GFSCallback):
    """May follow flows more closely than a run does, so that full solutions can be compared with each other."""

    def __init__(self, accuracy: Accuracy, **options: Any) -> None:
        super().__init__(**options)
        self.accuracy = accuracy

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it where the monitors are made."""
        super().on_fit_start(trainer, pl_module)
        for monitor in self.monitors.values():
            monitor.measuring.accuracy = self.accuracy


class _Bar(Callback):
    """One line of progress."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.task = progress, progress.add_task("training", total=steps, ratio="–")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Show the step and the latest stability ratio."""
        ratio = trainer.callback_metrics.get("gfs/stability_ratio")
        text = "–" if ratio is None else f"{float(ratio):.2f}"
        self.progress.update(self.task, completed=trainer.global_step, ratio=text)


def digits() -> tuple[Dataset[tuple[Tensor, ...]], Tensor, Tensor]:
    """The first examples of scikit-learn's digits for training, the others for a test."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3), torch.tensor(labels)
    return TensorDataset(x[:EXAMPLES], y[:EXAMPLES]), x[EXAMPLES:], y[EXAMPLES:]


def run(out: Path, quick: bool = False) -> None:
    """Train, print the table, write the page.

    Raises:
        OSError: ``out`` cannot be written.
    """
    scale = QUICK if quick else FULL
    console = Console()
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tensorboard", "history.jsonl", "alarms"):  # of an earlier demo in the same folder
        old = out / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    console.print(
        f"A {EXAMPLES}-image digit classifier, full-batch gradient descent, learning rate η = {RATE}: "
        f"stable up to a sharpness of 2/η = {2 / RATE:g}."
    )
    accuracy = _train(out, scale, console)
    history = read_history(out / "history.jsonl")
    console.print(_table(history))
    page = out / "index.html"
    report = make_report(read_run(out / "history.jsonl"))
    lead = [*_story(history, accuracy), *report.verdict.sentences]
    write_page(page, title="Gradient descent at the edge of stability", lead=lead, sections=report.sections())
    console.print(
        f"Test accuracy {accuracy:.0%} on {1797 - EXAMPLES} images; {time.perf_counter() - began:.0f} s in all."
    )
    console.print(f"The pictures:  {page}\nTensorBoard:   tensorboard --logdir {out / 'tensorboard'}")


def _train(out: Path, scale: Scale, console: Console) -> float:
    data, x, y = digits()
    torch.manual_seed(0)
    model = Classifier()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed}/{task.total}"))
    ratio = TextColumn("stability ratio {task.fields[ratio]}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are faster on one core
    try:
        with Progress(*columns, ratio, TimeElapsedColumn(), console=console) as progress, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer = Trainer(
                max_steps=scale.steps,
                accelerator="cpu",
                logger=TensorBoardLogger(out, name="tensorboard", version=""),
                log_every_n_steps=scale.every,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[
                    _Closely(
                        scale.accuracy,
                        tier="gfs_full",
                        every=scale.full_every,
                        running_every=None,
                        max_overhead=None,
                        history=str(out / "history.jsonl"),
                    ),
                    _Bar(progress, scale.steps),
                ],
            )
            trainer.fit(model, DataLoader(data, batch_size=EXAMPLES))
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        accuracy = float((model.net(x).argmax(1) == y).double().mean())
    return accuracy


def _table(history: list[Measurement]) -> Table:
    table = Table(title="What was measured")
    for name in ("step", "loss", "sharpness", "2/η", "ratio", "GFS_4", "full GFS"):
        table.add_column(name, justify="right")
    marked = [m for m in history if m.gfs_sharpness_full is not None]
    solved = [m for m in history if m.sharpness is not None]  # the others hold an early warning alone
    spread = solved[:: max(1, len(solved) // 12)]
    for m in sorted({m.step: m for m in [*spread, *marked]}.values(), key=lambda m: m.step):
        values = (m.loss_probe, m.sharpness, m.threshold, m.stability_ratio, m.gfs_sharpness, m.gfs_sharpness_full)
        table.add_row(str(m.step), *("" if v is None else f"{v:.3g}" if v < 0.1 else f"{v:.2f}" for v in values))
    return table


def _story(history: list[Measurement], accuracy: float) -> list[str]:
    """What happened, in words; only what the numbers of this run say."""
    edge = next((m for m in history if (m.stability_ratio or 0) >= 1), None)
    full = [(m.step, m.gfs_sharpness_full) for m in history if m.gfs_sharpness_full is not None]
    story = [
        "Sharpness says how steeply the loss curves in its steepest direction. Gradient descent with learning rate η "
        f"is stable only where it stays below 2/η, here {2 / RATE:g}: the dashed line."
    ]
    if edge is None:
        story.append("In this short run the sharpness did not reach that line; run `gfs demo` without `--quick`.")
    else:
        late = [m.sharpness for m in history if m.step > edge.step and m.sharpness is not None]
        story.append(
            f"Training itself drove the sharpness up to the line at step {edge.step}. It did not diverge there: the "
            f"sharpness swung between {min(late):.1f} and {max(late):.1f} from then on, and the loss swung with it. "
            "That is the edge of stability, and why a loss curve alone cannot tell a healthy run from the start of a "
            "divergence."
        )
    if len(full) > 1:
        rises = [(a, b) for a, b in pairwise(full) if b[1] > a[1] * (1 + _ERROR_BAR)]
        fell = (
            "it fell from each to the next"
            if not rises
            else "it fell but for "
            + " and ".join(f"a rise of {b[1] / a[1] - 1:.1%} from step {a[0]} to {b[0]}" for a, b in rises)
        )
        story.append(
            "The steadier quantity is the sharpness of the gradient flow solution (GFS): where the smooth path of "
            "steepest descent, started from the present weights, would end. Computed to its end at "
            f"{len(full)} steps, {fell} (rises within its error bar of {_ERROR_BAR:.1%} "
            f"not counted), from {full[0][1]:.1f} to {full[-1][1]:.1f}, above the raw "
            "sharpness. That it falls is a theorem for scalar networks (Kreisler et al. 2023, under "
            "conditions) and a measurement here, not a guarantee."
        )
    story.append(
        "GFS_4 follows the flow for the length of four steps only. It is the raw sharpness with its swing taken out, "
        "cheap enough for daily use, and not the paper's quantity."
    )
    return story
