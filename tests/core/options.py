"""A value for every option that is not its default, and what tests set that is no option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gfs_core import StabilityMonitor

# Both adapters must bring each one through.
NOT_DEFAULT = {
    "tier": "gfs_full",
    "every": 7,
    "max_overhead": 0.5,
    "running_every": 4,
    "probe": "fixed",
    "probe_size": 300,
    "max_memory": 2.5,
    "hvp": "gradients",
    "precision": "float32",
    "control": "follow",
    "margin": 0.3,
    "alarm": "warn",
    "history": "somewhere.jsonl",
    "strict": True,
    "seed": 5,
}


def tuned(
    monitor: StabilityMonitor,
    *,
    beside: Mapping[str, int] | None = None,
    parts: int | None = None,
    whole: bool = False,
    **accuracy: Any,
) -> StabilityMonitor:
    """The same monitor, set as no option sets it.

    Args:
        monitor: what is set.
        beside: steps between measurements of further signals, by name.
        parts: that a batch is cut into for the running estimate, whose products are then on parts.
        whole: products of the running estimate are on whole steps, by one gradient, whatever takes less time.
        **accuracy: the fields of :class:`~gfs_core.signals.lab.Accuracy`.
    """
    monitor.schedule.also(beside or {})
    monitor.measuring.accuracy = replace(monitor.measuring.accuracy, **accuracy)
    if parts is not None:
        monitor.measuring.learned.parts, monitor.measuring.learned.whole_cheaper = parts, False
    if whole:
        monitor.measuring.learned.whole_cheaper = True
    return monitor


def tuned_callback(callback: Any, **how: Any) -> Any:
    """The same callback, of either framework, whose monitors are :func:`tuned` as soon as they are made."""
    hook = "on_fit_start" if hasattr(callback, "on_fit_start") else "on_train_begin"
    starts = getattr(callback, hook)

    def started(*args: Any, **kwargs: Any) -> None:
        starts(*args, **kwargs)
        monitors = callback.monitors.values() if hasattr(callback, "monitors") else [callback.monitor]
        for monitor in monitors:
            if monitor is not None:
                tuned(monitor, **how)

    setattr(callback, hook, started)
    return callback
