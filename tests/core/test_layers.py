"""How weights are grouped into layers, and the share of an eigenvector in each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gfs_core as gfs
from benchmarks.lib.models import gpt2
from gfs_core.linalg.inner import WHOLE, InnerProduct, Sharding
from gfs_core.signals.layers import MOST, layers_of, names_of
from gfs_core.signals.shares import CURVATURE_SHARE, LayerShares


def layers(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(layers_of(names_of(model, model.parameters()))))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (12, [f"transformer.h.{i}" for i in range(12)]),
        (48, [f"transformer.h.{i}-{i + 1}" for i in range(0, 48, 2)]),
        (100, [*(f"transformer.h.{i}-{i + 2}" for i in range(0, 99, 3)), "transformer.h.99"]),
    ],
)
def test_a_deep_transformer_has_at_most_forty_layers(blocks: int, expected: list[str]) -> None:
    names = [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *(
            f"transformer.h.{i}.{part}.{kind}"
            for i in range(blocks)
            for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
            for kind in ("weight", "bias")
        ),
        "transformer.ln_f.weight",
    ]
    found = layers_of(names)
    assert len(found) == len(names)
    held = list(dict.fromkeys(found))
    assert len(held) <= MOST
    assert held == ["transformer.wte", "transformer.wpe", *expected, "transformer.ln_f"]


def test_small_models_keep_every_module_and_flat_ones_stay_readable() -> None:
    assert layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))) == ["0", "2"]
    assert layers(nn.Sequential(*(nn.Linear(1, 1) for _ in range(100))))[:2] == ["0-2", "3-5"]
    flat = layers_of([f"w_{chr(97 + i % 26)}{i}" for i in range(100)])
    assert len(set(flat)) <= MOST
    assert flat[0] == "w_a0 to w_c2"
    assert layers_of(["scale", "net.0.weight", "net.1.weight"]) == ["scale", "net.0", "net.1"]
    assert layers_of([]) == []


def test_prefixes_of_wrappers_are_not_in_the_names() -> None:
    model = gpt2(width=8, length=8, vocabulary=20)
    plain = layers(model)
    assert "transformer.h.0" in " ".join(plain)
    assert layers(torch.compile(model)) == plain  # type: ignore[arg-type]
    assert names_of(nn.Linear(1, 1), [torch.zeros(1)]) == ["parameter 0"]


def test_shares_are_those_of_the_eigenvector() -> None:
    curvatures = {"0": torch.tensor([3.0, 1.0]), "1": torch.tensor([3.0])}

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(self.a.weight)
            torch.nn.init.ones_(self.b.weight)

    model = Quadratic()
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])

    def loss(_: object) -> torch.Tensor:  # curvature 5 along (0.6 in a's first weight, 0.8 in b's)
        w = turn @ torch.stack([model.a.weight[0, 0], model.b.weight[0, 0]])
        return 2.5 * w[0] ** 2 + 0.5 * w[1] ** 2 + 0.5 * model.a.weight[0, 1] ** 2

    assert curvatures
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(tier="sharpness", every=1, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    monitor.measuring.accuracy = type(monitor.measuring.accuracy)(tol=1e-6)
    found = monitor.step(loss, torch.zeros(4, 1))
    assert found is not None
    assert found.layers("curvature_share") == pytest.approx({"a": 0.36, "b": 0.64}, abs=1e-4)
    assert found.as_log_dict()["gfs/curvature_share/b"] == pytest.approx(0.64, abs=1e-4)


def test_loggers_get_three_layers_that_change_rarely() -> None:
    shares = LayerShares(CURVATURE_SHARE)
    names = [f"h.{i}" for i in range(6)]

    def logged(*lengths: float) -> list[str]:
        vector = [torch.tensor([length**0.5]) for length in lengths]
        found = shares.readings(0, vector, names, WHOLE)
        assert [r.layer for r in found] == names
        assert sum(r.value or 0.0 for r in found) == pytest.approx(1.0)
        return [r.layer for r in found if r.key.logged]

    assert logged(0.3, 0.2, 0.1, 0.15, 0.15, 0.1) == ["h.0", "h.1", "h.3"]
    assert logged(0.1, 0.2, 0.1, 0.15, 0.25, 0.2) == ["h.1", "h.3", "h.4"]  # 0.25 is more than twice 0.1
    assert logged(0.2, 0.2, 0.1, 0.15, 0.15, 0.2) == ["h.1", "h.3", "h.4"]  # nobody is twice 0.15
    other = LayerShares(CURVATURE_SHARE)
    other.load(shares.state())
    assert other.shown == shares.shown
    assert shares.readings(0, [torch.zeros(1)] * 6, names, WHOLE) == []


def test_shares_of_sharded_vectors_are_summed_over_the_processes() -> None:
    exchanged: list[list[float]] = []

    def total(values: list[float]) -> list[float]:
        exchanged.append(list(values))
        return [2 * v for v in values]  # another process with the same numbers

    inner = InnerProduct(Sharding([1.0, 0.5, 1.0], total, most=2))
    squares = inner.squares([torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([3.0])], [0, 1, 2], 3)
    assert squares == pytest.approx([8.0, 4.0, 18.0])
    assert [len(values) for values in exchanged] == [2, 1]
