"""What a training is promised, for each kind of module: with a monitor and without, the same to the last bit.

Each kind trains a few steps and gives back all that it can: weights, buffers, optimizer state, batches, random streams,
attributes, and what hooks have seen.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gfs_core as gfs
from tests.bitwise import assert_same

STEPS, SIZE, FEATURES, CLASSES = 4, 12, 6, 3


class Kind(nn.Module):
    """A classifier of one kind; ``forward`` gives the loss of a batch, of which it may do what it likes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return cross_entropy(self.net(batch["x"]), batch["y"])


def plain(*middle: nn.Module) -> Kind:
    return Kind(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES))


class Recurrent(Kind):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, CLASSES))
        self.lstm = nn.LSTM(2, 8, dropout=0.2, num_layers=2, batch_first=True)
        self.state: Any = None

    def forward(self, batch: dict[str, Any]) -> Tensor:
        out, state = self.lstm(batch["x"].reshape(SIZE, 3, 2), self.state)  # truncated: the state goes on
        self.state = tuple(s.detach() for s in state)
        return cross_entropy(self.net(out[:, -1]), batch["y"])


class Attention(Kind):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, CLASSES))
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        tokens = (batch["x"].abs() * 3).long().clamp(max=9)
        return cross_entropy(self.net(self.layer(self.embed(tokens)).mean(1)), batch["y"])


class Tied(Kind):
    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.net[2].weight = self.net[0].weight


class Draws(Kind):
    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, CLASSES))
        self.torch, self.numpy, self.python = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(2),
            random.Random(3),
        )
        self.steps, self.turns = itertools.count(), iter(range(1000))
        self.nested = {"legacy": [np.random.RandomState(4)]}

    def forward(self, batch: dict[str, Any]) -> Tensor:
        noise = torch.randn(SIZE, FEATURES, generator=self.torch)
        scale = self.numpy.random() + self.python.random() + self.nested["legacy"][0].rand()
        batch["x"] = batch["x"] + 0.1 * scale * noise + 0.01 * (next(self.steps) + next(self.turns))
        return super().forward(batch)


class Teacher(Kind):
    """An exponential mean of the weights, made by the loss, whose outputs it also compares with a queue."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, CLASSES))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(20, CLASSES))
        self.at = 0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.lerp_(s.data, 0.01)
        target = self.teacher(batch["x"])
        apart = (self.net(batch["x"]) - target - self.queue.mean(0)).square().mean()
        self.queue[self.at % 20] = target[0]
        self.at += 1
        return super().forward(batch) + apart


class Ensemble(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(3)])
        self.turn = 0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        self.turn = (self.turn + 1) % 3  # one member a step
        return cross_entropy(self.members[self.turn](batch["x"]), batch["y"])


class TakesApart(Kind):
    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = batch.pop("x").mul_(0.9).requires_grad_()
        loss = cross_entropy(self.net(x), batch["y"])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        x.grad = slope.detach()
        batch["meta"]["seen"].append(1)
        return loss + slope.square().sum()


class Lazily(Kind):
    """Makes a layer in its first forward pass, and adds a hook."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.seen: list[float] = []

    def forward(self, batch: dict[str, Any]) -> Tensor:
        if not hasattr(self, "noise"):
            self.noise = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
            self.net.register_forward_hook(lambda m, i, o: self.seen.append(float(o.detach().sum())))
        batch["x"] = batch["x"] + self.noise(batch["x"])
        return super().forward(batch)


class Quantised(Kind):
    """Its base is frozen, in half precision and 8 bits."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, CLASSES))
        self.base = nn.Linear(FEATURES, 8).requires_grad_(False).bfloat16()
        self.register_buffer("codes", torch.randint(-127, 127, (8, FEATURES), dtype=torch.int8))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"]
        hidden = self.base(x.bfloat16()).float() + x @ (self.codes.float() / 127).T
        return cross_entropy(self.net(hidden.tanh()), batch["y"])


class Freezes(Kind):
    """Switches parts off and on while it computes its loss, and keeps statistics in an array."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES))
        self.histogram, self.calls = np.zeros(CLASSES), 0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        self.calls += 1
        self.net[1].train(self.calls % 2 == 0)
        self.net[2].bias.requires_grad_(self.calls % 3 > 0)
        self.histogram += np.bincount(batch["y"].numpy(), minlength=CLASSES)
        weights = torch.tensor(1 / (1 + self.histogram), dtype=torch.float32)
        return cross_entropy(self.net(batch["x"]), batch["y"], weights)


