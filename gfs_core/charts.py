"""What the loggers draw together: TensorBoard's custom scalars, and one chart of a W&B run."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gfs_core.errors import GFSWarning
from gfs_core.run.record import LOG_PREFIX

_SHARPNESS = "Sharpness and threshold"
CHARTS: dict[str, tuple[str, ...]] = {
    _SHARPNESS: (
        "sharpness",
        "preconditioned_sharpness",
        "running_sharpness",
        "gfs_sharpness",
        "gfs_sharpness_full",
        "threshold",
    ),
    "Stability ratio and alarm": (
        "stability_ratio",
        "running_stability_ratio",
        "mean_square_stability_ratio",
        "gfs_stability_ratio",
        "alarm",
    ),
    "Learning rate": ("lr_effective",),
    "Overhead": ("overhead",),
}
"""Log keys without their prefix, by the title of the chart that shows them together."""

# The rate asked for is logged by others: Lightning's LearningRateMonitor (which logs momentum and decay beside it) …
_ASKED = (r"lr-(?!.*-(momentum|weight_decay)$)", r"train/learning_rate$")  # … and the Hugging Face Trainer.
_PREFIX = "(.+-)?"  # what a logger of Lightning may put in front of every tag
_LAYOUT_TAG = b"custom_scalars__config__"
_MOST = 1000  # points of a line


def layout(names: Iterable[str] = ("",)) -> dict[str, dict[str, list[str]]]:
    """The charts as ``{category: {title: [tag, …]}}``; the tags are regular expressions, as TensorBoard reads them.

    Args:
        names: of the optimizers in the log; empty for one that goes without.
    """
    categories = {}
    for name in names:
        head = f"{LOG_PREFIX}{name}/" if name else LOG_PREFIX
        spelt = re.sub(r"[^-/\w]", ".", head)  # tensorboardX writes _ for other characters, torch keeps them
        charts = {title: [f"{spelt}{key}$" for key in keys] for title, keys in CHARTS.items()}
        charts["Learning rate"] += _ASKED
        categories[head.rstrip("/")] = {title: [_PREFIX + tag for tag in tags] for title, tags in charts.items()}
    return categories


def add_to_tensorboard(writer: Any, names: Iterable[str] = ("",)) -> None:
    """Write the layout into the run of ``writer``, unless there is one.

    TensorBoard shows one layout of a run: the one that was written last. One of the user's is therefore left alone,
    and one that is written later takes the place of this. A folder that cannot be looked into gets none.

    Args:
        writer: a ``SummaryWriter``; one without custom scalars is left alone.
        names: of the optimizers in the log.
    """
    folder = getattr(writer, "log_dir", None) or getattr(writer, "logdir", None)  # torch's, tensorboardX's
    if not folder or not hasattr(writer, "add_custom_scalars"):
        return
    with contextlib.suppress(OSError):
        writer.flush()
        if Path(folder).is_dir() and not any(map(_has_layout, Path(folder).glob("*tfevents*"))):
            charts = {
                category: {title: ["Multiline", tags] for title, tags in charts.items()}
                for category, charts in layout(names).items()
            }
            writer.add_custom_scalars(charts)


def _has_layout(path: Path) -> bool:
    """Whether an event file holds a layout: its tag stands in there as it is."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(_LAYOUT_TAG) >= 0


@dataclass
class _Line:
    """Values by step; of more than ``_MOST``, the largest of each few: no spike is lost."""

    points: list[tuple[int, float]] = field(default_factory=list)
    seen: int = 0
    each: int = 1  # values that share a point

    def add(self, step: int, value: float) -> None:
        if self.seen == self.each * _MOST:
            self.points = [max(pair, key=_value) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self.each *= 2
        if self.seen % self.each == 0:
            self.points.append((step, value))
        else:
            self.points[-1] = max(self.points[-1], (step, value), key=_value)
        self.seen += 1


def _value(point: tuple[int, float]) -> float:
    return point[1]


class WandbPanel:
    """The panels of a W&B run: one per key over the trainer's steps, and sharpness and threshold in one chart.

    W&B keeps layouts on its server, so that chart is a table which is logged when training ends. It works offline.

    Args:
        run: the W&B run.
        step_key: the key under which the trainer's step stands in each row.
    """

    def __init__(self, run: Any, step_key: str) -> None:
        self.run, self.step_key = run, step_key
        self._lines: dict[str, dict[str, _Line]] = {}  # by what stands before the key, then by key
        self._step = 0
        with _told():
            run.define_metric(f"{LOG_PREFIX}*", step_metric=step_key)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Take in what was logged at ``step``."""
        self._step = step
        for tag, value in values.items():
            head, _, key = tag.rpartition("/")
            if key in CHARTS[_SHARPNESS]:
                self._lines.setdefault(head, {}).setdefault(key, _Line()).add(step, value)

    def draw(self) -> None:
        """Log the chart, once; nothing where there is nothing to draw."""
        for head, lines in self._lines.items():
            if "preconditioned_sharpness" in lines:  # the one that belongs to the threshold
                lines.pop("sharpness", None)
            steps = [[step for step, _ in line.points] for line in lines.values()]
            values = [[value for _, value in line.points] for line in lines.values()]
            with _told():
                plot = sys.modules["wandb"].plot
                chart = plot.line_series(steps, values, keys=list(lines), title=_SHARPNESS, xname="step")
                self.run.log({f"{head}/sharpness_and_threshold": chart, self.step_key: self._step})
        self._lines = {}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A panel that cannot be had costs a warning, never the training."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"gfs: W&B did not take a panel ({type(error).__name__}: {error})", GFSWarning, stacklevel=4)
