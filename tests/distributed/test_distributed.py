"""Both frameworks on their own engines, two processes with gloo."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import gfs_core as gfs
from tests.core.test_ranks import NUMBERS, RUNNING, assert_close
from tests.distributed.launch import launch


def history(path: Path) -> list[dict[str, Any]]:
    return [{name: getattr(m, name) for name in ("step", *NUMBERS)} for m in gfs.history.read(path)]


def test_lightning_ddp_logs_what_one_process_does(tmp_path: Path) -> None:
    module = "tests.distributed.lightning_run"
    launch(module, tmp_path / "one", 1, "with")
    two = launch(module, tmp_path / "two", 2, "with")
    without = launch(module, tmp_path / "without", 2, "without")
    for a, b in zip(two, without, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
    found = [next((tmp_path / name).rglob("history.jsonl")) for name in ("one", "two")]
    alone, together = (history(path) for path in found)
    assert len(alone) == 12
    assert sum(m["gfs_sharpness"] is not None for m in alone) >= 3
    assert_close(together, alone, 1e-5)
    metrics = [{k: v for k, v in rank["metrics"].items() if k != "gfs/overhead"} for rank in two]  # each has a clock
    assert metrics[0] == metrics[1]
    assert "gfs/stability_ratio" in metrics[0]
    with next((tmp_path / "two").rglob("metrics.csv")).open() as file:
        logged = [float(row["gfs/running_sharpness"]) for row in csv.DictReader(file) if row["gfs/running_sharpness"]]
    assert logged == pytest.approx([m["running_sharpness"] for m in together if m["running_sharpness"]])
    assert two[0]["told"] == two[1]["told"] == []


def test_lightning_ddp_goes_on_where_one_rank_cannot_measure(tmp_path: Path) -> None:
    ranks = launch("tests.distributed.lightning_run", tmp_path, 2, "fails")
    steps = [m["step"] for m in history(next(tmp_path.rglob("history.jsonl")))]
    assert steps == [s for s in range(12) if s != 6]
    assert ["OSError" in text for text in ranks[1]["told"]] == [True]
    assert ["failed on rank 1" in text for text in ranks[0]["told"]] == [True]


def test_lightning_with_sharded_weights_logs_what_one_process_does(tmp_path: Path) -> None:
    module = "tests.distributed.lightning_run"
    launch(module, tmp_path / "one", 1, "gradients")
    two = launch(module, tmp_path / "two", 2, "sharded")
    without = launch(module, tmp_path / "without", 2, "sharded, without")
    for a, b in zip(two, without, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
        assert sum(p.numel() for p in a["weights"]) < 123  # shards
    alone, together = (history(next((tmp_path / name).rglob("history.jsonl"))) for name in ("one", "two"))
    assert sum(m["preconditioned_sharpness"] is not None for m in alone) == 3
    assert_close(together, alone, 1e-5, without=RUNNING)


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_the_trainer_logs_what_one_process_does(mode: str, tmp_path: Path) -> None:
    module = "tests.distributed.hf_run"
    launch(module, tmp_path / "one", 1, mode)
    two = launch(module, tmp_path / "two", 2, mode)
    without = launch(module, tmp_path / "without", 2, "without")
    for a, b in zip(two, without, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
        assert a["told"] == []
    alone, together = (history(tmp_path / name / "history.jsonl") for name in ("one", "two"))
    assert len(alone) == 6
    keys = ("sharpness", "preconditioned_sharpness", "gfs_sharpness", "loss_probe", "threshold")
    compared = [[{k: m[k] for k in ("step", *keys)} for m in rows] for rows in (together, alone)]
    assert sum(m["gfs_sharpness"] is not None for m in compared[0]) >= 1
    for a, b in zip(*compared, strict=True):
        assert {k: v for k, v in a.items() if v is None} == {k: v for k, v in b.items() if v is None}
        assert [a[k] for k in keys if a[k]] == pytest.approx([b[k] for k in keys if b[k]], rel=1e-5)
