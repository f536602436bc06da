"""Errors, warnings, and the reasons why a computation ended."""

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
    """A value could not be measured. A monitor warns and training goes on; with ``strict=True`` it is raised."""


class NoLoss(MeasurementError):
    """The loss function returned ``None``: a batch that training skips."""


class GFSWarning(UserWarning):
    """Something the user should know. Most texts are shown once per run, whatever numbers they hold."""


class Reason(str, Enum):
    """How a computation ended: what happened and what to do about it, in words; empty on success."""

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
    """A sentence that this package's own code is at fault for ``error``, with the place; empty where it is not.

    The package is at fault where the innermost frame of the traceback lies in it, with three exceptions: errors that it
    raises on purpose; errors of CUDA or for lack of memory; and a function of the user's that does not take the
    arguments that it is called with, which fails in the calling frame.
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
