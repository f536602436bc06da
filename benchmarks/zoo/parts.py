"""What trainings of the zoo are made of: batches, schedules, losses, and networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.lib.data import Batch
from benchmarks.lib.trainings import squared
from benchmarks.zoo.training import Step, Training

Schedule = Callable[[int], float]


def drawn(data: Batch, size: int | None, seed: int) -> Iterator[Batch]:
    """Batches without end, drawn anew each; ``None``: all the data each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None:
            yield data
        else:
            rows = torch.randint(len(data[0]), (size,), generator=generator)
            yield data[0][rows], data[1][rows]


def cosine(steps: int, warmup: int = 0, last: float = 0.0) -> Schedule:
    """A linear warm-up, and a cosine down to a fraction."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        along = (step - warmup) / max(steps - warmup, 1)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * along))

    return factor


def warmed(warmup: int) -> Schedule:
    """A linear warm-up, and constant from then on."""
    return lambda step: min(1.0, (step + 1) / warmup)


def restarts(period: int) -> Schedule:
    """A cosine that begins anew every so many steps (Loshchilov & Hutter 2017)."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * (step % period) / period))


def restarts_that_double(period: int) -> Schedule:
    """A cosine that begins anew, each time for twice as long (Loshchilov & Hutter 2017)."""

    def factor(step: int) -> float:
        began, length = 0, period
        while step >= began + length:
            began, length = began + length, 2 * length
        return 0.5 * (1 + math.cos(math.pi * (step - began) / length))

    return factor


def linear(steps: int, warmup: int) -> Schedule:
    """A linear warm-up, and a straight line down to nothing."""
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))


def stepped(*at: int) -> Schedule:
    """A tenth as much from each of these steps on."""
    return lambda step: 0.1 ** sum(step >= begin for begin in at)


def trapezoid(steps: int, warmup: int, decay: int) -> Schedule:
    """A linear warm-up, constant, and a straight line down to nothing over the last ``decay`` steps."""
    return lambda step: min(1.0, (step + 1) / warmup, (steps - step) / decay)


def one_cycle(steps: int) -> Schedule:
    """Up from a 25th over three tenths of the steps, and down to nothing (Smith & Topin 2018)."""
    top = int(0.3 * steps)

    def factor(step: int) -> float:
        if step < top:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / top))
        return 0.5 * (1 + math.cos(math.pi * (step - top) / (steps - top))) + 1e-5

    return factor


def triangles(period: int) -> Schedule:
    """Up and down in straight lines, between a tenth and the whole."""
    return lambda step: 0.1 + 0.9 * (1 - abs(2 * (step % period) / period - 1))


def changing(base: Schedule, at: int, change: Callable[[int], float]) -> Schedule:
    """A schedule whose rate is multiplied, by the steps since ``at``."""
    return lambda step: base(step) * (change(step - at) if step >= at else 1.0)


def squares(model: nn.Module, classes: int | None = None) -> Callable[[Batch], Tensor]:
    """Half the mean squared distance; labels are ones among zeros where there are classes."""

    def loss(batch: Batch) -> Tensor:
        target = batch[1] if classes is None else nn.functional.one_hot(batch[1], classes).float()
        return squared(model, (batch[0], target))

    return loss


def adversaries(
    maker: nn.Module, critic: nn.Module, optimizers: tuple[Optimizer, Optimizer], real: Callable[[], Tensor],
    noise: Callable[[], Tensor], steps: int, watched: nn.Module,
) -> Training:  # fmt: skip
    """Two networks that play against each other: one makes examples from noise, the other tells them from real ones.

    Args:
        maker: makes examples.
        critic: gives them a number, larger for what it takes for real.
        optimizers: of both.
        real: draws real examples.
        noise: draws what the maker begins with.
        steps: of either.
        watched: the one of the two whose steps the training is.
    """
    first, second = optimizers
    plus = nn.functional.softplus

    def told_apart(examples: tuple[Tensor, Tensor]) -> Tensor:
        return plus(-critic(examples[0])).mean() + plus(critic(examples[1])).mean()  # type: ignore[no-any-return]

    def taken_for_real(begun: Tensor) -> Tensor:
        return plus(-critic(maker(begun))).mean()  # type: ignore[no-any-return]

    def run() -> Iterator[Step]:
        for _ in range(steps):
            examples = real(), maker(noise()).detach()
            loss = told_apart(examples)
            second.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if watched is critic:
                yield Step(loss.item(), told_apart, examples)
            second.step()
            begun = noise()
            loss = taken_for_real(begun)
            first.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if watched is maker:
                yield Step(loss.item(), taken_for_real, begun)
            first.step()

    return Training(watched, second if watched is critic else first, run())


def through_float16(model: nn.Module, at: int, scale: float, doubles_in: int) -> Callable[[], None]:
    """Sends the gradients through float16, with a loss scale that doubles every so many steps from ``at`` on."""
    count = itertools.count()

    def send() -> None:
        now = scale * 2.0 ** (max(next(count) - at, 0) / doubles_in)
        for p in model.parameters():
            assert p.grad is not None
            p.grad = (p.grad * now).half().float() / now

    return send


class Recurrent(nn.Module):
    """A language model with a recurrent layer.

    Args:
        kind: the class of the layer.
        alphabet: different tokens.
        width: of the embedding and the layer.
        more: further options of the layer.
    """

    def __init__(self, kind: type[nn.RNNBase], alphabet: int, width: int, **more: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(alphabet, width)
        self.rnn = kind(width, width, batch_first=True, **more)
        self.head = nn.Linear(width, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, length, alphabet)."""
        out: Tensor = self.head(self.rnn(self.embed(x))[0])
        return out


class Attention(nn.Module):
    """A causal transformer, with the norm before, after or nowhere, whose queries and keys may be normalised.

    Args:
        alphabet: different tokens.
        length: of a sequence.
        width: of the residual stream.
        depth: blocks.
        norm: ``"pre"``, ``"post"`` or ``"none"``.
        qk_norm: whether queries and keys are normalised.
    """

    def __init__(
        self, alphabet: int, length: int, width: int, depth: int, norm: str = "pre", qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(alphabet, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, norm, qk_norm) for _ in range(depth))
        self.last = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, length, alphabet)."""
        h = self.embed(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.last(h))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, norm: str, qk_norm: bool) -> None:
        super().__init__()
        self.norm, self.heads = norm, 4
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        make = nn.Identity if norm == "none" else nn.LayerNorm
        self.first, self.second = make(width), make(width)
        self.qk = nn.LayerNorm(width // self.heads) if qk_norm else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        if self.norm == "post":
            h = self.first(h + self._attend(h))
            return self.second(h + self.mlp(h))  # type: ignore[no-any-return]
        h = h + self._attend(self.first(h))
        return h + self.mlp(self.second(h))  # type: ignore[no-any-return]

    def _attend(self, h: Tensor) -> Tensor:
        n, length, width = h.shape
        q, k, v = (t.reshape(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(self.qk(q), self.qk(k), v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(n, length, width))  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """A frozen linear layer with an update of low rank (LoRA, Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        out: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out
