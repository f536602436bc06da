"""What is done about alerts, where a part of it fails or is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.actions import catalog
from gfs_core.detectors.early_warning import DETECTORS
from gfs_core.signals.context import StepContext


class Fails:
    def act(self, alert: gfs.Alert, trainer: Any) -> None:
        raise OSError("no such pager")


def diverged(**options: Any) -> gfs.StabilityMonitor:
    """A monitor that has just seen a loss that is not finite."""
    model = nn.Linear(2, 1)
    config = gfs.GFSConfig(tier="running", **options)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    monitor.record_loss(float("inf"))
    monitor.update_detectors(0)
    return monitor


def test_an_action_that_fails_keeps_no_other_from_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "ACTIONS", [("log", lambda warn: Fails()), *catalog.ACTIONS])
    with pytest.warns(gfs.GFSWarning) as told:
        monitor = diverged(alarm="stop")
    assert monitor.should_stop
    assert monitor.wants_checkpoint
    assert [str(w.message) for w in told] == [
        "gfs: stability measurement: Fails did not act on an alert: OSError: no such pager",
        "gfs: stability measurement: alarm at step 0: the loss is inf; what to do: start again, and leave out the "
        "batches so far; if it comes again, look at the data",
    ]
    with pytest.raises(OSError, match="no such pager"):
        diverged(alarm="stop", strict=True)


@pytest.mark.parametrize(
    ("alarm", "asked"), [("off", (False, False)), ("log", (False, False)), ("checkpoint", (True, False))]
)
def test_each_value_of_the_option_does_more(alarm: str, asked: tuple[bool, bool]) -> None:
    monitor = diverged(alarm=alarm) if alarm in ("off", "log") else None
    if monitor is None:
        with pytest.warns(gfs.GFSWarning, match="the loss is inf"):
            monitor = diverged(alarm=alarm)
    assert (monitor.wants_checkpoint, monitor.should_stop) == asked


def test_a_state_from_before_a_detector_was_added_is_gone_on_with() -> None:
    before = gfs.EarlyWarning(detectors=DETECTORS[:-1])
    loss = gfs.Key("loss", "of training")
    assert before.observe(gfs.Reading(loss, 7, float("nan"))) is not None
    now = gfs.EarlyWarning()
    now.load_state_dict(before.state_dict())
    assert (now.level, now.reason) == (gfs.AlertLevel.ALARM, "the loss is nan")


def test_layers_have_the_names_of_the_users_modules() -> None:
    model, apart = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), apart], lr=0.1)
    step = StepContext(0, torch.compile(model), optimizer, lambda m, b: m(b).mean(), [], [], [])
    assert step.names == ["0.weight", "0.bias", "1.weight", "1.bias", "parameter 4"]
