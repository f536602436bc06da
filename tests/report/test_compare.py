from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import gfs_core as gfs
from gfs_core import ConfigError
from gfs_core.run.history import append
from gfs_report.cli import app
from gfs_report.comparison.compare import Comparison, compare, interval, runs_needed
from gfs_report.comparison.page import as_dict, write_comparison
from gfs_report.comparison.verdict import verdict
from gfs_report.losses import count_spikes
from lightning_gfs import GFSCallback
from tests.report.browser import look_at, needs_chromium

HOSTILE = "<script>alert(1)<"  # a folder's name holds no slash
FALLING = np.linspace(2.0, 1.0, 40)


def run_csv(folder: Path, values: Sequence[float], key: str = "train_loss", **others: float) -> Path:
    """A Lightning CSV log with a value a step, and others in the last row."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "step", key, *others])
        for step, value in enumerate(values):
            last = step == len(values) - 1
            rows.writerow([0, step, value, *(v if last else "" for v in others.values())])
    return folder


def ending(final: float, start: float = 2.0) -> np.ndarray[Any, Any]:
    """A loss of 41 steps whose last tenth has the mean ``final``."""
    return np.r_[np.linspace(start, final, 36), final + np.array([-0.01, 0.01, 0.0, -0.02, 0.02])]


def two_sets(tmp: Path, a: Sequence[float], b: Sequence[float]) -> tuple[str, str]:
    for name, finals in (("a", a), ("b", b)):
        for seed, final in enumerate(finals):
            run_csv(tmp / name / f"seed-{seed}", ending(final))
    return str(tmp / "a"), str(tmp / "b")


A = [0.50, 0.52, 0.47, 0.55, 0.51, 0.49]
NOISE = [0.004, -0.010, 0.008, -0.003, 0.006, -0.005]


def shifted(by: float) -> list[float]:
    return [a + by + e for a, e in zip(A, NOISE, strict=True)]


def one(tmp: Path, b: Sequence[float], a: Sequence[float] = A, **options: Any) -> Comparison:
    return compare(two_sets(tmp, a, b), **options)


# ---- the interval


def test_the_interval_is_that_of_all_resamples_at_hesterbergs_level() -> None:
    a, b = np.array(A), np.array(shifted(0.01))
    tail = stats.norm.cdf(-math.sqrt(6 / 5) * 2.570582)  # Student's t at 97.5 %, 5 degrees of freedom
    picks = np.array(list(itertools.product(range(6), repeat=6)))  # all 46,656
    by_hand = np.quantile((b - a)[picks].mean(1), [tail, 1 - tail])
    found = interval(a, b, paired=True)
    assert found.difference == pytest.approx((b - a).mean())
    assert found.ends == pytest.approx(by_hand, abs=4e-4)
    assert found.confidence == 0.95
    ratios = np.quantile((b - a)[picks].mean(1) / a[picks].mean(1), [tail, 1 - tail])
    assert interval(a, b, paired=True, relative=True).ends == pytest.approx(ratios, abs=8e-4)


def test_the_unpaired_interval_is_scipys() -> None:
    a, b = np.array(A), np.array([0.61, 0.72, 0.55, 0.66, 0.58, 0.69, 0.64])
    level = 1 - 2 * stats.norm.sf(math.sqrt(6 / 5) * stats.t.ppf(0.975, 5))
    theirs = stats.bootstrap(
        (b, a), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=100_000, confidence_level=level,
        method="percentile", rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    found = interval(a, b, paired=False)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.ends == pytest.approx((theirs.low, theirs.high), abs=4e-3)
    assert found.ends[1] - found.ends[0] > 1.05 * np.ptp(interval(a, b[:6], paired=True).ends) / 2


@pytest.mark.parametrize(
    ("n", "paired", "comparisons", "least", "most"),
    [(5, True, 1, 0.91, 0.9575), (8, True, 1, 0.915, 0.96), (8, True, 2, 0.95, 0.99), (6, False, 1, 0.94, 0.99)],
)
def test_the_interval_holds_the_true_difference_about_as_often_as_it_says(
    n: int, paired: bool, comparisons: int, least: float, most: float
) -> None:
    """Percentiles that are not widened hold it in 86 to 88 of 100."""
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(300):
        a = rng.normal(2, 0.3, n)
        b = (a if paired else rng.normal(2, 0.3, n)) + rng.normal(0.5, 0.2, n)
        low, high = interval(a, b, paired=paired, comparisons=comparisons).ends or (0, 0)
        held += low <= 0.5 <= high
    assert least <= held / 300 <= most


@pytest.mark.parametrize(
    ("n", "comparisons", "confidence"), [(2, 1, 0.5), (3, 1, 0.75), (5, 1, 0.9375), (6, 2, 1 - 2**-5)]
)
def test_the_interval_of_few_pairs_is_their_range(n: int, comparisons: int, confidence: float) -> None:
    a = np.linspace(1.0, 2.0, n)
    found = interval(a, a + np.arange(n) ** 2, paired=True, comparisons=comparisons)
    assert found.ends == pytest.approx((0, (n - 1) ** 2))
    assert found.confidence == confidence
    relative = interval(a, a + np.arange(n) ** 2, paired=True, comparisons=comparisons, relative=True)
    assert relative.ends == pytest.approx((0, (n - 1) ** 2 / 2))
    assert interval(a[:1], a[1:2], paired=True).ends is None
    apart = interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 4.0]), paired=False)
    assert apart.ends == (-1.0, 4.0)
    assert apart.confidence == 0.9  # 2 of the 20 ways to deal six values in two put all of one set below the other


# ---- the verdict


@pytest.mark.parametrize(
    ("by", "options", "outcome", "status", "words"),
    [
        (0.05, {}, "worse", 1, r"^b is worse than a: its final train_loss differs by \+0.05 \(\+9.87 %\) on "
         r"average over 6 pairs of runs \(95 % interval \+0.04\d* to .*; lower is better\.$"),
        (-0.05, {}, "better", 0, r"is better than .* differs by -0.05"),
        (0.05, {"higher_is_better": True}, "better", 0, "higher is better"),
        (-0.05, {"higher_is_better": True}, "worse", 1, "is worse than"),
        (0.0, {}, "no difference shown", 0, r"^No difference shown .*; if there is any, it is smaller than 0.00\d+ "
         r"\([\d.]+ %\) with 95 % confidence\.$"),
        (0.0, {"margin": 0.05}, "within the margin", 0, "^No difference larger than 5 % between"),
        (0.0, {"margin": 0.001}, "no difference shown", 0, "which is not within the margin of 0.1 %"),
        (0.0, {"margin": 0.01}, "no difference shown", 0, r"smaller than 0.00\d+ \(1\.\d+ %\)"),  # relative
        (0.01, {"margin": 0.05}, "within the margin", 0, r"differs by \+0.01"),  # shown, but too small to matter
        (0.01, {}, "worse", 1, "is worse than"),
    ],
)  # fmt: skip
def test_the_verdict(tmp_path: Path, by: float, options: dict[str, Any], outcome: str, status: int, words: str) -> None:
    made = one(tmp_path, shifted(by), **options)
    assert made.differences[0].outcome == outcome
    assert made.status == status
    sentences = verdict(made)
    assert len(sentences) == 3
    assert re.search(words, sentences[0]), sentences[0]
    assert sentences[1].endswith(" a in 0 of 6; their losses spiked 0 and 0 times.")
    assert sentences[2] == "What measuring cost was not logged."


def test_equal_runs_have_no_difference(tmp_path: Path) -> None:
    made = one(tmp_path, A[:3], A[:3])
    assert made.differences[0].outcome == "same"
    assert made.status == 0
    assert "3 pairs of runs with exactly the same final train_loss" in verdict(made)[0]


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (1, r"1 pair of runs, and 5 are needed; so far .* \+0.204 \(\+40.8 %\), and there is no interval\."),
        (4, r"4 pairs of runs, and 5 are needed; .* the 87.5 % interval is 0.01\d+ wide\."),
    ],
)
def test_too_few_seeds_are_said(tmp_path: Path, n: int, words: str) -> None:
    made = one(tmp_path, shifted(0.2)[:n], A[:n])
    assert made.differences[0].outcome == "too few runs"
    assert made.status == 0
    assert re.search(words, verdict(made)[0]), verdict(made)[0]


def test_several_comparisons_share_the_error(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path, A, shifted(0.0))
    for seed, final in enumerate(shifted(0.05)):
        run_csv(tmp_path / "c" / f"seed-{seed}", ending(final))
    alone, both = compare([a, b]), compare([a, b, str(tmp_path / "c")])
    assert np.ptp(both.differences[0].metric.ends) > 1.1 * np.ptp(alone.differences[0].metric.ends)
    assert [d.outcome for d in both.differences] == ["no difference shown", "worse"]
    assert both.status == 1
    assert len(verdict(both)) == 3
    assert "widened to 97.5 % (Bonferroni)" in verdict(both)[2]
    assert both.differences[0].metric.confidence == pytest.approx(1 - 2**-5)
    assert [runs_needed(n) for n in (1, 2, 3, 4, 8)] == [5, 6, 7, 7, 8]


def test_the_final_value_is_the_mean_over_the_last_part(tmp_path: Path) -> None:
    run_csv(tmp_path / "a", np.arange(101.0)[::-1])
    run_csv(tmp_path / "b", np.arange(101.0)[::-1] * 2)
    for final, expected in ((0.1, 5.0), (0.5, 25.0), (0.0, 0.0), (1.0, 50.0)):
        ((_, a, b),) = compare([str(tmp_path / "a"), str(tmp_path / "b")], final=final).differences[0].pairs
        assert (a, b) == (expected, 2 * expected)


def test_the_users_own_and_the_packages_values_can_be_compared(tmp_path: Path) -> None:
    for name, acc in (("a", 0.8), ("b", 0.9)):
        for seed in range(5):
            run_csv(
                tmp_path / name / f"seed-{seed}", FALLING, val_acc=acc + seed / 1000, **{"gfs/sharpness": seed + 1.0}
            )
    sets = str(tmp_path / "a"), str(tmp_path / "b")
    made = compare(sets, metric="val_acc", higher_is_better=True)
    assert made.differences[0].outcome == "better"
    assert made.differences[0].metric.difference == pytest.approx(0.1)
    assert made.sets[0].median("final") == pytest.approx(0.802)
    run_csv(tmp_path / "c", [*FALLING, math.nan], val_acc=0.8)
    assert [s.failed for s in compare([sets[0], str(tmp_path / "c")], metric="val_acc").sets] == [0, 1]
    for key in ("gfs/sharpness", "sharpness"):
        assert compare(sets, metric=key).differences[0].outcome == "same"
    with pytest.raises(
        ConfigError, match=r"no run of .*a holds `val_los`; they hold gfs/sharpness, train_loss, val_acc"
    ):
        compare(sets, metric="val_los")


def test_what_is_wrong_with_an_option_is_said(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path, A, A)
    for options, words in (
        ({"final": 1.5}, "`final` must be between 0 and 1"),
        ({"margin": 0.0}, "`margin` must be > 0"),
        ({"margin": math.nan}, "`margin` must be > 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare([a, b], **options)
    with pytest.raises(ConfigError, match="at least two sets"):
        compare([a])
    with pytest.raises(ConfigError, match=r"is in `.*/a` and `.*seed-0`"):
        compare([a, f"{tmp_path}/a/seed-0"])
    with pytest.raises(ConfigError, match=r"is in `.*` twice"):
        compare([f"{a}/seed-0,{a}/seed-0", b])
    with pytest.raises(ConfigError, match="there is nothing at `nowhere-"):
        compare([a, "nowhere-*"])
    run_csv(tmp_path / "signs" / "s0", [1.0, -1.0])
    run_csv(tmp_path / "signs" / "s1", [1.0, 0.5])
    with pytest.raises(ConfigError, match="of both signs"):
        compare([f"{tmp_path}/signs", f"{a}/seed-0,{a}/seed-1"], margin=0.1)


# ---- which runs belong together


def test_pairs_are_made_by_name_then_by_order_or_not_at_all(tmp_path: Path) -> None:
    for name, seeds in {"a": range(11), "b": range(11), "few": (10, 2), "x": range(5, 16), "y": (1, 50)}.items():
        for seed in seeds:
            run_csv(tmp_path / name / f"seed-{seed}" / "lightning_logs" / "version_0", ending(0.5 + seed / 100))
    paths = {name: str(tmp_path / name) for name in ("a", "b", "few", "x", "y")}

    by_name = compare([paths["a"], paths["b"]]).differences[0]
    assert by_name.paired_by == "name"
    assert [name for name, _, _ in by_name.pairs] == [f"seed-{i}" for i in range(11)]

    part = compare([paths["a"], paths["few"]])
    assert part.differences[0].paired_by == "name"
    assert part.differences[0].pairs == (
        ("seed-2", pytest.approx(0.52), pytest.approx(0.52)), ("seed-10", pytest.approx(0.6), pytest.approx(0.6))
    )  # fmt: skip
    assert "seed-0 of " in part.differences[0].left_out[0]
    assert len(part.differences[0].left_out) == 9
    assert re.search("left out of the difference, with their partners: seed-0 .* and 4 more", verdict(part)[1])

    order = compare([paths["a"], paths["x"]])
    assert order.differences[0].paired_by == "order"
    assert order.differences[0].pairs[0] == ("seed-0 / seed-5", pytest.approx(0.5), pytest.approx(0.55))
    assert "11 pairs of runs put together in order" in verdict(order)[0]

    apart = compare([paths["a"], paths["y"]])
    assert apart.differences[0].paired_by is None
    assert apart.differences[0].counts == (11, 2)
    assert apart.differences[0].metric.difference == pytest.approx((0.51 + 1.0) / 2 - 0.55)
    assert "11 runs of" in verdict(apart)[0]
    assert "not paired" in verdict(apart)[0]


def test_sets_are_folders_globs_files_or_lists_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        run_csv(tmp_path / "plain" / "lightning_logs" / f"version_{i}", ending(0.5 + i / 10))
        run_csv(tmp_path / f"cap-{i}", ending(0.6 + i / 10))
    monkeypatch.chdir(tmp_path)
    by_glob = compare(["plain", "cap-*"])
    assert [r.name for r in by_glob.sets[0].results] == ["version_0", "version_1", "version_2"]
    assert [r.name for r in by_glob.sets[1].results] == ["cap-0", "cap-1", "cap-2"]
    assert by_glob.differences[0].metric.difference == pytest.approx(0.1)
    listed = compare(["plain/lightning_logs/version_*/metrics.csv", "cap-0, cap-1/metrics.csv,cap-2"])
    assert [r.name for r in listed.sets[0].results] == ["version_0", "version_1", "version_2"]
    assert listed.differences[0].metric == by_glob.differences[0].metric


def test_broken_runs_are_left_out_and_said(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path, A, shifted(0.05))
    whole = (tmp_path / "b" / "seed-1" / "metrics.csv").read_text()
    (tmp_path / "b" / "seed-1" / "metrics.csv").write_text(whole[: len(whole) // 2] + "\x00\xff")  # cut within a row
    (tmp_path / "b" / "seed-2" / "metrics.csv").write_text("epoch,step,train_loss\n")
    (tmp_path / "b" / "seed-3" / "metrics.csv").unlink()
    (tmp_path / "b" / "seed-4" / "metrics.csv").unlink()
    (tmp_path / "b" / "seed-4" / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0, "st')
    made = compare([a, b])
    assert [r.name for r in made.sets[1].results] == ["seed-0", "seed-1", "seed-5"]
    assert [d.outcome for d in made.differences] == ["too few runs"]
    for seed, why in (
        (2, "holds no logged value"),
        (3, "holds no history.jsonl"),
        (4, "trainer_state.json was left out"),
    ):
        assert any(f"seed-{seed} was left out" in note and why in note for note in made.notes), made.notes
    assert re.search(r"ended early, where others reached step 40: seed-1 of b at step \d+\.", verdict(made)[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no run of .*empty` can be read: .* holds no history.jsonl"):
        compare([a, str(tmp_path / "empty")])


def test_losses_under_different_keys_are_not_compared(tmp_path: Path) -> None:
    run_csv(tmp_path / "a", FALLING)
    run_csv(tmp_path / "b", FALLING, key="loss")
    with pytest.raises(ConfigError, match=r"several keys: `train_loss` \(.*a: a\), `loss` \(.*b: b\); name one"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")])
    run_csv(tmp_path / "c", FALLING, key="accuracy")
    run_csv(tmp_path / "d", FALLING, key="f1")
    with pytest.raises(ConfigError, match="no training loss was found"):
        compare([str(tmp_path / "c"), str(tmp_path / "d")])


# ---- what became of the runs


def of_trainer(folder: Path, losses: Sequence[float], norms: Sequence[float], seconds: float) -> None:
    folder.mkdir(parents=True)
    rows: list[dict[str, float]] = [
        {"step": 5 * (i + 1), "loss": x, "grad_norm": g} for i, (x, g) in enumerate(zip(losses, norms, strict=True))
    ]
    rows.append({"step": 5 * len(losses), "train_runtime": seconds})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))


def test_divergence_counts_and_takes_the_pair_out(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path, A, shifted(0.0))
    for seed, values in ((1, [*FALLING, math.nan]), (4, [*FALLING, *np.linspace(1, 3, 40)])):
        (tmp_path / "b" / f"seed-{seed}" / "metrics.csv").unlink()
        (tmp_path / "b" / f"seed-{seed}").rmdir()
        run_csv(tmp_path / "b" / f"seed-{seed}", values)
    made = compare([a, b])
    assert [r.failed for r in made.sets[1].results] == [False, True, False, False, True, False]
    assert [r.final is None for r in made.sets[1].results] == [False, True, False, False, True, False]
    assert [name for name, _, _ in made.differences[0].pairs] == ["seed-0", "seed-2", "seed-3", "seed-5"]
    assert made.differences[0].metric.difference == pytest.approx(np.mean([NOISE[i] for i in (0, 2, 3, 5)]))
    assert made.status == 1  # more runs failed than of the baseline
    p = stats.fisher_exact([[2, 4], [0, 6]]).pvalue
    assert (
        f"b failed in 2 of 6 runs, a in 0 of 6 (Fisher's exact test: p = {p:.2g}); left out of the difference"
        in (verdict(made)[1])
    )
    assert "seed-1 of b (failed), seed-4 of b (failed)" in verdict(made)[1]
    assert compare([b, a]).status == 0
    (alone,) = compare([f"{a}/seed-0", f"{b}/seed-1"]).differences
    assert alone.metric is None
    assert alone.outcome == "too few runs"


def test_a_noisy_start_is_no_divergence(tmp_path: Path) -> None:
    """A fine-tuning that hardly moves: half of the single first losses are below the final mean."""
    rng = np.random.default_rng(0)
    for name in "ab":
        for seed in range(6):
            run_csv(tmp_path / name / f"seed-{seed}", 1 + 0.1 * rng.normal(size=200))
    made = compare([str(tmp_path / "a"), str(tmp_path / "b")])
    firsts = [run.loss().values[0] for s in made.sets for run in s.runs]
    assert sum(first < 1 for first in firsts) > 3
    assert [s.failed for s in made.sets] == [0, 0]


def test_the_trainers_zero_in_place_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """What transformers 5 writes: from the first NaN on the loss is 0, and the gradient norm NaN."""
    for seed in range(5):
        of_trainer(tmp_path / "a" / f"s{seed}" / "checkpoint-30", [3, 2, 1, 1, 1, 1], [1.0] * 6, 20 + seed)
        bad = seed == 2
        of_trainer(
            tmp_path / "b" / f"s{seed}" / "checkpoint-30",
            [3.8e32, 0, 0, 0, 0, 0] if bad else [3, 2, 1, 1, 1, 1], [math.nan if bad else 1.0] * 6, 22 + seed,
        )  # fmt: skip
    made = compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [r.failed for r in made.sets[1].results] == [False, False, True, False, False]
    assert made.differences[0].seconds.difference == pytest.approx(2)
    assert "took 24 s, one of" in verdict(made)[2]


def test_a_history_alone_tells_divergence_by_its_alarm(tmp_path: Path) -> None:
    for name, failed in (("a", False), ("b", True)):
        path = tmp_path / name / "history.jsonl"
        for step in (0, 10, 20):
            append(path, gfs.Measurement.of(step, "SGD", loss_probe=1 / (1 + step), overhead=0.04, alarm=0))
        if failed:
            append(path, gfs.Measurement.of(23, "SGD", alarm=2, reasons=("the loss is inf",)))
    made = compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert made.metric == "gfs/loss_probe"
    assert [s.failed for s in made.sets] == [0, 1]
    assert [s.results[0].alarms for s in made.sets] == [0, 1]
    assert [s.results[0].overhead for s in made.sets] == [0.04, 0.04]
    assert "Measuring took 4 % of the wall time of" in verdict(made)[2]


def test_spikes_are_counted() -> None:
    rng = np.random.default_rng(3)
    calm = 1 + 0.05 * rng.normal(size=300)
    assert count_spikes(calm) == 0
    spiky = calm.copy()
    spiky[30] += 1  # in the first 50
    spiky[100:103] += 1  # one, of three steps
    spiky[200] = math.nan
    spiky[250] -= 1  # down is none
    assert count_spikes(spiky) == 3
    before = calm[50:100]
    spread = 1.4826 * np.median(abs(before - np.median(before)))
    for factor, expected in ((5.9, 0), (6.1, 1)):
        edge = calm.copy()
        edge[100] = np.median(before) + factor * spread
        assert count_spikes(edge) == expected
    assert count_spikes(np.exp(-np.arange(500) / 50)) == 0
    assert count_spikes(np.ones(20)) is None
    assert count_spikes(np.ones(300)) == 0


def test_losses_that_were_logged_at_other_steps_are_not_compared_by_spikes(tmp_path: Path) -> None:
    run_csv(tmp_path / "a", FALLING)
    path = run_csv(tmp_path / "b", []) / "metrics.csv"
    path.write_text("step,train_loss\n" + "".join(f"{10 * i},{x}\n" for i, x in enumerate(FALLING)))
    assert "the loss was logged every 10 and 1 steps" in verdict(compare([str(tmp_path / "a"), str(tmp_path / "b")]))[1]


# ---- the page and the command


def test_the_page_escapes_and_says_what_was_found(tmp_path: Path) -> None:
    for name, by in (("plain", 0.0), (HOSTILE, 0.05)):
        for seed, final in enumerate(shifted(by)):
            run_csv(tmp_path / name / f"{HOSTILE}{seed}", ending(final))
    run_csv(tmp_path / "plain" / f"{HOSTILE}\x1b[31m", [math.nan] * 3)
    made = compare([str(tmp_path / "plain"), str(tmp_path / HOSTILE)])
    assert made.sets[0].results[-1].name == f"{HOSTILE}�[31m"
    write_comparison(made, tmp_path / "pages" / "page.html")
    page = (tmp_path / "pages" / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    for text in ("is worse than", "Training loss", "Final train_loss", "The sets", "How this was judged", "0.554"):
        assert text in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", page)
    assert len(page) < 5_000_000
    needs_chromium()
    assert look_at(tmp_path / "pages" / "page.html", "compare") == 2


def test_the_same_input_gives_the_same_output(tmp_path: Path) -> None:
    sets = two_sets(tmp_path, A, shifted(0.01))
    assert json.dumps(as_dict(compare(sets))) == json.dumps(as_dict(compare(sets)))


def test_the_command(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path, A, shifted(0.05))
    run: Callable[..., Any] = lambda *args: CliRunner().invoke(app, ["compare", *args])  # noqa: E731
    told = run(a, b, "--out", str(tmp_path / "page.html"))
    assert told.exit_code == 1, told.output
    assert "is worse than" in " ".join(told.output.split())
    assert (tmp_path / "page.html").is_file()
    assert run(b, a).exit_code == 0
    held = json.loads(run(a, b, "--json", "--margin", "0.2").output)
    assert held["status"] == 0
    assert held["differences"][0]["outcome"] == "within the margin"
    assert held["differences"][0]["metric"]["difference"] == pytest.approx(0.05)
    assert held["sets"][0]["runs"][0]["final"] == pytest.approx(0.5)
    assert run(a, b, "--higher-is-better").exit_code == 0
    for wrong, words in (
        ((a,), "at least two sets"),
        ((a, b, "--final", "2"), "`final` must be"),
        ((a, b, "--out", f"{a}/seed-0/metrics.csv/page.html"), "choose another file with --out"),
        ((a, b, "--metric", "val_loss"), "they hold train_loss"),
    ):
        failed = run(*wrong)
        assert failed.exit_code == 2
        assert words in " ".join(failed.output.split())
        assert "Traceback" not in failed.output


# ---- real runs


class Digits(LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def train(folder: Path, seed: int, rate: float, callbacks: list[Any]) -> None:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:256], torch.tensor(labels)[:256])
    seed_everything(seed, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=40, accelerator="cpu", logger=CSVLogger(folder, name="", version=f"seed-{seed}"),
            callbacks=callbacks, log_every_n_steps=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Digits(rate), DataLoader(data, batch_size=64, shuffle=True))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a rate that diverges, plain and under the cap; and with a good one, plain, watched and capped."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("real")
    guard: dict[str, Any] = {"tier": "sharpness", "max_overhead": None}
    for seed in range(5):
        train(root / "plain", seed, 0.5, [])
        train(root / "watched", seed, 0.5, [GFSCallback(**guard)])
        train(root / "wild", seed, 30.0, [])
        train(root / "wild-cap", seed, 30.0, [GFSCallback(control="cap", **guard)])
    return root


def test_real_runs_watched_end_as_plain_ones_do(real: Path) -> None:
    made = compare([str(real / "plain"), str(real / "watched")])
    assert made.differences[0].outcome == "same"  # measuring changes nothing
    assert made.differences[0].paired_by == "name"
    assert made.status == 0
    values = np.loadtxt(real / "plain" / "seed-3" / "metrics.csv", delimiter=",", skiprows=1, usecols=(1, 2))
    assert values[:, 0].tolist() == list(range(40))
    assert made.sets[0].results[3].final == pytest.approx(values[36:, 1].mean())  # steps 35.1 to 39
    assert 0 < made.sets[1].median("overhead") < 1
    assert len(made.sets[0].known("overhead")) == 0
    assert re.search(r"Measuring took [\d.]+ % of the wall time of watched \(median\); alarms: 0 in", verdict(made)[2])


def test_the_cap_saves_real_runs_from_a_rate_that_diverges(real: Path, tmp_path: Path) -> None:
    made = compare([str(real / "wild"), str(real / "wild-cap"), str(real / "plain")])
    assert [s.failed for s in made.sets] == [5, 0, 0]
    assert made.status == 0
    assert compare([str(real / "wild-cap"), str(real / "wild")]).status == 1
    capped = compare([str(real / "plain"), str(real / "wild-cap")])
    assert capped.differences[0].metric is not None
    assert len(capped.differences[0].pairs) == 5
    write_comparison(made, tmp_path / "page.html")
    assert "failed in 0 of 5 runs" in (tmp_path / "page.html").read_text()
