"""The content of one measurement: its readings, by log key."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from gfs_core.signals.base import Key, Reading
from gfs_core.signals.catalog import KEYS as MEASURED
from gfs_core.signals.keys import RATIO_CHART

LOG_PREFIX = "gfs/"

LR_EFFECTIVE = Key(
    "lr_effective", "learning rate that the coming step really uses; where there is a control", chart="Learning rate"
)
LR_SCALE = Key("lr_scale", "lr_effective / the rate that the user's scheduler sets")
ALARM = Key(
    "alarm", "early warning: 0 quiet, 1 watch, 2 alarm; the reason is in the history", chart=RATIO_CHART, whole=True
)
OVERHEAD = Key("overhead", "fraction of the run's wall time spent measuring so far", chart="Overhead")
SECONDS = Key("seconds", "wall time of this measurement", unit="s", logged=False)

KEYS: dict[str, Key] = {key.name: key for key in (*MEASURED, LR_EFFECTIVE, LR_SCALE, ALARM, OVERHEAD, SECONDS)}
"""Every key of this release by its name. A history may hold others."""


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Each log key, without its prefix ``gfs/``, is an attribute, such as ``measurement.sharpness``. It is ``None`` where
    the value was not measured or could not be; ``reasons`` says why it could not.

    Attributes:
        step: optimizer steps taken so far.
        optimizer_name: name of the optimizer.
        readings: the readings that have a value, in the order of the keys.
        reasons: why values are missing, and remarks about the others.
    """

    step: int
    optimizer_name: str = ""
    readings: tuple[Reading, ...] = ()
    reasons: tuple[str, ...] = ()

    @staticmethod
    def of(step: int, optimizer_name: str = "", reasons: Iterable[str] = (), **values: float | None) -> Measurement:
        """A measurement with these values, by key; ``None`` is left out.

        Raises:
            AttributeError: there is no such key.
        """
        return Measurement(step, optimizer_name, (), tuple(reasons)).having(**values)

    @staticmethod
    def from_readings(
        step: int, optimizer_name: str, readings: Iterable[Reading], notes: Iterable[str] = ()
    ) -> Measurement:
        """A measurement of these readings; of two values of one key and layer, the later one counts."""
        taken = list(readings)
        held = {(r.key.name, r.layer): r for r in taken if r.value is not None}
        reasons = dict.fromkeys([*(r.reason for r in taken if r.reason), *notes])
        return Measurement(step, optimizer_name, _ordered(held.values()), tuple(reasons))

    def having(self, **values: float | None) -> Measurement:
        """A copy with these values replaced, by key; ``None`` removes a value.

        Raises:
            AttributeError: there is no such key.
        """
        kept = [r for r in self.readings if r.layer or r.key.name not in values]
        new = [Reading(_key(name), self.step, value) for name, value in values.items()]
        return replace(self, readings=_ordered(r for r in (*kept, *new) if r.value is not None))

    def also(self, readings: Iterable[Reading], reasons: Iterable[str] = ()) -> Measurement:
        """A copy with more readings, none of which it has yet, and their reasons before its own."""
        return replace(self, readings=_ordered((*self.readings, *readings)), reasons=(*reasons, *self.reasons))

    def because(self, reasons: Iterable[str]) -> Measurement:
        """A copy with more reasons."""
        return replace(self, reasons=(*self.reasons, *reasons))

    def finite(self) -> Measurement:
        """A copy without values that are not finite, as in a run that has diverged."""
        return replace(self, readings=tuple(r for r in self.readings if r.value is not None and math.isfinite(r.value)))

    def with_ratio(self) -> Measurement:
        """A copy whose stability ratio is the running one, if it has no other."""
        running = self.running_stability_ratio
        return self if running is None or self.stability_ratio is not None else self.having(stability_ratio=running)

    def at_scale(self, factor: float) -> Measurement:
        """A copy as it would be with all learning rates multiplied by ``factor`` > 0, at the same weights."""
        by = {1: factor, 0: 1.0, -1: 1 / factor}
        scaled = [
            r._replace(value=r.value * by[r.key.scales_with_rate]) if r.key.scales_with_rate and r.value else r
            for r in self.readings
        ]
        return replace(self, readings=tuple(scaled))

    @cached_property
    def _of_model(self) -> dict[str, float]:
        return {r.key.name: r.value for r in self.readings if not r.layer and r.value is not None}

    def __getattr__(self, name: str) -> float | None:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self._of_model.get(name)
        if value is None and name not in KEYS:
            raise AttributeError(f"{name!r} is no log key; the keys are {', '.join(KEYS)}")
        return value

    def layers(self, name: str) -> dict[str, float]:
        """The values of one key by layer; empty if there are none."""
        return {r.layer: r.value for r in self.readings if r.layer and r.key.name == name and r.value is not None}

    def values(self) -> dict[str, float]:
        """All values of the whole model, by key; those that only the history holds included."""
        return dict(self._of_model)

    def as_log_dict(self) -> dict[str, float]:
        """The values that loggers get, by log key; a layer's value under ``gfs/key/layer``."""
        return {
            LOG_PREFIX + r.key.name + (f"/{r.layer}" if r.layer else ""): float(r.value)
            for r in self.readings
            if r.key.logged and r.value is not None
        }


def log_keys() -> dict[str, str]:
    """The meaning of every log key, by the key with its prefix ``gfs/``; ``LAYER`` stands for a layer's name."""
    names = {key.name: key.name + ("/LAYER" if key.only_layers else "") for key in KEYS.values() if key.logged}
    return {LOG_PREFIX + shown: KEYS[name].help for name, shown in names.items()}


_PLACES = {name: place for place, name in enumerate(KEYS)}


def _ordered(readings: Iterable[Reading]) -> tuple[Reading, ...]:
    """The readings in the order of the keys, so that measurements with the same values are equal."""
    return tuple(sorted(readings, key=lambda r: (_PLACES.get(r.key.name, len(_PLACES)), r.key.name, r.layer)))


def _key(name: str) -> Key:
    try:
        return KEYS[name]
    except KeyError:
        raise AttributeError(f"{name!r} is no log key; the keys are {', '.join(KEYS)}") from None
