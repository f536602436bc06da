"""The trainings on which ways to search for a learning rate are compared."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from benchmarks.lib.data import Batch, fashion_mnist, split, text_bytes
from benchmarks.lib.models import dense, digits_cnn
from benchmarks.lib.trainings import adamw, entropy, gradient, sgd, squared
from benchmarks.rate import CHOSEN, Batches, Data, Workload, bn_cnn, digits_data
from benchmarks.zoo.parts import Attention, LowRank, Recurrent
from benchmarks.zoo.trial import Factors, _small_cnn


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


@functools.cache
def pooled(count: int) -> Data:
    """Fashion-MNIST at 14×14, and 1000 more images to validate on."""
    images, labels = fashion_mnist(count + 1000)
    return split((nn.functional.avg_pool2d(images, 2), labels), 1000)


def flat(count: int) -> Data:
    (x, y), (v, w) = pooled(count)
    return (x.flatten(1), y), (v.flatten(1), w)


def few_digits() -> Data:
    (x, y), validation = digits_data()
    return (x[:320], y[:320]), validation


def noisy_digits() -> Data:
    """A fifth of the labels that are trained on are drawn anew."""
    (x, y), validation = digits_data()
    generator = torch.Generator().manual_seed(5)
    bad = torch.rand(len(y), generator=generator) < 0.2
    return (x, torch.where(bad, torch.randint(10, y.shape, generator=generator), y)), validation


@functools.cache
def ratings() -> Data:
    draws = torch.Generator().manual_seed(3)
    left, right = torch.randn(300, 5, generator=draws), torch.randn(200, 5, generator=draws)
    pairs = torch.stack([torch.randint(300, (9000,), generator=draws), torch.randint(200, (9000,), generator=draws)], 1)
    values = (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(1, keepdim=True)
    return split((pairs, values + 0.3 * torch.randn(values.shape, generator=draws)), 1000)


def new_classes() -> Data:
    (x, y), (v, w) = flat(4000)
    return (x[y >= 6], y[y >= 6]), (v[w >= 6], w[w >= 6])


def fine_tuned() -> nn.Module:
    """A network that was trained on the other classes, with updates of low rank."""
    (x, y), _ = flat(4000)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = dense(196, 96, 96, 10, act=nn.ReLU)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for batch in itertools.islice(endless(Batches((x[y < 6], y[y < 6]), 64, 1)), 300):
            gradient(optimizer, entropy(model, batch))
            optimizer.step()
    return nn.Sequential(*(LowRank(m, 4) if isinstance(m, nn.Linear) else m for m in model))


def trainable(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)


def dropped() -> nn.Module:
    return nn.Sequential(
        nn.Linear(196, 128), nn.ReLU(), nn.Dropout(0.4), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(64, 10),
    )  # fmt: skip


class Bag(nn.Module):
    """A classifier of rows of bytes by the mean of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 32), dense(32, 64, 2, act=nn.ReLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (n, 2)."""
        out: torch.Tensor = self.head(self.embed(x).mean(1))
        return out


@functools.cache
def counted() -> Data:
    """Rows of bytes, and whether they hold as many e as blanks."""
    train, validation = split(text_bytes(1800, 24), 300)

    def labelled(rows: Batch) -> Batch:
        return rows[0], ((rows[0] == 101).sum(1) >= (rows[0] == 32).sum(1)).long()

    return labelled(train), labelled(validation)


def nesterov(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, 0.9, nesterov=True)


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate)


def decayed(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)


relu = functools.partial(dense, act=nn.ReLU)
WORKLOADS = CHOSEN | {
    "few digits, MLP, AdamW": Workload(few_digits, lambda: relu(64, 96, 96, 10), adamw, 3e-3, 32, 400),
    "wrong labels, MLP, momentum": Workload(noisy_digits, lambda: dense(64, 100, 100, 10), sgd, 0.05),
    "wrong labels, CNN, AdamW": Workload(noisy_digits, digits_cnn, adamw, 3e-3, 64, 400),
    "few Fashion-MNIST, CNN, AdamW": Workload(lambda: pooled(1000), _small_cnn, adamw, 3e-3, 32),
    "small Fashion-MNIST, BatchNorm, momentum": Workload(
        lambda: pooled(4000), lambda: _small_cnn(True), sgd, 0.05, 64, 300
    ),
    "small Fashion-MNIST, dropout, Adam": Workload(lambda: flat(4000), dropped, adam, 1e-3, 64, 600),
    "small Fashion-MNIST, MLP, batch 512": Workload(
        lambda: flat(4000), lambda: relu(196, 64, 10), nesterov, 0.1, 512, 300
    ),
    "few bytes, GRU, AdamW": Workload(
        lambda: split(text_bytes(700, 32), 300), lambda: Recurrent(nn.GRU, 256, 48), adamw, 3e-3, 24, 300
    ),
    "bytes, attention, AdamW": Workload(
        lambda: split(text_bytes(3300, 40), 300), lambda: Attention(256, 40, 48, 2), decayed, 2e-3, 12, 400
    ),
    "bytes, LSTM, momentum": Workload(
        lambda: split(text_bytes(3300, 40), 300), lambda: Recurrent(nn.LSTM, 256, 48), sgd, 0.3, 32, 300
    ),
    "ratings, factorisation, Adam": Workload(ratings, lambda: Factors(300, 200, 16), adam, 1e-2, 128, 800, squared),
    "new classes, LoRA, AdamW": Workload(new_classes, fine_tuned, trainable, 2e-3, 32),
    "digits, MLP, AdamW, 2000 steps": Workload(digits_data, lambda: dense(64, 100, 100, 10), adamw, 3e-3, 64, 2000),
    "digits, BatchNorm CNN, AdamW": Workload(digits_data, bn_cnn, adamw, 3e-3, 64, 300),
    "few digits, CNN, SGD": Workload(
        few_digits, digits_cnn, lambda m, rate: torch.optim.SGD(m.parameters(), rate), 0.1, 32, 600
    ),
    "counted bytes, embedding, AdamW": Workload(counted, Bag, adamw, 3e-3, 32, 400),
}  # fmt: skip
LANGUAGE = (
    "characters, transformer, AdamW",
    "few bytes, GRU, AdamW",
    "bytes, attention, AdamW",
    "bytes, LSTM, momentum",
)
