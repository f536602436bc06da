"""The trainings on which the rules of the early warning were designed, and their thresholds chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Batch, digits, fashion_mnist, text
from benchmarks.lib.models import Characters, Rows, cnn, dense, digits_cnn, seeded
from benchmarks.lib.trainings import entropy
from benchmarks.zoo.parts import (
    Attention,
    Recurrent,
    adversaries,
    changing,
    cosine,
    drawn,
    one_cycle,
    restarts,
    squares,
    through_float16,
    triangles,
    warmed,
)  # fmt: skip
from benchmarks.zoo.training import Training, plain

STEPS = 3000
Make = Callable[[int], Training]


@functools.cache
def _digits() -> Batch:
    return digits()


@functools.cache
def _fashion() -> Batch:
    return fashion_mnist(3000)


@functools.cache
def _text() -> tuple[Batch, int]:
    return text(600, 32)


def sgd(model: nn.Module, rate: float, momentum: float = 0.9, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, momentum, **more)


def adamw(model: nn.Module, rate: float, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, **more)


def adam(model: nn.Module, rate: float, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate, **more)


# --- healthy ----------------------------------------------------------------------------------------------------------


def full_batch(seed: int) -> Training:
    data = tuple(t[:200] for t in _digits())
    model = seeded(lambda: dense(64, 32, 10), seed)
    return plain(model, sgd(model, 0.2, 0.0), squares(model, 10), drawn(data, None, seed), STEPS)  # type: ignore[arg-type]


def full_batch_relu(seed: int) -> Training:
    data = tuple(t[:300] for t in _digits())
    model = seeded(lambda: dense(64, 64, 64, 10, act=nn.ReLU), seed)
    return plain(model, sgd(model, 0.1, 0.0), partial(entropy, model), drawn(data, None, seed), STEPS)  # type: ignore[arg-type]


def fitted(seed: int) -> Training:
    model = seeded(lambda: dense(64, 128, 10, act=nn.ReLU), seed)
    return plain(model, adamw(model, 3e-3), partial(entropy, model), drawn(_digits(), 64, seed), STEPS)


def cyclic(seed: int) -> Training:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(784, 64, 10, act=nn.ReLU)), seed)
    batches = drawn(_fashion(), 64, seed)
    return plain(model, sgd(model, 0.05), partial(entropy, model), batches, STEPS, factor=triangles(600))


def restarted(seed: int) -> Training:
    model = seeded(lambda: digits_cnn(8, 16), seed)
    return plain(
        model, sgd(model, 0.05), partial(entropy, model), drawn(_digits(), 64, seed), STEPS, factor=restarts(700)
    )


def tiny_batches(seed: int) -> Training:
    model = seeded(lambda: dense(64, 64, 10), seed)
    return plain(model, sgd(model, 0.02), partial(entropy, model), drawn(_digits(), 4, seed), STEPS)


def large_batches(seed: int) -> Training:
    model = seeded(cnn, seed)
    batches = drawn(_fashion(), 256, seed)
    return plain(model, adam(model, 1e-3), partial(entropy, model), batches, 1200, factor=cosine(1200, 60))


def dropped_out(seed: int) -> Training:
    def make() -> nn.Module:
        model = Rows("gelu", True)
        model.block.dropout.p = model.block.dropout1.p = model.block.dropout2.p = 0.2
        return model

    model = seeded(make, seed)
    batches = drawn(_digits(), 64, seed)
    return plain(model, adamw(model, 1e-3), partial(entropy, model), batches, STEPS, factor=cosine(STEPS, 100))


def normalised_mlp(seed: int) -> Training:
    model = seeded(lambda: nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 10),
        ), seed)  # fmt: skip
    return plain(model, sgd(model, 0.1, weight_decay=5e-4), partial(entropy, model), drawn(_digits(), 64, seed), STEPS)


def character_model(seed: int) -> Training:
    data, alphabet = _text()
    model = seeded(lambda: Characters(alphabet, 32, 32), seed)
    batches = drawn(data, 16, seed)
    return plain(model, adamw(model, 2e-3), partial(entropy, model), batches, 2000, factor=cosine(2000, 100), clip=1.0)


def fine_tuned(seed: int) -> Training:
    model = seeded(lambda: dense(64, 64, 64, 10, act=nn.ReLU), seed)
    optimizer = adam(model, 1e-2)
    for _, batch in zip(range(200), drawn(_digits(), 64, 99), strict=False):
        optimizer.zero_grad()
        entropy(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model[0].requires_grad_(False)
    inputs, labels = _digits()
    data = (inputs, (labels + 3) % 10)
    return plain(model, sgd(model, 0.02), partial(entropy, model), drawn(data, 32, seed), STEPS)


def autoencoder(seed: int) -> Training:
    inputs = _digits()[0]
    model = seeded(lambda: dense(64, 48, 8, 48, 64, act=nn.SiLU), seed)
    return plain(model, adam(model, 2e-3), squares(model), drawn((inputs, inputs), 64, seed), STEPS)


def lstm(seed: int) -> Training:
    data, alphabet = _text()
    model = seeded(lambda: Recurrent(nn.LSTM, alphabet, 48), seed)
    optimizer = torch.optim.RMSprop(model.parameters(), 2e-3)
    return plain(model, optimizer, partial(entropy, model), drawn(data, 16, seed), 1500, clip=1.0)


def heavy_tails(seed: int) -> Training:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 8, generator=draws)
    noise = torch.randn(2000, 1, generator=draws) / torch.randn(2000, 1, generator=draws).abs().clamp_min(0.1)
    y = (x[:, :1] * x[:, 1:2]).sin() + 0.3 * noise
    model = seeded(lambda: dense(8, 64, 64, 1), seed)
    loss = lambda b: nn.functional.smooth_l1_loss(model(b[0]), b[1])  # noqa: E731
    return plain(model, adam(model, 1e-3), loss, drawn((x, y), 32, seed), STEPS)


def noisy_labels(seed: int) -> Training:
    inputs, labels = _digits()
    draws = torch.Generator().manual_seed(5)
    wrong = torch.rand(len(labels), generator=draws) < 0.2
    labels = torch.where(wrong, torch.randint(10, labels.shape, generator=draws), labels)
    model = seeded(lambda: dense(64, 100, 10, act=nn.ReLU), seed)
    optimizer = torch.optim.NAdam(model.parameters(), 1e-3)
    return plain(model, optimizer, partial(entropy, model), drawn((inputs, labels), 32, seed), STEPS)


def critic_of_digits(seed: int) -> Training:
    """Two networks that play against each other, of which the critic is watched."""
    return _forgery(seed, nn.ReLU, 5e-4, STEPS, critic_watched=True)


def _forgery(seed: int, act: type[nn.Module], rate: float, steps: int, critic_watched: bool) -> Training:
    data = _digits()[0]
    torch.manual_seed(seed)
    maker, critic = dense(16, 64, 64, act=act), dense(64, 64, 1, act=nn.LeakyReLU)
    optimizers = adam(maker, rate, betas=(0.5, 0.999)), adam(critic, rate, betas=(0.5, 0.999))
    draws = torch.Generator().manual_seed(seed)
    return adversaries(
        maker, critic, optimizers, lambda: data[torch.randint(len(data), (64,), generator=draws)],
        lambda: torch.randn(64, 16, generator=draws), steps, critic if critic_watched else maker,
    )  # fmt: skip


def attention_model(seed: int) -> Training:
    data, alphabet = _text()
    model = seeded(lambda: Attention(alphabet, 32, 32, 2), seed)
    batches = drawn(data, 16, seed)
    return plain(model, adam(model, 1.5e-3), partial(entropy, model), batches, 2000, factor=cosine(2000, 200), clip=1.0)


def one_cycle_mlp(seed: int) -> Training:
    model = seeded(lambda: dense(64, 96, 96, 10, act=nn.GELU), seed)
    batches = drawn(_digits(), 32, seed)
    return plain(model, adamw(model, 0.01), partial(entropy, model), batches, STEPS, factor=one_cycle(STEPS))


def normalised_cnn(seed: int) -> Training:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3),
            nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10),
        )  # fmt: skip

    model = seeded(make, seed)
    optimizer = sgd(model, 0.2, weight_decay=1e-3)
    return plain(model, optimizer, partial(entropy, model), drawn(_digits(), 64, seed), 2000, factor=cosine(2000, 200))


def skip_gram(seed: int) -> Training:
    """Characters are told from their neighbours, by inner products of embeddings that begin near zero."""
    (inputs, targets), alphabet = _text()
    data = (inputs.flatten(), targets.flatten())

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of, self.by = nn.Embedding(alphabet, 24), nn.Embedding(alphabet, 24)
            for table in (self.of, self.by):
                nn.init.normal_(table.weight, std=0.02)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.of(x) @ self.by.weight.T
            return out

    model = seeded(Pairs, seed)
    return plain(model, adam(model, 5e-3), partial(entropy, model), drawn(data, 256, seed), 2000)


def forger(seed: int) -> Training:
    """Two networks that play against each other, of which the one that forges digits is watched."""
    return _forgery(seed, nn.SiLU, 1e-3, 2000, critic_watched=False)


HEALTHY: dict[str, Make] = {
    "full batch at the edge, tanh": full_batch, "full batch at the edge, ReLU": full_batch_relu, "fitted": fitted,
    "cyclic rate": cyclic, "warm restarts": restarted, "batch 4": tiny_batches, "CNN, batch 256": large_batches,
    "dropout": dropped_out, "BatchNorm, momentum": normalised_mlp, "characters": character_model,
    "fine-tuning": fine_tuned, "autoencoder": autoencoder, "LSTM": lstm, "heavy tails": heavy_tails,
    "noisy labels": noisy_labels, "GAN, critic": critic_of_digits, "attention": attention_model,
    "OneCycle, MLP": one_cycle_mlp, "BatchNorm CNN, digits": normalised_cnn, "skip-gram": skip_gram,
    "GAN, forger": forger,
}  # fmt: skip

# --- in danger --------------------------------------------------------------------------------------------------------


def curve(seed: int, count: int = 64) -> Batch:
    x = torch.linspace(-1, 1, count)[:, None]
    phase = torch.rand(1, generator=torch.Generator().manual_seed(seed)) * 6
    return x, (6 * x + phase).sin() + 0.3 * (17 * x).sin()


def adam_spikes(rate: float) -> Make:
    def make(seed: int) -> Training:
        model = seeded(lambda: dense(1, 64, 64, 1), seed)
        loss = lambda b: (model(b[0]) - b[1]).square().mean()  # noqa: E731
        return plain(model, adam(model, rate), loss, drawn(curve(seed), None, seed), 2500)

    return make


def ramped(percent: float, optimizer: Callable[[nn.Module], Any], make: Callable[[], nn.Module], data: Any) -> Make:
    def run(seed: int) -> Training:
        model = seeded(make, seed)
        change = lambda k: min((1 + percent / 100) ** (k + 1), 1e6)  # noqa: E731
        at = 400 + seed
        return plain(model, optimizer(model), partial(entropy, model), drawn(data(), 64, seed), at + 300,
                     factor=changing(warmed(50), at, change), fault=at)  # fmt: skip

    return run


def jumped(times: float, optimizer: Callable[[nn.Module], Any], make: Callable[[], nn.Module], data: Any) -> Make:
    def run(seed: int) -> Training:
        model, at = seeded(make, seed), 400 + seed
        return plain(model, optimizer(model), partial(entropy, model), drawn(data(), 64, seed), at + 200,
                     factor=changing(warmed(50), at, lambda k: times), fault=at)  # fmt: skip

    return run


def too_high(rate: float, momentum: bool, make: Callable[[], nn.Module], data: Any, batch: int = 64) -> Make:
    """A constant rate that is too high from the start; seeds differ in the rate too."""

    def run(seed: int) -> Training:
        model = seeded(make, seed)
        high = rate * 1.15 ** (seed % 5)
        optimizer = sgd(model, high) if momentum else adam(model, high)
        return plain(model, optimizer, partial(entropy, model), drawn(data(), batch, seed), 1500)

    return run


def half_precision(seed: int) -> Training:
    """Gradients go through float16 with a loss scale that grows too large."""
    model, at = seeded(lambda: digits_cnn(8, 16, nn.Tanh), seed), 300 + seed
    return plain(model, adamw(model, 1e-3), partial(entropy, model), drawn(_digits(), 64, seed), at + 300,
                 after_backward=through_float16(model, at, 256.0, 8), fault=at)  # fmt: skip


def heavy_momentum(seed: int) -> Training:
    model = seeded(lambda: dense(64, 64, 64, 10), seed)
    return plain(
        model, sgd(model, 0.1 * 1.2 ** (seed % 5), 0.99), partial(entropy, model), drawn(_digits(), 64, seed), 1000
    )


def growing_weights(seed: int) -> Training:
    """A decay of the wrong sign makes the weights grow."""
    model, at = seeded(lambda: dense(64, 64, 64, 10, act=nn.ReLU), seed), 300 + seed

    def grow(step: int) -> None:
        if step >= at:
            with torch.no_grad():
                for p in model.parameters():
                    p *= 1.01

    return plain(
        model, adam(model, 1e-3), partial(entropy, model), drawn(_digits(), 64, seed), at + 400, before=grow, fault=at
    )


def exploding_rnn(seed: int) -> Training:
    data, alphabet = _text()
    model = seeded(lambda: Recurrent(nn.RNN, alphabet, 64, nonlinearity="relu"), seed)
    return plain(model, sgd(model, 0.8 * 1.1 ** (seed % 5)), partial(entropy, model), drawn(data, 16, seed), 600)


def faulty(optimizer: Callable[[nn.Module], Any], make: Callable[[], nn.Module], data: Any, kind: str) -> Make:
    """A fault of the data from a step on: labels shuffled, inputs that grow, a batch of rubbish."""

    def run(seed: int) -> Training:
        model, at = seeded(make, seed), 400 + seed
        draws = torch.Generator().manual_seed(seed + 1)

        def batches() -> Iterator[Batch]:
            for step, (x, y) in enumerate(drawn(data(), 64, seed)):
                since = step - at
                if kind == "labels" and since >= 0:
                    y = y[torch.randperm(len(y), generator=draws)]
                if kind == "grow" and since >= 0:
                    x = x * 1.02 ** min(since, 400)
                if kind == "rubbish" and 0 <= since < 3:
                    x = 30 * torch.randn(x.shape, generator=draws)
                yield x, y

        return plain(model, optimizer(model), partial(entropy, model), batches(), at + 250, factor=warmed(50), fault=at)

    return run


def _mlp() -> nn.Module:
    return dense(64, 100, 10, act=nn.ReLU)


def _deep() -> nn.Module:
    return dense(64, *[48] * 7, 10)


DANGER: dict[str, Make] = {
    "Adam's spikes, rate .003": adam_spikes(0.003),
    "ramp 2 %, MLP, momentum": ramped(2, lambda m: sgd(m, 0.03), _mlp, _digits),
    "ramp 3 %, CNN, Adam": ramped(3, lambda m: adam(m, 1e-3), digits_cnn, _digits),
    "rate ×10, MLP, AdamW": jumped(10, lambda m: adamw(m, 2e-3), _mlp, _digits),
    "rate ×30, CNN, momentum": jumped(30, lambda m: sgd(m, 0.02), digits_cnn, _digits),
    "rate too high, MLP, momentum": too_high(0.55, True, lambda: dense(64, 64, 64, 10), _digits),
    "rate too high, CNN, momentum": too_high(0.25, True, digits_cnn, _digits, 32),
    "rate too high, MLP, Adam": too_high(0.06, False, lambda: dense(64, 64, 64, 10, act=nn.ReLU), _digits),
    "rate too high, deep, momentum": too_high(0.12, True, _deep, _digits),
    "float16": half_precision, "momentum .99": heavy_momentum, "weights grow": growing_weights,
    "exploding RNN": exploding_rnn,
    "labels shuffled": faulty(lambda m: sgd(m, 0.05), _mlp, _digits, "labels"),
    "inputs grow": faulty(lambda m: adam(m, 1e-3), digits_cnn, _digits, "grow"),
    "rubbish": faulty(lambda m: adamw(m, 2e-3), _mlp, _digits, "rubbish"),
}  # fmt: skip
