"""Lightning trainings, by one process or by several."""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gfs_core.linalg.vectors import local
from lightning_gfs import GFSCallback
from tests.core.options import tuned_callback
from tests.core.processes import BATCH, examples, net
from tests.frames import measured

OPTIONS: dict[str, Any] = {"tier": "gfs", "every": 3, "running_every": 1, "max_overhead": None}
TUNED: dict[str, Any] = {"parts": 4, "tol": 1e-8, "max_hvps": 500}


class Module(L.LightningModule):
    def __init__(self, fails: bool, shard: bool) -> None:
        super().__init__()
        self.net, self.fails, self.shard = net(), fails, shard

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        again = measured()
        if self.fails and self.global_rank == 1 and batch_idx == 6 and again:
            raise OSError("cannot be run again here")
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_model(self) -> None:
        if self.shard and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.02)


def train(folder: str, mode: str) -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parts = [examples(step) for step in range(12)]
    data = TensorDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    shard = mode.startswith("sharded")
    rough = shard or mode == "gradients"
    options = OPTIONS | ({"tier": "sharpness"} if rough else {}) | ({"hvp": "gradients"} if mode == "gradients" else {})
    module, callback = Module(mode == "fails", shard), GFSCallback(**options)
    tuned_callback(callback, **TUNED | ({"tol": 1e-6} if rough else {}))
    sharding = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=sharding if shard else "ddp" if size > 1 else "auto",
        max_steps=7 if shard or mode == "gradients" else 12,  # its solves are dear
        callbacks=[] if mode.endswith("without") else [callback],
        logger=CSVLogger(folder, version="run"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rank = int(os.environ.get("RANK", "0"))
        sampler = DistributedSampler(data, size, rank, shuffle=False)  # Lightning's own would shuffle
        trainer.fit(module, DataLoader(data, batch_size=BATCH // size, sampler=sampler))
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gfs/")}
    torch.save(
        {
            "weights": [local(p).clone() for p in module.parameters()],
            "metrics": metrics,
            "told": [str(w.message) for w in told if "gfs:" in str(w.message)],
        },
        f"{folder}/{trainer.global_rank}.pt",
    )
