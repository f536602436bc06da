"""What one measurement holds; its fields are the log keys."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

LOG_PREFIX = "gfs/"


def _key(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True)
class Measurement:
    """One measurement; a value that could not be had is ``None``, and ``reasons`` says why.

    The fields that are numbers are the log keys without their prefix ``gfs/``.
    """

    step: int
    optimizer_name: str = ""
    sharpness: float | None = _key("largest eigenvalue λ₁ of the loss Hessian on the probe")
    preconditioned_sharpness: float | None = _key(
        "largest eigenvalue in the optimizer's own coordinates; adaptive optimizers, weight decay, several rates"
    )
    threshold: float | None = _key("the (preconditioned) sharpness at which the optimizer stops being stable")
    stability_ratio: float | None = _key(
        "(preconditioned) sharpness / threshold; 1 is the edge of stability. Of an optimizer whose threshold is not "
        "known: learning rate / critical_lr"
    )
    gfs_sharpness: float | None = _key(
        "the same eigenvalue after gradient flow for `horizon` learning rates: raw sharpness without its oscillation"
    )
    gfs_stability_ratio: float | None = _key("gfs_sharpness / threshold")
    gfs_sharpness_full: float | None = _key("sharpness of the full gradient flow solution, the paper's quantity")
    running_sharpness: float | None = _key(
        "running estimate of the (preconditioned) sharpness of the training loss, by single products on parts of "
        "batches: noisy, and mostly somewhat low"
    )
    running_stability_ratio: float | None = _key("running_sharpness / threshold: often and cheap")
    mean_square_stability_ratio: float | None = _key(
        "stability ratio over the latest parts, with the spread of the curvature from batch to batch: 1 is the edge at "
        "which noisy steps, momentum included, stop being stable in the mean square"
    )
    mean_square_bound: float | None = _key(
        "the same from single products, so that how far the estimate's direction lags behind counts as noise: what a "
        "control goes by"
    )
    batch_sharpness: float | None = _key(
        "mean over batches of the curvature of a batch's own loss along its own (preconditioned) gradient"
    )
    directional_sharpness: float | None = _key("curvature uᵀHu/‖u‖² along the last step u really taken")
    critical_lr: float | None = _key("learning rate at which a step in that direction would stop lowering the loss")
    loss_probe: float | None = _key("loss on the probe")
    learning_rate: float | None = _key("rate of the optimizer's reference group")
    lr_effective: float | None = _key("learning rate that the coming step really uses; where there is a control")
    lr_scale: float | None = _key("lr_effective / the rate that the user's scheduler sets")
    alarm: int | None = _key("early warning: 0 quiet, 1 watch, 2 alarm; the reason is in the history")
    overhead: float | None = _key("fraction of the run's wall time spent measuring so far")
    hvps: int | None = _key("Hessian-vector products of this measurement")
    grad_evals: int | None = _key("gradients of this measurement")
    residual: float | None = _key("bound on the distance of the sharpness to an eigenvalue, relative to it")
    precision_error: float | None = _key(
        "relative change of the (preconditioned) sharpness by half precision, where that was checked against float32"
    )
    seconds: float | None = _key("wall time of this measurement")
    reasons: tuple[str, ...] = ()

    def values(self) -> dict[str, float]:
        """The numbers that were had, by field: those that are logged, and those that are in the history alone."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if "help" in f.metadata}
        return {name: float(value) for name, value in held.items() if value is not None}

    def as_log_dict(self) -> dict[str, float]:
        """The values that were had, under their log keys."""
        values = {name: getattr(self, name) for name in _LOGGED}
        return {LOG_PREFIX + name: float(value) for name, value in values.items() if value is not None}


_LOGGED = {
    f.name: str(f.metadata["help"])
    for f in fields(Measurement)
    if "help" in f.metadata
    and f.name not in ("mean_square_bound", "residual", "precision_error", "seconds", "learning_rate")
}


def log_keys() -> dict[str, str]:
    """Every log key with its meaning."""
    return {LOG_PREFIX + name: text for name, text in _LOGGED.items()}
