"""kill -9 at any moment: what was measured can be read, the checkpoint loads, and a run goes on to the same values."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.run import history

STEPS = 90


def train(folder: Path) -> None:
    """Go on from the checkpoint, if there is one, and save one every four steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    config = gfs.GFSConfig(
        tier="gfs", every=2, running_every=1, max_overhead=None, alarm="log", history=str(folder / "history.jsonl")
    )
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
    first, saved = 0, folder / "checkpoint.pt"
    if saved.exists():
        held = torch.load(saved, weights_only=True)
        first = held["step"]
        for name, part in parts.items():
            part.load_state_dict(held[name])
    for step in range(first, STEPS):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        monitor.step(lambda b: nn.functional.cross_entropy(model(b), (b[:, 0] > 0).long()), x, step, loss=loss)
        optimizer.step()
        if step % 4 == 3:
            state = {"step": step + 1} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, folder / "part.pt")
            os.replace(folder / "part.pt", saved)


def values(measurement: gfs.Measurement) -> dict[str, Any]:
    clock = ("overhead", "seconds")
    return {k: v for k, v in measurement.values().items() if k not in clock}


def test_a_killed_run_goes_on_to_the_same_values(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    began = time.perf_counter()
    train(whole)
    longest = (time.perf_counter() - began) / 6
    path = killed / "history.jsonl"
    delays, kills = random.Random(0), 0
    forks = multiprocessing.get_context("fork")
    while True:
        saved = killed / "checkpoint.pt"
        kept = torch.load(saved, weights_only=True)["step"] if saved.exists() else 0
        child = forks.Process(target=train, args=(killed,))
        child.start()
        if kills < 12:
            time.sleep(delays.uniform(0.02, longest))
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode != -signal.SIGKILL:
            break
        kills += 1
        if path.exists() and len(path.read_bytes().splitlines()) > 2:
            found = history.read(path)
            assert [m.step for m in found] == list(range(len(found)))
            assert len(found) >= kept  # nothing is lost before the step that it was resumed at
        if saved.exists():
            torch.load(saved, weights_only=True)
    assert child.exitcode == 0
    assert kills >= 5
    assert [values(m) for m in history.read(path)] == [values(m) for m in history.read(whole / "history.jsonl")]
    assert history.read_settings(path)["tier"] == "gfs"


def test_a_history_cut_anywhere_is_read_up_to_there_and_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.begin(path, {"tier": "gfs"})
    for step in range(3):
        history.append(path, gfs.Measurement.of(step, sharpness=1.5 + step, reasons=("because é",)))
    text = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in range(ends[0], len(text) + 1):
        path.write_bytes(text[:cut])
        history.append(path, gfs.Measurement.of(9, sharpness=7.0))
        found = history.read(path)
        whole = sum(cut >= end - 1 for end in ends[1:])  # the last character of a record may be all that is missing
        assert [(m.step, m.sharpness) for m in found] == [(i, 1.5 + i) for i in range(whole)] + [(9, 7.0)], cut
        last = path.read_bytes().splitlines()[-1]
        assert json.loads(last)["step"] == 9


def test_a_full_disk_does_not_end_training() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="sharpness", every=1, max_overhead=None, history="/dev/full")
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    x = torch.ones(4, 3)
    with pytest.warns(gfs.GFSWarning, match="history"):
        found = [monitor.step(lambda b: model(b).square().mean(), x, step) for step in range(3)]
    assert all(m is not None and m.sharpness > 0 for m in found)
