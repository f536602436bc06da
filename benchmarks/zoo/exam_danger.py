"""Trainings in danger that are reported on: no rule and no threshold was chosen on them."""

from __future__ import annotations

from benchmarks.zoo.design import Make

DANGER: dict[str, Make] = {}
