"""Starts trainings as several processes, as torchrun does, over gloo."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.forks import START

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def launch(train: Callable[[str, str], None], folder: Path, size: int, *modes: str) -> dict[str, list[dict[str, Any]]]:
    """What each process of ``train(FOLDER/MODE, MODE)`` has saved under ``FOLDER/MODE``, by mode."""
    for mode in modes:
        (folder / mode).mkdir(parents=True)
    if size == 1:
        _train(train, folder, *modes)
    else:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method=START,
            monitor_interval=0.1,
        )
        handlers = {of: signal.getsignal(of) for of in (signal.SIGTERM, signal.SIGINT)}
        try:
            elastic_launch(config, _train)(train, folder, *modes)
        finally:
            for of, handler in handlers.items():
                signal.signal(of, handler)
    return {m: [torch.load(folder / m / f"{rank}.pt", weights_only=False) for rank in range(size)] for m in modes}


def _train(train: Callable[[str, str], None], folder: Path, *modes: str) -> None:
    os.environ.update(_ENVIRONMENT)
    for mode in modes:
        train(f"{folder}/{mode}", mode)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
