"""Ways to train under Lightning that people use: manual optimization, other callbacks. Training is bitwise the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core as gfs
from lightning_gfs import GFSCallback
from tests.bitwise import assert_same
from tests.core.options import tuned_callback
from tests.lightning.trainers import quiet

BATCH, BATCHES = 32, 5
OPTIONS: dict[str, Any] = {"every": 2, "running_every": 1, "max_overhead": None, "tier": "sharpness"}


def callback_of(**options: Any) -> GFSCallback:
    return tuned_callback(GFSCallback(**OPTIONS | options), tol=1e-4)


def digits() -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    count = BATCH * BATCHES
    return TensorDataset(torch.tensor(x[:count] / 16 - 0.3, dtype=torch.float32), torch.tensor(y[:count]))


class Classifier(L.LightningModule):
    """Automatic optimization; a norm over the batch, and a rate that falls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 10))

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}


class FromTheLoader(Classifier):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, batch_size=BATCH)
        return loss


class Adversarial(L.LightningModule):
    """Two optimizers that take turns within a step, each with a scheduler that is stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 64))
        self.judge = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1))

    def of_maker(self, batch: Any) -> torch.Tensor:
        made = self.make(batch[0][:, 2:6])  # noise enough
        return nn.functional.softplus(-self.judge(made)).mean()

    def of_judge(self, batch: Any) -> torch.Tensor:
        made = self.make(batch[0][:, 2:6]).detach()
        return (nn.functional.softplus(-self.judge(batch[0])) + nn.functional.softplus(self.judge(made))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss_of in zip(self.optimizers(), (self.of_maker, self.of_judge), strict=True):
            self.toggle_optimizer(optimizer)
            loss = loss_of(batch)
            self.log(loss_of.__name__, loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (self.make, self.judge)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 3, 0.9) for o in optimizers]


class ByHand(Classifier):
    """Gradients of several batches added up by hand, or a closure handed to the step."""

    def __init__(self, accumulate: int = 1, closure: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net[1] = nn.Identity()
        self.accumulate, self.closure = accumulate, closure

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self.closure:
            self.log("loss", optimizer.step(closure=closure))
            return
        self.manual_backward(self.loss(batch) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Averaged(WeightAveraging):
    """The exponential mean of the weights."""

    def __init__(self) -> None:
        super().__init__(avg_fn=lambda mean, new, count: 0.9 * mean + 0.1 * new)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


class Weights(Callback):
    """The weights and the batch before each training step."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(({k: v.clone() for k, v in pl_module.state_dict().items()}, batch))


def train(
    folder: Path, make: Callable[[], Any], callbacks: list[Any], **options: Any
) -> tuple[list[Any], Any, list[str]]:
    """What training leaves, the trainer, and what was told."""
    L.seed_everything(0, verbose=False)
    module = make()
    options = {"max_epochs": 3, "logger": CSVLogger(folder), "enable_checkpointing": False} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet(folder, callbacks, **options)
        trainer.fit(module, DataLoader(digits(), BATCH, shuffle=True))
    told = [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)]
    own = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("gfs/")}
    state = [o.state_dict()["state"] for o in trainer.optimizers]
    return [module.state_dict(), state, own, trainer.global_step, torch.get_rng_state()], trainer, told


def measured(trainer: Any, name: str = "history") -> list[gfs.Measurement]:
    return gfs.read_history(Path(trainer.log_dir) / f"{name}.jsonl")


def solved(trainer: Any, name: str = "history") -> dict[int, float]:
    return {m.step: m.sharpness for m in measured(trainer, name) if m.sharpness is not None}


def exact(
    make: Callable[[], Any], seen: Weights, step: int, loss_of: Callable[[Any, Any, int], Any], part: str
) -> float:
    """The largest eigenvalue of the dense Hessian at a step."""
    module = make()
    weights, batch = seen.seen[step]
    module.load_state_dict(weights)
    params = list(module.get_submodule(part).parameters())
    slope = torch.autograd.grad(loss_of(module, batch, 0), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in slope])
    rows = torch.autograd.grad(flat, params, torch.eye(len(flat)), is_grads_batched=True)
    hessian = torch.cat([r.reshape(len(flat), -1) for r in rows], 1)
    return float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])


