from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import gfs_core as gfs
from gfs_core.linalg import vectors
from gfs_core.metrics import StabilityRatio

OPTIMIZERS = {
    "sgd": lambda p, r, b: torch.optim.SGD(p, r),
    "heavy ball": lambda p, r, b: torch.optim.SGD(p, r, momentum=b),
    "dampening": lambda p, r, b: torch.optim.SGD(p, r, momentum=b, dampening=0.4),
    "nesterov": lambda p, r, b: torch.optim.SGD(p, r, momentum=b, nesterov=True),
    "coupled decay": lambda p, r, b: torch.optim.SGD(p, r, momentum=b, weight_decay=0.3 / r),
    "adam": lambda p, r, b: torch.optim.Adam(p, r, betas=(b, 1.0 - 1e-15)),
    "amsgrad": lambda p, r, b: torch.optim.Adam(p, r, betas=(b, 1.0 - 1e-15), amsgrad=True),
    "adam, coupled decay": lambda p, r, b: torch.optim.Adam(p, r, betas=(b, 1.0 - 1e-15), weight_decay=0.2),
    "adamw": lambda p, r, b: torch.optim.AdamW(p, r, betas=(b, 1.0 - 1e-15), weight_decay=0.4 / r),
    "sparse adam": lambda p, r, b: torch.optim.SparseAdam(p, r, betas=(b, 1.0 - 1e-15)),
    "rmsprop": lambda p, r, b: torch.optim.RMSprop(p, r, momentum=b, alpha=1.0),
    "centered": lambda p, r, b: torch.optim.RMSprop(p, r, momentum=b, alpha=1.0, centered=True),
    "nadam": lambda p, r, b: torch.optim.NAdam(p, r, betas=(b, 1.0 - 1e-15)),
    "nadam, early": lambda p, r, b: torch.optim.NAdam(p, r, betas=(b, 1.0 - 1e-15), momentum_decay=1e-20),
    "nadam, decoupled decay": lambda p, r, b: torch.optim.NAdam(
        p, r, betas=(b, 1.0 - 1e-15), weight_decay=0.4 / r, decoupled_weight_decay=True
    ),
    "radam": lambda p, r, b: torch.optim.RAdam(p, r, betas=(b, 1.0 - 1e-15)),
    "radam, not rectified": lambda p, r, b: torch.optim.RAdam(p, r, betas=(b, 0.5)),
    "adagrad": lambda p, r, b: torch.optim.Adagrad(p, r),
    "adagrad, decaying rate": lambda p, r, b: torch.optim.Adagrad(p, r, lr_decay=b, weight_decay=0.2),
    "fused adamw": lambda p, r, b: torch.optim.AdamW(p, r, betas=(b, 1.0 - 1e-15), fused=True),
    "foreach sgd": lambda p, r, b: torch.optim.SGD(p, r, momentum=b, foreach=True),
    "tensor rate": lambda p, r, b: torch.optim.Adam(p, torch.tensor(r, dtype=torch.float64), betas=(b, 1.0 - 1e-15)),
    "groups": lambda p, r, b: torch.optim.SGD([{"params": p[:1], "lr": 5 * r}, {"params": p[1:]}], r, momentum=b),
}


def freeze_second_moments(optimizer: torch.optim.Optimizer) -> None:
    """A preconditioner that stays where it is, and differs from weight to weight."""
    generator = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            v = torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5
            zero = torch.zeros_like(p)
            if isinstance(optimizer, torch.optim.RMSprop):
                optimizer.state[p] = {"step": torch.tensor(1.0), "square_avg": v, "momentum_buffer": zero.clone()}
                if group["centered"]:
                    optimizer.state[p]["grad_avg"] = 0.1 * v
            elif isinstance(optimizer, torch.optim.Adagrad):
                optimizer.state[p] = {"step": torch.tensor(40.0), "sum": v}
            elif not isinstance(optimizer, torch.optim.SGD):
                # 1 − β₂^t is 1 at a step so late: v̂ = v
                optimizer.state[p] = {"step": torch.tensor(1e18, dtype=torch.float64), "exp_avg": zero, "exp_avg_sq": v}
                if isinstance(optimizer, torch.optim.NAdam):
                    optimizer.state[p]["mu_product"] = torch.tensor(0.0)
                if group.get("amsgrad"):
                    optimizer.state[p]["max_exp_avg_sq"] = 2 * v


