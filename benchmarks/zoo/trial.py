"""More trainings to choose rules and thresholds of the early warning on, unlike those of ``design.py``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, fashion_mnist, text_bytes
from benchmarks.lib.models import dense, gpt2, seeded
from benchmarks.lib.trainings import entropy
from benchmarks.zoo.design import Make, adam, adamw, sgd, too_high
from benchmarks.zoo.parts import (
    Attention,
    LowRank,
    Recurrent,
    adversaries,
    changing,
    cosine,
    drawn,
    one_cycle,
    restarts,
    squares,
    through_float16,
    warmed,
)  # fmt: skip
from benchmarks.zoo.training import Training, plain

STEPS = 3000


@functools.cache
def _fashion() -> Batch:
    return fashion_mnist(4000)


@functools.cache
def _flat() -> Batch:
    images, labels = _fashion()
    return images.flatten(1), labels


@functools.cache
def _pooled() -> Batch:
    """Fashion-MNIST at 14×14."""
    images, labels = _fashion()
    return nn.functional.avg_pool2d(images, 2), labels


@functools.cache
def _bytes() -> Batch:
    return text_bytes(1500, 40)


def _small_cnn(norm: bool = False, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, 2, 1), *([nn.BatchNorm2d(b)] if norm else []), act()]

    return nn.Sequential(*block(1, 12), *block(12, 24), nn.Flatten(), nn.Linear(24 * 16, 10))


# --- healthy ----------------------------------------------------------------------------------------------------------


def full_batch(seed: int) -> Training:
    inputs, labels = _flat()
    data = (inputs[:256], labels[:256])
    model = seeded(lambda: dense(784, 40, 10), seed)
    return plain(model, sgd(model, 0.04, 0.0), squares(model, 10), drawn(data, None, seed), STEPS)


def fitted(seed: int) -> Training:
    inputs, labels = _flat()
    data = (inputs[:600], labels[:600])
    model = seeded(lambda: dense(784, 96, 10, act=nn.GELU), seed)
    return plain(model, adam(model, 1e-3), partial(entropy, model), drawn(data, 32, seed), STEPS)


def cycle(seed: int) -> Training:
    model = seeded(_small_cnn, seed)
    batches = drawn(_pooled(), 64, seed)
    return plain(model, sgd(model, 0.15), partial(entropy, model), batches, STEPS, factor=one_cycle(STEPS))


def warm_restarts(seed: int) -> Training:
    model = seeded(lambda: dense(784, 64, 64, 10, act=nn.SiLU), seed)
    return plain(
        model, adamw(model, 3e-3), partial(entropy, model), drawn(_flat(), 64, seed), STEPS, factor=restarts(500)
    )


def batch_8(seed: int) -> Training:
    model = seeded(_small_cnn, seed)
    return plain(
        model, adamw(model, 1e-3), partial(entropy, model), drawn(_pooled(), 8, seed), STEPS, factor=warmed(100)
    )


def batch_512(seed: int) -> Training:
    model = seeded(lambda: dense(784, 64, 10, act=nn.ReLU), seed)
    return plain(model, sgd(model, 0.1, nesterov=True), partial(entropy, model), drawn(_flat(), 512, seed), STEPS)


def dropout(seed: int) -> Training:
    model = seeded(lambda: nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.4), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.4),
            nn.Linear(64, 10),
        ), seed)  # fmt: skip
    return plain(model, adam(model, 1e-3), partial(entropy, model), drawn(_flat(), 64, seed), STEPS)


def batch_norm(seed: int) -> Training:
    model = seeded(lambda: _small_cnn(norm=True), seed)
    batches = drawn(_pooled(), 64, seed)
    optimizer = sgd(model, 0.1, weight_decay=1e-4)
    return plain(model, optimizer, partial(entropy, model), batches, STEPS, factor=cosine(STEPS, 100))


def language_model(seed: int) -> Training:
    model = seeded(lambda: gpt2(48, 2, 40, 256), seed)
    loss = lambda b: nn.functional.cross_entropy(model(input_ids=b[0]).logits.flatten(0, 1), b[1].flatten())  # noqa: E731
    optimizer = adamw(model, 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return plain(model, optimizer, loss, drawn(_bytes(), 12, seed), STEPS, factor=cosine(STEPS, 150, 0.1), clip=1.0)


def low_rank(seed: int) -> Training:
    """A network that was trained on six classes learns the other four by updates of low rank."""
    inputs, labels = _flat()
    old, new = labels < 6, labels >= 6
    model = seeded(lambda: dense(784, 96, 96, 10, act=nn.ReLU), 7)
    optimizer = adam(model, 1e-3)
    for _, batch in zip(range(300), drawn((inputs[old], labels[old]), 64, 1), strict=False):
        optimizer.zero_grad()
        entropy(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.manual_seed(seed)
    model = nn.Sequential(*(LowRank(m, 4) if isinstance(m, nn.Linear) else m for m in model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    data = (inputs[new], labels[new])
    return plain(model, optimizer, partial(entropy, model), drawn(data, 32, seed), STEPS, factor=cosine(STEPS, 50))


class Factors(nn.Module):
    """Ratings as inner products of what is known of users and of items."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Ratings of pairs, of shape (n, 1)."""
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1, keepdim=True)


