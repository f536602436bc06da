"""Whether an optimizer steps with each batch; under manual optimization, the module decides that."""

from __future__ import annotations

from typing import Any

from gfs_core.optimizers.thresholds import unwrap


class StepsSeen:
    """Notes the steps of an optimizer, until :meth:`close`.

    Args:
        optimizer: a torch optimizer, or a wrapper of one.
    """

    def __init__(self, optimizer: Any) -> None:
        self._taken = False
        self._handle = unwrap(optimizer).register_step_post_hook(self._after)

    def taken(self) -> bool:
        """Whether a step was taken since the last call."""
        taken, self._taken = self._taken, False
        return taken

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def _after(self, *_: Any) -> None:
        self._taken = True