def grows(kind: str, rate: float, beta: float, spectrum: list[float], ratio: float) -> bool:
    """Whether the real optimizer diverges on a quadratic scaled so that its stability ratio is ``ratio``."""
    generator = torch.Generator().manual_seed(1)
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T
    # So near to the minimum that a step's own gradient does not change Adagrad's sum of squares.
    w = [torch.nn.Parameter(1e-9 * torch.randn(k, generator=generator, dtype=torch.float64)) for k in (2, n - 2)]
    optimizer = OPTIMIZERS[kind](w, rate, beta)
    freeze_second_moments(optimizer)
    stability = gfs.stability_of(optimizer, w)
    assert stability.threshold is not None
    scale = [1.0, 1.0] if stability.scale is None else stability.scale
    s = torch.cat([torch.ones_like(p) * x for p, x in zip(w, scale, strict=True)])
    shift = torch.tensor([0.0, 0.0] if stability.shift is None else stability.shift, dtype=torch.float64)
    shift = torch.cat([torch.ones_like(p) * x for p, x in zip(w, shift, strict=True)])

    def top(factor: float) -> float:
        operator = s[:, None] * (factor * hessian + torch.diag(shift)) * s[None, :]
        return torch.linalg.eigvalsh(operator)[-1].item() / stability.threshold

    low, high = 0.0, 1e12
    for _ in range(200):
        middle = math.sqrt(max(low, 1e-12) * high)
        low, high = (middle, high) if top(middle) < ratio else (low, middle)
    hessian = hessian * high
    start = torch.cat([p.detach() for p in w]).norm()
    for _ in range(1500):
        x = torch.cat([p.detach() for p in w])
        if not x.norm() < 50 * start:
            return True
        gradient = hessian @ x
        for p, g in zip(w, gradient.split([2, n - 2]), strict=True):
            p.grad = g.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else g.clone()
        if isinstance(optimizer, torch.optim.Adagrad):
            freeze_second_moments(optimizer)  # its sum would grow with every step
        optimizer.step()
    return bool(torch.cat([p.detach() for p in w]).norm() > start)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    rate=st.floats(1e-3, 1.0),
    beta=st.floats(0.1, 0.95),
    spectrum=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=6),
)
def test_the_real_optimizer_converges_below_and_diverges_above(kind, rate, beta, spectrum) -> None:
    assert not grows(kind, rate, beta, spectrum, 0.97)
    assert grows(kind, rate, beta, spectrum, 1.03)


def weight() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_what_is_not_known_is_said() -> None:
    p = weight()
    assert "Adamax is not known" in gfs.stability_of(torch.optim.Adamax(p), p).reason
    assert "maximize=True" in gfs.stability_of(torch.optim.SGD(p, 0.1, maximize=True), p).reason
    assert "learning rate is 0" in gfs.stability_of(torch.optim.SGD(p, 0.0), p).reason
    early = gfs.stability_of(torch.optim.Adam(p, 0.1), p)
    assert early.threshold is None
    assert "come with its first step" in early.reason


def test_a_parameter_that_never_had_a_gradient_is_left_out() -> None:
    used, unused = weight(), weight()
    optimizer = torch.optim.Adam(used + unused, 0.1)
    (used[0] ** 2).sum().backward()
    optimizer.step()
    stability = gfs.stability_of(optimizer, used + unused)
    assert stability.threshold == pytest.approx(2 * 1.9 / (0.1 * 0.1))
    first, second = stability.scale
    assert first.tolist() == pytest.approx([2**-0.5] * 3)  # v̂ = g², g = 2
    assert second == 0.0


STEPPING = {
    "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.0, 0.99), eps=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, betas=(0.0, 0.5), eps=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.0, 0.9), eps=0.1, weight_decay=0.0),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, betas=(0.0, 0.9), eps=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, betas=(0.0, 0.999), eps=0.1),
    "radam, short memory": lambda p: torch.optim.RAdam(p, 0.01, betas=(0.0, 0.8), eps=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, eps=0.1),
    "centered": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, eps=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, eps=0.1),
}


