"""Healthy trainings that are reported on: no rule and no threshold was chosen on them."""

from __future__ import annotations

from benchmarks.zoo.design import Make

HEALTHY: dict[str, Make] = {}
