"""Products from one gradient each, and what they go by: the factor of clipping, steps that wait, compiled code."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from gfs_core.linalg.vectors import random_like
from gfs_core.loss.compiled import as_compiled
from gfs_core.loss.objective import Objective
from gfs_core.loss.one_gradient import OneGradient, StepLength
from gfs_core.run.clipping import ClippingFactor
from gfs_core.run.waiting import Waiting
from tests.core.options import tuned

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0).long()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@contextlib.contextmanager
def products(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, factor: float = 1.0
) -> Iterator[OneGradient]:
    with gfs.StateSnapshot(model) as isolation:
        objective = Objective(model, loss_fn, [batch], isolation=isolation)
        known = [factor * g for g in objective.gradient()[1]]
        yield OneGradient(objective, known, StepLength(), factor)


def exact(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, v: list[Tensor]) -> list[Tensor]:
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss_fn(model, batch), params, create_graph=True)
    along = sum((g * u).sum() for g, u in zip(gradient, v, strict=True))
    return list(torch.autograd.grad(along, params))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """‖a − b‖ / ‖b‖."""
    off, size = (sum(float(t.square().sum()) for t in v) for v in ([x - y for x, y in zip(a, b, strict=True)], b))
    return math.sqrt(off / size)


def some(model: nn.Module) -> list[Tensor]:
    return random_like([p.detach() for p in model.parameters()], torch.Generator().manual_seed(3))


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_the_exact_one_within_a_few_percent_and_an_average_of_two_within_one(
    dtype: torch.dtype, factor: float
) -> None:
    """The error is odd in the step, whose sign alternates."""
    model, batch = net(dtype), (X.to(dtype), Y)
    v = some(model)
    true = exact(model, cross_entropy, batch, v)
    with products(model, cross_entropy, batch, factor) as hessian:
        hessian(v)  # finds how long a step is to be
        one, other = hessian(v), hessian(v)
        assert hessian.objective.grad_evals == 4
        mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        assert max(distance(one, true), distance(other, true)) < 0.05
        assert distance(mean, true) < 0.2 * min(distance(one, true), distance(other, true))
        assert distance(mean, true) < 1e-2
        slope = hessian.slope_along(v)
        gradient = hessian.gradient()
    own = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
    assert distance(gradient, list(own)) < 1e-6
    assert slope == pytest.approx(float(sum((g * u).sum() for g, u in zip(own, v, strict=True))), rel=1e-4)


def test_weights_and_vectors_are_left_to_the_bit() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    v = some(model)
    fails = [False]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if fails[0]:
            raise ValueError("the user's own")
        return cross_entropy(model, batch)

    with products(model, loss_fn, (X, Y)) as hessian:
        known = [g.clone() for g in hessian.known]
        hessian(v)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        fails[0] = True
        with pytest.raises(ValueError, match="the user's own"):
            hessian(v)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(hessian.known, known, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(v, some(model), strict=True))


def test_a_row_of_padding_is_not_moved() -> None:
    """Its gradient is always zero, whatever it does to the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Flatten(), nn.Tanh(), nn.Linear(20, 3)).double()
    nn.init.normal_(model[0].weight.data[2])
    batch = (torch.randint(9, (16, 5), generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3)
    v = some(model)
    held = [t.clone() for t in v]
    v[0][2] *= 30.0
    held[0][2].zero_()
    true = exact(model, cross_entropy, batch, held)
    with products(model, cross_entropy, batch) as hessian:
        hessian(v)
        found = hessian(v)
    assert not found[0][2].any()
    assert distance(found, true) < 0.05


class Bend(nn.Module):
    """One weight, at 0. The gradient is 0.001 + 0.01·tanh(10⁴·w): linear only over a ten-thousandth."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, batch: object) -> Tensor:
        return (1e-3 * self.w + 1e-6 * torch.cosh(1e4 * self.w).log()).sum()


def test_a_step_is_shortened_where_the_gradient_is_far_from_linear() -> None:
    model = Bend()
    with products(model, lambda m, b: m(b), None) as hessian:
        [found] = hessian([torch.ones(1, dtype=torch.float64)])
        assert float(found) == pytest.approx(100.0, rel=1e-2)  # a step of the first length alone: 8
        assert hessian.objective.grad_evals > 2


def test_there_is_nothing_along_a_vector_of_zeros() -> None:
    model = net()
    with products(model, cross_entropy, (X, Y)) as hessian:
        assert not any(t.any() for t in hessian([torch.zeros_like(p) for p in model.parameters()]))
        assert hessian.objective.grad_evals == 1


class Hinge(nn.Module):
    """One weight, exactly at the kink of a ReLU, or beside it; its gradient jumps on one side only."""

    def __init__(self, at: float, side: float) -> None:
        super().__init__()
        self.w, self.side = nn.Parameter(torch.full((1,), at, dtype=torch.float64)), side

    def forward(self, batch: object) -> Tensor:
        return (0.1 * self.w + 0.05 * self.w.square() + torch.relu(self.side * self.w)).sum()


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_kink_at_the_weights_is_noticed_on_the_side_where_it_shows(side: float) -> None:
    one = [torch.ones(1, dtype=torch.float64)]
    for at, kink in ((0.0, side > 0), (3.0, False), (-3.0, False)):  # the first step is ahead
        with products(Hinge(at, side), lambda m, b: m(b), None) as hessian:
            assert hessian.has_kink(one) == kink


# --- clipping ---------------------------------------------------------------------------------------------------------


def clipped(how: Callable[[nn.Module], object], backwards: int = 1) -> float | None:
    model, factor = net(), ClippingFactor()
    factor.expect(list(model.parameters()))
    for _ in range(backwards):
        cross_entropy(model, (X, Y)).backward()
    how(model)
    found = factor.taken()
    assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())
    return found


def norm(model: nn.Module) -> float:
    return float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()])))


@pytest.mark.parametrize("backwards", [1, 3])
def test_the_factor_of_clipping_by_norm(backwards: int) -> None:
    whole: list[float] = []

    def clip(model: nn.Module) -> None:
        whole.append(norm(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    found = clipped(clip, backwards)
    assert found == pytest.approx(0.05 / whole[0], rel=1e-4)
    assert found < 0.5


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda model: None, 1.0),
        (lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e9), 1.0),
        (lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3), None),
        (lambda model: nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3), None),
        (lambda model: model.zero_grad(), None),
        (lambda model: [p.grad.zero_() for p in model.parameters()], None),
        (lambda model: [p.grad.fill_(math.nan) for p in model.parameters()], None),
    ],
)
def test_what_is_no_clipping_by_norm_has_the_factor_one_or_none(how: Any, expected: float | None) -> None:
    assert clipped(how) == expected


def test_hooks_of_the_user_stay_and_a_pass_without_a_backward_has_no_factor() -> None:
    model, factor, seen = net(), ClippingFactor(), []
    handle = model[0].bias.register_post_accumulate_grad_hook(seen.append)
    factor.expect(list(model.parameters()))
    assert factor.taken() is None
    factor.expect(list(model.parameters()))
    factor.expect(list(model.parameters()))  # once more: not twice
    cross_entropy(model, (X, Y)).backward()
    assert sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()) == 3  # two, and the user's
    copied = pickle.loads(pickle.dumps(factor))
    factor.close()
    copied.close()
    assert len(seen) == 1
    assert [p._post_accumulate_grad_hooks is None for p in model.parameters()] == [True, False, True, True]
    handle.remove()


@pytest.mark.parametrize("most", [None, 0.02])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_running_ratio_from_the_gradient_of_training_however_that_is_scaled(
    most: float | None, micro_batches: int
) -> None:
    """The sum of micro-batches, clipped: one gradient a product, and the sharpness of their mean."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    config = gfs.GFSConfig(tier="running", every=1, max_overhead=None, strict=True)
    monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), whole=True)
    batches = [(X[i::micro_batches], Y[i::micro_batches]) for i in range(micro_batches)]
    for _ in range(40):
        optimizer.zero_grad()
        for batch in batches:
            cross_entropy(model, batch).backward()
        if most is not None:
            nn.utils.clip_grad_norm_(model.parameters(), most)
        found = monitor.step(lambda b: cross_entropy(model, b), batches, micro_batches=True)
        optimizer.step()
    assert found is not None
    assert (found.hvps, found.grad_evals) == (0, 1)
    true = gfs.sharpness(model, cross_entropy, (X, Y), tol=1e-4).value
    assert found.running_sharpness == pytest.approx(true, rel=0.1)
    monitor.close()


