"""An eigenvalue that is solved for with one gradient a product, as on an accelerator where that takes less time."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gfs_core as gfs

DIGITS = torch.tensor(load_digits().data / 16, dtype=torch.float32)[:256]
LABELS = torch.tensor(load_digits().target)[:256]


def run(activation: type[nn.Module], make, steps: int = 12):
    """Measurements of a training by differences, beside what exact products give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), activation(), nn.Linear(24, 10))
    optimizer = make(model.parameters())

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    monitor.measuring.learned.solve_by_gradients = True  # on a CPU they are not timed, and exact products are taken
    monitor.measuring.learned.smooth = True  # a ReLU's kinks are not looked for: what they do to a solve is to be seen
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of((DIGITS, LABELS)).backward()
        exact = gfs.sharpness(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(DIGITS, LABELS)], tol=1e-4).value
        found.append((monitor.step(loss_of, (DIGITS, LABELS)), exact))
        optimizer.step()
    return found, monitor


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5)])
def test_it_is_that_of_exact_products_for_one_gradient_each(make) -> None:
    found, monitor = run(nn.Tanh, make)
    assert monitor.measuring.learned.solve_by_gradients is True
    for measurement, exact in found:
        assert measurement.sharpness == pytest.approx(exact, rel=0.03)
        assert measurement.stability_ratio == pytest.approx(measurement.sharpness / measurement.threshold)
    assert all(m.hvps == 0 for m, _ in found[1:])  # the first, from a random start, is by exact products
    assert max(m.grad_evals for m, _ in found[2:]) <= 20  # from the last vector


def test_where_differences_are_too_noisy_exact_products_are_taken_from_then_on() -> None:
    found, monitor = run(nn.ReLU, lambda p: torch.optim.AdamW(p, 3e-3))
    assert monitor.measuring.learned.solve_by_gradients is False
    for measurement, exact in found:
        assert measurement.sharpness == pytest.approx(exact, rel=0.05)
    assert found[-1][0].hvps > 0
