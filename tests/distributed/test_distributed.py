"""Both frameworks on their own engines, two processes with gloo."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gfs_core as gfs
from tests.core.test_ranks import NUMBERS, RUNNING, assert_close
from tests.distributed import hf_run, lightning_run
from tests.distributed.launch import launch


def history(path: Path) -> list[dict[str, Any]]:
    return [{name: getattr(m, name) for name in ("step", *NUMBERS)} for m in gfs.read_history(path)]


class Runs(NamedTuple):
    """Trainings of each mode, by one process and by two."""

    folder: Path
    alone: dict[str, list[dict[str, Any]]]
    together: dict[str, list[dict[str, Any]]]

    def histories(self, alone: str, together: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        one, two = (next((self.folder / d / m).rglob("history.jsonl")) for d, m in (("one", alone), ("two", together)))
        return history(one), history(two)


def run(train: Callable[[str, str], None], folder: Path, alone: Sequence[str], together: Sequence[str]) -> Runs:
    return Runs(folder, launch(train, folder / "one", 1, *alone), launch(train, folder / "two", 2, *together))


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    modes = ("with", "without", "sharded", "sharded, without", "fails")
    return run(lightning_run.train, tmp_path_factory.mktemp("lightning"), ("with", "gradients"), modes)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    modes = ("add_callback", "set_trainer")
    return run(hf_run.train, tmp_path_factory.mktemp("trainer"), modes, (*modes, "without"))


def test_lightning_ddp_logs_what_one_process_does(lightning: Runs) -> None:
    two = lightning.together["with"]
    for a, b in zip(two, lightning.together["without"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
    alone, together = lightning.histories("with", "with")
    assert len(alone) == 12
    assert sum(m["gfs_sharpness"] is not None for m in alone) >= 3
    assert_close(together, alone, 1e-5)
    metrics = [{k: v for k, v in rank["metrics"].items() if k != "gfs/overhead"} for rank in two]  # each has a clock
    assert metrics[0] == metrics[1]
    assert "gfs/stability_ratio" in metrics[0]
    with next((lightning.folder / "two" / "with").rglob("metrics.csv")).open() as file:
        logged = [float(row["gfs/running_sharpness"]) for row in csv.DictReader(file) if row["gfs/running_sharpness"]]
    assert logged == pytest.approx([m["running_sharpness"] for m in together if m["running_sharpness"]])
    assert two[0]["told"] == two[1]["told"] == []


def test_lightning_ddp_goes_on_where_one_rank_cannot_measure(lightning: Runs) -> None:
    ranks = lightning.together["fails"]
    steps = [m["step"] for m in lightning.histories("with", "fails")[1]]
    assert steps == [s for s in range(12) if s != 6]
    assert ["OSError" in text for text in ranks[1]["told"]] == [True]
    assert ["failed on rank 1" in text for text in ranks[0]["told"]] == [True]


def test_lightning_with_sharded_weights_logs_what_one_process_does(lightning: Runs) -> None:
    runs = lightning.together
    for a, b in zip(runs["sharded"], runs["sharded, without"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
        assert sum(p.numel() for p in a["weights"]) < 123  # shards
    alone, together = lightning.histories("gradients", "sharded")
    assert [m["step"] for m in alone if m["preconditioned_sharpness"] is not None] == [3, 6]
    assert_close(together, alone, 1e-5, without=RUNNING)


@pytest.mark.parametrize("mode", ["add_callback", "set_trainer"])
def test_the_trainer_logs_what_one_process_does(mode: str, trainer: Runs) -> None:
    for a, b in zip(trainer.together[mode], trainer.together["without"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
        assert a["told"] == []
    alone, together = trainer.histories(mode, mode)
    assert len(alone) == 6
    keys = ("sharpness", "preconditioned_sharpness", "gfs_sharpness", "loss_probe", "threshold")
    compared = [[{k: m[k] for k in ("step", *keys)} for m in rows] for rows in (together, alone)]
    assert sum(m["gfs_sharpness"] is not None for m in compared[0]) >= 1
    for a, b in zip(*compared, strict=True):
        assert {k: v for k, v in a.items() if v is None} == {k: v for k, v in b.items() if v is None}
        assert [a[k] for k in keys if a[k]] == pytest.approx([b[k] for k in keys if b[k]], rel=1e-5)
