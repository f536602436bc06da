"""Several processes measure as one, decide the same at the same step, and never wait for one that failed."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gfs_core as gfs
from gfs_core.linalg.inner import WHOLE, InnerProduct, Sharding
from gfs_core.signals.gradients import KEYS as OF_GRADIENTS
from tests.core import processes

BESIDE = {"directional": 2, "batch_sharpness": 3, "midpoint": 4}
TUNED: dict[str, Any] = {"beside": BESIDE, "parts": 4, "tol": 1e-8, "max_hvps": 500}
ALL = {
    "tier": "gfs",
    "every": 2,
    "running_every": 1,
    "max_overhead": None,
    "probe_size": None,
    "tuned": TUNED,
}
ROUGH = {**ALL, "tuned": {**TUNED, "tol": 1e-6}}
FREE = {key.name for key in OF_GRADIENTS}  # several processes take fewer samples than one: tests/core/test_free.py
NUMBERS = [k for k in (k.removeprefix("gfs/") for k in gfs.log_keys()) if k not in FREE and not k.endswith("/LAYER")]
CLOCK = ("overhead", "seconds", "hvps", "grad_evals", "residual")
FSDP2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch (2.6) does not train on a CPU"
)
RUNNING = ("running_sharpness", "running_stability_ratio", "mean_square_stability_ratio")


def assert_close(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float, without: tuple[str, ...] = ()
) -> None:
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in NUMBERS:
            if name not in (*CLOCK, *without):
                assert (a[name] is None) == (b[name] is None), (a["step"], name)
                assert a[name] is None or a[name] == pytest.approx(b[name], rel=rel), (a["step"], name)


@pytest.mark.parametrize(
    ("size", "kind", "hvp", "wrapped"),
    [(2, "sgd", "auto", False), (4, "adamw", "auto", False), (2, "adamw", "gradients", True), (2, "sgd", "auto", True)],
)
def test_the_values_are_those_of_one_process_on_the_joined_batch(
    size: int, kind: str, hvp: str, wrapped: bool, tmp_path: Path
) -> None:
    options = {**(ROUGH if hvp == "gradients" else ALL), "every": 4, "hvp": hvp}
    alone = processes.train(0, 1, kind, options)
    ranks = processes.run(processes.train, size, tmp_path, kind, options, 12, None, 60.0, wrapped)
    assert len(alone["found"]) == 12
    seen = {name for m in alone["found"] for name in NUMBERS if m[name] is not None}
    assert seen >= {"sharpness", "midpoint_sharpness", "gfs_sharpness", "running_sharpness"}
    assert "mean_square_stability_ratio" in seen
    assert seen >= {"batch_sharpness", "directional_sharpness", "critical_lr", "stability_ratio"}
    for rank in ranks:
        assert_close(rank["found"], alone["found"], 1e-5)
    for name in NUMBERS:  # among themselves to the bit
        if name not in CLOCK:
            assert [m[name] for m in ranks[0]["found"]] == [m[name] for m in ranks[-1]["found"]], name


@FSDP2
@pytest.mark.parametrize(("size", "kind"), [(2, "sgd"), (2, "adamw"), (4, "adamw")])
def test_sharded_weights_give_the_values_of_one_process(size: int, kind: str, tmp_path: Path) -> None:
    options, steps = ({"every": 5}, 20) if size == 2 else ({"tier": "sharpness", "every": 4}, 9)
    options = {**ROUGH, **options}
    alone = processes.train(0, 1, kind, {**options, "hvp": "gradients"}, steps)
    ranks = processes.run(processes.train, size, tmp_path, kind, options, steps, None, 60.0, False, True)
    for rank in ranks:  # other random vectors are mixed into the running estimate's direction
        assert_close(rank["found"], alone["found"], 1e-5, without=(*RUNNING, "stability_ratio"))
        for ours, theirs in zip(rank["found"], alone["found"], strict=True):
            for name in (*RUNNING, "stability_ratio"):
                assert (ours[name] is None) == (theirs[name] is None), (ours["step"], name)
            if theirs["sharpness"] is not None and theirs["stability_ratio"] is not None:  # elsewhere the running one
                assert ours["stability_ratio"] == pytest.approx(theirs["stability_ratio"], rel=1e-5), ours["step"]
        last, theirs = rank["found"][-1], alone["found"][-1]
        assert last["running_sharpness"] == pytest.approx(theirs["running_sharpness"], rel=0.1)
    whole = sum(p.numel() for p in processes.net().parameters())
    assert sum(sum(p.numel() for p in rank["weights"]) for rank in ranks) == whole * size // 2  # two shards of each


@FSDP2
def test_one_process_alone_may_shard(tmp_path: Path) -> None:
    """As `torchrun --nproc-per-node 1` does; there are no other processes to talk to."""
    options = ROUGH
    plain = processes.train(0, 1, "sgd", {**options, "hvp": "gradients"}, 6)
    [alone] = processes.run(functools.partial(processes.train, shard=True), 1, tmp_path, "sgd", options, 6)
    assert sum(m["sharpness"] is not None for m in alone["found"]) == 3
    assert_close(alone["found"], plain["found"], 1e-5)


@FSDP2
def test_shards_that_are_gathered_in_bfloat16(tmp_path: Path) -> None:
    """The policy of ``fully_shard`` cannot be switched off, and a small step of the weights is lost in rounding."""
    options = {**ALL, "running_every": None, "tuned": {"beside": {"batch_sharpness": 3}, "max_hvps": 500}}
    alone = processes.train(0, 1, "sgd", options, 2)
    work = functools.partial(processes.train, shard=True, half=True)
    first = processes.run(work, 2, tmp_path, "sgd", options, 2)[0]["found"][0]
    true = alone["found"][0]["sharpness"]
    assert first["sharpness"] is None or first["sharpness"] == pytest.approx(true, rel=0.1)
    assert first["gfs_sharpness"] is None
    assert "left out" in " ".join(first["reasons"])
    assert first["loss_probe"] == pytest.approx(alone["found"][0]["loss_probe"], rel=1e-2)


@pytest.mark.parametrize("kind", ["zero-sgd", "zero-adamw"])
def test_an_optimizer_whose_state_is_spread_has_an_empirical_ratio(kind: str, tmp_path: Path) -> None:
    options = {"tier": "sharpness", "every": 1, "running_every": None, "max_overhead": None, "tuned": {"tol": 1e-8}}
    ranks = processes.run(processes.train, 2, tmp_path, kind, options, 4)
    found = ranks[0]["found"]
    assert_close(found, ranks[1]["found"], 0.0)
    assert found[0]["sharpness"] == pytest.approx(processes.train(0, 1, "sgd", options, 1)["found"][0]["sharpness"])
    for m in found[1:]:
        assert m["stability_ratio"] == pytest.approx(0.02 / m["critical_lr"])


def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    without = {"tier": "running", "every": 10**6, "alarm": "off"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    plain = processes.run(processes.train, 2, tmp_path / "a", "adamw", without)
    measured = processes.run(processes.train, 2, tmp_path / "b", "adamw", ALL, 12, None, 60.0, True)
    assert plain[0]["losses"] != plain[1]["losses"]
    for a, b in zip(plain, measured, strict=True):
        assert a["losses"] == b["losses"]
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))


def test_inner_products_of_shards_count_each_part_once() -> None:
    """Two processes with the same numbers; of the second tensor both hold the same part."""
    asked: list[int] = []

    def total(values: Any) -> list[float]:
        asked.append(len(values))
        return [2 * v for v in values]

    x, y = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([5.0, 7.0]), torch.tensor([11.0])]
    inner = InnerProduct(Sharding([1.0, 0.5], total, 2))
    assert inner.dots([(x, y), (x, x), (y, y)]) == [2 * 19 + 33, 2 * 5 + 9, 2 * 74 + 121]
    assert asked == [2, 1]
    assert not inner.whole
    assert WHOLE.dots([(x, y)]) == [19 + 33]


@pytest.mark.parametrize(
    ("fault", "normed", "then"),  # what did not fit on one is halved on all, where it may be cut: not under BatchNorm
    [("raises", True, 16), ("out_of_memory", False, 8), ("out_of_memory", True, 16)],
)
def test_a_measurement_that_fails_on_one_rank_is_skipped_on_all(
    fault: str, normed: bool, then: int, tmp_path: Path
) -> None:
    history = tmp_path / "history.jsonl"
    options = {"tier": "sharpness", "every": 2, "running_every": None, "max_overhead": None, "history": str(history)}
    work = functools.partial(processes.train, wrapped=True, normed=normed)
    ranks = processes.run(work, 2, tmp_path, "sgd", options, 12, (fault, 1, 6))
    for rank in ranks:
        assert [m["step"] for m in rank["found"]] == [0, 2, 4, 8, 10]
        assert not rank["lost"]
    assert [ranks[0]["sizes"][step] for step in (4, 10)] == [16, then]
    assert [m.step for m in gfs.read_history(history)] == [0, 2, 4, 8, 10]  # one rank writes


def test_a_short_batch_of_one_rank_is_measured_on_none(tmp_path: Path) -> None:
    options = {"tier": "sharpness", "every": 1, "running_every": None, "max_overhead": None}
    work = functools.partial(processes.train, short=(1, 3, 5))
    ranks = processes.run(work, 2, tmp_path, "sgd", options, 6)
    for rank in ranks:
        assert [m["step"] for m in rank["found"] if m["sharpness"]] == [0, 1, 2, 4, 5]


def test_a_probe_that_is_all_of_the_batch_on_one_rank_alone(tmp_path: Path) -> None:
    """Where it is on all of them, differences go by the gradient of training."""
    options = {**ROUGH, "tier": "directional", "every": 1, "running_every": None, "probe_size": 10}
    work = functools.partial(processes.train, short=(1, 3, 10), timeout=5.0)
    ranks = processes.run(work, 2, tmp_path, "sgd", {**options, "tuned": {"beside": {"batch_sharpness": 1}}}, 6)
    for rank in ranks:
        assert not rank["lost"]
        both = [m for m in rank["found"] if m["directional_sharpness"] and m["batch_sharpness"]]
        assert [m["step"] for m in both] == [1, 2, 3, 4, 5]
    assert_close(ranks[0]["found"], ranks[1]["found"], 0.0)


def test_a_rank_that_does_not_answer_ends_measuring_and_not_training(tmp_path: Path) -> None:
    options = {"tier": "sharpness", "every": 2, "running_every": None, "max_overhead": None}
    ranks = processes.run(processes.train, 2, tmp_path, "sgd", options, 12, ("sleeps", 1, 6), 2.0)
    for rank in ranks:
        assert [m["step"] for m in rank["found"]] == [0, 2, 4]
        assert rank["lost"]
        assert len(rank["losses"]) == 12


def test_a_monitor_that_one_process_alone_makes_says_so(tmp_path: Path) -> None:
    first, second = processes.run(processes.only_the_first, 2, tmp_path)
    assert first.startswith("another process does not answer within 2 s (")
    assert first.endswith("Make the callback, or the monitor, on every process")
    assert second == ""


def test_the_budget_is_that_of_one_clock(tmp_path: Path) -> None:
    options = {"tier": "sharpness", "every": 1, "max_overhead": 0.9, "tuned": {"beside": {"directional": 2}}}
    poor = {"poor": 1}  # the other's allows nothing after the first measurement
    ranks = processes.run(functools.partial(processes.train, **poor), 2, tmp_path, "sgd", options, 400, None, 10.0)
    tiers = [[(m["step"], m["sharpness"], m["running_sharpness"]) for m in rank["found"]] for rank in ranks]
    assert tiers[0] == tiers[1]
    counts = [sum(m[i] is not None for m in tiers[0]) for i in (1, 2)]
    assert 0 < counts[0] < 400  # not all of them
    assert counts[1] > 1
    assert not ranks[0]["lost"]


@pytest.mark.parametrize("kind", ["adamw", "lion-like"])
def test_control_and_early_warning_are_the_same_on_all(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tier": "running", "every": 2, "max_overhead": 0.2, "control": "follow"}
    if kind == "lion-like":
        options |= {"tier": "sharpness", "control": "cdat"}
    ranks = processes.run(processes.train, 2, tmp_path, kind, options, 60)
    assert ranks[0]["scales"] == ranks[1]["scales"]
    assert len(set(ranks[0]["scales"])) > 5
    assert ranks[0]["events"] == ranks[1]["events"]
    assert all(torch.equal(p, q) for p, q in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True))
    assert all(math.isfinite(loss) for loss in ranks[0]["losses"])


def test_processes_part_without_waiting_for_each_other(tmp_path: Path) -> None:
    """A group that is given back while a thread of torch's still holds the last reference to what was sent hung."""
    assert processes.run(processes.part, 2, tmp_path) == [600.0, 600.0]
