"""Rows that a small classifier learns, as the Trainer takes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Dataset):
    """Points in eight dimensions with one of three labels each."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 8, generator=generator)
        self.y = (self.x @ torch.randn(8, 3, generator=generator)).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}
