from __future__ import annotations

import copy
import functools
import itertools
import random
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gfs_core as gfs
from gfs_core.loss.batches import copied
from tests.bitwise import assert_same


class Meter:
    def __init__(self) -> None:
        self.total, self.values = 0.0, []


class Messy(nn.Module):
    """Leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4))
        self.outs, self.calls, self.by_phase, self.meter = [], 0, {"train": [0.0]}, Meter()
        self.running = torch.zeros(3)
        self.stop_at: int | None = None
        self.error: type[BaseException] = RuntimeError

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.outs.append(float(loss.detach()))
        self.by_phase["train"].append(random.random())
        self.by_phase["new"] = [np.random.rand()]
        self.meter.total += 1.0
        self.meter.values.append(1)
        self.running += 1
        self.calls += 1
        self.net[1].eval() if self.calls > 100 else None
        Messy.evaluations += 1
        if self.stop_at is not None and Messy.evaluations >= self.stop_at:
            self.net[4].weight.data.mul_(2)
            raise self.error("stop")
        return loss

    evaluations = 0


def everything(model: Messy) -> tuple:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        [m.training for m in model.modules()],
        [list(model.outs), model.calls, {k: list(v) for k, v in model.by_phase.items()}],
        (model.meter.total, list(model.meter.values), model.running.clone(), id(model.running)),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 12, generator=generator), torch.randint(4, (20,), generator=generator)


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
@pytest.mark.parametrize(("stop_at", "error"), [(None, RuntimeError), (2, RuntimeError), (3, KeyboardInterrupt)])
def test_a_measurement_leaves_no_trace(hvp: str, stop_at: int | None, error: type[BaseException]) -> None:
    model = Messy()
    model(batch()).backward()
    hooked: list[int] = []
    model.net[0].weight.register_hook(lambda g: hooked.append(1) or g * 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.stop_at, model.error, Messy.evaluations = stop_at, error, 0
    before = everything(model)
    if stop_at is None:
        measurement = gfs.stability(model, lambda m, b: m(b), batch(), optimizer, hvp=hvp)
        assert measurement.gfs_sharpness is not None
    else:
        with pytest.raises(error, match="stop"):
            gfs.stability(model, lambda m, b: m(b), batch(), optimizer, hvp=hvp)
    after = everything(model)
    assert_same(before, after)
    assert all(a[0] is b[0] for a, b in zip(before[1], after[1], strict=True))
    assert hooked == []
    model.stop_at = None
    model(batch()).backward()
    assert hooked == [1]


def test_every_evaluation_is_the_same_function() -> None:
    model = Messy()
    with gfs.StateSnapshot(model) as isolation:
        objective = gfs.Objective(model, lambda m, b: m(b), [batch()], isolation=isolation)
        assert len({objective.loss() for _ in range(3)}) == 1
        first, second = objective.gradient()[1], objective.gradient()[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _add(t: Tensor) -> None:
    t.add_(1)


def _one_row(t: Tensor) -> None:
    t.view(2, -1)[1, 5] = 7.0


def _foreach(t: Tensor) -> None:
    torch._foreach_mul_([t, torch.ones(2)], 2.0)


def _out(t: Tensor) -> None:
    torch.add(t, 1.0, out=t)


def _index(t: Tensor) -> None:
    t.data[torch.tensor([3])] += 1.0


def _anew(t: Tensor) -> None:
    t.data = t.data + 1.0


@pytest.mark.parametrize("hvp", ["auto", "gradients"])
@pytest.mark.parametrize("change", [_add, _one_row, _foreach, _out, _index, _anew])
def test_a_large_attribute_that_the_loss_writes_to_is_put_back(change: Any, hvp: str) -> None:
    model = nn.Linear(3, 1)
    model.huge, model.data_set = torch.ones(2_000_000), torch.zeros(2_000_000)
    place = model.huge.data_ptr()

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        change(m.huge)
        return (m(x) * m.huge[[0, 3, 1_000_005]].sum()).square().mean() + 0.0 * m.data_set.sum()

    before = model.huge.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    measurement = gfs.stability(model, loss_fn, torch.ones(2, 3), optimizer, hvp=hvp, tier="sharpness")
    assert torch.equal(model.huge, before)
    assert model.huge.data_ptr() == place
    assert not any("too large" in reason for reason in measurement.reasons)
    once = copy.deepcopy(model)
    change(once.huge)
    scale = once.huge[[0, 3, 1_000_005]].sum().item() ** 2  # of the first change alone, not of several
    assert measurement.sharpness == pytest.approx(2 * 4 * scale, rel=1e-2)


def test_a_large_attribute_changed_in_the_backward_pass_is_named() -> None:
    model = nn.Linear(3, 1)
    model.huge = torch.zeros(2_000_000)

    class Counts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            model.huge.add_(1)
            return grad.clone()

    measurement = gfs.stability(
        model,
        lambda m, x: Counts.apply(m(x)).square().mean(),
        torch.ones(2, 3),
        torch.optim.SGD(model.parameters(), 0.1),
    )
    assert any("huge" in reason and "too large to be put back" in reason for reason in measurement.reasons)


def test_compiled_code_is_left_to_training() -> None:
    """A probe of another shape would have it compiled again. One gradient of the whole step runs what is compiled."""
    compiled, ran = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compiled.append(graph)
        return lambda *args: ran.append(1) or graph.forward(*args)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = torch.compile(model, backend=backend)
    x = torch.randn(12, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="gfs", every=1, probe_size=5, max_overhead=None, running_every=1)
    monitor = gfs.StabilityMonitor(run, optimizer, config)
    for _ in range(4):
        optimizer.zero_grad()
        run(x).square().mean().backward()
        before = len(ran)
        measurement = monitor.step(lambda b: run(b).square().mean(), x)
        assert measurement.gfs_sharpness > 0
        assert len(compiled) == 1
        optimizer.step()
    assert len(ran) == before + 1


def test_an_output_that_the_module_keeps_is_the_same_again() -> None:
    """With its graph: rebinding the attribute is enough, and all that can be done."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Linear(3, 1), torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.net(x)
            return self.last.square().mean()

    model = Keeps()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3))
    kept = model.last
    assert gfs.stability(model, lambda m, b: m(b), torch.ones(2, 3), optimizer).sharpness is not None
    assert model.last is kept
    kept.sum().backward()  # its graph is still there
    assert model.net.bias.grad.item() == 2.0


