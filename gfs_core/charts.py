"""Charts of several log keys together: TensorBoard's custom scalars, and one chart in a W&B run."""

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
from gfs_core.run.record import KEYS, LOG_PREFIX
from gfs_core.signals.keys import SHARPNESS_CHART

CHARTS: dict[str, tuple[str, ...]] = {}
"""Log keys without their prefix ``gfs/``, by the title of the chart that shows them together."""
for _key in KEYS.values():
    if _key.chart:
        CHARTS[_key.chart] = (*CHARTS.get(_key.chart, ()), _key.name)

# The user's rate is logged by Lightning's LearningRateMonitor, whose tags for momentum and weight decay are left out,
# and by the Hugging Face Trainer.
_ASKED = (r"lr-(?!.*-(momentum|weight_decay)$)", r"train/learning_rate$")
_PREFIX = "(.+-)?"  # the prefix that a Lightning logger may put before every tag
_LAYOUT_TAG = b"custom_scalars__config__"
_MOST_POINTS = 1000  # largest number of points in a line


def layout(names: Iterable[str] = ("",)) -> dict[str, dict[str, list[str]]]:
    """The charts as ``{category: {title: [tag, …]}}``; each tag is a regular expression for TensorBoard.

    Args:
        names: names of the optimizers in the log; an empty name for an optimizer that is logged without one.
    """
    categories = {}
    for name in names:
        head = f"{LOG_PREFIX}{name}/" if name else LOG_PREFIX
        spelt = re.sub(r"[^-/\w]", ".", head)  # tensorboardX replaces other characters by _, torch keeps them
        charts = {title: [f"{spelt}{key}$" for key in keys] for title, keys in CHARTS.items()}
        charts["Learning rate"] += _ASKED
        categories[head.rstrip("/")] = {title: [_PREFIX + tag for tag in tags] for title, tags in charts.items()}
    return categories


def add_to_tensorboard(writer: Any, names: Iterable[str] = ("",)) -> None:
    """Write the layout into the run of ``writer``, unless the run has one.

    TensorBoard shows only the last layout of a run. So a layout that the user has written is kept, and one that the
    user writes later replaces this one. Nothing is written if the folder cannot be read.

    Args:
        writer: a ``SummaryWriter``; nothing is written if it has no ``add_custom_scalars``.
        names: names of the optimizers in the log.
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
    """Whether an event file holds a layout; the tag of one appears in the file as plain bytes."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(_LAYOUT_TAG) >= 0


@dataclass
class _Line:
    """Values by step. With more than ``_MOST_POINTS``, one point is the largest of several values, so spikes stay."""

    points: list[tuple[int, float]] = field(default_factory=list)
    seen: int = 0
    each: int = 1  # values that share a point

    def add(self, step: int, value: float) -> None:
        if self.seen == self.each * _MOST_POINTS:
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
    """The panels of a W&B run: one per key over the trainer's steps, and one chart of sharpness and threshold.

    W&B keeps layouts on its server. So the chart is a table, which is logged when training ends. This works offline.

    Args:
        run: the W&B run.
        step_key: the key of the trainer's step in each logged row.
    """

    def __init__(self, run: Any, step_key: str) -> None:
        self.run, self.step_key = run, step_key
        self._lines: dict[str, dict[str, _Line]] = {}  # by the part of the tag before the key, then by key
        self._step = 0
        with _told():
            run.define_metric(f"{LOG_PREFIX}*", step_metric=step_key)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record values that were logged at ``step``, by tag."""
        self._step = step
        for tag, value in values.items():
            head, _, key = tag.rpartition("/")
            if key in CHARTS[SHARPNESS_CHART]:
                self._lines.setdefault(head, {}).setdefault(key, _Line()).add(step, value)

    def draw(self) -> None:
        """Log the chart, if there are values that were not drawn yet."""
        for head, lines in self._lines.items():
            if "preconditioned_sharpness" in lines:  # then the threshold belongs to it, and not to the plain one
                lines.pop("sharpness", None)
            steps = [[step for step, _ in line.points] for line in lines.values()]
            values = [[value for _, value in line.points] for line in lines.values()]
            with _told():
                plot = sys.modules["wandb"].plot
                chart = plot.line_series(steps, values, keys=list(lines), title=SHARPNESS_CHART, xname="step")
                self.run.log({f"{head}/sharpness_and_threshold": chart, self.step_key: self._step})
        self._lines = {}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A context in which a failure becomes a warning, so that it does not end the training."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"gfs: W&B did not take a panel ({type(error).__name__}: {error})", GFSWarning, stacklevel=4)
