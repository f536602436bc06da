"""Nothing is left behind by a step, measured or not; benchmarks/long_run.py looks at 50,000."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gfs_core as gfs
from benchmarks.long_run import hooks
from tests.core.options import tuned


def counts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())
    return {
        "tensors": tensors,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "hooks": hooks(model, optimizer),
        "modes": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors where Linux lists them")
def test_hundreds_of_steps_leave_nothing_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    config = gfs.GFSConfig(
        tier="gfs", every=10, running_every=5, max_overhead=None,
        control="cap", alarm="log", history=str(tmp_path / "history.jsonl"),
    )  # fmt: skip
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    tuned(monitor, beside={"directional": 10, "batch_sharpness": 20})

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())

    found = []
    for step in range(400):
        x = torch.randn(24, 6)
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        monitor.step(loss_of, x, step, loss=loss)
        optimizer.step()
        del loss
        if step % 100 == 99:
            found.append((counts(model, optimizer), len(str(monitor.state_dict()))))
    assert len(gfs.read_history(tmp_path / "history.jsonl")) > 40  # BatchNorm: running on whole batches, every 20 steps
    assert found[0][0]["hooks"] > 0
    assert all(now == found[1][0] for now, _ in found[2:]), found  # windows are full by then
    assert max(size for _, size in found[2:]) < 1.2 * found[1][1]
    monitor.close()
    assert counts(model, optimizer)["hooks"] == 0