@pytest.mark.parametrize("kind", STEPPING)
def test_the_preconditioner_is_what_each_step_divides_by(kind: str) -> None:
    """Without momentum a step is η·g/p, so that p can be read off it; from the first step to those of long memory."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = STEPPING[kind]([w])
    for step in range(40):
        w.grad = torch.randn(5, generator=generator, dtype=torch.float64) * (0.1 + step % 3)
        before = w.detach().clone()
        optimizer.step()
        [scale] = gfs.stability_of(optimizer, [w]).scale
        assert (0.01 * w.grad * scale**2).tolist() == pytest.approx((before - w.detach()).tolist(), rel=1e-9), step


@pytest.mark.parametrize("kind", STEPPING)
@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_tensors_that_are_worked_on_together_have_the_scale_that_each_has_alone(
    kind: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two groups; one weight stepped later than the others, one never, one entry without a gradient so far."""
    generator = torch.Generator().manual_seed(0)
    w = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5, 2, 4)]
    optimizer = STEPPING[kind](w[:2])
    optimizer.param_groups[0]["eps"] = eps
    optimizer.add_param_group({"params": w[2:], "lr": 0.02, "eps": eps})
    for step in range(12):
        for p in w[:2] if step < 3 else w[:3]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad[0] = 0.0
        optimizer.step()
    monkeypatch.setattr(vectors, "_BUNCH_ON_CPU", 1 << 23)
    together = list(gfs.stability_of(optimizer, w).scale)
    assert [float(s[0]) for s in together[:3]] == [0.0] * 3  # no gradient so far
    assert together[3] == 0.0  # never stepped
    monkeypatch.setattr(vectors, "_BUNCH_ON_CPU", 0)
    alone = list(gfs.stability_of(optimizer, w).scale)
    for a, b in zip(together[:3], alone, strict=False):
        assert torch.equal(a, b)
        assert bool((a[1:] > 0).all())
        assert bool(a.isfinite().all())


def test_decay_is_of_the_loss_where_it_goes_through_the_gradient() -> None:
    first, second = weight(), weight()
    groups = [{"params": first, "weight_decay": 0.5}, {"params": second}]
    assert gfs.stability_of(torch.optim.SGD(groups, 0.1), first + second).shift == [0.5, 0.0]
    assert gfs.stability_of(torch.optim.SGD(groups, 0.1), second).shift is None
    for decoupled in (torch.optim.AdamW(first, 0.1), torch.optim.NAdam(first, 0.1, decoupled_weight_decay=True)):
        decoupled.param_groups[0]["weight_decay"] = 0.5
        first[0].square().sum().backward()
        decoupled.step()
        assert gfs.stability_of(decoupled, first).shift is None


def test_rates_of_several_groups() -> None:
    """Of SGD the group with the largest rate is the reference; of an optimizer that is not known, its rate is told."""
    first, second = weight(), weight()
    groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.4}]
    found = gfs.stability_of(torch.optim.SGD(groups), first + second)
    assert (found.learning_rate, found.threshold) == (0.4, 5.0)
    assert list(found.scale) == [0.5, 1.0]
    assert list(found.scale.squared()) == [0.25, 1.0]
    unknown = gfs.stability_of(torch.optim.Adamax(groups), first + second)
    assert (unknown.learning_rate, unknown.threshold, unknown.empirical) == (0.4, None, True)
    groups[0]["lr"] = 0.0  # a group that stands still
    still = gfs.stability_of(torch.optim.SGD(groups), first + second)
    assert (still.learning_rate, still.threshold, list(still.scale)) == (0.4, 5.0, [0.0, 1.0])
    groups[0]["lr"] = math.nan
    odd = torch.optim.SGD([{**g, "lr": 0.1} for g in groups])
    odd.param_groups[0]["lr"] = math.nan
    found = gfs.stability_of(odd, first + second)
    assert "not a finite number ≥ 0: [nan, 0.1]" in found.reason
    assert found.threshold is None


