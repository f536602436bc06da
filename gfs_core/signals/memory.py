"""How many copies of the weights a measurement holds at its peak."""

from __future__ import annotations

from collections.abc import Collection

from gfs_core.config import Tier

# Without and with a preconditioner, the layer in work aside; what the running estimate keeps comes on top. The running
# estimate's peak is its start, not its pairs (5 and 6 copies). Measured: benchmarks/memory.md.
_COPIES: dict[Tier, tuple[int, int]] = {
    "directional": (4, 4),
    "running": (7, 8),
    "batch_sharpness": (4, 5),
    "sharpness": (10, 12),
    "gfs": (11, 13),
    "gfs_full": (11, 13),
}


def peak_copies(tiers: Collection[Tier], preconditioned: bool) -> int:
    """Vectors, each a copy of the weights, that a measurement of ``tiers`` holds at its peak."""
    return max(_COPIES[tier][preconditioned] for tier in tiers) + ("running" in tiers and len(tiers) > 1)
