"""Pictures as SVG that come out the same each time."""

from __future__ import annotations

from typing import Any

from benchmarks.lib.store import FOLDER


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches; ``None`` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, name: str) -> None:
    """Write NAME.svg, with no date and with names that go by the benchmark's."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name}):
        drawn.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
