"""The share of the user's learning rate that is used after trouble: down at once, and up again in stages.

Trouble lowers the share to a third. After a *hold* of steps without trouble it grows by the cube root of 3, and so on
until it is 1. So each stage tests whether the next higher rate holds. Trouble at a stage that the share has grown to
goes back to the stage before, which did hold, and doubles the hold. Trouble before anything has held lowers the share
by another third. Five such falls in a row say that the rate is not to blame: then the share grows back, and nothing
lowers it until the user's rate has been used for a thousand steps.

Stages are counted in whole numbers. So the share is exactly 1 in the end.
"""

from __future__ import annotations

from typing import Any

# The third: benchmarks/advice.md, where it helped as often as a tenth. The others were not varied in a table.
FALL, STAGES = 3.0, 3  # a fall divides the share by three, and takes three stages to be let up
HOLD = 50  # steps at a stage
FALLS = 5  # in a row
APART = 1000  # steps at the user's rate from which on a fall is a first one again


class Lowered:
    """Decides the share of the user's rate for each step.

    Attributes:
        last: the share of the last step taken.
        hold: steps at each stage.
    """

    def __init__(self) -> None:
        self.last, self.hold = 1.0, HOLD
        self._down = 0  # stages below the user's rate
        self._steps = 0  # taken at this stage
        self._grown = False  # whether the share has grown to this stage
        self._falls = 0  # in a row
        self._given_up = False

    @property
    def share(self) -> float:
        """The share for the coming step, in (0, 1]."""
        return FALL ** (-self._down / STAGES) if self._down else 1.0

    def may_fall(self) -> bool:
        """Whether the rate may be to blame for trouble that there is now."""
        if self._falls >= FALLS:
            self._given_up, self._falls, self.hold = True, 0, HOLD
        return not self._given_up

    def fall(self) -> None:
        """Lower the share, as there is trouble."""
        if self._grown:
            self._down, self.hold = self._down + 1, 2 * self.hold
        else:
            self._down, self._falls = self._down + STAGES, self._falls + 1
        self._steps, self._grown = 0, False

    def step(self, rate: float) -> float:
        """The share for a step at the user's rate ``rate`` that is taken now; it is counted, unless its rate is 0."""
        self.last = self.share
        if rate > 0:
            self._steps += 1
            if self._down and self._steps >= self.hold:
                self._down, self._steps, self._grown, self._falls = self._down - 1, 0, True, 0
            elif not self._down and self._steps == APART:
                self._grown, self._falls, self._given_up, self.hold = False, 0, False, HOLD
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            KeyError: something is missing.
        """
        for name, value in vars(self).items():
            setattr(self, name, type(value)(state[name]))
