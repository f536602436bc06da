from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection

import gfs_core as gfs
from gfs_core.metrics import (
    GFSSharpness,
    GFSSharpnessFull,
    GFSStabilityRatio,
    PreconditionedSharpness,
    Sharpness,
    StabilityRatio,
)
from tests.bitwise import assert_same
from tests.core import processes, ranks
from tests.core.reference import cross_entropy, data, dense_hessian, make, trainable
from tests.test_install import run_without

mpl.use("Agg")

FINE = {"tol": 1e-6}


def halves() -> list[list[Tensor]]:
    x, y = data()
    return [[x[:10], y[:10]], [x[10:], y[10:]]]  # lists, as data loaders give them


def dense(model: nn.Module, batch: Any, loss_fn: Any = cross_entropy) -> Tensor:
    return dense_hessian(lambda: loss_fn(model, batch), trainable(model))


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


class Product(nn.Module):
    """½(w₁w₂x − 1)²; gradient flow keeps w₁² − w₂² = 3, so that it ends with sharpness w₁² + w₂² = √13 for x = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))


def product_loss(model: Product, x: Tensor) -> Tensor:
    return 0.5 * (model.w[0] * model.w[1] * x - 1).square().mean()


ONE = torch.ones(1, dtype=torch.float64)
LIMIT = math.sqrt(13)


def quadratic(model: nn.Module, x: Tensor) -> Tensor:
    return 0.5 * model(x).square().mean()  # of a Linear(1, 1): Hessian x²


def line() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def test_sharpness_is_that_of_the_dense_hessian_and_compute_the_plain_mean() -> None:
    model = make("mlp")
    batches = [halves()[0], [t[:3] for t in halves()[1]]]
    expected = [top(dense(model, b)) for b in batches]
    metric = Sharpness(model, cross_entropy, **FINE)
    metric.set_dtype(torch.float64)
    values = [float(metric(b)) for b in batches]
    assert values == pytest.approx(expected, rel=1e-6)
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2, rel=1e-6)
    metric.reset()
    metric.update(batches[1])
    assert float(metric.compute()) == pytest.approx(expected[1], rel=1e-6)


def test_reset_keeps_the_warm_start() -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch)

    model, prices = make("mlp"), []
    metric = Sharpness(model, loss_fn, tol=1e-4, hvp="gradients")
    for _ in range(2):
        calls = 0
        metric.update(data())
        prices.append(calls)
        metric.reset()
    assert prices[1] < prices[0] / 2


def test_ratio_and_preconditioned_sharpness_with_adam() -> None:
    model = make("mlp")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ratio, preconditioned = (
        c(model, cross_entropy, optimizer, **FINE) for c in (StabilityRatio, PreconditionedSharpness)
    )
    with pytest.warns(gfs.GFSWarning, match="StabilityRatio is NaN.*Adam has no second moments yet"):
        assert math.isnan(ratio(data()))
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model, data()).backward()
        optimizer.step()
    roots = [(optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for p in trainable(model)]
    scale = torch.cat([r.reshape(-1) for r in roots]) ** -0.5
    expected = top(scale[:, None] * dense(model, data()) * scale)
    ratio.update(data())
    preconditioned.update(data())
    assert float(preconditioned.compute()) == pytest.approx(expected, rel=1e-5)
    assert float(ratio.compute()) == pytest.approx(expected / (3.8 / (0.1 * 1e-2)), rel=1e-5)  # the first: not counted
    assert int(ratio.count) == 1


def test_with_plain_sgd_the_preconditioned_sharpness_is_the_sharpness() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    x = torch.tensor([[3.0]])
    assert float(PreconditionedSharpness(model, quadratic, optimizer)(x)) == pytest.approx(9.0)
    assert float(StabilityRatio(model, quadratic, optimizer)(x)) == pytest.approx(9.0 / (3.0 / 0.1))


def test_gfs_sharpness_short_and_full() -> None:
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    w = model.w.detach().tolist()
    steps = 20_000
    for _ in range(steps):  # Euler, far shorter steps
        residual = w[0] * w[1] - 1
        w = [w[0] - 0.2 / steps * residual * w[1], w[1] - 0.2 / steps * residual * w[0]]
    short = top(torch.tensor([[w[1] ** 2, 2 * w[0] * w[1] - 1], [2 * w[0] * w[1] - 1, w[0] ** 2]]))

    options = {"tol": 1e-5, "rtol": 1e-4}
    assert float(GFSSharpness(model, product_loss, optimizer, horizon=2.0, **options)(ONE)) == pytest.approx(
        short, rel=1e-3
    )
    ratio = GFSStabilityRatio(model, product_loss, optimizer, horizon=2.0, **options)(ONE)
    assert float(ratio) == pytest.approx(short / 20, rel=1e-3)
    assert float(GFSSharpnessFull(model, product_loss, optimizer, **options)(ONE)) == pytest.approx(LIMIT, rel=1e-3)
    raw = top(torch.tensor([[1.0, 3.0], [3.0, 4.0]]))
    assert float(Sharpness(model, product_loss)(ONE)) == pytest.approx(raw, rel=1e-3)
    assert len({round(v, 2) for v in (raw, short, LIMIT)}) == 3


def test_metrics_of_a_collection_stay_apart() -> None:
    model = line()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)  # threshold 1: sharpness and ratio begin alike

    def cubic(m: nn.Linear, x: Tensor) -> Tensor:
        return (m(x) ** 3).mean() / 6  # (wx)³/6: Hessian w·x³

    with torch.no_grad():
        model.weight.fill_(1.0)
        twin.weight.fill_(1.0)
    collection = MetricCollection(
        {
            "sharpness": Sharpness(model, cubic),
            "ratio": StabilityRatio(model, cubic, optimizer),
            "twin": Sharpness(twin, cubic),
            "error": MeanSquaredError(),
        }
    )
    target = torch.zeros(1)
    collection.update(batch=torch.tensor([[2.0]]), preds=target + 2, target=target)
    assert {k: float(v) for k, v in collection.compute().items()} == pytest.approx(
        {"sharpness": 8.0, "ratio": 8.0, "twin": 8.0, "error": 4.0}
    )
    with torch.no_grad():
        twin.weight.fill_(3.0)
    optimizer.param_groups[0]["lr"] = 1.0
    collection.update(batch=torch.tensor([[2.0]]), preds=target, target=target)
    assert {k: float(v) for k, v in collection.compute().items()} == pytest.approx(
        {"sharpness": 8.0, "ratio": 6.0, "twin": 16.0, "error": 2.0}
    )


def test_plot() -> None:
    import matplotlib.pyplot as plt

    metric = Sharpness(line(), quadratic)
    values = [metric(torch.tensor([[x]])) for x in (1.0, 2.0, 3.0)]
    figure, axes = metric.plot(values)
    assert axes.lines[0].get_ydata().tolist() == [1.0, 4.0, 9.0]
    assert axes.get_ylabel() == "Sharpness"
    assert figure is axes.figure
    _, single = metric.plot()
    assert float(single.lines[0].get_ydata()[0]) == pytest.approx(14 / 3)
    plt.close("all")


def test_a_clone_measures_the_same_model_by_itself() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = StabilityRatio(model, quadratic, optimizer)
    metric.update(torch.tensor([[2.0]]))
    clone = metric.clone()
    assert clone.subject.model is model
    assert clone.subject.optimizer is optimizer
    optimizer.param_groups[0]["lr"] = 1.0
    clone.update(torch.tensor([[2.0]]))
    assert float(clone.compute()) == pytest.approx((0.2 + 2.0) / 2)
    assert float(metric.compute()) == pytest.approx(0.2)


def test_the_model_is_no_part_of_the_metric() -> None:
    model = make("mlp")
    metric = Sharpness(model, cross_entropy)
    assert list(metric.modules()) == [metric]
    assert not list(metric.parameters())
    metric.persistent(True)
    assert set(metric.state_dict()) == {"total", "count", "never_merged"}
    metric.to("meta")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    metric.set_dtype(torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_state_dict_goes_on_where_it_left_off() -> None:
    model, x = line(), torch.tensor([[3.0]])
    metric, other = Sharpness(model, quadratic), Sharpness(model, quadratic)
    metric.persistent(True)
    other.persistent(True)
    metric.update(x)
    other.load_state_dict(metric.state_dict())
    other.update(x / 3)
    assert float(other.compute()) == pytest.approx(5.0)


def test_pickle_carries_model_values_and_optimizer() -> None:
    model, x = line(), torch.tensor([[3.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = StabilityRatio(model, quadratic, optimizer)
    metric.update(x)
    again = pickle.loads(pickle.dumps(metric))
    subject = again.subject
    assert subject.model is not model
    assert subject.optimizer.param_groups[0]["params"][0] is subject.model.weight
    again.update(x / 3)
    assert float(again.compute()) == pytest.approx((0.45 + 0.05) / 2)


class Own(nn.Module):
    """A module that holds its own metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.metric = Sharpness(self, own_loss, tol=1e-5)


