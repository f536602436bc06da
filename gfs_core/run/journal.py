"""Writes a monitor's measurements, and the training losses between them, to the history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gfs_core.run import history
from gfs_core.run.losses import MeansOfLosses
from gfs_core.run.notices import Notices
from gfs_core.run.record import Measurement


class Journal:
    """Writes the lines of one training.

    Args:
        settings: returns the content of the first line, as JSON values; called when that line is written.
        label: returns the optimizer's name, for lines that hold losses only.
        notices: reports failures.

    Attributes:
        path: the history; ``None``: nothing is written.
        run: the training's identifier.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]], label: Callable[[], str], notices: Notices) -> None:
        self.path: Path | None = None
        self.run = history.new_run()
        self._settings, self._label, self._notices = settings, label, notices
        self._means = MeansOfLosses()
        self._begun = False
        self._resumed_at: int | None = None

    def add_losses(self, losses: list[tuple[int, float, int]]) -> None:
        """Record the losses of steps, as (step, loss, examples); an accelerator delivers several steps together."""
        for step, loss, _ in losses if self.path is not None else ():
            if self._means.due:
                self.write_losses()
            self._means.add(step, loss)

    def write(self, measurement: Measurement) -> None:
        """Write a measurement, with the mean loss since the last line."""
        with self._notices.harmless("a measurement is not in the history", alone=True):
            known = self._means.step == measurement.step  # some adapters measure before the loss of the step is known
            self._write(measurement, self._means.take() if known else None)

    def write_losses(self) -> None:
        """Write a line that holds losses only, if there are any."""
        with self._notices.harmless("a loss is not in the history", alone=True):
            if (loss := self._means.take()) is not None:
                self._write(None, loss)

    def write_due_losses(self) -> None:
        """Write a line that holds losses only, if one is due."""
        if self._means.due:
            self.write_losses()

    def resume(self, step: int) -> None:
        """Note that training was resumed at ``step``: the settings are written again before the next line."""
        self._resumed_at, self._begun = step, False

    def state_dict(self) -> dict[str, Any]:
        """The training's identifier, and the step of its latest loss."""
        return {"run": self.run, "loss_seen": self._means.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the lines of a saved training.

        Raises:
            ValueError: the state holds no identifier of a run.
        """
        run, seen = state["run"], state["loss_seen"]
        if not isinstance(run, str) or not run:
            raise ValueError(f"`run` is {run!r}")
        self.run = run
        self._means.resume(None if seen is None else int(seen))

    def _write(self, measurement: Measurement | None, loss: tuple[float, float | None] | None) -> None:
        if self.path is None:
            return
        try:
            if not self._begun:
                history.begin(self.path, self._settings(), self.run, self._notices.name, self._resumed_at)
                self._begun = True
            if measurement is not None:
                history.append(self.path, measurement, self.run, loss)
            elif loss is not None:
                mean = history.MeanOfLosses(self._means.step, *loss, self._label())
                history.append_losses(self.path, mean, self.run)
        except (OSError, ValueError) as error:  # ValueError: the path itself is invalid
            self._notices.warn_once(f"the history cannot be written ({error}); training goes on without it")
            self.path = None
