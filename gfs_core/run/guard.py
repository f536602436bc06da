"""Between a framework and what its hooks call: nothing that fails in there ends a training."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from gfs_core.detectors.base import Alert
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError, own_fault

H = TypeVar("H", bound=Callable[..., Any])


class Guard:
    """What a callback's hooks run under.

    Args:
        strict: let every failure through.
        close: ends the measuring of the callback.
        on_alarm: the user's function for changes of the early warning. It is called outside of the guard, so that it
            may end the training by an exception of its own (a pruned trial).

    Attributes:
        events: changes of the early warning that ``on_alarm`` is still to be called with.
    """

    def __init__(self, strict: bool, close: Callable[[], None], on_alarm: Callable[[Alert], Any] | None = None) -> None:
        self.strict, self.close, self.on_alarm = strict, close, on_alarm
        self.events: list[Alert] = []
        self._told: set[str] = set()

    @contextlib.contextmanager
    def hook(self, name: str, starts: bool) -> Iterator[None]:
        """Around a hook: where it fails, that is told and nothing is measured any more.

        Raises:
            ConfigError: an option is wrong; at the start of a training only.
        """
        try:
            yield
        except Exception as error:
            if self.strict or (starts and isinstance(error, ConfigError)):
                raise
            with contextlib.suppress(Exception):
                self.close()
            if isinstance(error, MeasurementError):
                self.tell(f"{error}; nothing is measured in this run")
            else:
                why = own_fault(error) or f"`{name}` failed ({type(error).__name__}: {error})"
                self.tell(f"{why}; nothing is measured any more in this run")
        while self.events and self.on_alarm is not None:
            self.on_alarm(self.events.pop(0))

    @contextlib.contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Around something that measuring does not need, such as a logger: where it fails, that is told once."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.tell(f"{what} ({own_fault(error) or f'{type(error).__name__}: {error}'})", kind=what)

    def tell(self, text: str, kind: str = "") -> None:
        """Warn, once of each kind; by default of each text."""
        if (kind or text) not in self._told:
            self._told.add(kind or text)
            warnings.warn(f"gfs: {text}", GFSWarning, stacklevel=4)


class _Guarded(Protocol):
    _guard: Guard


def guarded(hook: H) -> H:
    """A hook of a callback that holds its guard in ``_guard``: runs under it."""
    starts = hook.__name__ in ("on_fit_start", "on_train_begin")

    @functools.wraps(hook)
    def watched(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        with self._guard.hook(hook.__name__, starts):
            return hook(self, *args, **kwargs)

    return watched  # type: ignore[return-value]
