"""How close a training run is to instability: the framework-free core.

Only the names listed here are public; modules of this package may change.
"""

from gfs_core.api import gfs_sharpness, sharpness, stability
from gfs_core.config import GFSConfig
from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.detectors.early_warning import EarlyWarning
from gfs_core.detectors.profile import Profile
from gfs_core.errors import ConfigError, GFSError, GFSWarning, MeasurementError, Reason
from gfs_core.linalg.eigen import EigenResult, largest_eigenvalues
from gfs_core.loss.flow import Flow
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian
from gfs_core.loss.snapshot import StateSnapshot
from gfs_core.optimizers.thresholds import Stability, register_optimizer, stability_of
from gfs_core.run.alarm_record import AlarmRecord
from gfs_core.run.alarm_record import read as read_alarm
from gfs_core.run.history import HistoryPart
from gfs_core.run.history import parts as history_parts
from gfs_core.run.history import read as read_history
from gfs_core.run.monitor import StabilityMonitor
from gfs_core.run.record import Measurement, log_keys
from gfs_core.run.scheduler import EdgeOfStabilityLR
from gfs_core.search.found import FoundRate
from gfs_core.search.loop import find_rate
from gfs_core.signals.base import Cost, Key, Reading, Signal
from gfs_core.signals.flowing import FlowResult

__all__ = [
    "AlarmRecord",
    "Alert",
    "AlertLevel",
    "ConfigError",
    "Cost",
    "EarlyWarning",
    "EdgeOfStabilityLR",
    "EigenResult",
    "Flow",
    "FlowResult",
    "FoundRate",
    "GFSConfig",
    "GFSError",
    "GFSWarning",
    "Hessian",
    "HistoryPart",
    "Key",
    "Measurement",
    "MeasurementError",
    "Objective",
    "Profile",
    "Reading",
    "Reason",
    "Signal",
    "Stability",
    "StabilityMonitor",
    "StateSnapshot",
    "find_rate",
    "gfs_sharpness",
    "history_parts",
    "largest_eigenvalues",
    "log_keys",
    "read_alarm",
    "read_history",
    "register_optimizer",
    "sharpness",
    "stability",
    "stability_of",
]