def as_trained(train, **options) -> None:
    """``train(monitor)`` gives the same to the last bit with a monitor and without."""

    def build(model: nn.Module, optimizer: torch.optim.Optimizer) -> gfs.StabilityMonitor:
        return gfs.StabilityMonitor(
            model, optimizer, gfs.GFSConfig(max_overhead=None, strict=True, history=None, every=1, **options)
        )

    assert_same(train(lambda *_: None), train(build))


class Held:
    """An object of the user's, with slots."""

    __slots__ = ("count", "stream")

    def __init__(self) -> None:
        self.stream, self.count = random.Random(3), 0


class Streams(nn.Module):
    """Draws from all kinds of streams that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.generators = {"torch": [torch.Generator().manual_seed(1)]}
        self.numpy, self.legacy = np.random.default_rng(2), np.random.RandomState(3)
        self.bits = np.random.PCG64(4)
        self.held, self.counter, self.items = Held(), itertools.count(), iter([0.1, 0.2, 0.3, 0.4] * 20)
        self.pair = (iter(range(1000)), 1.0)
        self.engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=1)
        self.loader = torch.utils.data.DataLoader(
            torch.arange(8.0), shuffle=True, generator=torch.Generator().manual_seed(7)
        )
        self.histogram = np.zeros(3)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.held.count += 1
        self.histogram[self.held.count % 3] += 1
        new = [
            torch.rand(1, generator=self.generators["torch"][0]).item(),
            self.numpy.random(),
            self.legacy.rand(),
            self.bits.random_raw() / 2**64,
            self.held.stream.random(),
            next(self.counter) / 10,
            next(self.items),
            next(self.pair[0]) / 10,
            self.engine.draw(1).sum().item(),
            next(iter(self.loader)).item(),
            self.held.count / 10,
            self.histogram[0],
        ]
        self.drawn += new
        return (self.net(x) * sum(new) - 1).square().mean()


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_streams_that_a_module_holds_go_on_as_if_nothing_had_happened(hvp: str) -> None:
    def train(build):
        torch.manual_seed(0)
        model = Streams()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        monitor = build(model, optimizer)
        for _ in range(4):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            model(x).backward()
            if monitor is not None:
                assert monitor.step(model, x).gfs_sharpness > 0
            optimizer.step()
        return model.drawn, model.net.weight.detach(), model.histogram

    as_trained(train, tier="gfs", hvp=hvp)


def test_a_generator_that_the_loss_closes_over_goes_on() -> None:
    generator = np.random.default_rng(0)
    model = nn.Linear(3, 1)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return (m(x) - generator.normal()).square().mean()

    first = np.random.default_rng(0).normal()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert gfs.stability(model, functools.partial(loss_fn), torch.ones(2, 3), optimizer).sharpness == pytest.approx(8)
    assert generator.normal() == first


class Takes(nn.Module):
    def __init__(self, takes: bool) -> None:
        super().__init__()
        self.net, self.takes = nn.Linear(3, 1), takes
        self.loader = torch.utils.data.DataLoader(torch.arange(9.0).reshape(3, 3))
        self.batches = iter(self.loader)
        self.state = {"more": [(i for i in range(9))]}

    def forward(self, x: Tensor) -> Tensor:
        x = x + next(self.batches) if self.takes else x
        return self.net(x).square().mean()


def test_an_iterator_that_cannot_be_put_back_is_left_alone() -> None:
    """Where the loss takes from it nothing is measured, said once; where it is only held, all is."""
    model = Takes(takes=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(max_overhead=None, every=1, history=None))
    batches = model.batches
    with pytest.warns(gfs.GFSWarning, match=r"`model.batches`, a _SingleProcessDataLoaderIter.*`loss_fn=`") as told:
        assert [monitor.step(model, torch.ones(2, 3), step) for step in range(3)] == [None] * 3
    assert len(told) == 1
    assert model.batches is batches
    assert next(batches).tolist() == [[0.0, 1.0, 2.0]]
    with pytest.raises(gfs.MeasurementError, match=r"model\.batches"):
        gfs.sharpness(model, lambda m, b: m(b), torch.ones(2, 3))

    model = Takes(takes=False)
    assert gfs.sharpness(model, lambda m, b: m(b), torch.ones(2, 3)).value == pytest.approx(8)
    assert next(model.batches).tolist() == [[0.0, 1.0, 2.0]]
    assert next(model.state["more"][0]) == 0


@dataclass
class Graph:
    """A batch of a class of the user's, which holds what cannot be copied."""

    x: Tensor
    lock: Any = field(default_factory=threading.Lock)
    parts: list[Tensor] = field(default_factory=list)


