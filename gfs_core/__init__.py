"""How close a training run is to instability: the framework-free core.

Only the names listed here are public; modules of this package may change.
"""

from gfs_core.alarm import Alarm, Event, State
from gfs_core.config import GFSConfig
from gfs_core.curvature import Hessian
from gfs_core.eigen import EigenResult, largest_eigenvalues
from gfs_core.errors import ConfigError, GFSError, GFSWarning, MeasurementError, Reason
from gfs_core.flow import Flow
from gfs_core.history import HistoryPart
from gfs_core.history import parts as history_parts
from gfs_core.history import read as read_history
from gfs_core.isolation import Isolation
from gfs_core.measure import gfs_sharpness, sharpness, stability
from gfs_core.measurement import Measurement, log_keys
from gfs_core.monitor import StabilityMonitor
from gfs_core.objective import Objective
from gfs_core.probe import FlowResult
from gfs_core.scheduler import EdgeOfStabilityLR
from gfs_core.stability import Stability, register_optimizer, stability_of

__all__ = [
    "Alarm",
    "ConfigError",
    "EdgeOfStabilityLR",
    "EigenResult",
    "Event",
    "Flow",
    "FlowResult",
    "GFSConfig",
    "GFSError",
    "GFSWarning",
    "Hessian",
    "HistoryPart",
    "Isolation",
    "Measurement",
    "MeasurementError",
    "Objective",
    "Reason",
    "Stability",
    "StabilityMonitor",
    "State",
    "gfs_sharpness",
    "history_parts",
    "largest_eigenvalues",
    "log_keys",
    "read_history",
    "register_optimizer",
    "sharpness",
    "stability",
    "stability_of",
]
