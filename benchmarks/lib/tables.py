"""Tables in Markdown, and numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any


def table(head: Sequence[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table."""
    return [row(head), "|---" * len(head) + "|", *map(row, rows)]


def row(cells: Iterable[Any]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def shown(value: float, digits: int) -> str:
    """A number with so many decimals, a large one in powers of ten."""
    return "∞" if math.isinf(value) else f"{value:.{digits}f}" if value < 100 else f"{value:.0e}"


def middle_and_largest(values: Sequence[float]) -> str:
    """Median and, in brackets, the largest."""
    return f"{median(values):g} ({max(values)})"


def percent(part: float) -> str:
    """A fraction without decimals."""
    return f"{part:.0%}"
