"""A guard between a framework and the hooks of a callback: no failure in a hook ends the training."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from gfs_core.detectors.base import Alert
from gfs_core.errors import ConfigError, GFSWarning, MeasurementError, own_fault
from gfs_core.run.budget import Charged, OverheadBudget

H = TypeVar("H", bound=Callable[..., Any])


class Guard:
    """Runs the hooks of a callback, and turns their failures into warnings.

    Args:
        strict: raise every failure.
        close: ends the measuring of the callback.
        on_alarm: the user's function for changes of the early warning. It is called outside of the guard, so that it
            may end the training by an exception of its own (a pruned trial).
        budgets: returns the budgets to which the time of the hooks is charged, in equal parts.

    Attributes:
        alerts: alerts that ``on_alarm`` has not been called with yet: after a hook, outside of what is guarded.
    """

    def __init__(
        self,
        strict: bool,
        close: Callable[[], None],
        on_alarm: Callable[[Alert], Any] | None = None,
        budgets: Callable[[], list[OverheadBudget]] = list,
    ) -> None:
        self.strict, self.close, self.on_alarm, self.budgets = strict, close, on_alarm, budgets
        self.alerts: list[Alert] = []
        self._told: set[str] = set()

    def failed(self, name: str, starts: bool, error: Exception) -> None:
        """A hook has failed: a warning says so, and nothing is measured any more.

        Args:
            name: of the hook.
            starts: whether the hook is the one that starts the training.
            error: what it raised.

        Raises:
            ConfigError: an option is wrong; in the hook that starts the training only.
            Exception: with ``strict``, every failure.
        """
        if self.strict or (starts and isinstance(error, ConfigError)):
            raise error
        with contextlib.suppress(Exception):
            self.close()
        if isinstance(error, MeasurementError):
            self.tell(f"{error}; nothing is measured in this run")
        else:
            why = own_fault(error) or f"`{name}` failed ({type(error).__name__}: {error})"
            self.tell(f"{why}; nothing is measured any more in this run")

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

    # No context managers that are generators: every step runs through here several times.
    @functools.wraps(hook)
    def watched(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        guard, result = self._guard, None
        try:
            with Charged(guard.budgets()):
                result = hook(self, *args, **kwargs)
        except Exception as error:
            guard.failed(hook.__name__, starts, error)
        while guard.alerts and guard.on_alarm is not None:
            guard.on_alarm(guard.alerts.pop(0))
        return result

    return watched  # type: ignore[return-value]
