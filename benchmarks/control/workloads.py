"""What the ways to set the rate are compared on: trainings of 1000 steps, on none of which a constant was chosen."""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import re
import textwrap
from collections import Counter
from dataclasses import replace
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, fashion_mnist, next_tokens, split, text, text_bytes
from benchmarks.lib.models import dense
from benchmarks.lib.trainings import adamw, entropy, epochs, gradient, sgd, squared
from benchmarks.rate import Data, Workload, bn_cnn
from benchmarks.zoo.parts import Attention, LowRank, Recurrent

STEPS = 1000
LENGTH, SHORT = 32, 16  # tokens of a sequence: of the language model of bytes, and of the others
WORDS = 2000  # the commonest ones
USERS, ITEMS, RANK = 1000, 500, 5  # of the ratings


@functools.cache
def small_images() -> Data:
    """Fashion-MNIST at 14×14: 5000 images for training, 1000 for validation."""
    images, labels = fashion_mnist(6000)
    return split((nn.functional.avg_pool2d(images, 2), labels), 1000)


@functools.cache
def large_images() -> Data:
    return split(fashion_mnist(5000), 1000)


@functools.cache
def characters() -> tuple[Data, int]:
    """Pieces of Python's manual, and the size of their alphabet."""
    data, alphabet = text(9000, 16)
    return split(data, 500), alphabet


@functools.cache
def ratings() -> Data:
    """Inner products of hidden factors with noise, by pairs of a user and an item."""
    draws = torch.Generator().manual_seed(7)
    of, by = torch.randn(USERS, RANK, generator=draws), torch.randn(ITEMS, RANK, generator=draws)
    pairs = torch.stack([torch.randint(n, (62000,), generator=draws) for n in (USERS, ITEMS)], 1)
    noise = 0.5 * torch.randn(len(pairs), generator=draws)
    return split((pairs, ((of[pairs[:, 0]] * by[pairs[:, 1]]).sum(1) + noise)[:, None]), 2000)


class Factors(nn.Module):
    """A rating as the inner product of two embeddings."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.of, self.by = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        for table in (self.of, self.by):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Ratings (n, 1) of pairs (n, 2)."""
        return (self.of(pairs[:, 0]) * self.by(pairs[:, 1])).sum(1, keepdim=True)


@functools.cache
def taught() -> Data:
    """What a random network says of random inputs, with noise: 1024 examples for training, 1000 for validation."""
    draws = torch.Generator().manual_seed(11)
    x = torch.randn(2024, 20, generator=draws)
    first, last = torch.randn(20, 12, generator=draws), torch.randn(12, 2, generator=draws)
    target = (x @ first / 20**0.5).relu() @ last / 12**0.5
    return split((x, target + 0.2 * torch.randn(target.shape, generator=draws)), 1000)


@functools.cache
def source_code() -> Data:
    """Bytes of modules of Python's library: what is fine-tuned on."""
    code = "".join(inspect.getsource(module) for module in (argparse, functools, textwrap))
    ids = list(code.encode("ascii", "replace"))
    return split(next_tokens(ids[: len(ids) // (SHORT + 1) * (SHORT + 1)], SHORT), 500)


@functools.cache
def pretrained() -> dict[str, Tensor]:
    """The weights of a small transformer after 600 steps on the manual's prose."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention(256, SHORT, 48, 2)
    optimizer = adamw(model, 3e-3)
    batches = epochs(text_bytes(8000, SHORT), 16, torch.Generator().manual_seed(0))
    for batch in itertools.islice(batches, 600):
        gradient(optimizer, entropy(model, batch))
        optimizer.step()
    return model.state_dict()


def low_rank() -> nn.Module:
    """That transformer with an update of rank 4 for each linear layer of its blocks; nothing else is trained."""
    model = Attention(256, SHORT, 48, 2)
    model.load_state_dict(pretrained())
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child, 4))
    return model


def trained_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)


@functools.cache
def manual_bytes() -> Data:
    return split(text_bytes(8000, LENGTH, "\n"), 200)


@functools.cache
def manual_words() -> Data:
    """The manual as words and marks, the rare ones all one."""
    found = [word for topic in topics.values() for word in re.findall(r"\w+|[^\w\s]", topic.lower())]
    ranks = {word: i for i, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    ids = [ranks.get(word, WORDS - 1) for word in found]
    return split(next_tokens(ids[: len(ids) // (SHORT + 1) * (SHORT + 1)], SHORT), 400)


def one_hot(model: nn.Module, batch: Batch) -> Tensor:
    """Squared loss of the classes of images."""
    return squared(model, (batch[0], nn.functional.one_hot(batch[1], 10).float()))


_ALL = {
    "ReLU network, squared loss, momentum, 128": Workload(
        large_images, lambda: nn.Sequential(nn.Flatten(), dense(784, 100, 100, 10, act=nn.ReLU)), sgd, 0.01, 128,
        loss=one_hot,
    ),
    "BatchNorm CNN, momentum, 32": Workload(small_images, lambda: bn_cnn(1, 14), sgd, 0.05, 32),
    "LoRA, AdamW, 16": Workload(source_code, low_rank, trained_adamw, 3e-3, 16),
    "GRU on characters, momentum, 16": Workload(
        lambda: characters()[0], lambda: Recurrent(nn.GRU, characters()[1], 40), sgd, 0.3, 16
    ),
    "tanh network, momentum, full batch": Workload(taught, lambda: dense(20, 96, 96, 2), sgd, 0.05, 1024, loss=squared),
    "factors of ratings, AdamW, 256": Workload(ratings, Factors, adamw, 1e-2, 256, loss=squared),
    "word GPT, 1.1 M weights, AdamW, 4": Workload(
        manual_words, lambda: Attention(WORDS, SHORT, 144, 2), adamw, 1e-3, 4
    ),
    "byte GPT, 1.1 M weights, AdamW, 4": Workload(manual_bytes, lambda: Attention(256, LENGTH, 200, 2), adamw, 1e-3, 4),
}  # fmt: skip
WORKLOADS = {name: replace(workload, steps=STEPS) for name, workload in _ALL.items()}  # in the order of the runs
LANGUAGE = [name for name in WORKLOADS if "GPT" in name]
