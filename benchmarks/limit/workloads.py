"""The models and data that a control is tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.lib.data import Batch, digits, fashion_mnist, sentence_data, split, text
from benchmarks.lib.models import Characters, Sentences, cnn, mlp

LENGTH, WIDTH = 24, 32  # characters of an example, width of its transformer
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
