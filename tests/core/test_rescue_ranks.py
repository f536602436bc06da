"""Steps that are skipped, and ways back, where two processes train together."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gfs_core as gfs
from tests.bitwise import assert_same
from tests.core.processes import run

STEPS = 90


def train(rank: int, size: int) -> dict[str, Any]:
    """A batch of rank 1 alone is bad at step 20; weights break at 60; at 80 too, when rank 1 has no snapshots."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(512, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(tier="running", every=5, alarm="rescue"))
    generator = torch.Generator().manual_seed(rank)
    kept, said = [], {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(STEPS):
            kept.append([p.detach().clone() for p in model.parameters()])
            if step in (60, 80):
                with torch.no_grad():
                    model[0].weight.fill_(math.nan)
            if step == 80 and rank == 1:
                assert monitor.rescuing is not None
                monitor.rescuing.snapshots.drop()
            rows = torch.randint(512, (16,), generator=generator)
            batch = x[rows] * (math.nan if (step, rank) == (20, 1) else 1.0), y[rows]
            loss = nn.functional.cross_entropy(wrapped(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            made = monitor.step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), batch, loss=loss)
            optimizer.step()
            said[step] = "" if made is None else "; ".join(made.reasons)
    monitor.close()
    return {"kept": kept, "said": said, "told": [str(w.message) for w in told]}


def begin(rank: int, size: int) -> dict[str, Any]:
    """A start towards a rate that is far too high; the processes have other data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    x = torch.randn(512, 6)
    y = (x @ torch.randn(6, 1)).tanh()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 10.0, momentum=0.9)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(tier="running", every=5, control="start"))
    generator = torch.Generator().manual_seed(rank)
    shares: list[float] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            rows = torch.randint(512, (16,), generator=generator)
            batch = x[rows], y[rows]
            loss = (wrapped(batch[0]) - batch[1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.step(lambda b: (model(b[0]) - b[1]).square().mean(), batch, loss=loss)
            optimizer.step()
            shares.append(monitor.rates.start.last)  # type: ignore[union-attr]
    monitor.close()
    kept = [p.detach().clone() for p in model.parameters()]
    return {"kept": kept, "shares": shares, "loss": float(loss.detach()), "told": [str(w.message) for w in told]}


def test_all_processes_end_a_start_at_the_same_step(tmp_path: Path) -> None:
    a, b = run(begin, 2, tmp_path)
    assert a["shares"] == b["shares"]
    assert_same(a["kept"], b["kept"])
    assert a["shares"][-1] < 0.1
    assert math.isfinite(a["loss"])
    assert sum("as the rate rose" in text and "went back" in text for text in a["told"]) == 1


def test_all_processes_do_the_same_at_the_same_step(tmp_path: Path) -> None:
    a, b = run(train, 2, tmp_path)
    for step in {*range(81)} - {61, 62, 63}:
        assert_same(a["kept"][step], b["kept"][step])
        assert all(t.isfinite().all() for t in a["kept"][step])
    assert_same(a["kept"][20], a["kept"][21])
    assert not torch.equal(a["kept"][21][0], a["kept"][22][0])
    assert_same(a["kept"][64], a["kept"][50])
    for ranks in (a, b):
        assert "the step was skipped" in ranks["said"][20]
        assert "went back at step 63 to the weights of step 50" in ranks["said"][63]
        # Of no use to one process alone.
        assert not ranks["kept"][-1][0].isfinite().any()
        assert [step for step in range(64, STEPS) if "went back" in ranks["said"][step]] == []
        assert "the run does not go back" in ranks["said"][83]
        skipped = [step for step in range(80, STEPS) if "the step was skipped" in ranks["said"][step]]
        assert skipped == [80, 81, 82, 84, 85, 86, 88, 89]
    assert sum("the run does not go back" in text for text in a["told"]) == 1