# --- steps that wait --------------------------------------------------------------------------------------------------


def test_a_gradient_scaler_that_divides_by_its_scale_is_no_clipping() -> None:
    """A scale of a power of two changes no bit of the gradients."""
    ratios = []
    for scale in (1.0, 2.0**16):
        model = net(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        config = gfs.GFSConfig(tier="running", every=1, max_overhead=None, alarm="off")
        monitor = tuned(gfs.StabilityMonitor(model, optimizer, config), whole=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        batch = X.float(), Y
        found = []
        for step in range(12):
            loss = cross_entropy(model, batch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            found.append(monitor.step(lambda b: cross_entropy(model, b), batch, step, loss=loss))  # noqa: B023
            scaler.step(optimizer)
            scaler.update()
        ratios.append([None if m is None else m.running_stability_ratio for m in found])
    assert ratios[0][-1] is not None
    assert ratios[0] == ratios[1]


def waiting(*losses: float, rate: float | None = 0.1) -> Waiting:
    """After steps with these losses."""
    made = Waiting()
    for loss in losses:
        made.passed_on([(loss, 8)], rate)
    return made


def test_four_steps_wait_for_the_fifth_in_their_order() -> None:
    held = waiting(1.0)
    assert [held.takes(step, [(0.9, 8)], 0.1) for step in range(5)] == [True] * 4 + [False]
    assert [(s.step, s.losses, s.rate) for s in held.taken()] == [(step, [(0.9, 8)], 0.1) for step in range(4)]
    assert held.taken() == []
    assert held.takes(5, [(0.9, 8)], 0.1)


@pytest.mark.parametrize("loss", [1.01, math.inf, math.nan])
def test_a_step_with_a_high_or_no_finite_loss_does_not_wait(loss: float) -> None:
    held = waiting(0.5, 1.0, 0.7, math.inf)
    assert not held.takes(4, [(0.6, 8), (loss, 8)], 0.1)
    assert held.steps == []
    assert held.takes(4, [(1.0, 8)], 0.1)


def test_high_is_above_the_latest_fifty() -> None:
    held = waiting(9.0, *[1.0] * 49)
    assert held.takes(50, [(5.0, 8)], 0.1)
    held.passed_on([(1.0, 8)], 0.1)
    assert not held.takes(51, [(5.0, 8)], 0.1)


@pytest.mark.parametrize(
    ("before", "rate", "waits"),
    [(0.1, 0.1, True), (0.1, 0.109, True), (0.1, 0.12, False), (0.1, 0.01, True), (None, None, True),
     (None, 0.1, False), (0.1, None, False)],
)  # fmt: skip
def test_a_step_at_a_rising_rate_does_not_wait(before: float | None, rate: float | None, waits: bool) -> None:
    assert waiting(1.0, rate=before).takes(1, [(0.9, 8)], rate) == waits


def test_the_first_step_does_not_wait_and_a_loss_that_is_a_tensor_is_not_read() -> None:
    assert not Waiting().takes(0, [(1.0, 8)], 0.1)
    assert waiting(1.0).takes(1, [(torch.tensor(7.0, device="meta"), 8)], 0.1)


# --- compiled code ----------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> tuple[nn.Module, list[int]]:
    """The model compiled, and a list with an entry for each time that its compiled code has run."""
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    return torch.compile(model, backend=backend), runs


def test_compiled_code_runs_compiled_where_that_is_asked_for() -> None:
    inner, x = nn.Linear(3, 2), torch.ones(4, 3)
    model, runs = compiled(inner)
    with torch.compiler.set_stance("force_eager"):
        model(x)
        assert runs == []
        with as_compiled(model):
            assert torch.equal(model(x), inner(x))
        assert runs == [1]
        model(x)
        assert runs == [1]


def test_a_product_runs_compiled_code() -> None:
    inner = net()
    model, runs = compiled(inner)
    with products(model, cross_entropy, (X, Y)) as hessian:
        assert runs == []  # all else of a measurement is run eagerly
        found = hessian(some(inner))
        assert len(runs) == hessian.objective.grad_evals - 1
    with products(inner, cross_entropy, (X, Y)) as hessian:
        assert distance(found, hessian(some(inner))) < 1e-6


class Placed(nn.Module):
    """A model that is not on a CPU."""

    def __init__(self, compiled: bool, mode: str | None) -> None:
        super().__init__()
        inner = nn.Linear(3, 2, device="meta")
        self.inner = torch.compile(inner, mode=mode) if compiled else inner


@pytest.mark.parametrize(
    ("compiled", "mode", "hidden", "expected"),
    [
        (True, "max-autotune-no-cudagraphs", False, "default"),
        (True, "reduce-overhead", False, "force_eager"),
        (True, "max-autotune", False, "force_eager"),
        (True, "max-autotune-no-cudagraphs", True, "force_eager"),
        (False, None, False, "force_eager"),
    ],
)
def test_code_that_may_have_captured_a_cuda_graph_runs_eagerly(
    compiled: bool, mode: str | None, hidden: bool, expected: str
) -> None:
    model = Placed(compiled, mode)
    if hidden:  # `Module.compile` does not show its options
        model.compile()
    with torch.compiler.set_stance("force_eager"), as_compiled(model):
        assert torch._dynamo.eval_frame._stance.stance == expected
