"""Every example runs as its first lines say, in an empty folder."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest

import gfs_core as gfs
from gfs_report.comparison.compare import compare
from tests.forks import START

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTLING = range(0, 13, 2)  # steps at which the running estimate settles
EARLY = 150  # steps in which it is measured beside its interval, at distances that grow
ENDS = range(28, 1000, 29)  # steps that end an epoch of 1797 digits in batches of 64: with 5, which are not measured


def run(folder: Path, script: str, *arguments: str) -> str:
    """What it prints, as ``python EXAMPLES/script ARGUMENTS`` would."""
    out, told = folder / "printed", folder / "told"
    started = multiprocessing.get_context(START).Process(target=_run, args=(folder, script, arguments, out, told))
    started.start()
    started.join()
    assert started.exitcode == 0, told.read_text()
    return out.read_text()


def _run(folder: Path, script: str, arguments: tuple[str, ...], out: Path, told: Path) -> None:
    os.chdir(folder)
    for number, path in ((1, out), (2, told)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(EXAMPLES / script), *arguments]
    sys.path.insert(0, str((EXAMPLES / script).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()


def printed(measurement: gfs.Measurement) -> str:
    ratios = [(k, v) for k, v in measurement.as_log_dict().items() if k.endswith("stability_ratio")]
    return "  ".join([f"step {measurement.step:3d}", *(f"{k} {v:.3f}" for k, v in ratios)])


def assert_due(history: list[gfs.Measurement], regular: set[int]) -> None:
    """The estimate is measured at its interval, and at first beside it: while it settles, and a few times more."""
    steps = [m.step for m in history]
    beside = set(steps) - regular
    assert steps == sorted({*regular, *beside})
    assert beside >= {*SETTLING} - regular
    assert max(beside) < EARLY
    assert len(beside) < 20


def test_plain_loop(tmp_path: Path) -> None:
    lines = run(tmp_path, "plain_loop.py").splitlines()
    history = gfs.read_history(tmp_path / "plain-history.jsonl")
    assert_due(history, {*range(0, 200, 5)})
    assert lines == [printed(m) for m in history]
    for m in history:
        assert m.threshold == 2 * 1.9 / 0.5
        assert (m.sharpness is not None) == (m.step % 20 == 0)
        assert (m.running_stability_ratio is not None) == (m.step >= 12)
        assert all(0 < r < 1.5 for r in (m.running_stability_ratio, m.stability_ratio) if r is not None)


def test_controlled_loop(tmp_path: Path) -> None:
    lines = run(tmp_path, "controlled_loop.py").splitlines()
    losses = {line.split(":")[0]: float(line.split()[-1]) for line in lines if ": loss" in line}
    assert losses["follow"] < 0.1
    assert losses["observe"] > 2.0
    assert "follow: step 0, rate used 0.05, scale 0.01" in lines


def test_find_rate(tmp_path: Path) -> None:
    lines = run(tmp_path, "find_rate.py").splitlines()
    before, after = (float(line.split()[-1]) for line in lines[-2:])
    assert lines[0].startswith("FoundRate(")
    assert after < 0.25 < 1 < before


def test_lightning_find_rate(tmp_path: Path) -> None:
    lines = run(tmp_path, "lightning/find_rate.py").splitlines()
    before, after = (float(line.split()[-1]) for line in lines if line.startswith("rate "))
    assert any(line.startswith("FoundRate(") for line in lines)
    assert after < 0.25 < 2 < before
    assert not list(tmp_path.rglob("*.ckpt"))


def test_huggingface_find_rate(tmp_path: Path) -> None:
    lines = run(tmp_path, "huggingface/find_rate.py").splitlines()
    [after] = [float(line.split()[-1]) for line in lines if line.startswith("rate ")]
    assert any(line.startswith("FoundRate(") for line in lines)
    assert after < 2.9  # 3.8 at the trainer's default rate


def test_rescued_loop(tmp_path: Path) -> None:
    lines = run(tmp_path, "rescued_loop.py").splitlines()
    losses = {line.split(":")[0]: float(line.split()[-1]) for line in lines if ": loss" in line}
    assert not losses["log"] < 1
    assert losses["rescue"] < 0.1
    assert losses["start"] < 0.1
    assert "rescue: step 60: the step was skipped: nothing is updated by it" in lines
    assert [line.split(":")[0] for line in lines if "the run went back" in line] == ["rescue", "start"]
    assert sum("as the rate rose; it is kept below" in line for line in lines) == 1


def test_second_data(tmp_path: Path) -> None:
    """Without the old digits in the batches their loss rises more, and becomes sharper."""
    alone, mixed = run(tmp_path, "second_data.py").split("half of each batch from the old digits\n")
    words = [[line.split() for line in text.splitlines() if "step" in line] for text in (alone, mixed)]
    (first, *_, last), (again, *_, kept) = ([[float(row[i]) for i in (1, 5, 7)] for row in rows] for rows in words)
    assert first == again
    assert first[0] == 0
    assert last[0] == kept[0] == 50
    assert last[1] > 5 > 1 > kept[1]
    assert last[2] > 2 * kept[2] > 2 * first[2]


def test_torchmetrics_loop(tmp_path: Path) -> None:
    lines = run(tmp_path, "torchmetrics_loop.py").splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"epoch {epoch}" for epoch in range(8)]
    values = [dict(part.rsplit(" ", 1) for part in line.split("  ")[1:]) for line in lines]
    assert all(v.keys() == {"accuracy", "sharpness", "stability ratio"} for v in values)
    assert float(values[-1]["accuracy"]) > 0.85
    for v in values:  # the threshold is 2·1.9/0.5
        assert float(v["stability ratio"]) == pytest.approx(float(v["sharpness"]) / 7.6, abs=0.006)


def test_lightning(tmp_path: Path) -> None:
    run(tmp_path, "lightning/digits.py")
    [path] = tmp_path.glob("lightning_logs/*/history.jsonl")
    history = gfs.read_history(path)
    assert history[0].step == 2  # Adam has no second moments before its first step
    assert all(0.01 < m.running_stability_ratio < 10 for m in history if m.running_stability_ratio is not None)
    assert sum(m.running_stability_ratio is not None for m in history) >= 2


def test_an_ab_test(tmp_path: Path) -> None:
    run(tmp_path, "lightning/ab_test.py", "1")
    made = compare([str(tmp_path / "runs" / "plain"), str(tmp_path / "runs" / "cap")])
    assert made.metric == "train_loss"
    assert made.differences[0].outcome == "too few runs"
    assert made.differences[0].pairs[0][0] == "seed-0"
    assert made.sets[1].results[0].overhead is not None


def test_lightning_from_yaml(tmp_path: Path) -> None:
    config = str(EXAMPLES / "lightning" / "digits.yaml")
    run(tmp_path, "lightning/cli.py", "fit", "--config", config, "--trainer.callbacks.max_overhead=null")
    [path] = tmp_path.glob("lightning_logs/*/history.jsonl")
    history = gfs.read_history(path)
    assert_due(history, {*range(0, 8 * 29, 5)} - {*ENDS})
    assert [m.step for m in history if m.gfs_sharpness is not None][-1] == 220


def test_language_model(tmp_path: Path) -> None:
    flags = ["--max_steps", "21", "--gfs_every", "10", "--gfs_max_overhead", "1.0", "--gfs_tier", "sharpness"]
    run(tmp_path, "huggingface/language_model.py", *flags)
    history = gfs.read_history(tmp_path / "language-model" / "history.jsonl")
    assert [m.step for m in history][:2] == [2, 4]
    assert history[1].threshold == pytest.approx(3.8 / (0.1 * 2e-3 * (1 - 4 / 21)))  # the rate decays linearly


def test_sentence_embeddings(tmp_path: Path) -> None:
    run(tmp_path, "huggingface/sentence_embeddings.py")
    history = gfs.read_history(tmp_path / "sentence-embeddings" / "history.jsonl")
    assert [m.step for m in history] == [0, 2, 4, 5, 6]
    assert [m.step for m in history if m.sharpness is not None] == [0, 5]
    assert all(100 < m.sharpness < 5000 for m in history if m.sharpness is not None)


def test_lightning_language_model(tmp_path: Path) -> None:
    run(tmp_path, "lightning/language_model.py")
    [path] = tmp_path.glob("lightning_logs/*/history.jsonl")
    history = gfs.read_history(path)
    assert [m.step for m in history][:2] == [2, 4]
    assert all(m.running_stability_ratio > 0 for m in history if m.running_stability_ratio is not None)


def test_lightning_sentence_embeddings(tmp_path: Path) -> None:
    run(tmp_path, "lightning/sentence_embeddings.py")
    [path] = tmp_path.glob("lightning_logs/*/history.jsonl")
    history = gfs.read_history(path)
    assert [m.step for m in history] == [0, 2, 4, 5, 6]
    assert [m.step for m in history if m.sharpness is not None] == [0, 5]
    assert all(100 < m.sharpness < 5000 for m in history if m.sharpness is not None)


@pytest.mark.parametrize("kind", ["fabric", "accelerate"])
def test_other_loops(tmp_path: Path, kind: str) -> None:
    lines = run(tmp_path, f"{kind}_loop.py").splitlines()
    history = gfs.read_history(tmp_path / f"{kind}-history.jsonl")
    assert_due(history, {*range(0, 4 * 29, 5)} - {*ENDS})
    assert all(m.threshold == pytest.approx(3.8 / (0.1 * 3e-3), rel=1e-3) for m in history[1:])
    assert lines == [printed(m) for m in history]
    assert all(m.running_stability_ratio > 0 for m in history if m.step > 15)  # it has settled
    assert [m.step for m in history if m.preconditioned_sharpness is not None] == list(range(20, 4 * 29, 20))
