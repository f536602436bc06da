"""What the values of several streams were like lately: the middle of each, and how far it scatters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

NORMAL = 1.4826  # times the median distance from the median: the deviation of a normal variable
OVERFLOW = 700.0  # exponents that a number can hold


class Past:
    """The latest values of named streams, which arrive together; a stream may have none now and then.

    Args:
        length: values that are held of each stream.
        first: values before anything is said of a stream.
        refresh: arrivals after which medians are computed anew; they are dear beside all else, and hardly move.
    """

    def __init__(self, length: int, first: int, refresh: int = 1) -> None:
        self.length, self.first, self.refresh = length, first, refresh
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self._places: dict[str, int] = {}
        self._rows: list[list[float]] = []
        self._since = 0
        self._usual: dict[str, tuple[float, float]] = {}

    def usual(self, name: str) -> tuple[float, float] | None:
        """The median of a stream and its scatter, as a deviation; ``None``: too few values."""
        if self._since >= self.refresh or not self._usual:
            self._compute()
        return self._usual.get(name)

    def add(self, values: Mapping[str, float]) -> None:
        """Take in what has arrived together; one that is not finite is passed over."""
        for name in values:
            self._places.setdefault(name, len(self._places))
        row = [math.nan] * len(self._places)
        for name, value in values.items():
            row[self._places[name]] = value if math.isfinite(value) else math.nan
        self._rows.append(row)
        del self._rows[: -self.length]
        self._since += 1

    def _compute(self) -> None:
        self._since, self._usual = 0, {}
        if len(self._rows) < self.first:
            return
        wide = len(self._places)
        rows = torch.tensor([row + [math.nan] * (wide - len(row)) for row in self._rows], dtype=torch.float64)
        counts = (~rows.isnan()).sum(0).tolist()
        middle = rows.nanmedian(0).values
        scatter = ((rows - middle).abs().nanmedian(0).values * NORMAL).tolist()
        for name, place in self._places.items():
            if counts[place] >= self.first:
                self._usual[name] = (float(middle[place]), scatter[place])

    def state_dict(self) -> dict[str, Any]:
        """The values held."""
        return {
            "names": list(self._places),
            "rows": [[None if math.isnan(value) else value for value in row] for row in self._rows],
            "since": self._since,
            "usual": {name: list(found) for name, found in self._usual.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.clear()
        self._places = {str(name): place for place, name in enumerate(state["names"])}
        rows = [[math.nan if value is None else float(value) for value in row] for row in state["rows"]]
        self._rows = rows[-self.length :]
        if any(len(row) > len(self._places) for row in self._rows):
            raise ValueError("a row has more values than there are streams")
        self._since = int(state["since"])
        self._usual = {str(name): (float(a), float(b)) for name, (a, b) in state["usual"].items()}
