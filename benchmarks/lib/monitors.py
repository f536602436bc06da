"""Monitors that measure as no option says."""

from __future__ import annotations

import gfs_core as gfs
from gfs_core.signals.curvature import RunningCurvature


def put_running(monitor: gfs.StabilityMonitor, signal: RunningCurvature) -> None:
    """Let this signal take the place of the monitor's running estimate."""
    signals = monitor.measuring.signals
    signals.all = [signal if held.name == signal.name else held for held in signals.all]


def kept(monitor: gfs.StabilityMonitor) -> int:
    """Copies of the weights that the signals keep from one measurement to the next."""
    state = monitor.measuring.signals.state_dict()
    solved, running = state["sharpness"], state["running"]["estimate"]
    return sum(v is not None for v in (solved["raw"], solved["preconditioned"], running["vector"]))
