"""Trainings in danger that are reported on: no rule and no threshold was chosen on them.

Settings were chosen by losses and breaks alone. What is like a training of the design sets differs from it in its
network, its data, its optimizer and its batches. Seeds differ in the rate, the data, and where a run begins.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from sklearn.datasets import load_breast_cancer, load_sample_image
from torch import Tensor, nn

from benchmarks.lib.data import Batch, fashion_mnist, next_tokens
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.trainings import entropy
from benchmarks.zoo.design import Make, adam, adamw, sgd
from benchmarks.zoo.parts import Attention, Recurrent, changing, drawn, squares, through_float16, warmed
from benchmarks.zoo.training import Training, plain

Schedule = Callable[[int], float]

# --- data -------------------------------------------------------------------------------------------------------------


@functools.cache
def _clothes(side: int = 7) -> Batch:
    """4000 images of Fashion-MNIST from the 8000th on, at this many pixels a side."""
    images, labels = (t[8000:12000] for t in fashion_mnist(12000))
    return nn.functional.adaptive_avg_pool2d(images, side), labels


@functools.cache
def _patches() -> Batch:
    """Patches of a photograph, 8×8 in grey, their mean taken off; twice, as what goes in and what shall come out."""
    grey = torch.tensor(load_sample_image("china.jpg")).float().mean(2) / 255
    patches = grey.unfold(0, 8, 6).unfold(1, 8, 6).reshape(-1, 64)
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.std(1, keepdim=True) + 0.05)
    return patches, patches


@functools.cache
def _source() -> Batch:
    """Bytes of the source of argparse, as this Python has it."""
    length = 24
    code = inspect.getsource(argparse).encode()
    return next_tokens([b % 128 for b in code[: len(code) // (length + 1) * (length + 1)]], length)


@functools.cache
def _sums(modulus: int = 31) -> Batch:
    """Pairs of numbers, and their sum modulo a prime."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return pairs, pairs.sum(1) % modulus


def _sorting(seed: int, count: int = 3000, length: int = 6, alphabet: int = 16) -> Batch:
    """Numbers, then the same in order: what comes next is asked for."""
    draws = torch.Generator().manual_seed(seed)
    numbers = torch.randint(alphabet, (count, length), generator=draws)
    rows = torch.cat([numbers, numbers.sort(1).values], 1)
    return rows[:, :-1], rows[:, 1:]


