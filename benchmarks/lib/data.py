"""Data sets: scikit-learn's digits, Fashion-MNIST from Debian's package, and the text of Python's manual."""

from __future__ import annotations

import functools
import gzip
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
Batch = tuple[Tensor, Tensor]  # inputs and targets
SENTENCE = 16  # words at most


def digits(count: int | None = None, centre: float = 0.3, dtype: torch.dtype = torch.float32) -> Batch:
    """The first ``count`` of 1797 images of 8×8, flattened to n×64, in [−centre, 1 − centre]; labels as int64."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16 - centre, dtype=dtype)[:count], torch.tensor(labels, dtype=torch.int64)[:count]


def fashion_mnist(count: int | None = None) -> Batch:
    """The first ``count`` of 60 000 training images, n×1×28×28 with mean 0 and deviation 1; labels as int64."""
    images, labels = _idx("train-images-idx3-ubyte.gz"), _idx("train-labels-idx1-ubyte.gz")
    return (images[:count].float().unsqueeze(1) / 255 - 0.2860) / 0.3530, labels[:count].long()


def _idx(name: str) -> Tensor:
    """An IDX file: two zero bytes, the type (8: bytes), the number of axes; the axes as big-endian int32; the data."""
    path = FASHION_MNIST / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).copy()).reshape(shape)


def text(count: int, length: int = 48) -> tuple[Batch, int]:
    """Rows of ``length`` characters of Python's manual with the characters that follow; the size of the alphabet."""
    characters = "".join(topics.values())[: count * (length + 1)]
    alphabet = sorted(set(characters))
    return next_tokens([alphabet.index(c) for c in characters], length), len(alphabet)


def text_bytes(count: int, length: int, between: str = "") -> Batch:
    """Rows of ``length`` bytes of Python's manual, its topics joined by ``between``; the bytes that follow."""
    return next_tokens(list(between.join(topics.values()).encode()[: count * (length + 1)]), length)


def next_tokens(ids: list[int], length: int) -> Batch:
    """Cut tokens into rows of ``length`` + 1: all but the last of each row, and all but the first."""
    rows = torch.tensor(ids).reshape(-1, length + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def split(data: Batch, held_out: int) -> tuple[Batch, Batch]:
    """Training and validation data, by a fixed permutation; the latter has ``held_out`` examples."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))
    now, later = order[held_out:], order[:held_out]
    return (data[0][now], data[1][now]), (data[0][later], data[1][later])


@functools.cache
def sentence_data() -> tuple[Batch, Batch, int, int]:
    """Sentences of the eight topics of Python's manual that have most, of the 1500 commonest words, to be told apart.

    Returns:
        Data for training and for validation, how many words there are, and how many classes.
    """
    found = {
        topic: [re.findall(r"[a-z_]+", s.lower()) for s in re.split(r"[.!?]\s", body)] for topic, body in topics.items()
    }
    kept = {topic: [s for s in sentences if len(s) >= 4] for topic, sentences in found.items()}
    chosen = sorted(kept, key=lambda topic: -len(kept[topic]))[:8]
    counts = Counter(word for topic in chosen for s in kept[topic] for word in s)
    ids = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(1500))}
    rows = [([ids.get(w, 1) for w in s][:SENTENCE], label) for label, topic in enumerate(chosen) for s in kept[topic]]
    x = torch.tensor([words + [0] * (SENTENCE - len(words)) for words, _ in rows])
    return *split((x, torch.tensor([label for _, label in rows])), len(rows) // 5), len(ids) + 2, len(chosen)
