"""Whose mistake an error is, and what a callback's hooks run under."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.errors import own_fault
from gfs_core.run.guard import Guard, guarded


def broken(*args: Any, **kwargs: Any) -> Any:
    """What the package takes apart has nothing in it: an error in its own code."""
    return ()


def told_of(loss_fn: Any) -> list[str]:
    model = nn.Linear(2, 1)
    options = {"every": 1, "max_overhead": None, "tier": "sharpness", "running_every": None}
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitor.step(lambda x: loss_fn(model, x), torch.ones(4, 2)) is None
    return [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]


def test_an_error_of_the_package_is_called_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfs_core.run.measuring.Conditions", broken)
    [text] = told_of(lambda model, x: model(x).square().mean())
    assert "a mistake in gfs itself, please report it: AttributeError in gfs_core/signals/measuring.py:" in text


def test_an_error_of_the_loss_is_called_the_losss() -> None:
    [text] = told_of(lambda model, x: [model(x).mean()][1])
    assert "the loss failed when it was evaluated again: IndexError: list index out of range" in text
    [text] = told_of(lambda model: model)
    assert "the loss failed when it was evaluated again: TypeError: " in text


@pytest.mark.parametrize(
    "error", [gfs.MeasurementError("a"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_what_the_package_says_on_purpose_is_no_mistake_of_its_own(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        Guard(True, list).on_alarm = exec("raise error", {"__name__": "gfs_core.x", "error": error})
    assert own_fault(caught.value) == ""


class Callback:
    def __init__(self, strict: bool, error: Exception | None) -> None:
        self.closed = self.calls = 0
        self.error = error
        self._guard = Guard(strict, self.close)

    def close(self) -> None:
        self.closed += 1
        raise OSError("and fails in turn")

    @guarded
    def on_step(self) -> str:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return "done"

    @guarded
    def on_train_begin(self) -> None:
        raise gfs.ConfigError("wrong option")


def test_a_hook_that_fails_ends_measuring_with_one_warning() -> None:
    assert Callback(False, None).on_step() == "done"
    callback = Callback(False, ValueError("no"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            callback.on_step()
    assert [str(w.message) for w in caught] == [
        "gfs: `on_step` failed (ValueError: no); nothing is measured any more in this run"
    ]
    assert callback.closed == 3
    with pytest.raises(ValueError, match="no"):
        Callback(True, ValueError("no")).on_step()
    with pytest.raises(KeyboardInterrupt):
        Callback(False, KeyboardInterrupt()).on_step()  # type: ignore[arg-type]


def test_a_wrong_option_is_an_error_at_the_start_alone() -> None:
    with pytest.raises(gfs.ConfigError, match="wrong option"):
        Callback(False, None).on_train_begin()
    with pytest.warns(gfs.GFSWarning, match="wrong option"):
        Callback(False, gfs.ConfigError("wrong option")).on_step()


def test_what_measuring_does_not_need_may_fail() -> None:
    guard = Guard(False, list)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            with guard.tolerated("a logger has not taken the values"):
                raise OSError(number)
    assert [str(w.message) for w in caught] == ["gfs: a logger has not taken the values (OSError: 0)"]
    with pytest.raises(OSError, match="full"), Guard(True, list).tolerated("a logger"):
        raise OSError("full")


def test_the_users_function_may_end_the_training() -> None:
    def pruned(event: Any) -> None:
        raise RuntimeError(f"pruned at {event}")

    callback = Callback(False, None)
    callback._guard = Guard(False, list, pruned)
    callback._guard.alerts.append(3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="pruned at 3"):
        callback.on_step()