@functools.cache
def _cells() -> Batch:
    """Measurements of cells, with mean 0 and deviation 1; 569 of two classes."""
    values, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor(values, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(labels)


def _taught(seed: int, count: int = 3000) -> Batch:
    """What a random network says of random inputs, with noise."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=draws)
    hidden = (x @ torch.randn(12, 20, generator=draws) / 2).tanh()
    y = hidden @ torch.randn(20, 2, generator=draws) / 3
    return x, y + 0.1 * torch.randn(y.shape, generator=draws)


def _high(rate: float, seed: int, spread: float = 1.1) -> float:
    """A rate that differs a little from seed to seed."""
    return float(rate * spread ** (seed % 5))


# --- by themselves ----------------------------------------------------------------------------------------------------


def adam_spikes(seed: int) -> Training:
    """Full batch: patches of a photograph through a network; the second moment forgets slowly."""
    rows = torch.randperm(len(_patches()[0]), generator=torch.Generator().manual_seed(seed))[:64]
    data = (_patches()[0][rows], _patches()[1][rows])
    model = seeded(lambda: dense(64, 96, 96, 64, act=nn.GELU), seed)
    return plain(model, adam(model, _high(0.01, seed)), squares(model), drawn(data, None, seed), 1500)


def no_warmup(seed: int) -> Training:
    """A transformer that sorts, at a high rate from the first step on."""
    model = seeded(lambda: Attention(16, 11, 24, 2, norm="pre"), seed)
    loss = _sorted_half(model)
    return plain(model, sgd(model, _high(0.35, seed)), loss, drawn(_sorting(seed), 16, seed), 500)


def _sorted_half(model: nn.Module) -> Callable[[Batch], Tensor]:
    """Cross-entropy of the second half, which follows from the first."""
    return lambda b: nn.functional.cross_entropy(model(b[0])[:, 5:].flatten(0, 1), b[1][:, 5:].flatten())


def no_qk_norm(seed: int) -> Training:
    """A transformer whose queries and keys grow: bytes of Python's source."""
    model = seeded(lambda: Attention(128, 24, 24, 2), seed)
    optimizer = adam(model, _high(0.18, seed), betas=(0.9, 0.95))
    return plain(model, optimizer, partial(entropy, model), drawn(_source(), 16, seed), 600, factor=warmed(60))


def deep_plain(seed: int) -> Training:
    """Fourteen layers, initialised for rectifiers (He et al. 2015)."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(49, *[40] * 13, 10, act=nn.ReLU)), seed)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.kaiming_normal_(p)
    optimizer = sgd(model, _high(0.022, seed), nesterov=True)
    return plain(model, optimizer, partial(entropy, model), drawn(_clothes(), 24, seed), 1000)


class _Adder(Recurrent):
    """A rectified recurrent layer between numbers, which begins as 0.8 times the identity."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.RNN, 1, width, nonlinearity="relu")
        self.embed, self.head = nn.Linear(1, width), nn.Linear(width, 1)  # type: ignore[assignment]
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(0.8 * torch.eye(width))


def exploding_rnn(seed: int) -> Training:
    """A rectified recurrent layer that begins near the identity (Le et al. 2015) adds up numbers; a slow warm-up."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(3000, 40, 1, generator=draws) / 2
    model = seeded(lambda: _Adder(32), seed)
    loss = lambda b: (model(b[0]) - b[1]).square().mean()  # noqa: E731
    batches = drawn((x, x.cumsum(1)), 48, seed)
    return plain(model, sgd(model, _high(6e-4, seed)), loss, batches, 600, factor=warmed(400))


def too_high_momentum(seed: int) -> Training:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(49, 48, 48, 48, 10, act=nn.SiLU)), seed)
    return plain(model, sgd(model, _high(0.1, seed), 0.95), partial(entropy, model), drawn(_clothes(), 48, seed), 1500)


class _Sums(nn.Module):
    """Embeddings of two numbers, side by side, into a network with one hidden layer."""

    def __init__(self, modulus: int = 31) -> None:
        super().__init__()
        self.embed, self.net = nn.Embedding(modulus, 24), dense(48, 96, modulus, act=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embed(x).flatten(1))  # type: ignore[no-any-return]


def too_high_adam(seed: int) -> Training:
    model = seeded(lambda: _small(nn.GELU), seed)
    return plain(model, adam(model, _high(0.015, seed)), partial(entropy, model), drawn(_clothes(14), 16, seed), 1000)


def bfloat16(seed: int) -> Training:
    """Weights, optimizer and all else in bfloat16, at a rate at which float32 breaks too."""
    model = seeded(lambda: _small(nn.SiLU), seed).bfloat16()
    images, labels = _clothes(14)
    loss = lambda b: nn.functional.cross_entropy(model(b[0]).float(), b[1])  # noqa: E731
    batches = drawn((images.bfloat16(), labels), 32, seed)
    return plain(model, sgd(model, _high(0.05, seed), 0.95), loss, batches, 1000)


def _small(act: type[nn.Module]) -> nn.Module:
    """Two convolutions for images at 14×14."""
    layers = [nn.Conv2d(1, 8, 5, 2, 2), act(), nn.Conv2d(8, 16, 3, 2, 1), act(), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def half(seed: int) -> Training:
    """Weights, optimizer and all else in float16 without a loss scale, at a rate at which float32 breaks too."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(49, 48, 48, 48, 10, act=nn.ReLU)), seed).half()
    images, labels = _clothes()
    loss = lambda b: nn.functional.cross_entropy(model(b[0]).float(), b[1])  # noqa: E731
    return plain(model, sgd(model, _high(0.14, seed)), loss, drawn((images.half(), labels), 32, seed), 1000)


# --- by a fault -------------------------------------------------------------------------------------------------------


def _at(seed: int, first: int = 400) -> int:
    """The step from which something is done to a training."""
    return first + 13 * (seed % 10)


def adamw_changed(change: Schedule) -> Make:
    """A small CNN whose rate is changed."""

    def run(seed: int) -> Training:
        at = _at(seed)
        model = seeded(lambda: _small(nn.GELU), seed)
        optimizer = adamw(model, _high(8e-3, seed, 1.05))
        return plain(model, optimizer, partial(entropy, model), drawn(_clothes(14), 32, seed), at + 350,
                     factor=changing(warmed(50), at, change), fault=at)  # fmt: skip

    return run


def momentum_changed(change: Schedule) -> Make:
    """A regression on noisy data whose rate is changed."""

    def run(seed: int) -> Training:
        at = _at(seed, 500)
        model = seeded(lambda: dense(12, 64, 64, 2, act=nn.SiLU), seed)
        optimizer = sgd(model, _high(0.055, seed, 1.05), 0.95)
        return plain(model, optimizer, squares(model), drawn(_taught(seed), 24, seed), at + 400,
                     factor=changing(warmed(50), at, change), fault=at)  # fmt: skip

    return run


def sums_ramped(seed: int) -> Training:
    at = _at(seed)
    model = seeded(_Sums, seed)
    return plain(model, adamw(model, _high(4e-3, seed)), partial(entropy, model), drawn(_sums(), 64, seed),
                 at + 400, factor=changing(warmed(50), at, lambda k: 1.02 ** (k + 1)), fault=at)  # fmt: skip


def patches_ramped(seed: int) -> Training:
    at = _at(seed)
    model = seeded(lambda: dense(64, 24, 64, act=nn.Tanh), seed)
    optimizer = sgd(model, _high(0.02, seed), nesterov=True)
    return plain(model, optimizer, squares(model), drawn(_patches(), 64, seed),
                 at + 300, factor=changing(warmed(50), at, lambda k: min(1.05 ** (k + 1), 1e6)), fault=at)  # fmt: skip


def resumed(seed: int) -> Training:
    """The optimizer's state is lost, and the rate is seven times as high."""
    at = _at(seed)
    model = seeded(lambda: dense(64, 96, 32, 96, 64, act=nn.SiLU), seed)
    optimizer = adam(model, _high(1e-3, seed))

    def before(step: int) -> None:
        if step == at:
            optimizer.state.clear()

    return plain(model, optimizer, squares(model), drawn(_patches(), 192, seed), at + 250, before=before,
                 factor=changing(warmed(50), at, lambda k: 7.0), fault=at)  # fmt: skip


def _disturbed(batches: Iterator[Batch], at: int, disturb: Callable[[int, Tensor, Tensor], Batch]) -> Iterator[Batch]:
    """Batches that something is done to from a step on, given the steps since."""
    for step, (x, y) in enumerate(batches):
        yield disturb(step - at, x, y) if step >= at else (x, y)


def labels_shuffled(seed: int) -> Training:
    """A share of the labels is shuffled: one in two hundred more at each step."""
    at, draws = _at(seed), torch.Generator().manual_seed(seed + 1)
    model = seeded(lambda: dense(30, 48, 2, act=nn.GELU), seed)
    optimizer = torch.optim.NAdam(model.parameters(), _high(1e-3, seed))

    def disturb(since: int, x: Tensor, y: Tensor) -> Batch:
        wrong = torch.rand(len(y), generator=draws) < since / 200
        return x, torch.where(wrong, y[torch.randperm(len(y), generator=draws)], y)

    batches = _disturbed(drawn(_cells(), 32, seed), at, disturb)
    return plain(model, optimizer, partial(entropy, model), batches, at + 300, fault=at)


def inputs_grow(seed: int) -> Training:
    at = _at(seed)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(49, 64, 64, 10, act=nn.GELU)), seed)
    optimizer = torch.optim.RMSprop(model.parameters(), _high(1e-3, seed))
    batches = _disturbed(drawn(_clothes(), 80, seed), at, lambda since, x, y: (x * 1.03**since, y))
    return plain(model, optimizer, partial(entropy, model), batches, at + 300, fault=at)


