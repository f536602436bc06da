"""Practical networks: the full gradient flow solution at many iterates of a training, each with its error bar.

The first workloads are what the paper's experiments cover (squared loss, full-batch gradient descent); the others are
not covered by it, and measured all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import digits, fashion_mnist

HORIZONS = (1, 4, 16, 64, 256, 1024, 4096)
LONGER = 4  # the third solution flows so many times as long
EIGENVALUE = 1e-6  # relative residual
MAX_GRADS = 60_000

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One training.

    Attributes:
        name: of the workload and of its file of results.
        title: what it is, in words.
        model: ``"mlp"``, ``"cnn"`` or ``"transformer"``.
        rate: learning rate.
        covered: squared loss and full-batch gradient descent.
        data: ``"digits"`` or ``"fashion"`` (pooled to 14×14).
        examples: the first so many, also the probe.
        optimizer: ``"sgd"``, ``"momentum"`` (0.9) or ``"adam"``.
        batch: examples per step; ``None``: all.
        warmup: steps in which the rate grows linearly.
        cutoff: cross-entropy instead of squared loss, its flow stopped at this loss.
        tolerances: ``rtol`` of the two solutions; along ReLUs a tight one never ends.
        steps, every: length of the training, and distance between the iterates measured.
        horizons: k of the short flows.
    """

    name: str
    title: str
    model: str
    rate: float
    covered: bool = False
    data: str = "digits"
    activation: type[nn.Module] = nn.Tanh
    width: int = 32
    examples: int = 20
    optimizer: str = "sgd"
    batch: int | None = None
    warmup: int = 0
    cutoff: float | None = None
    tolerances: tuple[float, float] = (1e-3, 1e-4)
    steps: int = 800
    every: int = 50
    horizons: tuple[int, ...] = HORIZONS


RELU = (3e-2, 1e-2)
COVERED = (
    Workload("tanh", "tanh MLP, digits", "mlp", 0.2, True),
    Workload("relu", "ReLU MLP, digits", "mlp", 0.2, True, activation=nn.ReLU, tolerances=RELU),
    Workload("fashion", "tanh MLP, Fashion-MNIST", "mlp", 0.1, True, data="fashion", steps=400, every=25),
    Workload("cnn", "tanh CNN, Fashion-MNIST", "cnn", 0.15, True, data="fashion", steps=400, every=25),
    Workload("cnn-slower", "tanh CNN, Fashion-MNIST, η = 0.1", "cnn", 0.1, True, data="fashion", steps=600, every=40),
    Workload(
        "cnn-relu",
        "ReLU CNN, Fashion-MNIST",
        "cnn",
        0.1,
        True,
        "fashion",
        nn.ReLU,
        tolerances=RELU,
        steps=600,
        every=40,
    ),
)
BEYOND = (
    Workload("cross-entropy", "cross-entropy, tanh MLP", "mlp", 2.0, cutoff=1e-3, steps=120, every=8),
    Workload("momentum", "momentum 0.9, tanh MLP", "mlp", 0.6, optimizer="momentum", warmup=200, steps=400, every=40),
    Workload("adam", "Adam, tanh MLP", "mlp", 5e-3, optimizer="adam", every=80),
    Workload("mini-batches", "SGD with batches of 5, tanh MLP", "mlp", 0.2, batch=5, every=80),
    Workload("transformer", "transformer, digits", "transformer", 0.06, examples=10, width=16, steps=400, every=50),
)
# one of each kind, in a few seconds
SMALL, SMALL_BEYOND = (
    tuple(
        replace(
            w,
            data="digits",
            examples=4,
            width=6,
            rate=w.rate / 2,
            tolerances=(1e-2, 3e-3),
            steps=10,
            every=5,
            horizons=(1, 64),
        )
        for w in workloads
        if w.name in ("tanh", "cnn", "cross-entropy", "adam")
    )
    for workloads in (COVERED, BEYOND)
)


class Transformer(nn.Module):
    """One encoder layer over the eight rows of a digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """n×64 → n×10."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the one that can be differentiated twice
            tokens = self.layer(self.embed(x.view(-1, 8, 8)) + self.position)
        out: Tensor = self.head(tokens.mean(1))
        return out


def load(workload: Workload) -> Batch:
    """Images and labels, one-hot for squared loss; float64."""
    images, labels = (digits if workload.data == "digits" else fashion_mnist)(workload.examples)
    images = images.double()
    if workload.data == "fashion":
        images = nn.functional.avg_pool2d(images, 2)
    elif workload.model == "cnn":
        images = images.view(-1, 1, 8, 8)
    return images, nn.functional.one_hot(labels, 10).double() if workload.cutoff is None else labels


