from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import schedulefree
import torch
from torch import nn

import gfs_core as gfs
from gfs_core.loss.objective import Objective
from gfs_core.signals.directional import along_by_product
from tests.core.options import tuned

SPECTRUM = torch.tensor([0.3, 1.0, 2.0, 5.0], dtype=torch.float64)

# Optimizers without a row in the table of thresholds.
EMPIRICAL = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Lion": lambda p: Lion(p, 0.02),
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.2),
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.05),
}
if hasattr(torch.optim, "Muon"):  # torch ≥ 2.9
    EMPIRICAL["Muon"] = lambda p: torch.optim.Muon(p, lr=0.05)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, without decay."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(torch.sign(first * m + (1 - first) * p.grad), alpha=group["lr"])
                m.mul_(second).add_(p.grad, alpha=1 - second)


class Quadratic(nn.Module):
    """½·wᵀHw of a 2×2 matrix of weights."""

    def __init__(self, spectrum: torch.Tensor = SPECTRUM) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.register_buffer("hessian", q @ torch.diag(spectrum) @ q.T)
        self.weight = nn.Parameter(torch.tensor([[1.0, -0.5], [0.7, 2.0]], dtype=torch.float64))

    def forward(self, batch: object = None) -> torch.Tensor:
        w = self.weight.flatten()
        return 0.5 * w @ self.hessian @ w


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.x = torch.randn(16, 5, dtype=torch.float64)

    def forward(self, batch: object = None) -> torch.Tensor:
        return (self.net(self.x) - self.x[:, :3].sin()).square().mean()


def loss_of(model: nn.Module, batch: object) -> torch.Tensor:
    return model(batch)


def brute_force(model: nn.Module, before: list[torch.Tensor]) -> float:
    """The first multiple of the step at which the loss is back where it was, by bisection on the loss itself."""
    model = copy.deepcopy(model)
    params = [p.detach() for p in model.parameters()]
    step = [p - b for p, b in zip(params, before, strict=True)]

    def higher(multiple: float) -> bool:
        for p, b, u in zip(params, before, step, strict=True):
            p.copy_(b + multiple * u)
        with torch.no_grad():
            return bool(model() > start)

    for p, b in zip(params, before, strict=True):
        p.copy_(b)
    with torch.no_grad():
        start = model()
    high = next(0.01 * 1.02**i for i in itertools.count() if higher(0.01 * 1.02**i))
    low = high / 1.02
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if higher(middle) else (middle, high)
    return low


def trained(optimizer_of, steps: int, model: nn.Module):
    """The model after some real steps, and its weights before the last."""
    optimizer = optimizer_of(list(model.parameters()))
    getattr(optimizer, "train", lambda: None)()
    before = []
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    return optimizer, before


@pytest.mark.parametrize("name", EMPIRICAL)
def test_the_loss_stops_falling_at_the_critical_rate(name: str) -> None:
    """On a quadratic the critical multiple is exact, for whatever step the real optimizer takes."""
    model = Quadratic()
    optimizer, before = trained(EMPIRICAL[name], 5, model)
    step = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    u = step[0].flatten()
    true = brute_force(model, before)
    measured = gfs.stability(model, loss_of, None, optimizer, tier="directional", before=[b.clone() for b in before])
    rate = optimizer.param_groups[0]["lr"]
    assert measured.critical_lr == pytest.approx(true * rate, rel=1e-6)
    assert measured.stability_ratio == pytest.approx(1 / true, rel=1e-6)
    assert measured.directional_sharpness == pytest.approx(float(u @ model.hessian @ u / (u @ u)), rel=1e-6)
    assert measured.threshold is None
    assert any(f"{name} is not known; its stability ratio is empirical" in r for r in measured.reasons)
    assert measured.hvps > 0


@pytest.mark.parametrize(("momentum", "factor"), [(0.0, 0.97), (0.0, 1.0), (0.0, 1.03), (0.5, 1.0), (0.9, 1.0)])
def test_the_empirical_ratio_is_the_analytic_one_at_the_edge(momentum: float, factor: float) -> None:
    """In the oscillation along the sharpest direction what is measured is λ / threshold; with momentum, at the edge."""
    threshold = (2 + 2 * momentum) / 0.1
    model = Quadratic(torch.tensor([0.0, 0.0, 0.0, factor * threshold], dtype=torch.float64))
    optimizer, before = trained(lambda p: torch.optim.SGD(p, 0.1, momentum=momentum), 300, model)
    found = gfs.stability(model, loss_of, None, optimizer, tier="directional", before=before)
    assert 0.1 / found.critical_lr == pytest.approx(factor, rel=1e-6)


def test_uphill_and_lost_steps_have_no_critical_rate() -> None:
    model = Quadratic()
    objective = Objective(model, loss_of, [None])
    uphill = [0.1 * model.weight.detach()]  # away from the minimum at 0
    assert along_by_product(gfs.Hessian(objective), uphill).critical is None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    still = [model.weight.detach().clone()]
    found = gfs.stability(model, loss_of, None, optimizer, tier="directional", before=still)
    assert found.directional_sharpness is None
    assert found.critical_lr is None


