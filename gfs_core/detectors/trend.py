"""Growth towards the edge of stability: whether a ratio grows steadily, and when it will reach 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gfs_core.detectors.profile import Profile

Point = tuple[int, float]
"""A step, and the stability ratio measured there."""


def steps_to_edge(points: Sequence[Point], profile: Profile) -> int | None:
    """Steps until a line through the latest log ratios reaches the edge.

    The line is fitted by least squares through the last ``profile.fit_window`` points.

    Args:
        points: in the order in which they were measured, at least two.
        profile: how steady and how fast the growth has to be, and how far ahead is looked.

    Returns:
        Steps from the last point on, 0 where the edge has been crossed; ``None``: the ratio does not grow steadily, or
        too slowly, or the edge is too far.
    """
    points = points[-profile.fit_window :]
    steps = [step - points[-1][0] for step, _ in points]
    logs = [math.log(ratio) for _, ratio in points]
    middle, level = sum(steps) / len(steps), sum(logs) / len(logs)
    across = sum((s - middle) ** 2 for s in steps)
    along = sum((s - middle) * (g - level) for s, g in zip(steps, logs, strict=True))
    up = sum((g - level) ** 2 for g in logs)
    if not along > 0 or along < profile.fit_correlation * math.sqrt(across * up):
        return None
    slope = along / across
    ahead = -(level - slope * middle) / slope
    if ahead > profile.fit_horizon or -slope * steps[0] < math.log(profile.fit_growth):
        return None
    return max(math.ceil(ahead), 0)
