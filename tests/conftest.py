"""Fixtures of several packages' tests."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # trackio asks for it once, when anything imports it


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    yield wandb
    wandb.finish()


def pytest_collection_finish() -> None:
    """Let the garbage collector pass by the frameworks: the Trainer collects whenever it begins to train."""
    gc.collect()
    gc.freeze()
