"""Warnings to the user during training, each shown once."""

from __future__ import annotations

import re
import warnings

from gfs_core.errors import ConfigError, GFSWarning, MeasurementError, own_fault
from gfs_core.run.ranks import OtherRankFailed, Ranks

# Reasons that need no action from the user.
_PASSING = (
    "come with its first step",
    "the learning rate is 0",
    "the weights have not moved, or by less",
    "no eigenvalue of a curvature that is not symmetric",
    "the running estimate of the curvature is not positive",
)


class Notices:
    """Shows the warnings of a monitor, and turns errors that must not end a training into warnings.

    Args:
        strict: raise errors instead of warning.
        ranks: the processes that train together; ``None``: this process only.
        name: name of the optimizer, where there are several.
    """

    def __init__(self, strict: bool, ranks: Ranks | None, name: str = "") -> None:
        self.strict, self.ranks, self.name = strict, ranks, name
        self._told: set[str] = set()

    def warn_once(self, reason: str, always: bool = False, own: bool = False) -> None:
        """Warn, unless the same reason was shown before.

        Args:
            reason: in words; two reasons that differ in numbers only are the same.
            always: warn even if it was shown before.
            own: the reason concerns this process, which shows it. Otherwise all processes have it, and rank 0 shows it.
        """
        if not (own or self.ranks is None or self.ranks.rank == 0):
            return
        kind = re.sub(r"[0-9.e+-]+|\b(nan|inf)\b", "", reason)
        if always or kind not in self._told:
            self._told.add(kind)
            where = f" of {self.name}" if self.name else ""
            warnings.warn(f"gfs: stability measurement{where}: {reason}", GFSWarning, stacklevel=3)

    def warn_always(self, reason: str) -> None:
        """Warn every time, on rank 0 only."""
        self.warn_once(reason, always=True)

    def complain(self, reason: str) -> None:
        """Warn once that an option has no effect.

        Raises:
            MeasurementError: with ``strict``, in place of the warning.
        """
        if self.strict:
            raise MeasurementError(reason)
        self.warn_once(reason)

    def reasons(self, reasons: tuple[str, ...]) -> None:
        """Warn once of each reason of a measurement, except of those that need no action."""
        for reason in reasons:
            if not any(words in reason for words in _PASSING):
                self.warn_once(reason)

    def damaged(self, error: Exception) -> None:
        """Warn that a saved state could not be loaded.

        Raises:
            ConfigError: with ``strict``.
        """
        text = f"the saved state is damaged ({type(error).__name__}: {error}); measuring starts without it"
        if self.strict:
            raise ConfigError(text) from None
        self.warn_once(text, own=True)

    def harmless(self, without: str, alone: bool = False) -> Harmless:
        """A context in which a failure becomes a warning, and training goes on.

        A process that fails in an exchange with other processes takes part in no further one. The others wait for it
        until their time limit, as for a process that has ended.

        Args:
            without: the consequence of a failure, in words; the warning begins with it.
            alone: whether nothing in the context exchanges with other processes.

        Raises:
            Exception: with ``strict``, the failure.
        """
        return Harmless(self, without, alone)

    def failed(self, without: str, alone: bool, error: Exception) -> None:
        """Warn of a failure that must not end the training; ``without`` and ``alone`` are as in :meth:`harmless`."""
        why = f"{error}" if isinstance(error, MeasurementError) else f"{type(error).__name__}: {error}"
        why = own_fault(error) or why
        if self.ranks is not None and not alone and not isinstance(error, OtherRankFailed):
            self.ranks.lost = True
            without = "nothing is measured any more in this run"
        self.warn_once(f"{without}: {why}", own=True)


class Harmless:
    """The context of :meth:`Notices.harmless`. A class is faster than a generator, and every step enters it."""

    __slots__ = ("alone", "notices", "without")

    def __init__(self, notices: Notices, without: str, alone: bool) -> None:
        self.notices, self.without, self.alone = notices, without, alone

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or self.notices.strict:
            return False
        self.notices.failed(self.without, self.alone, error)
        return True