def factorisation(seed: int) -> Training:
    draws = torch.Generator().manual_seed(seed)
    left, right = torch.randn(300, 5, generator=draws), torch.randn(200, 5, generator=draws)
    pairs = torch.stack([torch.randint(300, (8000,), generator=draws), torch.randint(200, (8000,), generator=draws)], 1)
    ratings = (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(1, keepdim=True)
    ratings += 0.3 * torch.randn(ratings.shape, generator=draws)
    model = seeded(lambda: Factors(300, 200, 16), seed)
    return plain(model, adam(model, 1e-2), squares(model), drawn((pairs, ratings), 128, seed), STEPS)


def ring(seed: int) -> Training:
    """A generator that learns eight points on a ring, against a critic; the generator is watched."""
    torch.manual_seed(seed)
    maker, critic = dense(8, 64, 64, 2, act=nn.ReLU), dense(2, 64, 64, 1, act=nn.LeakyReLU)
    optimizers = adam(maker, 1e-3, betas=(0.5, 0.99)), adam(critic, 1e-3, betas=(0.5, 0.99))
    draws = torch.Generator().manual_seed(seed)

    def real() -> Tensor:
        angle = torch.randint(8, (128, 1), generator=draws) * math.pi / 4
        return torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(128, 2, generator=draws)

    noise = lambda: torch.randn(128, 8, generator=draws)  # noqa: E731
    return adversaries(maker, critic, optimizers, real, noise, STEPS, watched=maker)


def gru(seed: int) -> Training:
    data = _bytes()
    model = seeded(lambda: Recurrent(nn.GRU, 256, 48), seed)
    return plain(model, adam(model, 3e-3), partial(entropy, model), drawn(data, 16, seed), STEPS, clip=1.0)


def contrastive(seed: int) -> Training:
    """Two noisy views of an image are told from those of others (InfoNCE)."""
    model = seeded(lambda: dense(196, 96, 32, act=nn.ReLU), seed)
    draws = torch.Generator().manual_seed(seed + 1)

    def view(x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=draws) > 0.3
        return x * kept + 0.2 * torch.randn(x.shape, generator=draws)

    def views() -> Iterator[Batch]:
        for images, _ in drawn(_pooled(), 128, seed):
            x = images.flatten(1)
            yield view(x), view(x)

    def loss(batch: Batch) -> Tensor:
        first, second = (nn.functional.normalize(model(x), dim=1) for x in batch)
        return nn.functional.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))

    return plain(model, sgd(model, 0.1), loss, views(), STEPS, factor=cosine(STEPS, 100))


HEALTHY: dict[str, Make] = {
    "full batch at the edge": full_batch, "nearly fitted": fitted, "OneCycle": cycle, "warm restarts": warm_restarts,
    "batch 8": batch_8, "batch 512": batch_512, "dropout": dropout, "BatchNorm CNN": batch_norm,
    "small LM": language_model, "LoRA": low_rank, "matrix factorisation": factorisation, "GAN, generator": ring,
    "GRU": gru, "contrastive": contrastive,
}  # fmt: skip

# --- in danger, by themselves -----------------------------------------------------------------------------------------


def adam_spikes(seed: int) -> Training:
    """Full batch, a surface over the plane; the second moment forgets slowly."""
    x = torch.rand(96, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    y = (4 * x[:, :1]).sin() * (5 * x[:, 1:]).cos()
    model = seeded(lambda: dense(2, 48, 48, 48, 1), seed)
    loss = lambda b: (model(b[0]) - b[1]).square().mean()  # noqa: E731
    return plain(model, adam(model, 0.01), loss, drawn((x, y), None, seed), 2000)


def no_warmup(seed: int) -> Training:
    """A transformer with the norm behind, at a high rate from the first step on."""
    model = seeded(lambda: Attention(256, 40, 48, 4, norm="post"), seed)
    return plain(model, adam(model, 0.03 * 1.2 ** (seed % 5)), partial(entropy, model), drawn(_bytes(), 16, seed), 500)


def no_qk_norm(seed: int) -> Training:
    """A transformer whose queries and keys grow, at a high rate."""
    model = seeded(lambda: Attention(256, 40, 48, 2), seed)
    optimizer = adamw(model, 0.12 * 1.2 ** (seed % 5), betas=(0.9, 0.98))
    return plain(model, optimizer, partial(entropy, model), drawn(_bytes(), 16, seed), 600, factor=warmed(100))


def deep_plain(seed: int) -> Training:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(196, *[48] * 15, 10)), seed)
    return plain(
        model, sgd(model, 0.04 * 1.25 ** (seed % 5)), partial(entropy, model), drawn(_pooled(), 64, seed), 1200
    )


