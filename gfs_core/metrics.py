"""The torchmetrics face: the measurements as metrics that accumulate, sync across ranks and plot.

Not imported by ``gfs_core`` itself, which needs torch and nothing more. One class per log key, over one base.
"""

from __future__ import annotations

import warnings
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
    # What is measured. Not a module, without a __dict__, and copied in its own way, so that …
    # - … the model does not become a part of the metric: its weights stay out of the metric's state_dict and .to(),
    #   and a metric that is an attribute of the module it measures makes no circle of modules;
    # - … the isolation of a measurement does not find the monitor behind such a metric, and undo its warm start;
    # - … a clone of the metric refers to the same model, and the metric in a copied module to the copy.
    __slots__ = ("config", "loss_fn", "model", "monitor", "optimizer")

    def __init__(self, model: Any, loss_fn: Any, optimizer: Any, config: GFSConfig) -> None:
        self.model, self.loss_fn, self.optimizer, self.config = model, loss_fn, optimizer, config
        self.monitor: StabilityMonitor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Subject:
        # No monitor yet: a module that is being copied may be empty still.
        model, optimizer = (memo.get(id(x), x) for x in (self.model, self.optimizer))
        return _Subject(model, self.loss_fn, optimizer, self.config)

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
            # Where no optimizer is asked for, the plainest: it costs no eigenvalue but that of H.
            optimizer = SGD(self.model.parameters(), lr=1.0) if self.optimizer is None else self.optimizer
            self.monitor = StabilityMonitor(  # torchmetrics syncs, and its mean is over every batch
                self.model, optimizer, self.config, alone=True, short_batches=True
            )
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
        super().__init__(**options)
        config = GFSConfig(tier=self.tier, every=1, running_every=None, max_overhead=None, **own)
        self.subject = _Subject(model, loss_fn, optimizer, config)
        self.subject.check()
        self.why = ""  # the last measurement's reasons
        # A MetricCollection merges, for good, metrics whose states were equal once: a ratio whose threshold is 1 and a
        # sharpness, or two models that begin alike. NaN equals nothing. First: torchmetrics 1.4 looks no further.
        self.add_state("never_merged", torch.tensor(torch.nan), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.to(next(model.parameters()).device)

    def update(self, batch: Any) -> None:
        """Measure on one batch; the value counts if it was had.

        Args:
            batch: what ``loss_fn`` takes. A list is *one* batch too, as data loaders give them. Read only.
        """
        # A validation loop runs in inference mode, whose tensors autograd refuses: out of it (which turns gradients on
        # as well), and on with copies, which are ordinary tensors.
        with torch.inference_mode(False):
            measurement = self.subject.measure(copied(batch))
        if measurement is None:
            return  # the monitor has told why
        self.why = "; ".join(measurement.reasons)
        value = self._value(measurement)
        if value is not None:
            # Not in place: after a `reset` in inference mode these are inference tensors.
            self.total, self.count = self.total + value, self.count + 1

    def compute(self) -> Tensor:
        """Mean of the values counted, over all ranks; a 0-dim tensor, NaN with a warning where there is none."""
        if self.update_called and not self.count:
            why = f": {self.why}" if self.why else ""
            warnings.warn(f"gfs: {type(self).__name__} is NaN, no update gave a value{why}", GFSWarning, stacklevel=3)
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value of ``forward`` or ``compute``, or a sequence of them; by default what ``compute`` gives.

        Returns:
            Figure and axes of matplotlib; the figure is ``None`` where ``ax`` was given.
        """
        return self._plot(val, ax)

    def _value(self, measurement: Measurement) -> float | None:
        value: float | None = getattr(measurement, self.quantity)
        return value


class Sharpness(_Measured):
    """Largest eigenvalue λ₁ of the loss Hessian on each batch.

    ``compute`` gives the plain mean over the updates, of all ranks: every batch counts the same. λ₁ is convex in H, so
    with batches of one size that mean is never below the sharpness of their union; for the latter use
    ``gfs_core.sharpness(model, loss_fn, [batch, …])``. ``forward`` gives the value on its batch. The model is left
    exactly as it was, also in ``no_grad`` and ``inference_mode``. ``reset`` forgets the values and keeps the
    eigenvector, so that later measurements are cheap.

    A measurement that fails (a loss that is not finite, say) warns once and is not counted; with ``strict=True`` it
    raises.

    Args:
        model: the module measured, referred to and not owned: clones measure the same one, its weights are not part of
            the metric. All its parameters with ``requires_grad`` are the space.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch. To pickle the metric, a function
            that can be pickled.
        **options: ``tol``, ``max_hvps``, ``hvp``, ``probe_size``, ``seed``, ``strict`` as in
            :class:`~gfs_core.GFSConfig`; all others are those of ``torchmetrics.Metric``.

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
    """(Preconditioned) sharpness / threshold of the optimizer as it stands; 1 is the edge of stability.

    For gradient descent λ₁η/2. Adaptive optimizers have no threshold before their first step: such a value is not
    counted. All else is as in :class:`Sharpness`.

    Args:
        model: the module measured.
        loss_fn: ``loss_fn(model, batch)``, a 0-dim tensor, the mean over the batch.
        optimizer: the torch optimizer that steps it, or a wrapper of one; its parameters are the space.
        **options: as for :class:`Sharpness`.

    Raises:
        ConfigError: also where the optimizer's threshold is not known, or it is another model's.

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
    """Largest eigenvalue in the optimizer's own coordinates, of S·(H + shift)·S; with plain SGD, of H.

    Arguments and errors are those of :class:`StabilityRatio`; S and the shift: :mod:`gfs_core.optimizers.thresholds`.
    """

    quantity = "preconditioned_sharpness"

    def _value(self, measurement: Measurement) -> float | None:
        ratio, threshold = measurement.stability_ratio, measurement.threshold
        return None if ratio is None or threshold is None else ratio * threshold  # with plain SGD the field is empty


class GFSSharpness(_Measured):
    """(Preconditioned) sharpness after gradient flow for ``horizon`` learning rates: without the swing of the edge.

    A *short* stretch of flow, not the quantity of Kreisler et al. 2023, which :class:`GFSSharpnessFull` gives.
    Arguments and errors are those of :class:`StabilityRatio`, with the options ``horizon``, ``rtol`` and ``max_grads``.
    """

    quantity = "gfs_sharpness"
    tier: ClassVar[Tier] = "gfs"
    own_options = (*_Measured.own_options, "horizon", "max_grads", "rtol")


class GFSStabilityRatio(_Measured):
    """:class:`GFSSharpness` / threshold of the optimizer as it stands."""

    quantity = "gfs_stability_ratio"
    tier: ClassVar[Tier] = "gfs"
    own_options = GFSSharpness.own_options


class GFSSharpnessFull(_Measured):
    """Sharpness at the *end* of gradient flow (Kreisler et al. 2023, arXiv:2305.13064). For small models.

    Arguments are those of :class:`GFSSharpness`; of the optimizer, only the parameters and the learning rate (for the
    first stretch of flow) are used.
    """

    quantity = "gfs_sharpness_full"
    tier: ClassVar[Tier] = "gfs_full"
    own_options = GFSSharpness.own_options
