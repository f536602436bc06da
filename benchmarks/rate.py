"""The rate that `find_rate` recommends, beside the best of rates half a decade apart. Writes rate.json and rate.md.

Run (about ten minutes): OMP_NUM_THREADS=1 python -m benchmarks.rate [chosen] [reported]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits, fashion_mnist, sentence_data, split, text
from benchmarks.lib.models import Characters, Rows, Sentences, cnn, dense, digits_cnn
from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import adamw, entropy, gradient, sgd, squared
from benchmarks.zoo.parts import Recurrent, cosine

SEEDS = 2
WARMUP = 0.05  # of the steps
GRID = [10 ** (i / 2) for i in range(-4, 5)]  # times the base rate: the rates of the reference
USERS = (0.1, 1.0, 10.0)  # times the base rate: what a search begins from
Data = tuple[Batch, Batch]


@dataclass(frozen=True)
class Workload:
    """What is trained, with warm-up and cosine.

    Attributes:
        data: gives training and validation data.
        model: makes the network.
        optimizer: makes its optimizer, with a rate.
        rate: the base rate.
        batch: examples in a batch.
        steps: of the training.
        loss: of a batch.
    """

    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float
    batch: int = 64
    steps: int = 500
    loss: Callable[[nn.Module, Batch], Tensor] = entropy


class Batches:
    """Batches of all examples, in a new order each time."""

    def __init__(self, data: Batch, size: int, seed: int) -> None:
        self.data, self.size = data, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data[1]) // self.size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.data[1]), generator=self.generator)
        for rows in order.split(self.size)[: len(self)]:
            yield self.data[0][rows], self.data[1][rows]


def bn_cnn(channels: int = 1, size: int = 8) -> nn.Module:
    """Two convolutions with BatchNorm, for images given flat or not."""
    return nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (channels, size, size)),
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


@functools.cache
def digits_data() -> Data:
    return split(digits(), 360)


@functools.cache
def fashion_data() -> Data:
    return split(fashion_mnist(5000), 1000)


@functools.cache
def text_data() -> Data:
    return split(text(3000, 24)[0], 300)


@functools.cache
def alphabet() -> int:
    return text(3000, 24)[1]


@functools.cache
def slopes_data() -> Data:
    """Linear regression with inputs of very different scales: past the edge it diverges at once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=generator) * torch.logspace(0, -1.5, 40)
    target = x @ torch.randn(40, 3, generator=generator) + 0.3 * torch.randn(2000, 3, generator=generator)
    return split((x, target), 400)


@functools.cache
def sentences() -> tuple[Data, int, int]:
    train, validation, words, classes = sentence_data()
    return (train, validation), words, classes


# Thresholds and the way of the search were chosen on these …
CHOSEN = {
    "digits, MLP, momentum": Workload(digits_data, lambda: dense(64, 100, 100, 10), sgd, 0.05),
    "digits, CNN, momentum, batch 16": Workload(digits_data, digits_cnn, sgd, 0.03, 16),
    "digits, BatchNorm CNN, momentum": Workload(digits_data, bn_cnn, sgd, 0.05),
    "digits, CNN, AdamW": Workload(digits_data, digits_cnn, adamw, 3e-3),
    "characters, transformer, AdamW": Workload(text_data, lambda: Characters(alphabet(), 24, 32), adamw, 3e-3, 32, 400),
    "digits, deep tanh network, momentum": Workload(digits_data, lambda: dense(64, *[40] * 6, 10), sgd, 0.05, 128),
    "linear regression, momentum": Workload(slopes_data, lambda: nn.Linear(40, 3), sgd, 0.01, 32, 400, squared),
}
# … and nothing on these.
REPORTED = {
    "Fashion-MNIST, CNN, momentum": Workload(fashion_data, cnn, sgd, 0.05),
    "Fashion-MNIST, BatchNorm CNN, AdamW": Workload(fashion_data, lambda: bn_cnn(1, 28), adamw, 3e-3, 64, 300),
    "Fashion-MNIST, BatchNorm CNN, momentum": Workload(fashion_data, lambda: bn_cnn(1, 28), sgd, 0.05, 32, 300),
    "sentences, transformer, AdamW": Workload(
        lambda: sentences()[0], lambda: Sentences(*sentences()[1:]), adamw, 3e-3, 64, 400
    ),
    "characters, GRU, momentum": Workload(text_data, lambda: Recurrent(nn.GRU, alphabet(), 48), sgd, 0.3, 32),
    "Fashion-MNIST, ReLU network, squared loss, momentum": Workload(
        fashion_data,
        lambda: nn.Sequential(nn.Flatten(), dense(784, 100, 100, 10, act=nn.ReLU)),
        sgd, 0.01, 64, 500,
        lambda model, b: squared(model, (b[0], nn.functional.one_hot(b[1], 10).float())),
    ),
    "digits as rows, transformer, AdamW, batch 256": Workload(
        digits_data, lambda: Rows("gelu", True), adamw, 3e-3, 256, 400
    ),
}  # fmt: skip


