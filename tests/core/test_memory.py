from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.meters import LiveBytes
from gfs_core.loss.batches import pieces
from gfs_core.loss.memory import GIB, Limits
from gfs_core.loss.objective import Objective
from gfs_core.loss.snapshot import StateSnapshot
from gfs_core.signals.lab import Accuracy, Lab


def make(width: int = 16, depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    inner = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *inner, nn.Linear(width, 3)).double()


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def batch(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1)).double()


def config(**options) -> gfs.GFSConfig:
    return gfs.GFSConfig(**{"every": 1, "running_every": None, "max_overhead": None} | options)


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_a_probe_that_streams_through_gives_the_same_values(hvp) -> None:
    def measured(count: int | None) -> tuple[float, float, set[int]]:
        model, sizes = make(), []

        def loss(model, x):
            sizes.append(len(x))
            return loss_fn(model, x)

        with StateSnapshot(model) as isolation:
            objective = Objective(
                model, loss, [batch(7), batch(12)], isolation=isolation, limits=Limits(examples=count)
            )
            found = Lab(objective, hvp, accuracy=Accuracy(tol=1e-9 if hvp == "exact" else 1e-4)).eigenvalue()
            return found.value, objective.loss(), set(sizes)

    whole, streamed, single = measured(None), measured(5), measured(1)
    assert [sizes for *_, sizes in (whole, streamed, single)] == [{7, 12}, {5, 2}, {1}]
    for value, loss, _ in (streamed, single):
        assert value == pytest.approx(whole[0], rel=1e-8 if hvp == "exact" else 1e-4)
        assert loss == pytest.approx(whole[1], rel=1e-12)


def test_the_shares_of_the_pieces() -> None:
    found = pieces([batch(7), batch(4)], 3)
    assert [len(p) for p, _ in found] == [3, 3, 1, 3, 1]
    assert [s for _, s in found] == pytest.approx([3 / 14, 3 / 14, 1 / 14, 3 / 8, 1 / 8])
    assert [s for _, s in pieces(["one", "two"], 3)] == [0.5, 0.5]  # cannot be cut


def test_streaming_keeps_one_pieces_graph_at_a_time() -> None:
    def peak(count: int | None) -> int:
        model = make(64, depth=8)
        with StateSnapshot(model) as isolation:
            objective = Objective(model, loss_fn, [batch(1024)], isolation=isolation, limits=Limits(examples=count))
            gc.collect()
            with LiveBytes() as live:
                Lab(objective, "exact").eigenvalue()
        return live.peak

    assert peak(64) < 0.25 * peak(None)


def test_max_memory_is_kept_by_measuring_on_less() -> None:
    model = make(64, depth=8)
    most = 8e6 / GIB
    sizes: list[int] = []

    def loss(x):
        sizes.append(len(x))
        return loss_fn(model, x)

    monitor = gfs.StabilityMonitor(
        model, torch.optim.SGD(model.parameters(), 0.1), config(tier="sharpness", max_memory=most)
    )
    before = copy.deepcopy(model.state_dict())
    x = batch(1024)
    with pytest.warns(gfs.GFSWarning, match="`max_memory` allows.*half as many examples"):
        found = [monitor.step(loss, x) for _ in range(8)]
    assert found[0] is None
    assert found[-1] is not None
    assert sizes[0] == 1024
    assert 1 < sizes[-1] <= 512
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    gc.collect()
    with LiveBytes() as live:
        again = monitor.step(loss, x)
    assert again is not None
    assert 0.3 * most < live.peak / GIB <= most
    wide = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config(tier="sharpness"))
    assert again.sharpness == pytest.approx(wide.step(loss, x[: sizes[-1]]).sharpness, rel=1e-3)


def test_a_limit_below_the_vectors_is_refused_at_once() -> None:
    model = make()
    with pytest.raises(gfs.ConfigError, match=r"`max_memory` is 1e-06 GiB, and the vectors of tier='gfs' alone take"):
        gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config(tier="gfs", max_memory=1e-6))
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(gfs.ConfigError, match="`max_memory` must be"):
            config(max_memory=wrong)


def test_counting_changes_no_product() -> None:
    x, vectors = batch(9), []
    for memory in (None, GIB):
        model = make()
        with StateSnapshot(model) as isolation:
            objective = Objective(model, loss_fn, [x], isolation=isolation, limits=Limits(graph=memory))
            hessian = gfs.Hessian(objective, "exact")
            vectors.append(hessian([torch.ones_like(p) for p in model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*vectors, strict=True))
