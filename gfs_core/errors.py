"""What can go wrong, as types and in words."""

from __future__ import annotations

from enum import Enum


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
