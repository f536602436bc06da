"""The models and data that a control is tried on."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, digits, fashion_mnist, split, text
from benchmarks.lib.models import Characters, cnn, mlp

LENGTH, WORDS, WIDTH = 24, 16, 32  # characters of an example, words of a sentence, width of both transformers
Data = tuple[Batch, Batch, int, int]  # for training, for validation, symbols, classes


@dataclass(frozen=True)
class Workload:
    """A model, its data and its base rate.

    Attributes:
        data: gives the data, and how many symbols and classes there are.
        model: made from those two numbers.
        adaptive: AdamW, otherwise SGD with momentum 0.9.
        images: whether it counts for the goal.
        accuracy: what is reported: the accuracy in validation, otherwise the loss.
    """

    data: Callable[[], Data]
    model: Callable[[int, int], nn.Module]
    adaptive: bool
    images: bool = True
    accuracy: bool = True

    @property
    def rate(self) -> float:
        """The base rate."""
        return 3e-3 if self.adaptive else 0.05


class Sentences(nn.Module):
    """A small transformer over the words of a sentence, with the mean over them at the end; 0 is no word."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, WIDTH), nn.Parameter(torch.zeros(WORDS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        there = (x > 0).unsqueeze(-1).float()
        hidden = self.blocks(self.embed(x) + self.place)
        out: Tensor = self.head((hidden * there).sum(1) / there.sum(1).clamp(min=1))
        return out


@functools.cache
def digits_data() -> Data:
    """Images as vectors."""
    return *split(digits(), 360), 0, 10


@functools.cache
def fashion_data() -> Data:
    """The first 6000 images."""
    x, y = fashion_mnist(6000)
    return (x[:5000], y[:5000]), (x[5000:], y[5000:]), 0, 10


@functools.cache
def text_data() -> Data:
    """Characters, and those that follow."""
    data, alphabet = text(5000, LENGTH)
    return *split(data, 500), alphabet, alphabet


@functools.cache
def sentence_data() -> Data:
    """Sentences of the eight topics of Python's manual that have most; the 1500 commonest words."""
    found = {
        topic: [re.findall(r"[a-z_]+", s.lower()) for s in re.split(r"[.!?]\s", body)] for topic, body in topics.items()
    }
    kept = {topic: [s for s in sentences if len(s) >= 4] for topic, sentences in found.items()}
    chosen = sorted(kept, key=lambda topic: -len(kept[topic]))[:8]
    counts = Counter(word for topic in chosen for s in kept[topic] for word in s)
    ids = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(1500))}
    rows = [([ids.get(w, 1) for w in s][:WORDS], label) for label, topic in enumerate(chosen) for s in kept[topic]]
    x = torch.tensor([words + [0] * (WORDS - len(words)) for words, _ in rows])
    return *split((x, torch.tensor([label for _, label in rows])), len(rows) // 5), len(ids) + 2, len(chosen)


def _mlp(symbols: int, classes: int) -> nn.Module:
    return mlp(nn.ReLU)


def _cnn(symbols: int, classes: int) -> nn.Module:
    return cnn()


def _characters(symbols: int, classes: int) -> nn.Module:
    return Characters(symbols, LENGTH, WIDTH)


WORKLOADS = {
    "digits, MLP, momentum": Workload(digits_data, _mlp, adaptive=False),
    "digits, MLP, AdamW": Workload(digits_data, _mlp, adaptive=True),
    "Fashion-MNIST, CNN, momentum": Workload(fashion_data, _cnn, adaptive=False),
    "Fashion-MNIST, CNN, AdamW": Workload(fashion_data, _cnn, adaptive=True),
    "characters, transformer, AdamW": Workload(text_data, _characters, adaptive=True, images=False, accuracy=False),
    "sentences, transformer, AdamW": Workload(sentence_data, Sentences, adaptive=True, images=False),
}
IMAGES = [name for name, workload in WORKLOADS.items() if workload.images]
