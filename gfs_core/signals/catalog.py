"""The signals of a run, and the keys of all their readings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from gfs_core.signals.base import Key, Signal
from gfs_core.signals.curvature import BatchSharpness, DirectionalCurvature, RunningCurvature
from gfs_core.signals.eigenvalue import Eigenvalue
from gfs_core.signals.gradient_flow import FullFlow, ShortFlow
from gfs_core.signals.gradients import KEYS as OF_GRADIENTS
from gfs_core.signals.keys import GRAD_EVALS, HVPS, LEARNING_RATE, LOSS_PROBE, THRESHOLD
from gfs_core.signals.midpoint import Midpoint

# In the order in which they are measured. Signals that select their own batches come first, so that the loss on the
# probe is differentiated once for all others. A new signal is one more line here.
SIGNALS: list[Callable[[], Signal]] = [
    RunningCurvature,
    BatchSharpness,
    DirectionalCurvature,
    Eigenvalue,
    Midpoint,
    ShortFlow,
    FullFlow,
]


class Signals:
    """All signals of a run, each with its state.

    Attributes:
        all: the signals, in the order in which they are measured.
    """

    def __init__(self) -> None:
        self.all = [make() for make in SIGNALS]

    def named(self, names: Collection[str]) -> list[Signal]:
        """The signals of these names and the signals that they need, in the order in which they are measured."""
        wanted = set(names).union(*(s.needs for s in self.all if s.name in names))
        return [s for s in self.all if s.name in wanted]

    def forget(self) -> None:
        """Drop the state of all signals: other weights are trained from now on."""
        for signal in self.all:
            signal.forget()

    def broke_off(self) -> None:
        """Drop state that may have been half changed when a measurement failed."""
        for signal in self.all:
            signal.broke_off()

    def state_dict(self) -> dict[str, Any]:
        """The state of each signal, by name."""
        return {signal.name: signal.state_dict() for signal in self.all}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; a signal that is not in ``state`` keeps its own."""
        held = dict(state)  # a damaged state may hold something else than a dictionary
        for signal in self.all:
            if signal.name in held:
                signal.load_state_dict(held[signal.name], params)


# Each key once, in the order in which tables show them.
KEYS: tuple[Key, ...] = tuple(
    dict.fromkeys(
        key
        for keys in (
            Eigenvalue.keys,
            (THRESHOLD,),
            Midpoint.keys,
            ShortFlow.keys,
            FullFlow.keys,
            *(signal.keys for signal in Signals().all),
            OF_GRADIENTS,
            (LOSS_PROBE, LEARNING_RATE, HVPS, GRAD_EVALS),
        )
        for key in keys
    )
)
"""The keys of all readings that a measurement may hold."""
