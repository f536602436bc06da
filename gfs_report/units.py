"""Durations and sizes in a few digits and a fitting unit."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size(held: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if held >= 1024**power:
            return f"{held / 1024**power:.3g} {unit}"
    return f"{held / 1024:.3g} KiB"


def in_digits(value: float) -> str:
    """A ratio in a few digits."""
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.2g}"


def count(number: float) -> str:
    """Two digits, and never a power of ten."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
