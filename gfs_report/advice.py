"""What to set: a tier and intervals that cost no more than was agreed, as a line to copy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gfs_core import GFSConfig
from gfs_report.units import count

BUDGET = 0.05  # fraction of the training time, the default of `max_overhead`
_CHEAP = 0.02  # … of it for the running estimate beside a dearer tier
# Steps between measurements: a value that comes less often warns of nothing, and of a flow there is no curve to see.
_LONGEST = {"gfs": 500, "midpoint": 1000, "sharpness": 1000, "running": 1000}
_CLOSEST = 5  # … of the running estimate: more often tells nothing new
_CLOSEST_SOLVED = 10


@dataclass(frozen=True)
class Advice:
    """Options of :class:`~gfs_core.GFSConfig` to set, and why.

    Attributes:
        options: those that are worth naming.
        reasons: a sentence for each decision.
    """

    options: dict[str, Any]
    reasons: tuple[str, ...]

    @property
    def python(self) -> str:
        """The callback, for both frameworks."""
        return f"GFSCallback({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"

    @property
    def yaml(self) -> str:
        """The callback in a LightningCLI config."""
        inner = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self.options.items())
        entry = f"- {{class_path: lightning_gfs.GFSCallback, init_args: {{{inner}}}}}"
        return f"trainer:\n  callbacks:\n    {entry}"

    @property
    def flags(self) -> str:
        """The flags of a script that parses :class:`~hf_gfs.GFSArguments`."""
        return " ".join(f"--gfs_{name} {value}" for name, value in self.options.items())


def interval(seconds: float, step: float, share: float = BUDGET) -> int:
    """Steps between measurements of ``seconds`` each, so that they take ``share`` of the time of steps of ``step``."""
    return max(1, math.ceil(seconds / (share * step)))


def advise(
    step: float,
    prices: Mapping[str, float],
    *,
    flow: str = "",
    running: str = "",
    empirical: bool = False,
    extra: Mapping[str, tuple[Any, str]] | None = None,
) -> Advice:
    """The dearest tier that is worth its price, and its interval.

    Args:
        step: seconds of a training step without measuring.
        prices: seconds of one measurement of each tier, everything that belongs to it included.
        flow: why the short-horizon GFS sharpness is not worth it, where that is known.
        running: why the running estimate is not to be trusted, where that is known.
        empirical: whether the optimizer's threshold is not known, so that its steps have to be measured.
        extra: further options: of each its value, and a sentence that says why.
    """
    if empirical:
        every = max(_CLOSEST, _round(interval(prices["directional"], step))) if "directional" in prices else 20
        why = "The threshold of this optimizer is not known; the curvature along its own steps stands in for it."
        return _advice({"tier": "directional", "every": every}, (why,), extra)
    reasons: list[str] = []
    cheap = max(_CLOSEST, _round(interval(prices["running"], step, _CHEAP))) if "running" in prices else None
    if running or (cheap is not None and cheap > _LONGEST["running"]):
        reasons.append(f"The running estimate is off: {running or 'it costs too much beside so short a step'}.")
        cheap = None
    for tier in ("gfs", "midpoint", "sharpness"):
        if tier not in prices or (tier == "gfs" and flow):
            if tier == "gfs" and flow:
                reasons.append(f"No flow: {flow}.")
            continue
        every = max(_CLOSEST_SOLVED, _round(interval(prices[tier], step, BUDGET - (_CHEAP if cheap else 0.0))))
        if every <= _LONGEST[tier]:
            reasons.append(
                f"A measurement of tier {tier} costs {count(prices[tier] / step)} training steps; every {every} steps, "
                f"with the running estimate {f'every {cheap}' if cheap else 'off'}, that is within {BUDGET:.0%}."
            )
            return _advice({"tier": tier, "every": every, "running_every": cheap}, reasons, extra)
        reasons.append(
            f"Tier {tier} costs {count(prices[tier] / step)} training steps: within {BUDGET:.0%} it would come every "
            f"{every} steps only."
        )
    if cheap is None:
        reasons.append("Nothing is affordable beside so short a step: the budget decides how seldom it is measured.")
        return _advice({"tier": "sharpness", "every": _LONGEST["sharpness"], "running_every": None}, reasons, extra)
    every = max(_CLOSEST, _round(interval(prices["running"], step)))
    reasons.append(f"The running estimate alone, every {every} steps, is within {BUDGET:.0%}.")
    return _advice({"tier": "running", "every": every}, reasons, extra)


def _advice(options: dict[str, Any], reasons: Sequence[str], extra: Mapping[str, tuple[Any, str]] | None) -> Advice:
    extra = extra or {}
    reasons = (*reasons, *(why for _, why in extra.values()))
    defaults = {f.name: f.default for f in fields(GFSConfig)}
    named = ("tier", "every")
    options |= {name: value for name, (value, _) in extra.items()}
    options = {n: v for n, v in options.items() if n in named or v != defaults[n]}
    GFSConfig.from_options(**options)  # what is advised has to be possible
    return Advice(options, reasons)


def _round(steps: int) -> int:
    """Up to the next number of one digit and noughts."""
    power: int = 10 ** math.floor(math.log10(steps))
    return -(-steps // power) * power