def build(workload: Workload) -> nn.Module:
    """The model, seeded."""
    torch.manual_seed(0)
    act, width = workload.activation, workload.width
    model: nn.Module
    if workload.model == "transformer":
        model = Transformer(width)
    elif workload.model == "cnn":
        side = 2 if workload.data == "fashion" else 1
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=side), act(), nn.Conv2d(4, 8, 3), act(), nn.Flatten(), nn.Linear(128, 10)
        )
    else:
        pixels = 196 if workload.data == "fashion" else 64
        layers = [nn.Flatten(), nn.Linear(pixels, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 10)]
        model = nn.Sequential(*layers)
    return model.double()


def squared(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared distance to the one-hot label."""
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()
    return loss


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer at its constant rate."""
    if workload.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), workload.rate)
    return torch.optim.SGD(model.parameters(), workload.rate, momentum=0.9 * (workload.optimizer == "momentum"))


def run(workload: Workload) -> dict[str, Any]:
    """Train; measure the sharpness often, and the gradient flow solution at every iterate chosen."""
    model, full, loss_fn = build(workload), load(workload), squared if workload.cutoff is None else entropy
    optimizer, draws = optimizer_of(workload, model), torch.Generator().manual_seed(0)
    everything = torch.arange(workload.examples)
    raw: list[list[Any]] = []
    iterates: list[dict[str, Any]] = []
    for step in range(workload.steps + 1):
        optimizer.param_groups[0]["lr"] = workload.rate * min(1.0, (step + 1) / max(1, workload.warmup))
        if step % max(1, workload.every // 8) == 0 or step % workload.every == 0:
            now = gfs.stability(model, loss_fn, full, optimizer, tier="sharpness", tol=1e-3, max_hvps=1000)
            raw.append([step, now.loss_probe, now.sharpness, now.stability_ratio, now.threshold])
        if step % workload.every == 0 and (workload.cutoff is None or raw[-1][1] > 2 * workload.cutoff):
            iterates.append({"step": step} | solutions(workload, model, loss_fn, full, raw[-1][2]))
            print(f"{workload.name}: {iterates[-1]}", flush=True)
        chosen = everything
        if workload.batch is not None:
            chosen = torch.randperm(workload.examples, generator=draws)[: workload.batch]
        optimizer.zero_grad()
        loss_fn(model, (full[0][chosen], full[1][chosen])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    settings = asdict(workload) | {"activation": workload.activation.__name__}
    settings["parameters"] = sum(p.numel() for p in model.parameters())
    return {"settings": settings, "raw": raw, "iterates": iterates}


def solutions(workload: Workload, model: nn.Module, loss_fn: Any, full: Batch, raw: float) -> dict[str, Any]:
    """φ with its error bar, its price, and the sharpness after finite horizons, from the present weights.

    The error bar is the largest distance of φ, found with the tight tolerance, from the value at the loose tolerance
    (ten times as large; three times along ReLUs) and from the value after a flow that goes on four times as long.
    """
    loose, tight = workload.tolerances
    options: dict[str, Any] = {"learning_rate": workload.rate, "tol": EIGENVALUE, "max_grads": MAX_GRADS}
    first, phi = (
        gfs.gfs_sharpness(model, loss_fn, full, rtol=rtol, loss_cutoff=workload.cutoff, **options)
        for rtol in (loose, tight)
    )
    checks = [first.sharpness]
    converged = first.converged and phi.converged
    if (
        workload.cutoff is not None
    ):  # the flow lands within 1 % of the cutoff, and the sharpness goes with the loss there
        checks.append(phi.sharpness * workload.cutoff / phi.loss)
    else:
        horizon = LONGER * phi.time / workload.rate
        later = gfs.gfs_sharpness(model, loss_fn, full, horizon=horizon, rtol=tight, **options)
        checks.append(later.sharpness)
        converged &= later.converged
    short = {}
    for k in workload.horizons:
        if k * workload.rate < phi.time:  # beyond, the flow is over
            flow = gfs.gfs_sharpness(model, loss_fn, full, horizon=k, rtol=loose, **options)
            if flow.converged:
                short[str(k)] = flow.sharpness
    price = phi.grad_evals + 2 * phi.hvps
    return {
        "phi": phi.sharpness,
        "error": max(abs(value - phi.sharpness) for value in checks),
        "tolerance_error": abs(first.sharpness - phi.sharpness),
        "loss": phi.loss,
        "converged": converged,
        "time": phi.time / workload.rate,
        "gradients": price,
        "loose_gradients": first.grad_evals + 2 * first.hvps,
        "rk4": 4 * phi.time * min(raw, phi.sharpness),
        "short": short,
    }


def violations(iterates: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs of steps: an iterate whose φ is above an earlier one's (the lowest) beyond both error bars."""
    found = []
    settled = [i for i in iterates if i["converged"]]
    for index, now in enumerate(settled):
        earlier = min(settled[:index], key=lambda i: float(i["phi"] + i["error"]), default=None)
        if earlier is not None and now["phi"] - now["error"] > earlier["phi"] + earlier["error"]:
            found.append((earlier["step"], now["step"]))
    return found
