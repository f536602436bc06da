"""However a model is made, its values are those of the plain one, and training is bitwise the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import gfs_core as gfs
from tests.core import engines, processes
from tests.core.options import tuned
from tests.core.reference import dense_hessian
from tests.core.test_ranks import ROUGH, assert_close

OPTIONS: dict[str, Any] = {**ROUGH, "tier": "sharpness"}
LIKE = {"checkpointed": "attention", "re-entrant": "attention", "compiled": "attention", "placed": "attention"}


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("made", engines.MADE)
def test_the_sharpness_is_that_of_the_dense_hessian_of_the_plain_model(made: str) -> None:
    model, plain, batch = engines.MADE[made](), engines.MADE[LIKE.get(made, made)](), processes.examples(0)
    params = list({id(p): p for p in plain.parameters() if p.requires_grad}.values())
    true = float(torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(plain, batch), params))[-1])
    found = gfs.sharpness(model, loss_fn, batch, tol=1e-5)
    assert found.value == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("made", engines.MADE)
def test_training_is_bitwise_the_same(made: str) -> None:
    measured = processes.train(0, 1, "adamw", OPTIONS, made=made)
    plain = processes.train(0, 1, "adamw", {"tier": "running", "every": 10**6, "alarm": "off"}, made=made)
    assert [m["sharpness"] is not None for m in measured["found"]].count(True) >= 5
    assert measured["losses"] == plain["losses"]
    assert all(torch.equal(a, b) for a, b in zip(measured["weights"], plain["weights"], strict=True))


@pytest.mark.parametrize("made", ["checkpointed", "re-entrant", "compiled", "tied", "quantised"])
def test_two_processes_measure_as_one(made: str, tmp_path: Path) -> None:
    alone = processes.train(0, 1, "adamw", OPTIONS, 6, made=made)
    work = functools.partial(processes.train, made=made, wrapped=made != "re-entrant")
    for rank in processes.run(work, 2, tmp_path, "adamw", OPTIONS, 6):
        assert sum(m["sharpness"] is not None for m in rank["found"]) >= 2
        assert_close(rank["found"], alone["found"], 1e-5)


def test_a_compiled_optimizer(tmp_path: Path) -> None:
    def run(measure: bool, control: str = "observe") -> tuple[list[torch.Tensor], list[float]]:
        model = processes.net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        config = gfs.GFSConfig(**{**{name: v for name, v in OPTIONS.items() if name != "tuned"}, "control": control})
        monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), **OPTIONS["tuned"]) if measure else None
        compiled = torch.compile(optimizer.step, backend="aot_eager")
        scales = []
        for step in range(8):
            batch = processes.examples(step)
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            if monitor is not None:
                monitor.step(lambda b: loss_fn(model, b), batch, step)
                scales.append(monitor.control.last)
            compiled()
        return [p.detach().clone() for p in model.parameters()], scales

    assert all(torch.equal(a, b) for a, b in zip(run(True)[0], run(False)[0], strict=True))
    held, scales = run(True, "follow")
    assert scales[-1] != 1.0
    assert not torch.equal(held[0], run(False)[0][0])