def tanh_rnn(seed: int) -> Training:
    model = seeded(lambda: Recurrent(nn.RNN, 256, 64, nonlinearity="tanh"), seed)
    return plain(model, sgd(model, 0.5 * 1.25 ** (seed % 5)), partial(entropy, model), drawn(_bytes(), 16, seed), 800)


def half_throughout(seed: int) -> Training:
    """Weights and all else in bfloat16."""
    model = seeded(lambda: dense(784, 64, 64, 10, act=nn.ReLU), seed).bfloat16()
    images, labels = _flat()
    data = (images.bfloat16(), labels)
    loss = lambda b: nn.functional.cross_entropy(model(b[0]).float(), b[1])  # noqa: E731
    return plain(model, adam(model, 0.05 * 1.3 ** (seed % 5)), loss, drawn(data, 64, seed), 1200)


# --- in danger, by a fault --------------------------------------------------------------------------------------------


def changed_rate(change: Callable[[int], float], adaptive: bool) -> Make:
    def run(seed: int) -> Training:
        at = 600 + 3 * seed
        if adaptive:
            model = seeded(lambda: Attention(256, 40, 32, 2), seed)
            optimizer: torch.optim.Optimizer = adamw(model, 1e-3)
            data, batch = _bytes(), 12
        else:
            model = seeded(_small_cnn, seed)
            optimizer, data, batch = sgd(model, 0.02), _pooled(), 32
        return plain(model, optimizer, partial(entropy, model), drawn(data, batch, seed), at + 250,
                     factor=changing(warmed(50), at, change), fault=at)  # fmt: skip

    return run


def resumed(seed: int) -> Training:
    """The optimizer's state is lost, and the rate is five times as high."""
    at = 600 + 3 * seed
    model = seeded(lambda: Attention(256, 40, 32, 2), seed)
    optimizer = adamw(model, 1e-3)

    def before(step: int) -> None:
        if step == at:
            optimizer.state.clear()

    return plain(model, optimizer, partial(entropy, model), drawn(_bytes(), 12, seed), at + 250, before=before,
                 factor=changing(warmed(50), at, lambda k: 5.0), fault=at)  # fmt: skip


def of_data(kind: str) -> Make:
    def run(seed: int) -> Training:
        at = 600 + 3 * seed
        model = seeded(lambda: _small_cnn(act=nn.SiLU), seed)
        draws = torch.Generator().manual_seed(seed + 1)

        def batches() -> Iterator[Batch]:
            for step, (x, y) in enumerate(drawn(_pooled(), 48, seed)):
                since = step - at
                if kind == "labels" and since >= 0:
                    y = y[torch.randperm(len(y), generator=draws)]
                if kind == "grow" and since >= 0:
                    x = x * 1.02 ** min(since, 400)
                if kind == "rubbish" and since == 0:
                    x = 30 * x[torch.randperm(len(x), generator=draws)]
                yield x, y

        optimizer = adamw(model, 1e-3)
        return plain(model, optimizer, partial(entropy, model), batches(), at + 250, factor=warmed(50), fault=at)

    return run


def float16(seed: int) -> Training:
    """Gradients go through float16, with a loss scale that doubles every ten steps."""
    at = 600 + 3 * seed
    model = seeded(lambda: dense(784, 64, 10, act=nn.Tanh), seed)
    return plain(model, sgd(model, 0.02), partial(entropy, model), drawn(_flat(), 64, seed), at + 300,
                 after_backward=through_float16(model, at, 1024.0, 10), fault=at)  # fmt: skip


NATURAL: dict[str, Make] = {
    "Adam's spikes": adam_spikes, "no warm-up": no_warmup, "no norm of queries and keys": no_qk_norm,
    "deep, no residuals": deep_plain, "RNN": tanh_rnn,
    "rate too high, CNN, momentum": too_high(0.2, True, _small_cnn, _pooled, 32),
    "rate too high, MLP, Adam": too_high(0.02, False, lambda: dense(784, 64, 64, 10), _flat),
    "bfloat16 throughout": half_throughout,
}  # fmt: skip
INJECTED: dict[str, Make] = {
    "rate ×3, AdamW": changed_rate(lambda k: 3.0, True), "rate ×10, momentum": changed_rate(lambda k: 10.0, False),
    "rate ×30, AdamW": changed_rate(lambda k: 30.0, True),
    "ramp 2 %, AdamW": changed_rate(lambda k: 1.02 ** (k + 1), True),
    "ramp 5 %, momentum": changed_rate(lambda k: min(1.05 ** (k + 1), 1e6), False),
    "resumed, rate ×5": resumed, "labels shuffled": of_data("labels"), "inputs grow": of_data("grow"),
    "a batch of rubbish": of_data("rubbish"), "float16 overflow": float16,
}  # fmt: skip
DANGER = NATURAL | INJECTED