def test_an_optimizer_without_a_rate_or_without_weights() -> None:
    class Own(torch.optim.Optimizer):
        pass

    frozen = [torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    assert gfs.stability_of(Own(weight(), {}), weight()).learning_rate is None
    found = gfs.stability_of(torch.optim.SGD(frozen, 0.1), frozen)
    assert (found.threshold, found.reason) == (None, "the optimizer holds no trainable parameter")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_entry_that_never_had_a_gradient_is_left_out(kind: type[torch.optim.Optimizer]) -> None:
    [w] = weight()
    optimizer = kind([w], 0.1)
    (w[:2] ** 2).sum().backward()
    optimizer.step()
    [scale] = gfs.stability_of(optimizer, [w]).scale
    assert (scale[:2] > 0.5).all()
    assert scale[2] == 0.0


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop"])
def test_a_capturable_optimizer_has_the_threshold_of_the_plain_one(kind: str) -> None:
    """Its step counts are tensors on the device of the weights; a CPU refuses to run it: the plain one's state."""
    p = weight()
    plain = getattr(torch.optim, kind)(p, 0.1)
    (p[0] ** 2).sum().backward()
    plain.step()
    capturable = getattr(torch.optim, kind)(p, 0.1, capturable=True)
    for key, value in plain.state[p[0]].items():
        capturable.state[p[0]][key] = torch.as_tensor(value).clone()
    ours, theirs = gfs.stability_of(capturable, p), gfs.stability_of(plain, p)
    assert ours.threshold == pytest.approx(theirs.threshold)
    assert next(iter(ours.scale)).tolist() == next(iter(theirs.scale)).tolist()


def test_tensor_rates_and_wrappers() -> None:
    class Wrapper:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

    p = weight()
    plain = torch.optim.SGD(p, torch.tensor(0.1), foreach=False)
    assert gfs.stability_of(Wrapper(Wrapper(plain)), p).threshold == pytest.approx(20)
    with pytest.raises(TypeError, match="expected a torch"):
        gfs.stability_of(object(), p)


def doubled(step: list[list[float]]) -> torch.Tensor:
    m = torch.tensor(step, dtype=torch.float64)
    return torch.kron(m, m)


def growth_of(update, curvatures: list[float]) -> float:
    """Growth per step of the second moments of a linear recursion whose curvature is drawn anew at each step."""
    mean = sum(doubled(update(h)) for h in curvatures) / len(curvatures)
    return float(torch.linalg.eigvals(mean).abs().max())


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_noisy_steps_are_stable_in_the_mean_square_up_to_the_threshold(beta: float, spread: float) -> None:
    """Heavy ball on a quadratic whose curvature is λ·(1 ± spread), each half of the time: the second moments decay just
    below λ + f·σ²/λ = threshold and grow just above it."""
    rate, weight = 0.1, torch.nn.Parameter(torch.zeros(1))
    stability = gfs.stability_of(torch.optim.SGD([weight], rate, momentum=beta), [weight])
    assert stability.noise_factor == pytest.approx((1 + beta) / (1 - beta))
    for times, stable in ((0.97, True), (1.03, False)):
        curvature = times * stability.threshold / (1 + stability.noise_factor * spread**2)

        def update(h: float) -> list[list[float]]:
            return [[1 + beta - rate * h, -beta], [1.0, 0.0]]

        growth = growth_of(update, [curvature * (1 + spread), curvature * (1 - spread)])
        assert (growth < 1) is stable


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_so_are_those_of_an_exponential_mean(beta: float) -> None:
    """Adam with its preconditioner held at 1: x ← x − η·m, m ← β·m + (1 − β)·h·x."""
    rate, weight = 0.1, torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], rate, betas=(beta, 0.999))
    optimizer.state[weight] = {"step": torch.tensor(1e6), "exp_avg_sq": torch.ones(1), "exp_avg": torch.zeros(1)}
    stability = gfs.stability_of(optimizer, [weight])
    for times, stable in ((0.97, True), (1.03, False)):
        curvature = times * stability.threshold / (1 + stability.noise_factor * 0.25)

        def update(h: float) -> list[list[float]]:
            g = (1 - beta) * h
            return [[1 - rate * g, -rate * beta], [g, beta]]

        assert (growth_of(update, [1.5 * curvature, 0.5 * curvature]) < 1) is stable


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), 3.8 / 2.8 / 2 * 10),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), 19.0),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), 19.0),
        (lambda p: torch.optim.Adagrad(p, 0.1), 1.0),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0), 19.0),
    ],
)
def test_momentum_widens_the_edge_of_the_mean_but_not_that_of_the_noise(optimizer, factor: float) -> None:
    """The factor is the threshold over that of plain descent at the same long-run rate."""
    weight = torch.nn.Parameter(torch.ones(2))
    made = optimizer([weight])
    weight.square().sum().backward()
    made.step()
    assert gfs.stability_of(made, [weight]).noise_factor == pytest.approx(factor, rel=1e-6)


