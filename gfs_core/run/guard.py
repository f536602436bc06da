"""A guard between a framework and the hooks of a callback: no failure in a hook ends the training."""

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
    """Runs the hooks of a callback, and turns their failures into warnings.

    Args:
        strict: raise every failure.
        close: ends the measuring of the callback.
        on_alarm: the user's function for changes of the early warning. It is called outside of the guard, so that it
            may end the training by an exception of its own (a pruned trial).

    Attributes:
        alerts: alerts that ``on_alarm`` has not been called with yet.
    """

    def __init__(self, strict: bool, close: Callable[[], None], on_alarm: Callable[[Alert], Any] | None = None) -> None:
        self.strict, self.close, self.on_alarm = strict, close, on_alarm
        self.alerts: list[Alert] = []
        self._told: set[str] = set()

    @contextlib.contextmanager
    def hook(self, name: str, starts: bool) -> Iterator[None]:
        """Run a hook in this context. If it fails, a warning says so, and nothing is measured any more.

        Args:
            name: of the hook.
            starts: whether the hook is the one that starts the training.

        Raises:
            ConfigError: an option is wrong; in the hook that starts the training only.
            Exception: with ``strict``, every failure; what ``on_alarm`` raises, always.
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
        while self.alerts and self.on_alarm is not None:
            self.on_alarm(self.alerts.pop(0))

    @contextlib.contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Run something that measuring does not need, such as a logger. If it fails, a warning says so once.

        Args:
            what: the failure in words; the warning begins with it.

        Raises:
            Exception: with ``strict``, the failure.
        """
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.tell(f"{what} ({own_fault(error) or f'{type(error).__name__}: {error}'})", kind=what)

    def tell(self, text: str, kind: str = "") -> None:
        """Warn once for each ``kind``; without one, once for each text."""
        if (kind or text) not in self._told:
            self._told.add(kind or text)
            warnings.warn(f"gfs: {text}", GFSWarning, stacklevel=4)


class _Guarded(Protocol):
    _guard: Guard


def guarded(hook: H) -> H:
    """Decorator for a hook of a callback: the hook runs under the guard that the callback holds in ``_guard``."""
    starts = hook.__name__ in ("on_fit_start", "on_train_begin")

    @functools.wraps(hook)
    def watched(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        with self._guard.hook(hook.__name__, starts):
            return hook(self, *args, **kwargs)

    return watched  # type: ignore[return-value]
