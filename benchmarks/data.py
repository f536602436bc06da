"""The data sets of the benchmarks: scikit-learn's digits, and Fashion-MNIST from Debian's package."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def digits(count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` of 1797 images of 8×8, flattened to n×64 and roughly centred; labels as int64."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16 - 0.3, dtype=torch.float32)[:count], torch.tensor(labels, dtype=torch.int64)[:count]


def fashion_mnist(count: int | None = None) -> tuple[Tensor, Tensor]:
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