def step(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def steps_in_the_backward_pass() -> Kind:
    model = plain()
    model.unused = nn.Parameter(torch.ones(2))  # so that a backward pass into `.grad` is made as well
    model.own = {}
    for p in model.parameters():
        optimizer = model.own[p] = torch.optim.Adam([p], lr=0.01)
        p.register_post_accumulate_grad_hook(functools.partial(step, optimizer))
    return model


def hooked() -> Kind:
    model = plain()
    model.seen = []
    seen = model.seen
    model.net[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    model.net[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.net[0].register_forward_hook(lambda *_: seen.append("forward"))
    return model


KINDS: dict[str, Callable[[], Kind]] = {
    "plain": plain,
    "batch norm": lambda: plain(nn.BatchNorm1d(8)),
    "dropout": lambda: plain(nn.Dropout(0.5)),
    "weight norm": lambda: Kind(weight_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, CLASSES)),
    "spectral norm": lambda: Kind(spectral_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, CLASSES)),
    "old spectral norm": lambda: Kind(nn.utils.spectral_norm(nn.Linear(FEATURES, 8)), nn.Linear(8, CLASSES)),
    "recurrent": Recurrent,
    "attention": Attention,
    "tied": Tied,
    "draws": Draws,
    "teacher": Teacher,
    "ensemble": Ensemble,
    "takes its batch apart": TakesApart,
    "lazily made layer": Lazily,
    "quantised and frozen": Quantised,
    "freezes": Freezes,
    "steps in the backward pass": steps_in_the_backward_pass,
    "hooked": hooked,
}


def attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of all modules, those of the module's own machinery left out."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        held = {k: v for k, v in vars(m).items() if k == "training" or not k.startswith("_")}
        for key, value in held.items():
            if isinstance(value, (bool, int, float, str, list, np.ndarray)) or (key == "state" and value is not None):
                found[f"{name}.{key}"] = copy.copy(value)
    found["requires_grad"] = [p.requires_grad for p in module.parameters()]
    found["hooks"] = [len(m._forward_hooks) for m in module.modules()]
    return found


def streams(module: nn.Module) -> list[Any]:
    if not isinstance(module, Draws):
        return []
    legacy = module.nested["legacy"][0].get_state()
    bits = module.numpy.bit_generator.state
    return [module.torch.get_state(), bits, module.python.getstate(), legacy, next(module.steps), next(module.turns)]


def train(kind: Callable[[], Kind], measured: bool, **options: Any) -> tuple[dict[str, Any], list[gfs.Measurement]]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = kind()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9)
    config = gfs.GFSConfig(max_overhead=None, every=1, running_every=1, strict=True, alarm="off", **options)
    monitor = gfs.StabilityMonitor(model, optimizer, config) if measured else None
    seen: dict[str, Any] = {"losses": [], "batches": []}
    found = []
    for _ in range(STEPS):
        x, y = torch.randn(SIZE, FEATURES), torch.randint(CLASSES, (SIZE,))
        batch = {"x": x, "y": y, "meta": {"seen": []}}
        if monitor is not None:  # before the loss, as Lightning does
            measurement = monitor.step(model, batch)
            assert measurement is not None
            found.append(measurement)
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        seen["losses"].append(loss.item())
        seen["batches"].append([x.detach().clone(), x.grad, x.requires_grad, sorted(batch), batch["meta"]["seen"]])
    seen |= {
        "weights and buffers": copy.deepcopy(model.state_dict()),
        "gradients": [p.grad for p in trained],
        "optimizer": [copy.deepcopy(optimizer.state_dict())],
        "own optimizers": [o.state_dict() for o in getattr(model, "own", {}).values()],
        "attributes": attributes(model),
        "held streams": streams(model),
        "global streams": [torch.rand(3), random.random(), np.random.rand()],
    }
    return seen, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hvp", ["auto", "gradients"])
@pytest.mark.parametrize("name", KINDS)
def test_training_is_left_alone(name: str, hvp: str) -> None:
    tier = "gfs" if hvp == "auto" else "sharpness"
    kind = KINDS[name]
    alone, _ = train(kind, measured=False)
    beside, found = train(kind, measured=True, tier=tier, hvp=hvp)
    for promise in alone:
        assert_same({promise: alone[promise]}, {promise: beside[promise]})
    if name == "old spectral norm":  # its stop-gradients make the curvature one that may not be symmetric
        assert all(m.sharpness is not None or m.reasons for m in found)
    else:
        assert sum(m.sharpness is not None for m in found) >= STEPS // 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "dropout", "tied", "takes its batch apart", "freezes"])
def test_the_value_is_that_of_the_whole_hessian(name: str) -> None:
    """The loss of the training step itself, built once more by hand with the same numbers drawn."""
    torch.manual_seed(1)
    model = KINDS[name]()
    batch = {"x": torch.randn(SIZE, FEATURES), "y": torch.randint(CLASSES, (SIZE,)), "meta": {"seen": []}}
    drawn = torch.get_rng_state()
    found = gfs.sharpness(model, lambda m, b: m(b), [batch], tol=1e-4)
    assert torch.equal(torch.get_rng_state(), drawn)
    params = [p for p in model.parameters() if p.requires_grad]
    loss = model(batch)
    slope = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    flat = torch.cat([g.reshape(-1) for g in slope if g is not None])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([r.reshape(-1) for r, g in zip(row, slope, strict=True) if r is not None and g is not None])
        )
    assert found.value == pytest.approx(torch.linalg.eigvalsh(torch.stack(rows))[-1].item(), rel=1e-3)
