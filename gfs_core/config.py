"""All options, declared once: names, types, defaults and help."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from gfs_core.errors import ConfigError

Tier: TypeAlias = Literal["directional", "running", "batch_sharpness", "sharpness", "gfs", "gfs_full"]
TIERS: tuple[Tier, ...] = get_args(Tier)  # cheapest first
Policy: TypeAlias = Literal["observe", "cap", "follow", "step_down", "warmup", "cdat"]
_MOST = 1e300  # of an option that is multiplied: nothing overflows
# The words that turn an option off, as a parser of types has to list them; YAML makes `false` of a bare `off`.
Off: TypeAlias = Literal["none", "None", "NONE", "null", "Null", "NULL", "off", "Off", "OFF", False]
_EVERY: dict[Tier, str] = {tier: f"{tier}_every" for tier in TIERS[:-1]}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GFSConfig:
    """Options of a :class:`~gfs_core.run.monitor.StabilityMonitor`, and so of every adapter.

    The help of each option is in its metadata; ``GFSConfig.help()`` gives it as a dictionary. An option that may be
    ``None`` takes the words none, null and off for it too, in any case, and ``False``, which YAML makes of a bare off.

    Raises:
        ConfigError: an option is out of its range.
    """

    tier: Literal["directional", "running", "batch_sharpness", "sharpness", "gfs", "gfs_full"] = _option(
        "gfs",
        "Dearest quantity measured: directional, the curvature along the last step; running, an average of single "
        "products on parts of batches; batch_sharpness, the curvature along the gradients of single "
        "batches; sharpness, solved for on the probe; gfs adds the short-horizon GFS sharpness; gfs_full adds "
        "the full gradient flow solution (small models only).",
    )
    every: int = _option(
        10, "Optimizer steps between measurements of that tier; the budget may lengthen it, never shorten."
    )
    directional_every: int | None = _option(
        None, "Steps between directional measurements beside a dearer tier; null: none."
    )
    running_every: int | None = _option(
        5, "Steps between products for the running estimate beside a dearer tier; null: none."
    )
    running_parts: int = _option(
        16,
        "Parts that a batch is cut into for the running estimate; each product is computed on one of them. A loss that "
        "is not the mean over its parts is measured on whole batches, at four times the interval.",
    )
    batch_sharpness_every: int | None = _option(
        None, "Steps between measurements of the batch sharpness beside a dearer tier; null: none."
    )
    sharpness_every: int | None = _option(
        None, "Steps between measurements of the sharpness alone, beside a dearer tier; null: none."
    )
    gfs_every: int | None = _option(
        None, "Steps between measurements of the short-horizon GFS sharpness, beside tier gfs_full; null: none."
    )
    directional: Literal["product", "losses"] = _option(
        "product",
        "How the directional tier measures: by a Hessian-vector product and a gradient, or by forward passes only.",
    )
    max_overhead: float | None = _option(
        0.05, "Fraction of wall time that measuring may take after the first measurement; null: no budget."
    )
    horizon: float = _option(4.0, "Flow time of the short-horizon GFS sharpness, in units of the learning rate.")
    probe: Literal["batch", "fixed"] = _option(
        "batch", "Measure on the current batch, or on a fixed probe of the first batches."
    )
    probe_batches: int = _option(1, "Batches in the fixed probe.")
    probe_size: int | None = _option(None, "Examples of a batch used for measuring; null: all of them.")
    micro_batch: int | None = _option(
        None,
        "Examples measured at once: the probe streams through in pieces of that size, for less memory and about twice "
        "the time; null: each batch at once.",
    )
    max_memory: float | None = _option(
        None,
        "GiB that a measurement may take beside the weights, for its vectors and for what the loss keeps for its "
        "backward pass; where that is not enough, the next one is on half as many examples; null: no limit.",
    )
    sync: Literal["global", "local"] = _option(
        "global",
        "With several processes: global measures the mean loss over all of them; local that of rank 0 alone, whose "
        "values all of them use, and sends no vector.",
    )
    hvp: Literal["auto", "exact", "gradients"] = _option(
        "auto", "How Hessian-vector products are computed: by double backward, from gradients, or whichever works."
    )
    precision: Literal["auto", "training", "float32"] = _option(
        "auto",
        "Precision of measuring where training uses less than float32. auto: exact products as training computes them, "
        "checked now and then, everything else in float32, and all of it instead of float16; training: everything as "
        "training computes it; float32: everything in float32.",
    )
    tol: float = _option(1e-2, "Relative residual at which an eigenvalue counts as converged.")
    rtol: float = _option(1e-2, "Relative error of the sharpness that the flow aims at.")
    max_hvps: int = _option(100, "Hessian-vector products allowed per eigenvalue.")
    max_grads: int = _option(
        20_000, "Gradients allowed per full gradient flow solution; a short-horizon one has 100 at rtol 1e-2."
    )
    control: Literal["observe", "cap", "follow", "step_down", "warmup", "cdat"] = _option(
        "observe",
        "What is done with the learning rate: observe, nothing; cap, held below the rate at which the stability ratio "
        "would be `margin`; follow, put there, in the shape of the schedule; step_down, halved by an alarm; warmup, "
        "cap until nothing is held back any more; cdat, put at `margin` of the critical rate along the steps. The "
        "user's scheduler and logged rate stay as they are.",
    )
    margin: float | None = _option(
        None,
        "Stability ratio that a control keeps below; 1 is the edge of stability. null: 0.5, and 0.75 for optimizers "
        "with second moments (Adam and its kind).",
    )
    alarm: Literal["off", "log", "warn", "stop"] = _option(
        "log",
        "What an early warning does: off, there is none; log, it is logged and kept in the history; warn, it is also "
        "shown; stop, an alarm also ends the training.",
    )
    alarm_checkpoint: bool = _option(False, "Save a checkpoint at an alarm, before training goes on or is stopped.")
    history: str | None = _option(
        None, "Path of the JSON-lines history; null: beside the framework's own logs, where there are any."
    )
    strict: bool = _option(False, "Raise where a measurement fails, instead of warning once and training on.")
    seed: int = _option(0, "Seed of the random directions of the eigenvalue solver.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            if may_be_off(hints[f.name]) and is_off(getattr(self, f.name)):
                object.__setattr__(self, f.name, None)
            self._check_type(f.name, hints[f.name], getattr(self, f.name))
        counts = (
            "every",
            "running_parts",
            "probe_batches",
            "probe_size",
            "micro_batch",
            "max_hvps",
            "max_grads",
            *_EVERY.values(),
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be ≥ 1, got {value}")
        for name in ("horizon", "tol", "rtol"):
            value = getattr(self, name)
            if not 0 < value <= _MOST:
                raise ConfigError(f"`{name}` must be a finite number > 0, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"`seed` must be an integer of 64 bits, got {self.seed}")
        if self.max_memory is not None and not 0 < self.max_memory <= _MOST:
            raise ConfigError(f"`max_memory` must be a number of GiB > 0, or None for no limit; got {self.max_memory}")
        if self.max_overhead is not None and not 0 < self.max_overhead <= 1:
            raise ConfigError(f"`max_overhead` must be in (0, 1], or None for no budget; got {self.max_overhead}")
        if self.margin is not None and not 0 < self.margin <= 1:
            raise ConfigError(f"`margin` must be in (0, 1], the edge of stability; got {self.margin}")
        no_ratio = self.tier == "directional" or (self.tier == "batch_sharpness" and self.running_every is None)
        if self.control in ("cap", "follow", "warmup") and no_ratio:
            raise ConfigError(
                f"control={self.control!r} needs a stability ratio, and there is none with tier={self.tier!r}; "
                "use tier='running' or a dearer one"
            )
        if self.alarm_checkpoint and self.alarm == "off":
            raise ConfigError("`alarm_checkpoint` needs an alarm, and `alarm` is 'off'; use 'log', 'warn' or 'stop'")
        if self.control == "step_down" and self.alarm == "off":
            raise ConfigError("control='step_down' goes by alarms, and `alarm` is 'off'; use 'log', 'warn' or 'stop'")
        defaults = {f.name: f.default for f in fields(self)}
        for tier in TIERS[TIERS.index(self.tier) : -1]:
            if getattr(self, _EVERY[tier]) not in (None, defaults[_EVERY[tier]]):
                raise ConfigError(
                    f"`{_EVERY[tier]}` is for tiers dearer than {tier!r}, and `tier` is {self.tier!r}; use `every`"
                )

    def cadence(self) -> dict[Tier, int]:
        """Steps between measurements of each tier that is on, cheapest first."""
        cheaper = TIERS[: TIERS.index(self.tier)]
        steps: dict[Tier, int | None] = {tier: getattr(self, _EVERY[tier]) for tier in cheaper}
        return {tier: every for tier, every in (steps | {self.tier: self.every}).items() if every is not None}

    @staticmethod
    def _check_type(name: str, hint: Any, value: Any) -> None:
        choices = [a for a in get_args(hint) if isinstance(a, str)]
        if choices:
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}")
            return
        allowed = get_args(hint) or (hint,)
        number = isinstance(value, int) and not isinstance(value, bool) and float in allowed
        if isinstance(value, bool) != (bool in allowed) or not (isinstance(value, allowed) or number):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"`{name}` must be {wanted}, got {value!r}")

    @classmethod
    def from_options(cls, **options: Any) -> GFSConfig:
        """A config from keyword arguments.

        Raises:
            ConfigError: an option is not known, or out of its range.
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option `{name}`; the options are {', '.join(sorted(known))}")
        return cls(**options)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Help text of each option, by name."""
        return {f.name: _help(f) for f in fields(cls)}


def may_be_off(hint: Any) -> bool:
    """Whether an option of this type may be ``None``."""
    return type(None) in get_args(hint)


def is_off(value: Any) -> bool:
    """Whether a value of an option that may be ``None`` stands for it."""
    return value is False or (isinstance(value, str) and value.lower() in get_args(Off))


def _help(f: Field[Any]) -> str:
    return str(f.metadata["help"])