def of_module(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    return module.loss(batch)


def of_maker(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    return module.of_maker(batch)


def of_judge(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    return module.of_judge(batch)


def test_two_optimizers_that_take_turns(tmp_path: Path) -> None:
    losses = {"make": of_maker, "judge": of_judge}
    plain, _, _ = train(tmp_path / "plain", Adversarial, [])
    seen = Weights()
    again, trainer, told = train(tmp_path / "gfs", Adversarial, [callback_of(loss_fn=losses, alarm="off"), seen])
    assert_same(plain, again)
    assert told == []
    for part, loss_of in losses.items():
        found = solved(trainer, f"history-{part}")
        assert list(found) == list(range(0, 3 * BATCHES, 2))
        for step in (0, 8):
            assert found[step] == pytest.approx(exact(Adversarial, seen, step, loss_of, part), rel=1e-3)
        assert not any(m.reasons for m in measured(trainer, f"history-{part}"))
    assert all(not o._optimizer_step_post_hooks for o in trainer.optimizers)


@pytest.mark.parametrize(
    ("accumulate", "closure"), [(1, False), (5, False), (1, True)], ids=["each", "accumulate", "closure"]
)
def test_steps_taken_by_hand(tmp_path: Path, accumulate: int, closure: bool) -> None:
    def make() -> ByHand:
        return ByHand(accumulate, closure)

    plain, _, _ = train(tmp_path / "plain", make, [])
    seen = Weights()
    callback = callback_of(loss_fn=of_module)
    again, trainer, told = train(tmp_path / "gfs", make, [callback, seen])
    assert_same(plain, again)
    assert told == []
    found = solved(trainer)
    assert found[10] == pytest.approx(exact(make, seen, 10, of_module, "net"), rel=1e-3)
    rare = [m.step for m in measured(trainer) if any("no step with some of the batches" in r for r in m.reasons)]
    assert rare == (list(range(1, 3 * BATCHES)) if accumulate > 1 else [])


def test_nothing_lies_along_a_step_that_was_not_taken(tmp_path: Path) -> None:
    callback = GFSCallback(loss_fn=of_module, every=1, tier="directional", max_overhead=None)
    _, trainer, told = train(tmp_path, lambda: ByHand(5), [callback])
    assert told == []
    assert [m.step for m in measured(trainer) if m.directional_sharpness is not None] == [5, 10]
    for m in measured(trainer):
        said = any("the weights have not moved" in reason for reason in m.reasons)
        assert said == (m.directional_sharpness is None)


def test_the_control_scales_steps_taken_by_hand(tmp_path: Path) -> None:
    callback = callback_of(loss_fn=of_module, tier="running", running_every=None, control="cap")
    _, trainer, told = train(tmp_path, lambda: ByHand(closure=True), [callback])
    assert told == []
    scales = [m.lr_scale for m in measured(trainer)]
    assert scales[:3] == [0.01] * 3
    assert scales[-1] == 1.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("loss_fn", [None, of_module, {"": of_module}], ids=["own", "given", "named"])
def test_a_step_that_takes_its_batches_itself_is_refused(tmp_path: Path, loss_fn: Any) -> None:
    plain, _, _ = train(tmp_path / "plain", FromTheLoader, [])
    again, _, [text] = train(tmp_path / "gfs", FromTheLoader, [GFSCallback(loss_fn=loss_fn)])
    assert_same(plain, again)
    assert "take `batch` in place of `dataloader_iter`; nothing is measured in this run" in text
    with pytest.raises(gfs.MeasurementError, match="takes its batches from the loader itself"):
        train(tmp_path / "strict", FromTheLoader, [GFSCallback(loss_fn=loss_fn, strict=True)])


OTHERS: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "weight averaging": (lambda: [Averaged()], {}),
    "accumulation by epoch": (lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})], {}),
    "plateau and rates": (lambda: [LearningRateMonitor()], {}),
    "overfitting": (list, {"overfit_batches": 2, "max_epochs": 6}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_beside_other_callbacks(tmp_path: Path, name: str) -> None:
    others, options = OTHERS[name]
    plain, _, _ = train(tmp_path / "plain", Classifier, others(), **options)
    seen = Weights()
    again, trainer, told = train(tmp_path / "gfs", Classifier, [callback_of(), seen, *others()], **options)
    assert_same(plain, again)
    assert told == []  # with BatchNorm a batch cannot be cut, and none has to be
    found = solved(trainer)
    assert list(found) == list(range(0, trainer.global_step, 2))
    assert found[2] == pytest.approx(exact(Classifier, seen, 2, of_module, "net"), rel=2e-3)


def test_an_epoch_that_only_renews_the_batch_statistics_is_not_measured(tmp_path: Path) -> None:
    def averaging() -> Callback:
        return StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)

    class Kept(Callback):
        """How many batches the callback holds."""

        most = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.most = max(self.most, len(callback._window.batches))

    plain, _, _ = train(tmp_path / "plain", Classifier, [averaging()], max_epochs=4)
    callback, kept = callback_of(), Kept()
    again, trainer, _ = train(tmp_path / "gfs", Classifier, [callback, averaging(), kept], max_epochs=4)
    assert_same(plain, again)
    assert list(solved(trainer)) == list(range(0, 4 * BATCHES, 2))
    assert kept.most <= 1


class Mixed(Callback):
    """Mixes the examples of a batch, and their weights with noise, at its start."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        share = torch.rand(())
        batch[0].copy_(share * batch[0] + (1 - share) * batch[0][torch.randperm(len(batch[0]))])
        with torch.no_grad():
            pl_module.net[0].weight.add_(0.1 * torch.randn_like(pl_module.net[0].weight))


class Scaled(Classifier):
    """Changes the batch in a hook of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(3.0)


class Losses(Callback):
    """What training computed, by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.mark.parametrize(("make", "others"), [(Classifier, [Mixed]), (Scaled, [])], ids=["callback", "module"])
def test_what_hooks_at_the_start_of_a_batch_change_is_measured_as_it_is_trained(
    make: type[Classifier], others: list[type[Callback]], tmp_path: Path
) -> None:
    plain, _, _ = train(tmp_path / "plain", make, [kind() for kind in others])
    losses = Losses()
    callbacks = [callback_of(), *(kind() for kind in others), losses]
    again, trainer, _ = train(tmp_path / "gfs", make, callbacks)
    assert_same(plain, again)
    found = {m.step: m.loss_probe for m in measured(trainer) if m.sharpness is not None}
    assert len(found) == 8
    assert found == pytest.approx({step: losses.seen[step] for step in found}, rel=1e-6)
    assert "on_train_batch_start" not in vars(trainer.strategy)
