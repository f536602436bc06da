"""The transformer whose width grows, and its training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.meters import timed
from benchmarks.lib.trainings import gradient

VOCABULARY, LENGTH, EXAMPLES = 64, 8, 16  # tokens known, in an example; examples in a batch
WIDTHS = {1e4: 12, 1e5: 44, 1e6: 144, 1e7: 456, 1e8: 1442}  # parameters: width
RATES: dict[Any, float] = {torch.optim.SGD: 0.1, torch.optim.AdamW: 1e-3}


class Block(nn.Module):
    """Causal attention and an MLP, before each a LayerNorm."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        n, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).masked_fill(later, -math.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Four blocks; the head is tied to the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.blocks(self.embedding(tokens) + self.place)
        return self.norm(x) @ self.embedding.weight.T


def batch_of(examples: int) -> Tensor:
    """Sequences in which a token mostly follows from the one before."""
    tokens = [torch.randint(VOCABULARY, (examples,))]
    for _ in range(LENGTH):
        noise = torch.randint(VOCABULARY, (examples,)) * (torch.rand(examples) < 0.2)
        tokens.append((5 * tokens[-1] + 1 + noise) % VOCABULARY)
    return torch.stack(tokens, 1)


class Run:
    """A model in training."""

    def __init__(self, width: int, kind: Any = torch.optim.SGD, wrap: Callable[[Any], Any] = lambda m: m) -> None:
        torch.manual_seed(0)
        self.model = wrap(GPT(width))
        self.optimizer = kind(self.model.parameters(), lr=RATES[kind])
        self.params = list(self.model.parameters())

    def loss(self, batch: Tensor) -> Tensor:
        """Of the next token."""
        return nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def gradient(self, batch: Tensor) -> None:
        """Forward and backward pass."""
        gradient(self.optimizer, self.loss(batch))

    def step(self, batch: Tensor) -> None:
        """A training step."""
        self.gradient(batch)
        self.optimizer.step()

    def monitor(self, tier: Any, **options: Any) -> gfs.StabilityMonitor:
        """One that measures this tier alone, at every step."""
        beside = {} if tier == "running" else {"running_every": None}
        options = {"every": 1, "max_overhead": None, "strict": True, **beside, **options}
        return gfs.StabilityMonitor(self.model, self.optimizer, gfs.GFSConfig(tier=tier, **options))


def processor(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, which other work on the machine disturbs less than those of the clock."""
    return timed(work, time.process_time)
