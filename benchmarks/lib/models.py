"""Networks that more than one benchmark trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose weights depend on nothing but this seed."""
    torch.manual_seed(seed)
    return make()


def dense(*widths: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers between these widths, with an activation after each but the last."""
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def mlp(activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers of 100, for digits."""
    return dense(64, 100, 100, 10, act=activation)


def cnn() -> nn.Sequential:
    """Two convolutions with stride 2 and a hidden layer of 32, for Fashion-MNIST."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def digits_cnn(first: int = 8, second: int = 16, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions with this many channels, for digits given flat."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, first, 3), act(), nn.Conv2d(first, second, 3), act(), nn.Flatten(),
        nn.Linear(16 * second, 10),
    )  # fmt: skip


class Rows(nn.Module):
    """A small transformer that reads a digit as eight rows."""

    def __init__(self, activation: str, places: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.zeros(8, 32)) if places else None
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, activation=activation)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of shape (n, 64)."""
        rows = self.embed(x.reshape(-1, 8, 8))
        out: Tensor = self.head(self.block(rows if self.place is None else rows + self.place).mean(1))
        return out


class Characters(nn.Module):
    """A small causal transformer over characters."""

    def __init__(self, alphabet: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(alphabet, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, alphabet)
        self.register_buffer("mask", torch.triu(torch.full((length, length), -math.inf), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, length, alphabet)."""
        out: Tensor = self.head(self.blocks(self.embed(x) + self.place, mask=self.mask))
        return out


def gpt2(width: int = 768, layers: int = 12, length: int = 1024, vocabulary: int = 50257) -> Any:
    """GPT-2 of this size, of 124 million weights by default, without dropout."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=max(width // 64, 2), n_positions=length,
        attn_implementation="sdpa", use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    """The shape of TinyLlama, with as many tokens in its vocabulary: 1.1 billion weights."""
    import transformers

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    config = transformers.LlamaConfig(attn_implementation="sdpa", use_cache=False, **shape, **heads)
    return transformers.LlamaForCausalLM(config)


class Sentences(nn.Module):
    """A small transformer over the words of a sentence, with the mean over them at the end; 0 is no word."""

    def __init__(self, words: int, classes: int, length: int = 16, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        there = (x > 0).unsqueeze(-1).float()
        hidden = self.blocks(self.embed(x) + self.place)
        out: Tensor = self.head((hidden * there).sum(1) / there.sum(1).clamp(min=1))
        return out