def test_plain_descent_is_measured_by_the_hessian_itself() -> None:
    w = weight()
    found = gfs.stability_of(torch.optim.SGD(w, 0.1, dampening=0.4), w)  # without momentum there is nothing to dampen
    assert (found.plain, found.scale, found.shift, found.adaptive, found.empirical) == (True, None, None, False, False)
    assert (found.threshold, found.noise_factor) == (20.0, 1.0)
    failed = gfs.stability_of(torch.optim.SGD(w, 0.1, maximize=True), w)
    assert (failed.adaptive, failed.empirical) == (False, False)


def test_an_own_optimizer_without_decay() -> None:
    class Plain(torch.optim.Optimizer):
        pass

    w = weight()
    gfs.register_optimizer(Plain, threshold=lambda optimizer, group: 3 / group["lr"])
    found = gfs.stability_of(Plain(w, {"lr": 0.5}), w)
    assert (found.threshold, found.shift, found.plain) == (6.0, None, True)


def test_a_momentum_that_forgets_nothing_multiplies_noise_without_end() -> None:
    w = [torch.nn.Parameter(torch.ones(2))]
    found = gfs.stability_of(torch.optim.SGD(w, 0.1, momentum=1.0), w)
    assert (found.threshold, found.noise_factor) == (pytest.approx(40.0), math.inf)


def test_the_momentum_of_nadam_is_that_of_the_coming_step() -> None:
    w = weight()
    optimizer = torch.optim.NAdam(w, 0.1, betas=(0.9, 0.999), momentum_decay=1.0)
    w[0].square().sum().backward()
    optimizer.step()
    now, later = 0.9 * (1 - 0.5 * 0.96**2), 0.9 * (1 - 0.5 * 0.96**3)  # of steps 2 and 3 (Dozat 2016)
    expected = 2 / (0.1 * (1 - now + later * 0.1 / 1.9))
    assert gfs.stability_of(optimizer, w).threshold == pytest.approx(expected, rel=1e-9)


class Adam(torch.optim.Optimizer):
    """Shares nothing with torch's but the name."""


def test_an_optimizer_that_only_shares_a_name_is_named_with_its_module() -> None:
    w = weight()
    found = gfs.stability_of(Adam(w, {"lr": 0.1}), w)
    assert (found.threshold, found.empirical, found.name) == (None, True, "Adam")
    assert found.reason.startswith(f"the threshold of {__name__}.Adam is not known; ")

    class AdamW(torch.optim.AdamW):  # of a known class, but what it does differently is not known
        pass

    found = gfs.stability_of(AdamW(w, 0.1), w)
    here = "test_an_optimizer_that_only_shares_a_name_is_named_with_its_module.<locals>.AdamW"
    assert found.empirical
    assert found.reason.startswith(f"the threshold of {__name__}.{here} is not known; ")
    model = torch.nn.Linear(2, 1)
    own = Adam(model.parameters(), {"lr": 0.1})
    with pytest.raises(gfs.ConfigError, match=re.escape(f"the threshold of {__name__}.Adam is not known; make")):
        StabilityRatio(model, lambda m, b: m(b).sum(), own)
    torchs = gfs.stability_of(torch.optim.Adamax(w, 0.1), w)
    assert torchs.reason.startswith("the threshold of Adamax is not known; ")


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_adagrad_has_no_ratio_before_its_first_step(initial: float) -> None:
    """Its state is there from the start, and holds no gradient: the first step divides by √(initial + g²)."""
    [w] = weight()
    optimizer = torch.optim.Adagrad([w], 0.1, initial_accumulator_value=initial)
    found = gfs.stability_of(optimizer, [w])
    assert (found.threshold, found.scale, found.adaptive) == (None, None, True)
    assert found.reason == "Adagrad has no second moments yet: they come with its first step"
    w.grad = torch.full_like(w, 0.5)
    optimizer.step()
    found = gfs.stability_of(optimizer, [w])
    assert found.threshold == pytest.approx(20.0)
    [scale] = found.scale
    assert scale.tolist() == pytest.approx([(initial + 0.25) ** -0.25] * 3)


def test_a_weight_that_adagrad_has_not_stepped_is_left_out() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adagrad([first, second], 0.1, initial_accumulator_value=0.3)
    first.grad = torch.ones(2)
    optimizer.step()
    scales = list(gfs.stability_of(optimizer, [first, second]).scale)
    assert scales[0].tolist() == pytest.approx([1.3**-0.25] * 2)
    assert scales[1] == 0.0