def run(config: gfs.GFSConfig, steps: int, optimizer_of=EMPIRICAL["Lion"], **how):
    model = Net()
    optimizer = optimizer_of(list(model.parameters()))
    getattr(optimizer, "train", lambda: None)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gfs.GFSWarning)
        monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), **how)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        measured = monitor.step(lambda _: model(), None)
        found += [measured] if measured else []
        optimizer.step()
    return found, monitor, model, optimizer


@pytest.mark.filterwarnings("ignore::gfs_core.errors.GFSWarning")
def test_an_unknown_optimizer_gets_the_empirical_ratio_without_being_asked() -> None:
    found, *_ = run(gfs.GFSConfig(every=3, running_every=None, max_overhead=None), 8)
    assert [m.step for m in found] == [0, 3, 6]
    assert found[0].stability_ratio is None  # no step was taken yet
    for m in found[1:]:
        assert m.stability_ratio == pytest.approx(m.learning_rate / m.critical_lr)
        assert m.sharpness > m.directional_sharpness


def test_tiers_have_their_own_cadence() -> None:
    config = gfs.GFSConfig(
        tier="gfs_full",
        every=18,
        running_every=4,
        max_overhead=None,
    )
    beside = {"gfs": 6, "sharpness": 3, "directional": 2, "batch_sharpness": 5}
    found, *_ = run(config, 29, lambda p: torch.optim.SGD(p, 0.1), beside=beside, rtol=1e-1)
    kinds = {
        m.step: [
            m.directional_sharpness is not None,
            m.running_stability_ratio is not None,
            m.batch_sharpness is not None,
            m.sharpness is not None,
            m.gfs_sharpness is not None,
            "gfs_full" if m.gfs_sharpness_full is not None or any("full GFS" in r for r in m.reasons) else "",
        ]
        for m in found
    }
    assert {step: kind for step, kind in kinds.items() if step > 14} == {  # settled by eight products, up to step 14
        15: [False, False, True, True, False, ""],
        16: [True, True, False, False, False, ""],
        18: [True, False, False, True, True, "gfs_full"],
        20: [True, True, True, False, False, ""],
        21: [False, False, False, True, False, ""],
        22: [True, False, False, False, False, ""],
        24: [True, True, False, True, True, ""],
        25: [False, False, True, False, False, ""],
        26: [True, False, False, False, False, ""],
        27: [False, False, False, True, False, ""],
        28: [True, True, False, False, False, ""],
    }
    assert next(step for step, kind in kinds.items() if kind[1]) == 14  # none of fewer products
    assert not any(kinds[0][:2])
    assert all(kinds[0][2:])


def test_the_step_taken_survives_a_resume() -> None:
    """Between a step and its measurement lies a checkpoint."""
    config = gfs.GFSConfig(tier="directional", every=4, max_overhead=None)
    optimizer_of = lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)  # noqa: E731
    whole, *_ = run(config, 9, optimizer_of)
    _, monitor, model, optimizer = run(config, 4, optimizer_of)
    again = gfs.StabilityMonitor(model, optimizer, config)
    again.load_state_dict(monitor.state_dict())
    measured = again.step(lambda _: model(), None)
    assert measured.directional_sharpness == whole[0].directional_sharpness
    assert measured.critical_lr == whole[0].critical_lr
    assert [m.step for m in whole] == [4, 8]


def test_a_cadence_beside_its_own_tier_is_refused() -> None:
    with pytest.raises(gfs.ConfigError, match="`running_every` is for tiers dearer than 'running'"):
        gfs.GFSConfig(tier="running", running_every=2)
    assert gfs.GFSConfig(tier="directional", every=3).intervals() == {"directional": 3}
    assert gfs.GFSConfig().intervals() == {"running": 5, "gfs": 10}
    full = gfs.GFSConfig(tier="gfs_full", every=100)
    assert list(full.intervals().items()) == [("running", 5), ("gfs", 10), ("gfs_full", 100)]
    assert gfs.GFSConfig(tier="gfs_full", running_every=None).intervals() == {"gfs_full": 10}  # it holds a short one


def test_a_registered_optimizer_is_analytic() -> None:
    class Mine(torch.optim.SGD):
        pass

    model = Quadratic()
    optimizer = Mine(model.parameters(), 0.1)
    assert gfs.stability_of(optimizer, [model.weight]).empirical
    gfs.register_optimizer(
        Mine,
        lambda optimizer, group: 2 / group["lr"],
        lambda optimizer, group, p: torch.full_like(p, 4.0),
    )
    optimizer.state[model.weight] = {"seen": True}
    found = gfs.stability(model, loss_of, None, optimizer, tier="sharpness", tol=1e-6)
    assert found.threshold == pytest.approx(20.0)
    assert found.stability_ratio == pytest.approx(5.0 / 4.0 / 20.0)
    assert math.isclose(found.sharpness, 5.0, rel_tol=1e-6)
    with pytest.raises(TypeError, match="expected a class of torch"):
        gfs.register_optimizer(optimizer, lambda o, g: 1.0)