def start(workload: Workload, rate: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR]:
    """Model, optimizer and schedule at the start of a training."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = workload.optimizer(model, rate)
    return model, optimizer, LambdaLR(optimizer, cosine(workload.steps, max(1, round(WARMUP * workload.steps))))


def validation_of(workload: Workload) -> list[Batch]:
    x, y = workload.data()[1]
    return [(x[i : i + 100], y[i : i + 100]) for i in range(0, len(y), 100)]


def trained(workload: Workload, rate: float, seed: int) -> float:
    """Validation loss after a whole training; infinite where it was lost."""
    model, optimizer, schedule = start(workload, rate, seed)
    passes = itertools.repeat(Batches(workload.data()[0], workload.batch, seed))
    for batch in itertools.islice(itertools.chain.from_iterable(passes), workload.steps):
        loss = workload.loss(model, batch)
        if not math.isfinite(loss.item()):
            return math.inf
        gradient(optimizer, loss)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        loss = torch.stack([workload.loss(model, batch) for batch in validation_of(workload)]).mean().item()
    return loss if math.isfinite(loss) else math.inf


def reference(workload: Workload, seed: int) -> Row:
    """Losses at the rates of the grid."""
    return {f"{r * workload.rate:.3g}": rounded(trained(workload, r * workload.rate, seed), 5) for r in GRID}


def searched(workload: Workload, users: float, seed: int) -> Row:
    """What a search from this rate finds, and the loss of a training with it."""
    model, optimizer, schedule = start(workload, users * workload.rate, seed)
    found = gfs.find_rate(
        model, optimizer, lambda batch: workload.loss(model, batch), Batches(workload.data()[0], workload.batch, seed),
        workload.steps, scheduler=schedule, validation=validation_of(workload),
    )  # fmt: skip
    knee = found.ramp.knee
    return rounded(
        {
            "rate": found.rate,
            "low": found.range[0],
            "high": found.range[1],
            "loss": trained(workload, found.rate, seed),
            "onset": None if knee is None else knee.rate,
            "level": None if knee is None else knee.ratio,
            "end": found.ramp.end,
            "cliff": found.choice.cliff,
            "pilots": [[p.rate, p.steps, p.share, p.taken, p.loss] for p in found.pilots],
            "cost": found.cost.steps / workload.steps,
            "seconds": found.cost.seconds,
        },
        4,
    )


def run(store: Store, part: str, workloads: dict[str, Workload]) -> None:
    for (name, workload), seed in itertools.product(workloads.items(), range(SEEDS)):
        store.add(f"{part}: reference", (name, seed), functools.partial(reference, workload, seed))
        for users in USERS:
            store.add(part, (name, users, seed), functools.partial(searched, workload, users, seed))


def excess(row: Row, losses: Row) -> float:
    """Relative excess of the loss over the best of the reference; infinite where the training was lost."""
    best = min(v for v in losses.values() if v is not None)
    return math.inf if row["loss"] is None else row["loss"] / best - 1


HEAD = f"""# A learning rate before the training

    OMP_NUM_THREADS=1 python -m benchmarks.rate