def rubbish(seed: int) -> Training:
    """A batch of noise, far larger than what came before."""
    at, draws = _at(seed), torch.Generator().manual_seed(seed + 1)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), dense(49, 80, 80, 10, act=nn.ReLU)), seed)
    optimizer = sgd(model, _high(0.02, seed), nesterov=True)
    disturb = lambda since, x, y: (x if since else 20 * torch.randn(x.shape, generator=draws), y)  # noqa: E731
    batches = _disturbed(drawn(_clothes(), 40, seed), at, disturb)
    return plain(model, optimizer, partial(entropy, model), batches, at + 250, fault=at)


def overflow(seed: int) -> Training:
    """Gradients go through float16, with a loss scale that doubles every 12 steps."""
    at = _at(seed)
    model = seeded(_Sums, seed)
    return plain(model, adam(model, _high(4e-3, seed)), partial(entropy, model), drawn(_sums(), 48, seed), at + 400,
                 after_backward=through_float16(model, at, 512.0, 12), fault=at)  # fmt: skip


NATURAL: dict[str, Make] = {
    "Adam's spikes, patches": adam_spikes, "no warm-up, sorting": no_warmup, "no norm of queries and keys": no_qk_norm,
    "deep, no residuals, ReLU": deep_plain, "exploding RNN, sums": exploding_rnn,
    "rate too high, SiLU, momentum": too_high_momentum, "rate too high, CNN, Adam": too_high_adam,
    "bfloat16 throughout, CNN": bfloat16, "float16 throughout, MLP": half,
}  # fmt: skip
INJECTED: dict[str, Make] = {
    "rate ×3, CNN, AdamW": adamw_changed(lambda k: 3.0), "rate ×10, CNN, AdamW": adamw_changed(lambda k: 10.0),
    "rate ×30, CNN, AdamW": adamw_changed(lambda k: 30.0),
    "rate ×3, regression, momentum": momentum_changed(lambda k: 3.0),
    "rate ×10, regression, momentum": momentum_changed(lambda k: 10.0),
    "rate ×30, regression, momentum": momentum_changed(lambda k: 30.0),
    "ramp 2 %, sums, AdamW": sums_ramped, "ramp 5 %, patches, momentum": patches_ramped,
    "resumed, state lost, rate ×7": resumed, "labels shuffled by and by": labels_shuffled,
    "inputs grow, MLP, RMSprop": inputs_grow, "a batch of rubbish, momentum": rubbish,
    "float16 overflow, sums, Adam": overflow,
}  # fmt: skip
DANGER = NATURAL | INJECTED
