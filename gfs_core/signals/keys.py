"""Keys that several signals share, and keys that every measurement has."""

from __future__ import annotations

from gfs_core.signals.base import Key

SHARPNESS_CHART = "Sharpness and threshold"
RATIO_CHART = "Stability ratio and alarm"

THRESHOLD = Key(
    "threshold",
    "the (preconditioned) sharpness at which the optimizer stops being stable",
    scales_with_rate=-1,
    chart=SHARPNESS_CHART,
)
STABILITY_RATIO = Key(
    "stability_ratio",
    "(preconditioned) sharpness / threshold; 1 is the edge of stability. Where no eigenvalue was solved for, it is the "
    "running estimate's. Of an optimizer whose threshold is not known: learning rate / critical_lr",
    scales_with_rate=1,
    chart=RATIO_CHART,
)
LEARNING_RATE = Key("learning_rate", "rate of the optimizer's reference group", scales_with_rate=1, logged=False)
LOSS_PROBE = Key("loss_probe", "loss on the probe")
PRECISION_ERROR = Key(
    "precision_error",
    "relative change of the (preconditioned) sharpness by half precision, where that was checked against float32",
    logged=False,
)
HVPS = Key("hvps", "Hessian-vector products of this measurement", whole=True)
GRAD_EVALS = Key("grad_evals", "gradients of this measurement", whole=True)
