"""Selects the data that is measured: the step's own, a fixed probe, or a second data set; and how many examples."""

from __future__ import annotations

from typing import Any, Literal

import torch

from gfs_core.loss.batches import batch_size, changed, copied, examples_of, first_of_all, is_cut, is_plain
from gfs_core.loss.learned import PARTS, Learned
from gfs_core.run.second_data import SecondData
from gfs_core.signals.training import BatchSizes

_WAIT = 8  # measurements after which more examples are tried again; each failure for lack of memory doubles it
_FEW = 256  # examples of a fixed probe; with fewer its sharpness told another trend than the training loss's


class Probe:
    """The data of a run's measurements.

    Args:
        kind: ``"batch"``: the batches of the step; ``"fixed"``: the first batch of the run, or, with a ``size``, the
            first batches until they hold that many examples.
        size: number of examples that are measured; ``None``: all of a batch.
        short_batches: also measure batches of less than half the usual size.
        second: a second data set, whose batches are measured in place of those of each step; ``None``: there is none.

    Attributes:
        fixed: the batches of a fixed probe so far.
    """

    def __init__(
        self,
        kind: Literal["batch", "fixed"],
        size: int | None,
        short_batches: bool,
        second: SecondData | None = None,
    ) -> None:
        self.kind, self.size, self.second = kind, size, second
        self.fixed: list[Any] = []
        self._uncut = False  # the fixed probe is one whole batch, whatever its size
        self._sizes = None if short_batches or second is not None else BatchSizes()
        self._narrow, self._wait = 0, _WAIT  # measurements since memory ran out, and how many until more are tried

    def short(self, batches: list[Any]) -> bool:
        """Record the size of a step's batches; returns whether they are too short to be compared with the others."""
        return self._sizes is not None and self._sizes.short(examples_of(batches))

    @property
    def doubt(self) -> str:
        """Why values on this probe may mislead, in words; empty: they do not."""
        if self.kind == "batch" or (self.size or _FEW) >= _FEW:
            return ""
        return (
            f"a fixed probe of {self.size} examples is misleading: training fits its noise, and the trend of its "
            "sharpness has come out reversed; use probe='batch', or a larger fixed probe"
        )

    @property
    def filling(self) -> bool:
        """Whether a fixed probe still needs batches."""
        if self.kind == "batch" or self._uncut:
            return False
        count = examples_of(self.fixed)
        return not self.fixed or (self.size is not None and count is not None and count < self.size)

    def fill(self, batches: list[Any], learned: Learned) -> None:
        """Copy missing examples into a fixed probe.

        Raises:
            MeasurementError: a batch is or holds an iterator.
        """
        for batch in batches:
            if not self.filling:
                return
            missing = None if self.size is None else self.size - (examples_of(self.fixed) or 0)
            self.fixed += [copied(b) for b in _first([batch], missing, learned)]
            self._uncut = learned.splits is False  # then the probe is one whole batch, as the loss cannot be split

    def cuts(self, batches: list[Any], learned: Learned, running: bool) -> bool:
        """Whether a measurement would cut these batches; ``running``: it includes the running estimate."""
        sizes = [size for b in batches if (size := batch_size(b)) is not None]
        limits = (self.size, learned.fits)
        cuts = any(limit is not None and limit < sum(sizes) for limit in limits)
        return cuts or (running and any(is_cut(b, learned.parts) for b in batches))

    def current(self, batches: list[Any], learned: Learned) -> list[Any]:
        """The step's batches, limited to ``size`` examples."""
        return _first(batches, self.size, learned)

    def data(self, current: list[Any]) -> list[Any]:
        """The data to measure: the fixed probe, or the result of :meth:`current`."""
        return self.fixed if self.kind == "fixed" else current

    def fitting(self, batches: list[Any], learned: Learned) -> list[Any]:
        """The batches, limited to the examples that memory has room for."""
        return _first(batches, learned.fits, learned)

    def make_room(self, learned: Learned, probe: list[Any], only_running: bool) -> None:
        """Halve the data that did not fit into memory.

        Args:
            learned: where the new limit is stored.
            probe: the data that was measured.
            only_running: only the running estimate was measured, so its parts of a batch are halved, not the probe.
        """
        if only_running:
            if learned.whole_cheaper is not False:
                learned.whole_cheaper = False  # parts need less memory, whatever they cost
            else:
                learned.parts *= 2
        elif count := examples_of(probe):
            learned.fits = max(1, count // 2)
        self._narrow, self._wait = 0, 2 * self._wait

    def try_more(self, learned: Learned, whole: list[Any]) -> None:
        """After some measurements without a failure, allow twice the data: memory may have become free.

        Args:
            learned: where the limit is stored.
            whole: the data without a limit by memory.
        """
        if learned.fits is None and learned.parts <= PARTS:
            return
        self._narrow += 1
        if self._narrow < self._wait:
            return
        self._narrow = 0
        learned.parts = max(learned.parts // 2, PARTS)
        if learned.fits is not None:
            learned.fits = 2 * learned.fits if 2 * learned.fits < (examples_of(whole) or 0) else None

    def move(self, source: torch.device | None, target: torch.device | None) -> None:
        """Move the tensors of a fixed probe, or of a second data set, from one device to another."""
        self.fixed = [changed(b, lambda t: t.to(target) if t.device == source else t) for b in self.fixed]
        if self.second is not None:
            self.second.move(target)

    def state_dict(self) -> dict[str, Any]:
        """The whole state; without batches that are not plain data."""
        return {
            "fixed": self.fixed if is_plain(self.fixed) else None,
            "second": None if self.second is None else self.second.state_dict(),
            "uncut": self._uncut,
            "room": [self._narrow, self._wait],
            "sizes": [] if self._sizes is None else list(self._sizes.seen),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None, keep: bool) -> bool:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: the state.
            device: the device for the batches.
            keep: whether the saved batches belong to this process.

        Returns:
            Whether batches must be collected again because they could not be saved.
        """
        self._narrow, self._wait = map(int, state["room"])
        if self._sizes is not None:
            self._sizes = BatchSizes(state["sizes"])
        if self.second is not None:
            return keep and state["second"] is not None and self.second.load_state_dict(state["second"], device)
        keep, held = keep and self.kind == "fixed", state["fixed"]
        self.fixed = [changed(b, lambda t: t.to(device)) for b in held or []] if keep else []
        self._uncut = bool(state["uncut"]) and len(self.fixed) > 0
        return keep and held is None


def _first(batches: list[Any], count: int | None, learned: Learned) -> list[Any]:
    """The first ``count`` examples of several batches together; whole batches where the loss cannot be split."""
    return batches if learned.splits is False else first_of_all(batches, count)