def takes_apart(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    x, graph = batch.pop("x"), batch["graph"]
    x.mul_(0.5).requires_grad_()
    graph.x += 1
    graph.parts.append(graph.x)
    graph.seen = True
    batch["list"][0] = batch["list"][0] + 1
    batch["list"].append(3)
    loss = model(x).square().mean() + graph.x.mean() + batch["list"][0].sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    x.grad = slope.detach()
    return loss + slope.square().sum()


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_a_loss_may_do_with_its_batch_what_it_likes(hvp: str) -> None:
    model = nn.Linear(3, 1)

    def batch() -> dict[str, Any]:
        return {"x": torch.arange(6.0).reshape(2, 3), "graph": Graph(torch.ones(2)), "list": [torch.zeros(1), "text"]}

    given, fresh = batch(), batch()
    found = gfs.sharpness(model, takes_apart, given, hvp=hvp, tol=1e-4)
    graph = given.pop("graph"), fresh.pop("graph")
    assert_same(given, fresh)
    assert graph[0].x.tolist() == [1, 1]
    assert graph[0].parts == []
    assert not hasattr(graph[0], "seen")
    assert given["x"].grad is None
    assert not given["x"].requires_grad
    params = [*model.parameters()]
    loss = takes_apart(model, batch())
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, params, retain_graph=True)]) for f in flat]
    assert found.value == pytest.approx(torch.linalg.eigvalsh(torch.stack(rows))[-1].item(), rel=1e-3)


