"""Measurements as torchmetrics metrics, which accumulate, sync across ranks and plot.

``gfs_core`` itself needs nothing but torch, and so does not import this module. Each class gives one field of a
:class:`~gfs_core.Measurement`.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from gfs_core.config import GFSConfig, Tier
from gfs_core.errors import ConfigError, GFSWarning
from gfs_core.loss.batches import copied
from gfs_core.loss.objective import LossFn
from gfs_core.optimizers.thresholds import named_in_full, parameters_of, stability_of
from gfs_core.run.monitor import StabilityMonitor
from gfs_core.run.record import Measurement
from gfs_core.signals.lab import Accuracy

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name == "torchmetrics":
        raise ModuleNotFoundError(
            "gfs_core.metrics needs torchmetrics: pip install 'gfs-sharpness[metrics]'", name=error.name
        ) from None
    raise

__all__ = [
    "GFSSharpness",
    "GFSSharpnessFull",
    "GFSStabilityRatio",
    "PreconditionedSharpness",
    "Sharpness",
    "StabilityRatio",
]


class _Subject:
    # What is measured. Three choices keep it apart from the metric and the model:
    # - It is no module. So the weights of the model stay out of the metric's state_dict and .to(), and a metric that is
    #   an attribute of the module that it measures makes no cycle of modules.
    # - It has no __dict__. So the snapshot of a measurement does not find the monitor behind such a metric, and does
    #   not undo its warm start.
    # - It has its own __deepcopy__. So a clone of the metric refers to the same model, and the metric inside a copied
    #   module refers to the copy.
    __slots__ = ("accuracy", "config", "loss_fn", "model", "monitor", "optimizer")

    def __init__(self, model: Any, loss_fn: Any, optimizer: Any, config: GFSConfig, accuracy: Accuracy) -> None:
        self.model, self.loss_fn, self.optimizer, self.config = model, loss_fn, optimizer, config
        self.accuracy = accuracy
        self.monitor: StabilityMonitor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Subject:
        # The copy has no monitor yet: a module that is being copied may still be empty.
        model, optimizer = (memo.get(id(x), x) for x in (self.model, self.optimizer))
        return _Subject(model, self.loss_fn, optimizer, self.config, self.accuracy)

    def check(self) -> None:
        if not isinstance(self.model, nn.Module) or not callable(self.loss_fn):
            got = f"{type(self.model).__name__} and {type(self.loss_fn).__name__}"
            raise ConfigError(f"expected a torch.nn.Module and a function `loss_fn(model, batch)`, got {got}")
        own = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not own:
            raise ConfigError("nothing to measure: `model` has no parameter with `requires_grad=True`")
        if self.optimizer is None:
            return
        try:
            stepped = parameters_of(self.optimizer)
        except TypeError as error:
            raise ConfigError(f"`optimizer`: {error}") from None
        if own.isdisjoint(id(p) for p in stepped):
            raise ConfigError("`optimizer` holds no trainable parameter of `model`; give the optimizer that steps it")
        stability = stability_of(self.optimizer, stepped)
        if stability.empirical and self.config.tier != "gfs_full":
            raise ConfigError(
                f"the threshold of {named_in_full(self.optimizer)} is not known; make it known with "
                "`gfs_core.register_optimizer`"
            )

    def measure(self, batch: Any) -> Measurement | None:
        if self.monitor is None:
            self.check()
            # Without an optimizer: plain SGD, which needs no eigenvalue but that of H.
            optimizer = SGD(self.model.parameters(), lr=1.0) if self.optimizer is None else self.optimizer
            self.monitor = StabilityMonitor(  # torchmetrics syncs, and averages over every batch
                self.model, optimizer, self.config, alone=True, short_batches=True
            )
            self.monitor.measuring.accuracy = self.accuracy
        return self.monitor.step(lambda b: self.loss_fn(self.model, b), batch)


class _Measured(Metric):
    """A value measured on every batch given, and its plain mean over them."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    quantity: ClassVar[str]  # the field of Measurement
    tier: ClassVar[Tier] = "sharpness"
    own_options: ClassVar[tuple[str, ...]] = ("hvp", "max_hvps", "probe_size", "seed", "strict", "tol")

    total: Tensor
    count: Tensor

    def __init__(self, model: nn.Module, loss_fn: LossFn, optimizer: Any, **options: Any) -> None:
        own = {name: options.pop(name) for name in self.own_options if name in options}
        try:
            super().__init__(**options)
        except ValueError as error:
            names = ", ".join(sorted(self.own_options))
            raise ValueError(f"{error}; the options of {type(self).__name__} are {names}") from None
        accuracy = Accuracy(**{f.name: own.pop(f.name) for f in fields(Accuracy) if f.name in own})
        config = GFSConfig(tier=self.tier, every=1, running_every=None, max_overhead=None, **own)
        self.subject = _Subject(model, loss_fn, optimizer, config, accuracy)
        self.subject.check()
        self.why = ""  # the last measurement's reasons
        # A MetricCollection permanently merges metrics whose states are equal once, such as those of two models that
        # begin alike. NaN equals nothing. This state comes first, as torchmetrics 1.4 compares the first one only.
        self.add_state("never_merged", torch.tensor(torch.nan), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.to(next(model.parameters()).device)

    def update(self, batch: Any) -> None:
        """Measure on one batch; the value counts if there is one.

        Args:
            batch: what ``loss_fn`` takes. A list is *one* batch too, as a DataLoader gives it. It is not changed.
        """
        # A validation loop may run in inference mode, and autograd refuses inference tensors. So inference mode is left
        # (which turns gradients on as well), and the batch is copied: the copies are ordinary tensors.
        with torch.inference_mode(False):
            measurement = self.subject.measure(copied(batch))
        if measurement is None:
            return  # the monitor has warned
        self.why = "; ".join(measurement.reasons)
        value = self._value(measurement)
        if value is not None:
            # Not in place: after a `reset` in inference mode these are inference tensors.
            self.total, self.count = self.total + value, self.count + 1

    def compute(self) -> Tensor:
        """Mean of the values of all updates on all ranks, a 0-dim tensor; NaN with a warning where there is none."""
        if self.update_called and not self.count:
            why = f": {self.why}" if self.why else ""
            warnings.warn(f"gfs: {type(self).__name__} is NaN, no update gave a value{why}", GFSWarning, stacklevel=3)
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value of ``forward`` or ``compute``, or a sequence of them; by default the value of ``compute``.

        Returns:
            Figure and axes of matplotlib; the figure is ``None`` where ``ax`` was given.
        """
        return self._plot(val, ax)

    def _value(self, measurement: Measurement) -> float | None:
        value: float | None = getattr(measurement, self.quantity)
        return value


class Sharpness(_Measured):
    """Largest eigenvalue λ₁ of the loss Hessian on each batch.

    ``compute`` gives the plain mean over the updates on all ranks: every batch counts the same. λ₁ is convex in H. So
    with batches of one size the mean is never below the sharpness of their union; for that, use
    ``gfs_core.sharpness(model, loss_fn, [batch, …])``. ``forward`` gives the value on its batch. The model is left
    exactly as it was, also in ``no_grad`` and ``inference_mode``. ``reset`` forgets the values and keeps the
    eigenvector, so that later measurements are cheap.

    A measurement that fails (a loss that is not finite, say) warns once and is not counted; with ``strict=True`` it
    raises.

    Args:
        model: the module measured. The metric refers to it and does not own it: clones measure the same module, and its
            weights are not part of the metric. The Hessian is over all its parameters with ``requires_grad``.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch. The metric can be pickled if this
            function can.
        **options: ``tol`` and ``max_hvps`` as in :func:`gfs_core.sharpness` (by default 1e-2 and 100), ``hvp``,
            ``probe_size``, ``seed`` and ``strict`` as in :class:`~gfs_core.GFSConfig`. All others are those of
            ``torchmetrics.Metric``.

    Raises:
        ConfigError: an option is out of its range, or there is nothing to measure.

    Example:
        >>> import torch
        >>> from gfs_core.metrics import Sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> metric = Sharpness(model, lambda m, b: 0.5 * m(b).square().mean())
        >>> metric(torch.tensor([[3.0]]))  # ½(3w)²: 9
        tensor(9.)
        >>> metric.update(torch.tensor([[1.0]]))  # ½w²: 1
        >>> metric.compute()
        tensor(5.)
    """

    quantity = "sharpness"

    def __init__(self, model: nn.Module, loss_fn: LossFn, **options: Any) -> None:
        super().__init__(model, loss_fn, None, **options)


class StabilityRatio(_Measured):
    """(Preconditioned) sharpness / threshold of the optimizer in its present state; 1 is the edge of stability.

    For gradient descent it is λ₁η/2. Adaptive optimizers have no threshold before their first step, and an update
    without a threshold is not counted. All else is as in :class:`Sharpness`.

    Args:
        model: the module measured.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch.
        optimizer: the torch optimizer that steps it, or a wrapper of one; the Hessian is over its parameters.
        **options: as for :class:`Sharpness`.

    Raises:
        ConfigError: as for :class:`Sharpness`; also where the optimizer's threshold is not known, or where the
            optimizer belongs to another model.

    Example:
        >>> import torch
        >>> from gfs_core.metrics import StabilityRatio
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # threshold 2/0.1
        >>> StabilityRatio(model, lambda m, b: 0.5 * m(b).square().mean(), optimizer)(torch.tensor([[3.0]]))
        tensor(0.4500)
    """

    quantity = "stability_ratio"


class PreconditionedSharpness(_Measured):
    """Largest eigenvalue of S·(H + shift)·S, the Hessian in the optimizer's coordinates; with plain SGD, of H.

    S and the shift are defined in :mod:`gfs_core.optimizers.thresholds`. Arguments and errors are those of
    :class:`StabilityRatio`.
    """

    quantity = "preconditioned_sharpness"

    def _value(self, measurement: Measurement) -> float | None:
        ratio, threshold = measurement.stability_ratio, measurement.threshold
        return None if ratio is None or threshold is None else ratio * threshold  # with plain SGD the field is empty


class GFSSharpness(_Measured):
    """(Preconditioned) sharpness after gradient flow for a time of ``horizon`` learning rates.

    The flow removes the oscillation of the weights at the edge of stability. It is *short*: the quantity of Kreisler et
    al. 2023 is that of :class:`GFSSharpnessFull`. Arguments and errors are those of :class:`StabilityRatio`, with the
    options ``horizon``, ``rtol`` and ``max_grads`` as in :func:`gfs_core.stability`.
    """

    quantity = "gfs_sharpness"
    tier: ClassVar[Tier] = "gfs"
    own_options = (*_Measured.own_options, "horizon", "max_grads", "rtol")


class GFSStabilityRatio(_Measured):
    """:class:`GFSSharpness` / threshold of the optimizer in its present state."""

    quantity = "gfs_stability_ratio"
    tier: ClassVar[Tier] = "gfs"
    own_options = GFSSharpness.own_options


class GFSSharpnessFull(_Measured):
    """Sharpness at the *end* of gradient flow (Kreisler et al. 2023, arXiv:2305.13064). For small models.

    Arguments are those of :class:`GFSSharpness`. Of the optimizer, only the parameters and the learning rate are used:
    the rate sets the time of the first stretch of flow, after which its end is looked for.
    """

    quantity = "gfs_sharpness_full"
    tier: ClassVar[Tier] = "gfs_full"
    own_options = GFSSharpness.own_options
