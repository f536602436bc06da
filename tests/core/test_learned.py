"""What a run has found out about its loss is found out once: over measurements, and over a resume."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.loss.learned import Learned
from tests.core.reference import cross_entropy, data, make
from tests.core.test_curvature import OnceDifferentiable

CONFIG = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None, alarm="off")


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many derivatives have failed since the last look."""
    count = [0]
    differentiate = torch.autograd.grad

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return differentiate(*args, **kwargs)
        except RuntimeError:
            count[0] += 1
            raise

    def since() -> int:
        seen, count[0] = count[0], 0
        return seen

    monkeypatch.setattr(torch.autograd, "grad", watched)
    return since


def monitor_of(model: nn.Module, config: gfs.GFSConfig = CONFIG) -> gfs.StabilityMonitor:
    return gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.01), config)


def measured(monitor: gfs.StabilityMonitor, step: int) -> gfs.Measurement:
    found = monitor.step(lambda batch: cross_entropy(monitor.model, batch), data(), step=step)
    assert found is not None
    return found


def resumed(monitor: gfs.StabilityMonitor, config: gfs.GFSConfig = CONFIG) -> gfs.StabilityMonitor:
    """A monitor of a copy of the model, with what was saved, as a checkpoint is read."""
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    after = monitor_of(copy.deepcopy(monitor.model), config)
    after.load_state_dict(torch.load(file, weights_only=True))
    return after


def learned(monitor: gfs.StabilityMonitor) -> Learned:
    return Learned.from_state(monitor.state_dict()["measuring"]["learned"])


def test_that_the_plain_kernel_is_needed_is_found_out_once(failures) -> None:
    monitor = monitor_of(make("transformer"))
    first = measured(monitor, 0)
    assert failures() == 1  # fused attention has no second derivative
    again = measured(monitor, 1)
    after = resumed(monitor)
    last = measured(after, 2)
    assert failures() == 0
    assert learned(after) == Learned(hvp="exact", double_backward_verified=True, plain_kernels=True)
    assert first.sharpness == pytest.approx(last.sharpness, rel=1e-2)
    assert again.sharpness == pytest.approx(last.sharpness, rel=1e-2)


def test_that_products_come_from_gradients_is_found_out_once(failures) -> None:
    monitor = monitor_of(OnceDifferentiable(custom=True))
    first = measured(monitor, 0)
    assert "differences of gradients" in first.reasons[0]
    assert failures() == 0  # a part of the second derivative is missing without an error
    after = resumed(monitor)
    assert (learned(after).hvp, learned(after).double_backward_verified) == ("gradients", True)
    last = measured(after, 1)
    assert last.reasons == ()
    assert last.sharpness == pytest.approx(first.sharpness, rel=1e-2)


@pytest.mark.parametrize("saved", ["exact", "gradients"])
def test_an_option_that_is_given_goes_before_what_is_learned(saved, failures) -> None:
    monitor = monitor_of(make("mlp"))
    state = monitor.state_dict()
    state["measuring"]["learned"] = Learned(hvp=saved, precision="training").state_dict()
    monitor.load_state_dict(state)
    asked = gfs.GFSConfig(
        **{**vars(CONFIG), "hvp": "gradients" if saved == "exact" else "exact", "precision": "float32"}
    )
    after = resumed(monitor, asked)
    assert learned(after).hvp == saved
    measured(after, 0)
    assert (learned(after).hvp, learned(after).precision) == (asked.hvp, "float32")
    monitor = resumed(monitor)
    measured(monitor, 0)
    assert (learned(monitor).hvp, learned(monitor).precision) == (saved, "training")


def test_a_hessian_works_on_a_copy_of_what_is_learned() -> None:
    before = Learned()
    model = make("transformer")
    with gfs.StateSnapshot(model) as isolation:
        hessian = gfs.Hessian(gfs.Objective(model, cross_entropy, [data()], isolation=isolation), learned=before)
        hessian([torch.ones_like(p) for p in model.parameters()])
    assert before == Learned()
    after = Learned(hvp="exact", double_backward_verified=True, plain_kernels=True, precision="training")
    assert hessian.learned == after  # without a choice of precision the loss is as it comes


def test_learned_facts_go_through_plain_values() -> None:
    facts = Learned("gradients", True, True, False, 0.25, True, "float32", False, "it fails on a part", 7, 32)
    assert Learned.from_state(facts.state_dict()) == facts
    assert Learned.from_state({}) == Learned()
    with pytest.raises(ValueError, match="`hvp` is 'often'"):
        Learned.from_state({"hvp": "often"})
    with pytest.raises(ValueError, match="`precision` is 'float8'"):
        Learned.from_state({"precision": "float8"})
    with pytest.raises(ValueError, match="0 parts"):
        Learned.from_state({"parts": 0})
