"""Trainings that go well, and the faults that destroy them: those that verdicts were designed on, and an exam."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn

from benchmarks.lib.data import digits, text
from benchmarks.lib.harmed import Batch, Fault, Task, jump, ramp, task_of
from benchmarks.lib.models import Characters


def classes(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    out = model(batch[0])
    return nn.functional.cross_entropy(out.flatten(0, -2), batch[1].flatten())


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared distance to the targets, or to the one-hot classes."""
    out, y = model(batch[0]), batch[1]
    return 0.5 * (out - (nn.functional.one_hot(y, 10) if y.dtype == torch.int64 else y)).square().sum(1).mean()


def momentum(parameters: object, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, rate, momentum=0.9)  # type: ignore[arg-type]


def dense(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Recurrent(nn.Module):
    """A recurrent network over bytes."""

    def __init__(self, width: int = 64, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(128, 32), kind(32, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, length, 128)."""
        out: Tensor = self.head(self.rnn(self.embed(x))[0])
        return out


def bytes_of(count: int, length: int) -> Batch:
    content = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")[: count * (length + 1)]
    ids = torch.tensor(list(content)).reshape(count, length + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _images() -> Batch:
    x, y = digits()
    return x.reshape(-1, 1, 8, 8), y


def _cancer() -> Batch:
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    return x, torch.tensor(y, dtype=torch.int64)


def _diabetes() -> Batch:
    x, y = load_diabetes(return_X_y=True)
    return torch.tensor(x / x.std(0), dtype=torch.float32), torch.tensor((y - y.mean()) / y.std()).float()[:, None]


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


def _characters() -> Task:
    data, alphabet = text(400, 32)
    make = lambda: Characters(alphabet, 32, 32)  # noqa: E731
    return task_of(make, 3, torch.optim.AdamW, 3e-3, classes, data, 16, 300)


def _reconstruction() -> Batch:
    x = digits()[0]
    return x, x


_SGD, _ADAM = torch.optim.SGD, torch.optim.Adam
DESIGN: dict[str, Callable[[], Task]] = {
    "tanh MLP, momentum": lambda: task_of(lambda: dense(64, 64, 64, 10, act=nn.Tanh), 0, momentum, 0.05, classes,
                                        digits(), 64, 500),
    "ReLU MLP, AdamW": lambda: task_of(lambda: dense(64, 64, 64, 10), 1, torch.optim.AdamW, 3e-3, classes, digits(), 64,
                                     500),
    "squared loss, full-batch SGD": lambda: task_of(lambda: dense(64, 32, 10, act=nn.Tanh), 2, _SGD, 0.3, squares,
                                                  digits(200), None, 1000),
    "transformer, AdamW": _characters,
    "CNN, SGD": lambda: task_of(_cnn, 10, _SGD, 0.1, classes, _images(), 32, 600),
}  # fmt: skip
EXAM: dict[str, Callable[[], Task]] = {
    "two hidden layers, Adagrad": lambda: task_of(
        lambda: dense(64, 48, 48, 10, act=nn.SiLU), 16, torch.optim.Adagrad, 0.02, classes, digits(), 32, 500
    ),
    "regression, Adam": lambda: task_of(lambda: dense(10, 64, 64, 1), 11, _ADAM, 2e-3, squares, _diabetes(), 32, 500),
    "bytes, GRU, RMSprop, clipped": lambda: task_of(Recurrent, 12, torch.optim.RMSprop, 3e-3, classes,
                                                    bytes_of(600, 32), 16, 300, clip=1.0),
    "autoencoder, NAdam": lambda: task_of(lambda: dense(64, 32, 8, 32, 64), 13, torch.optim.NAdam, 2e-3, squares,
                                        _reconstruction(), 64, 500),
    "deep ReLU, batch of 4, Adam, warm-up": lambda: task_of(lambda: dense(64, 48, 48, 48, 48, 10), 14, _ADAM, 1e-3,
                                                          classes, digits(), 4, 900, warmup=100),
    "two classes, Nesterov": lambda: task_of(
        lambda: dense(30, 32, 2), 15, lambda p, r: torch.optim.SGD(p, r, momentum=0.9, nesterov=True), 0.05, classes,
        _cancer(), 32, 500),
}  # fmt: skip

FAULTS: dict[str, Fault] = {
    "none": Fault(),
    "rate ×0.003": jump(0.003),
    "one bad batch": Fault(0.5, 0.501, inputs=30.0),
    "few examples, fitted": Fault(fit=48),
    "rate ×30": jump(30.0),
    "rate ×90": jump(90.0),
    "jump ×10 at half": jump(10.0, 0.5),
    "jump ×30 at half": jump(30.0, 0.5),
    "jump ×90 late": jump(90.0, 0.92),
    "jump ×30 for a while": jump(30.0, 0.4, 0.45),
    "ramp 2 %": ramp(2.0),
    "labels shuffled": Fault(0.5, labels=True),
    "weights ×30": Fault(0.5, weights=30.0),
    "dead from the start": Fault(bias=-100.0),
    "dead from half": Fault(0.5, bias=-100.0),
}


# --- losses that rise, jump or hover in good runs -------------------------------------------------------------------


def adversary() -> Task:
    """The generator of a small adversarial pair: its loss rises while its adversary learns."""
    torch.manual_seed(20)
    maker, judge = dense(16, 64, 64), dense(64, 64, 1)
    of_judge, x = _ADAM(judge.parameters(), 1e-3), digits()[0]
    binary = nn.functional.binary_cross_entropy_with_logits
    draws = torch.Generator().manual_seed(1)

    def before(step: int) -> None:
        real = x[torch.randint(len(x), (64,), generator=draws)]
        fake = maker(torch.randn(64, 16, generator=draws)).detach()
        of_judge.zero_grad()
        (binary(judge(real), torch.ones(64, 1)) + binary(judge(fake), torch.zeros(64, 1))).backward()
        of_judge.step()

    def loss(batch: Batch) -> Tensor:
        return binary(judge(maker(batch[0])), torch.ones(len(batch[0]), 1))

    noise = torch.randn(256, 16, generator=draws)
    return Task(maker, _ADAM(maker.parameters(), 1e-3), loss, (noise, noise), None, 800,
                draw=lambda step, g: (torch.randn(64, 16, generator=g),), before=before)  # fmt: skip


def rewards() -> Task:
    """Which digit it is, learnt from rewards alone: the loss hovers about 0."""
    torch.manual_seed(21)
    model, (x, y) = dense(64, 64, 10), digits()

    def draw(step: int, draws: torch.Generator) -> Batch:
        pick = torch.randint(len(x), (64,), generator=draws)
        with torch.no_grad():
            action = torch.multinomial(model(x[pick]).softmax(-1), 1, generator=draws)[:, 0]
        reward = (action == y[pick]).float()
        return x[pick], action, reward - reward.mean()

    def loss(batch: Batch) -> Tensor:
        surprise = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (surprise * (batch[2] if len(batch) > 2 else 1.0)).mean()

    return Task(model, _ADAM(model.parameters(), 3e-3), loss, (x, y), None, 800, draw=draw)


def curriculum() -> Task:
    """Two classes more at a time: the loss jumps, and falls again."""
    task = task_of(lambda: dense(64, 64, 10), 22, torch.optim.AdamW, 3e-3, classes, digits(), 64, 800)
    x, y = task.data
    held = [torch.nonzero(y < 2 * k)[:, 0] for k in range(1, 6)]

    def draw(step: int, draws: torch.Generator) -> Batch:
        rows = held[min(step // 130, 4)]
        pick = rows[torch.randint(len(rows), (64,), generator=draws)]
        return x[pick], y[pick]

    task.draw = draw
    return task


def penalty() -> Task:
    """A penalty on the weights that grows all along, and the loss with it once the data are fitted."""
    weight = [0.0]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        squares_ = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        return classes(model, batch) + weight[0] * squares_

    task = task_of(lambda: dense(64, 64, 10, act=nn.Tanh), 23, momentum, 0.05, loss, digits(), 64, 800)

    def before(step: int) -> None:
        weight[0] = 1e-2 * step / 800

    task.before = before
    return task


def pretrained() -> Task:
    """A fine-tuning that hardly moves: the network is trained already, on batches of 4."""
    task = task_of(lambda: dense(64, 64, 10), 24, torch.optim.AdamW, 3e-3, classes, digits(), 256, 0)
    for _ in range(150):
        task.optimizer.zero_grad()
        task.loss(task.data).backward()
        task.optimizer.step()
    model, (x, y) = task.model, task.data
    return Task(model, torch.optim.AdamW(model.parameters(), 1e-5), task.loss, (x, y), 4, 600)


ODD: dict[str, dict[str, Callable[[], Task]]] = {
    "design": {"generator of an adversarial pair": adversary, "fine-tuning that hardly moves": pretrained},
    "exam": {"rewards": rewards, "curriculum": curriculum, "growing penalty": penalty},
}