def own_loss(model: Own, x: Tensor) -> Tensor:
    return (model.layer(x) ** 4).mean() / 12  # (wx)⁴/12: Hessian w²x⁴


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_module_has_its_own_metric(how: str) -> None:
    model = Own()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.metric.subject.model is other
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
        other.layer.weight.fill_(2.0)
    assert float(other.metric(torch.ones(1, 1))) == pytest.approx(4.0)
    assert float(model.metric(torch.ones(1, 1))) == pytest.approx(1.0)


def test_a_module_that_holds_its_metric_keeps_the_warm_start() -> None:
    model = Own()
    assert set(model.state_dict()) == {"layer.weight"}
    model.metric.update(torch.ones(1, 1))
    monitor = model.metric.subject.monitor
    assert monitor is not None
    [eigenvalue] = monitor.measuring.signals.named(["sharpness"])
    held = eigenvalue.raw
    assert held is not None
    model.metric.update(torch.ones(1, 1))
    assert monitor.measuring.count == 2
    assert int(model.metric.count) == 2


def test_an_optimizer_of_the_original_is_refused_by_a_copy() -> None:
    model = Own()
    model.metric = StabilityRatio(model, own_loss, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[assignment]
    other = copy.deepcopy(model)
    with pytest.raises(gfs.ConfigError, match="holds no trainable parameter of `model`"):
        other.metric.update(torch.ones(1, 1))


def test_no_trace_is_left() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model, data()).backward()
    grads = [p.grad for p in model.parameters()]

    def state() -> list[Any]:
        held = [p.grad for p in model.parameters()]
        return [model.state_dict(), held, data(), torch.get_rng_state(), random.getstate(), np.random.get_state()]

    metrics = [Sharpness(model, cross_entropy)]
    metrics += [c(model, cross_entropy, optimizer) for c in (StabilityRatio, GFSSharpness)]  # type: ignore[misc]
    before, batch = copy.deepcopy(state()), data()
    for metric in metrics:
        metric(batch)
        metric.update(batch)
        assert int(metric.count) == 2
    assert_same(state(), before)
    assert_same(batch, data())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert model.training


