"""All options, each declared once with its name, type, default and help text."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from gfs_core.errors import ConfigError

Tier: TypeAlias = Literal["directional", "running", "batch_sharpness", "sharpness", "midpoint", "gfs", "gfs_full"]
TIERS: tuple[Tier, ...] = get_args(Tier)  # cheapest first
BY_LOSSES = ("guard", "start", "plateau")  # values of the option `control` that go by losses and alarms
Policy: TypeAlias = Literal["observe", "cap", "follow", "warmup", "cdat"]  # by measurements
_SHORT_BESIDE_FULL = 10  # steps between short-horizon GFS sharpnesses at tier gfs_full; the full one is much dearer
_LARGEST_FACTOR = 1e300  # upper limit of an option, so that products with it do not overflow
# The words that turn an option off. Parsers of type hints need them listed. YAML reads a bare `off` as false.
Off: TypeAlias = Literal["none", "None", "NONE", "null", "Null", "NULL", "off", "Off", "OFF", False]

# Removed options of release 0.1, and what to use in their place.
GONE = {
    "directional_every": "use `tier='directional'`; optimizers whose threshold is not known are measured so anyway",
    "running_parts": "a batch is cut into 16 parts, and into more where memory is short",
    "batch_sharpness_every": "use `tier='batch_sharpness'`",
    "sharpness_every": "use `every`: each dearer tier measures the sharpness too",
    "gfs_every": "beside tier 'gfs_full' the short-horizon GFS sharpness is measured at every tenth step",
    "directional": "the directional tier goes by products",
    "horizon": "the flow time is 4 learning rates; use `gfs_core.gfs_sharpness(horizon=...)` for another",
    "probe_batches": "use `probe_size`: a fixed probe collects batches until it has so many examples",
    "micro_batch": "use `max_memory`, or `probe_size` to measure on fewer examples",
    "sync": "several processes measure the mean loss over all of them; `max_overhead` limits what that takes",
    "tol": "use `gfs_core.sharpness(tol=...)` for an eigenvalue that is known more closely",
    "rtol": "use `gfs_core.gfs_sharpness(rtol=...)` for a flow that is followed more closely",
    "max_hvps": "use `max_overhead` to limit the cost, or `gfs_core.sharpness(max_hvps=...)`",
    "max_grads": "use `max_overhead` to limit the cost, or `gfs_core.gfs_sharpness(max_grads=...)`",
    "alarm_checkpoint": "use `alarm='checkpoint'`; `alarm='stop'` saves one too",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GFSConfig:
    """Options of a :class:`~gfs_core.StabilityMonitor`, and so of every adapter.

    ``GFSConfig.help()`` returns the help text of each option. For an option that may be ``None``, the words none, null
    and off mean ``None`` too, in lower or upper case, and so does ``False``, as YAML reads a bare off.

    Raises:
        ConfigError: an option has the wrong type or is out of its range, two options contradict each other, or the
            option was removed.
    """

    tier: Literal["directional", "running", "batch_sharpness", "sharpness", "midpoint", "gfs", "gfs_full"] = _option(
        "gfs",
        "Dearest quantity measured: directional, the curvature along the last step; running, an average of single "
        "products; batch_sharpness, the curvature along the gradients of single "
        "batches; sharpness, solved for on the probe; midpoint adds the sharpness at the midpoint of the last three "
        "iterates; gfs adds the short-horizon GFS sharpness instead; gfs_full adds the full gradient flow solution "
        "(small models only), and the short-horizon one every 10 steps.",
    )
    every: int = _option(
        10, "Optimizer steps between measurements of that tier; the budget may lengthen it, never shorten."
    )
    running_every: int | None = _option(
        5,
        "Steps between measurements of the running estimate beside a dearer tier; they are closer together at first; "
        "null: none.",
    )
    max_overhead: float | None = _option(
        0.05,
        "Fraction of wall time that measuring, hooks and logging may take after the first measurements; null: no "
        "budget.",
    )
    probe: Literal["batch", "fixed"] = _option(
        "batch",
        "Measure on the current batch, or on a fixed probe of the first batches. In Python a loader may be given: then "
        "its first batches are measured, as a second data set, and the early warning goes by the losses alone.",
    )
    probe_size: int | None = _option(
        None,
        "Examples used for measuring: the first ones of a batch, or those that a fixed probe collects or a loader "
        "gives; null: all of a batch.",
    )
    max_memory: float | None = _option(
        None,
        "GiB that a measurement may take beside the weights, for its vectors and for what the loss keeps for its "
        "backward pass; where that is not enough, the next one is on half as many examples; null: no limit.",
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
    control: Literal["observe", "guard", "start", "plateau", "cap", "follow", "warmup", "cdat"] = _option(
        "observe",
        "What is done with the learning rate: observe, nothing; guard, nothing while the run is healthy, and a third "
        "where an alarm shows in the loss, with a way back to a snapshot, as with alarm rescue; start, guard, and at "
        "first the rate rises to the user's from a hundredth of it, as far as the run bears it; plateau, guard, and a "
        "third of the rate where the loss has come to rest and falls with it; cap, held below the "
        "rate at which the stability ratio would be `margin`; follow, put there, in the shape of the schedule; warmup, "
        "cap until nothing is held back any more; cdat, put at `margin` of the critical rate along the steps. The "
        "user's scheduler and logged rate stay as they are.",
    )
    margin: float | None = _option(
        None,
        "Stability ratio that a control keeps below; 1 is the edge of stability. null: 0.5, and 0.75 for optimizers "
        "with second moments (Adam and its kind).",
    )
    alarm: Literal["off", "log", "warn", "checkpoint", "stop", "skip", "rescue"] = _option(
        "log",
        "What an early warning does: off, there is none; log, it is logged and kept in the history; warn, it is also "
        "shown; checkpoint, an alarm also saves a checkpoint; stop, it also ends the training. Or, so that the run "
        "survives, beside log and warn: skip, a step with an alarm updates nothing; rescue, and what control guard "
        "does, which may be had so beside another control.",
    )
    history: str | None = _option(
        None, "Path of the JSON-lines history; null: beside the framework's own logs, where there are any."
    )
    strict: bool = _option(False, "Raise where a measurement fails, instead of warning once and training on.")
    seed: int = _option(0, "Seed of the random directions of the eigenvalue solver.")

    def __new__(cls, *args: Any, **options: Any) -> GFSConfig:
        """Reject a removed option, with what to use in its place.

        Raises:
            ConfigError: the option was removed.
        """
        for name in options:
            if name in GONE:
                raise ConfigError(f"there is no option `{name}` any more: {GONE[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            if may_be_off(hints[f.name]) and is_off(getattr(self, f.name)):
                object.__setattr__(self, f.name, None)
            self._check_type(f.name, hints[f.name], getattr(self, f.name))
        for name in ("every", "running_every", "probe_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be ≥ 1, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"`seed` must be an integer of 64 bits, got {self.seed}")
        if self.max_memory is not None and not 0 < self.max_memory <= _LARGEST_FACTOR:
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
        if self.control in BY_LOSSES and self.alarm == "off":
            raise ConfigError(
                f"control={self.control!r} goes by alarms, and `alarm` is 'off'; use 'log', 'warn' or 'stop'"
            )
        default = GFSConfig.__dataclass_fields__["running_every"].default
        if TIERS.index(self.tier) <= TIERS.index("running") and self.running_every not in (None, default):
            raise ConfigError(
                f"`running_every` is for tiers dearer than 'running', and `tier` is {self.tier!r}; use `every`"
            )

    @property
    def guarded(self) -> bool:
        """Whether trouble lowers the rate, and the run may go back to a snapshot."""
        return self.control in BY_LOSSES or self.alarm == "rescue"

    def intervals(self) -> dict[str, int]:
        """Optimizer steps between measurements of each tier that is on, cheapest first."""
        steps: dict[str, int] = {self.tier: self.every}
        if self.tier == "gfs_full" and self.every > _SHORT_BESIDE_FULL:
            steps = {"gfs": _SHORT_BESIDE_FULL, **steps}
        if self.running_every is not None and TIERS.index(self.tier) > TIERS.index("running"):
            steps = {"running": self.running_every, **steps}
        return steps

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
        """A config from keyword arguments, with an error that lists the options if a name is unknown.

        Raises:
            ConfigError: an option is unknown, or for the reasons of the class.
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known and name not in GONE:
                raise ConfigError(f"unknown option `{name}`; the options are {', '.join(sorted(known))}")
        return cls(**options)

    @classmethod
    def help(cls) -> dict[str, str]:
        """The help text of each option, by name."""
        return {f.name: _help(f) for f in fields(cls)}


def may_be_off(hint: Any) -> bool:
    """Whether an option of this type may be ``None``."""
    return type(None) in get_args(hint)


def is_off(value: Any) -> bool:
    """Whether a value means ``None`` for an option that may be ``None``."""
    return value is False or (isinstance(value, str) and value.lower() in get_args(Off))


def _help(f: Field[Any]) -> str:
    return str(f.metadata["help"])
