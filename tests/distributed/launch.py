"""Starts a training script as several processes, as users do: with torchrun, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def launch(module: str, folder: Path, size: int, *modes: str) -> dict[str, list[dict[str, Any]]]:
    """What each process of ``python -m module FOLDER MODE …`` has saved under ``FOLDER/MODE``, by mode."""
    for mode in modes:
        (folder / mode).mkdir(parents=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", module, str(folder), *modes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {m: [torch.load(folder / m / f"{rank}.pt", weights_only=False) for rank in range(size)] for m in modes}