def test_a_batch_that_is_a_view_costs_its_own_size() -> None:
    data = torch.zeros(1000, 3)
    copy = copied({"rows": data[:2], "again": data[:2], "graph": Graph(data[4:5])})
    assert copy["rows"].untyped_storage().nbytes() == 24
    assert copy["graph"].x.untyped_storage().nbytes() == 12
    x = torch.ones(2)
    assert len({id(t) for t in copied([x, x])}) == 1


def test_a_batch_that_is_an_iterator_is_left_alone() -> None:
    batches = iter(torch.utils.data.DataLoader(torch.arange(4.0)))
    with pytest.raises(gfs.MeasurementError, match="iterator, a _SingleProcessDataLoaderIter"):
        gfs.sharpness(nn.Linear(1, 1), lambda m, b: m(next(b)[:, None]).sum(), [(batches, 0)])
    assert next(batches).item() == 0


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_hooks_of_the_user_do_not_fire(hvp: str) -> None:
    """One weight is not used, so that a backward pass into ``.grad`` is made as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    model.unused = nn.Parameter(torch.zeros(2))
    fired: list[str] = []
    weight = model[0].weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    handles = [
        weight.register_hook(lambda g: fired.append("tensor")),
        weight.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated")),
        node.register_hook(lambda *_: fired.append("node")),
        node.register_prehook(lambda *_: fired.append("before the node")),
        model[2].register_full_backward_hook(lambda *_: fired.append("module")),
        model[2].register_full_backward_pre_hook(lambda *_: fired.append("before the module")),
        model[2].register_forward_hook(lambda *_: fired.append("forward")),
        model[0].register_forward_pre_hook(lambda *_: fired.append("before forward")),
        nn.modules.module.register_module_full_backward_hook(lambda *_: fired.append("any module")),
    ]
    optimizer = torch.optim.SGD([*model.parameters()], 0.1)
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: fired.append("pack") or t, lambda t: t)
    x = torch.randn(5, 4)
    try:
        model(x).square().mean().backward()
        trained, fired[:] = sorted(set(fired)), []
        with pack:
            assert gfs.stability(model, lambda m, b: m(b).square().mean(), x, optimizer, hvp=hvp).gfs_sharpness > 0
        assert fired == []
        model(x).square().mean().backward()
        assert sorted(set(fired)) == trained
        assert len(trained) == len(handles)
    finally:
        for handle in handles:
            handle.remove()


def test_a_mode_that_would_record_the_measurement_ends_it() -> None:
    model = nn.Linear(3, 1)
    with (
        FlopCounterMode(display=False) as flops,
        pytest.raises(gfs.MeasurementError, match="FlopCounterMode is active"),
    ):
        gfs.sharpness(model, lambda m, b: m(b).sum(), torch.ones(2, 3))
    assert flops.get_total_flops() == 0


class Teacher(nn.Module):
    """Averages the student into its teacher within the loss, and pushes keys into a queue."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("queue", torch.randn(5, 3))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.data.mul_(0.99).add_(s.data, alpha=0.01)
        keys = self.teacher(x)
        out = self.student(x)
        loss = (out - keys).square().mean() + (out @ self.queue.clone().T).logsumexp(1).mean()
        self.queue[self.at] = keys[0]
        self.at.add_(1).remainder_(5)
        for p in self.teacher.parameters():
            p.requires_grad_(True)
        self.teacher.eval()
        return loss


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_a_teacher_and_a_queue_are_the_same_at_each_evaluation(hvp: str) -> None:
    model, x = Teacher(), torch.randn(6, 3)
    before = copy.deepcopy(model.state_dict())
    student = [*model.student.parameters()]
    with gfs.StateSnapshot(model) as isolation:
        objective = gfs.Objective(model, lambda m, b: m(b), [x], student, isolation)
        hessian = gfs.Hessian(objective, hvp)
        v = [torch.randn_like(p) for p in student]
        products = [hessian(v) for _ in range(3)]
        assert len({objective.loss() for _ in range(3)}) == 1
        assert_same(objective.gradient(), objective.gradient())
    assert_same(before, model.state_dict())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model.teacher.training
    # With the teacher of the first evaluation held fixed, by hand.
    frozen = copy.deepcopy(model)
    frozen(x)
    teacher, queue = copy.deepcopy(frozen.teacher).requires_grad_(False), before["queue"]
    out = model.student(x)
    loss = (out - teacher(x)).square().mean() + (out @ queue.T).logsumexp(1).mean()
    slope = torch.autograd.grad(loss, student, create_graph=True)
    true = torch.autograd.grad(slope, student, v)
    for product in products if hvp == "exact" else ():
        for a, b in zip(product, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _clipped(p: Tensor) -> Tensor:
    return p.data.clamp(-0.2, 0.2)


def _of_length_1(p: Tensor) -> Tensor:
    return p.data / p.data.norm()


@pytest.mark.parametrize("hvp", ["auto", "gradients"])
@pytest.mark.parametrize("change", [_clipped, _of_length_1, lambda p: p.data.clone()])
def test_a_loss_that_gives_its_weights_other_data_is_that_which_changes_them_in_place(change: Any, hvp: str) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def in_place(m: nn.Module, x: Tensor) -> Tensor:
        for p in m.parameters():
            p.data.copy_(change(p))
        return m(x).square().mean()

    def bound_anew(m: nn.Module, x: Tensor) -> Tensor:
        for p in m.parameters():
            p.data = change(p)
        return m(x).square().mean()

    found = []
    for loss in (in_place, bound_anew):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        loss(model, x)  # as training has done before it is measured
        places = [p.data_ptr() for p in model.parameters()]
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gfs.GFSWarning)
            found.append(gfs.sharpness(model, loss, x, hvp=hvp, tol=1e-3, max_hvps=30).value)
        assert_same(before, model.state_dict())
        assert [p.data_ptr() for p in model.parameters()] == places
    assert found[0] == pytest.approx(found[1], rel=1e-6) != pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("hvp", ["auto", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_the_loss_ties_together_are_two_again(dtype: torch.dtype, hvp: str, precision: str) -> None:
    """A target network that is given the data of the other one: what is put back must not be written into both."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"online": nn.Linear(3, 3), "target": nn.Linear(3, 3).requires_grad_(False)})
    model.register_buffer("scale", torch.ones(3))
    model.to(dtype)
    shared = torch.full((3,), 2.0, dtype=dtype)

    def loss(m: Any, x: Tensor) -> Tensor:
        for t, o in zip(m["target"].parameters(), m["online"].parameters(), strict=True):
            t.data = o.data
        m.scale.data = shared.to(m.scale.dtype)
        return (m["online"](x.to(m.scale.dtype)) * m.scale - m["target"](x.to(m.scale.dtype))).square().mean()

    before = copy.deepcopy(model.state_dict())
    places = [t.data_ptr() for t in model.state_dict().values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gfs.GFSWarning)
        gfs.sharpness(model, loss, torch.randn(4, 3).to(dtype), hvp=hvp, precision=precision, max_hvps=10)
    assert_same(before, model.state_dict())
    assert [t.data_ptr() for t in model.state_dict().values()] == places


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_recurrent_layers_dropout_is_drawn_without_cudnn_while_measuring(dropout: float) -> None:
    """cuDNN's comes from a stream that cannot be put back; tests/accelerator holds the weights of a training."""
    model, seen = nn.LSTM(3, 4, num_layers=2, dropout=dropout), []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.enabled)
        return model(batch)[0].square().mean()

    gfs.sharpness(model, loss, torch.randn(2, 5, 3), tol=0.5)
    assert set(seen) == {dropout == 0}
    assert torch.backends.cudnn.enabled
