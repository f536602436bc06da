"""What can go wrong, as types and in words."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

_OWN = ("gfs_core", "lightning_gfs", "hf_gfs")


class GFSError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(GFSError, ValueError):
    """An option or argument is wrong; raised before training starts."""


class MeasurementError(GFSError, RuntimeError):
    """A value could not be had. A monitor reports it and goes on; ``strict=True`` raises it."""


class NoLoss(MeasurementError):
    """The loss function returned ``None``: a batch that training skips."""


class GFSWarning(UserWarning):
    """Something the user should know; each text is shown once per run."""


class Reason(str, Enum):
    """How a computation ended. The text is the advice; success is the empty string."""

    OK = ""
    MAX_PRODUCTS = (
        "the eigenvalue did not reach its tolerance within the allowed Hessian-vector products; "
        "raise `max_hvps` or loosen `tol`"
    )
    INEXACT_PRODUCTS = (
        "the tolerance is below the error of the Hessian-vector products; loosen `tol`, or use float64 or hvp='exact'"
    )
    MAX_GRADIENTS = (
        "the flow did not reach its end within the allowed gradients; raise `max_grads`, loosen `rtol`, "
        "or set `loss_cutoff` where the loss has no minimum (separable cross-entropy)"
    )
    STEP_TOO_SMALL = (
        "the flow's step became too small to go on (a kink of the loss, or a tolerance below the precision "
        "of the weights); loosen `rtol` or use float64"
    )
    SADDLE = (
        "the flow from exactly these weights ends at a saddle or on a plateau: the value belongs to it, and the flow "
        "from weights next to these ends elsewhere; change the weights a little to see where"
    )
    NO_END = (
        "the flow has no end: the longer it lasts the slower everything becomes, as where the loss has no minimum "
        "(separable cross-entropy); set `loss_cutoff`"
    )
    LOSS_CUTOFF = "stopped at the loss cutoff: the value belongs to that cutoff, it is not a limit"

    def __str__(self) -> str:
        return self.value


def own_fault(error: BaseException) -> str:
    """In words, that ``error`` was raised by this package's own code, and where; empty where it was not.

    That is where the innermost frame of its traceback lies in this package. A call of the user's function with
    arguments that it does not take fails in the frame that calls it, and is the function's.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    if trace is None or package not in _OWN or isinstance(error, (GFSError, MemoryError)):
        return ""
    if re.search(r"^CUDA error|out of memory", str(error)) or (
        isinstance(error, TypeError) and "argument" in str(error)
    ):
        return ""
    parts = Path(trace.tb_frame.f_code.co_filename).parts
    file = "/".join(parts[len(parts) - parts[::-1].index(package) - 1 :])
    place = f"{file}:{trace.tb_lineno}"
    return f"a mistake in gfs itself, please report it: {type(error).__name__} in {place}: {error}"