`find_rate` of a training with warm-up and cosine, from its base rate times 0.1, 1 and 10, {SEEDS} seeds.
*Excess*: of the validation loss after a whole training with the rate found, over the least loss of {len(GRID)}
rates half a decade apart (0.01 to 100 times the base rate), with the same seed. That is chosen on the
validation data itself, and seeds alone scatter by 5 to 15 % on the smaller ones. *Cost*: optimizer steps of
ramp and pilots over those of the training. *Onset*: the rate at the knee of the ratio in the ramp, where one
was found; *best*: the best rate of the reference.
"""
TEXTS = {
    "reported": """## Workloads that nothing was chosen on
""",
    "chosen": """## Workloads on which thresholds were chosen
""",
}
COLUMNS = ["workload", "steps", "best rate", "rates found", "excess: median", "worst", "cost", "best / onset", "lost"]


def render(results: dict[str, Any]) -> str:
    """The page."""
    lines = [HEAD]
    for part, workloads in (("reported", REPORTED), ("chosen", CHOSEN)):
        rows, all_ = [], list[float]()
        costs: list[float] = []
        for name, workload in workloads.items():
            own = {tuple(k.split(" | ")[1:]): row for k, row in results[part].items() if k.startswith(f"{name} | ")}
            if not own:
                continue
            reference = {seed: results[f"{part}: reference"][f"{name} | {seed}"] for _, seed in own}
            excesses = [excess(row, reference[seed]) for (_, seed), row in own.items()]
            best = {s: min((v, r) for r, v in losses.items() if v is not None)[1] for s, losses in reference.items()}
            ratios = [float(best[s]) / row["onset"] for (_, s), row in own.items() if row["onset"] is not None]
            found = [row["rate"] for row in own.values()]
            all_ += excesses
            costs += [row["cost"] for row in own.values()]
            rows.append(
                [
                    name,
                    workload.steps,
                    ", ".join(dict.fromkeys(best.values())),
                    f"{min(found):.2g} to {max(found):.2g}",
                    f"{median(excesses):+.1%}",
                    f"{max(excesses):+.1%}",
                    f"{median(row['cost'] for row in own.values()):.0%}",
                    f"{median(ratios):.2g} ({len(ratios)} of {len(own)})" if ratios else "–",
                    f"{sum(map(math.isinf, excesses))} of {len(own)}",
                ]
            )
        lines += [TEXTS[part], *table(COLUMNS, rows), ""]
        lines += [
            f"Of {len(all_)} searches: excess {median(all_):+.1%} in the median, {max(all_):+.1%} at worst, "
            f"{sum(e <= 0.15 for e in all_)} within 15 %; cost {median(costs):.0%} of a training in the median, "
            f"{max(costs):.0%} at most; {sum(map(math.isinf, all_))} trainings lost.",
            "",
        ]
    return "\n".join([*lines, *REMARKS])


REMARKS = [
    "With pilots of a fifth of the steps over all of the data, run again twice as long while they were alike, the same",
    "searches had a median excess of 1.1 % on the first workloads (36 within 15 %, 54 % at worst) and of 1.6 % on the",
    "second ones (34, 73 %), for 82 % and 77 % of a training in the median and 200 % at most. How pilots are run was",
    "chosen on the second ones and 16 more, where those of a tenth of steps and data were better: pilots.md.",
    "Of the sentences the reference has two valleys, at 0.001 and at 0.3, and between them networks that overfit; a",
    "pilot at 0.3 learns too little.",
    "",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["chosen", "reported"])
    store = Store("rate")
    for part in parser.parse_args().parts:
        run(store, part, {"chosen": CHOSEN, "reported": REPORTED}[part])
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