def test_a_loss_that_is_not_finite_is_not_counted() -> None:
    metric = Sharpness(line(), quadratic)
    metric.update(torch.tensor([[3.0]]))
    with pytest.warns(gfs.GFSWarning, match="not finite"):
        metric.update(torch.tensor([[math.inf]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(metric.compute()) == pytest.approx(9.0)
    strict = Sharpness(line(), quadratic, strict=True)
    with pytest.raises(gfs.MeasurementError, match="not finite"):
        strict.update(torch.tensor([[math.inf]]))


def test_nothing_counted_is_nan_and_said() -> None:
    metric = Sharpness(line(), quadratic)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute())
    model = line()
    stopped = StabilityRatio(model, quadratic, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.warns(gfs.GFSWarning, match="the learning rate is 0"):
        stopped.update(torch.ones(1, 1))
    with pytest.warns(gfs.GFSWarning, match="no update gave a value: the learning rate is 0"):
        assert math.isnan(stopped.compute())


def test_options_arrive_and_mistakes_are_told() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {"hvp": "gradients", "max_hvps": 7, "probe_size": 3, "seed": 5, "strict": True, "tol": 0.5}
    flow = {"horizon": 2.0, "max_grads": 9, "rtol": 0.25}
    metric = GFSSharpness(model, quadratic, optimizer, **own, **flow, sync_on_compute=False)
    metric.update(torch.ones(4, 1))
    assert metric.subject.monitor is not None
    monitor = metric.subject.monitor
    arrived = vars(monitor.config) | vars(monitor.measuring.accuracy)
    assert {k: arrived[k] for k in own | flow} == own | flow
    assert metric.sync_on_compute is False

    with pytest.raises(gfs.ConfigError, match="`tol` must be a finite number > 0, got -1"):
        Sharpness(model, quadratic, tol=-1.0)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `horizon`"):
        Sharpness(model, quadratic, horizon=2.0)
    with pytest.raises(ValueError, match="the options of Sharpness are hvp, max_hvps, probe_size, seed, strict, tol"):
        Sharpness(model, quadratic, tier="gfs")
    with pytest.raises(gfs.ConfigError, match="`max_grads` must be an integer ≥ 1, got 0"):
        GFSSharpness(model, quadratic, optimizer, max_grads=0)
    with pytest.raises(gfs.ConfigError, match=r"expected a torch.nn.Module and a function .* got function and Linear"):
        Sharpness(quadratic, model)  # type: ignore[arg-type]
    with pytest.raises(gfs.ConfigError, match="no parameter with `requires_grad=True`"):
        Sharpness(line().requires_grad_(False), quadratic)
    with pytest.raises(gfs.ConfigError, match=r"`optimizer`: expected a torch.optim.Optimizer .* got float"):
        StabilityRatio(model, quadratic, 0.1)
    with pytest.raises(gfs.ConfigError, match="give the optimizer that steps it"):
        StabilityRatio(line(), quadratic, optimizer)
    with pytest.raises(gfs.ConfigError, match=r"threshold of Rprop is not known.*register_optimizer"):
        StabilityRatio(model, quadratic, torch.optim.Rprop(model.parameters()))


def test_inference_mode() -> None:
    model = make("mlp")
    expected = top(dense(model, data()))
    metric = Sharpness(model, cross_entropy, **FINE)
    with torch.inference_mode():
        model.kept = torch.zeros(2_000_000)  # too large for the isolation to copy
        metric.reset()
        batch = [t.clone() for t in data()]
        assert batch[0].is_inference()
        assert float(metric(batch)) == pytest.approx(expected, rel=1e-5)
        assert torch.is_inference_mode_enabled()
    metric.update(batch)
    with torch.no_grad():
        metric.update(data())
        assert not torch.is_grad_enabled()
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    assert int(metric.count) == 3


def test_two_processes_give_one_value(tmp_path: Path) -> None:
    zero, one = processes.run(ranks.measure, 2, tmp_path)
    model = make("mlp")
    values = [top(dense(model, b)) for b in (*ranks.batches(0), ranks.batches(1)[0])]
    assert zero[0] == one[0] == pytest.approx(sum(values) / 3, rel=1e-5)
    assert zero[1:] == (pytest.approx(values[0] + values[1], rel=1e-5), 2)  # own state again after the sync
    assert one[1:] == (pytest.approx(values[2], rel=1e-5), 1)


class Module(LightningModule):
    def __init__(self, measured: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 4)).double()
        self.measured = measured
        self.kept: list[Tensor] = []
        if measured:
            self.sharpness = Sharpness(self, module_loss, tol=1e-6)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return module_loss(self, batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.kept.append(module_loss(self, batch))
        if self.measured:
            self.sharpness(batch)
            self.log("sharpness", self.sharpness)
            self.ratio.update(batch)
            self.log("ratio", self.ratio, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.measured:
            self.ratio = StabilityRatio(self, module_loss, optimizer, tol=1e-6)
        return optimizer


def module_loss(module: Module, batch: Any) -> Tensor:
    return cross_entropy(module.net, batch)


def logged(trainer: Trainer) -> tuple[float, float]:
    return float(trainer.callback_metrics["sharpness"]), float(trainer.callback_metrics["ratio"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:Checkpoint directory")
def test_lightning_validation(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)

    def fit(measured: bool) -> tuple[Module, Trainer]:
        module = Module(measured)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, loader, loader)
        return module, trainer

    (plain, _), (module, trainer) = fit(False), fit(True)
    assert_same(dict(plain.state_dict()), dict(module.state_dict()))
    x, y = data()
    means = sum(top(dense(module.net.eval(), [x[i : i + 8], y[i : i + 8]])) for i in (0, 8, 16)) / 3
    expected = pytest.approx((means, means / 20), rel=1e-5)
    assert logged(trainer) == expected  # of the last epoch alone
    assert not module.inference
    trainer.validate(module, loader, verbose=False)
    assert module.inference
    assert logged(trainer) == expected
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    state = torch.load(tmp_path / "checkpoint.ckpt", weights_only=False)["state_dict"]
    assert set(state) == set(plain.state_dict())  # neither the metrics nor the model once more


def test_torchmetrics_is_named_where_it_is_missing(tmp_path: Path) -> None:
    done = run_without(tmp_path, ("torchmetrics",), "import gfs_core; import gfs_core.metrics")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: gfs_core.metrics needs torchmetrics: pip install 'gfs-sharpness[metrics]'"
    )


def test_the_core_does_not_import_it() -> None:
    code = "import sys, gfs_core; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
