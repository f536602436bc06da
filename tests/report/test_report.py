from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import Tensor, nn
from typer.testing import CliRunner

import gfs_core as gfs
from gfs_core.run import history
from gfs_report.cli import app
from gfs_report.page import Table
from gfs_report.plots import thinned
from gfs_report.report import make_report
from gfs_report.runs import Curve, Mark, Run, read_run
from gfs_report.verdict import judge
from tests.report.test_runs import written

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def over(steps: int, value: Any) -> Curve:
    """A value for each step; a function of the step, or a constant."""
    at = np.arange(steps)
    return Curve(at, np.array([value(s) if callable(value) else value for s in at], float))


def run_with(loss: Any = lambda s: 1 / (1 + s), marks: list[Mark] | None = None, **gfs_values: Any) -> Run:
    return Run(
        "r",
        gfs={key: over(100, v) for key, v in gfs_values.items()},
        logged={"loss": over(100, loss)},
        marks=marks or [],
    )


ALARM = [Mark(40, 2, "the loss is 9")]


@pytest.mark.parametrize(
    ("run", "standing", "summary", "where", "what", "do"),
    [
        (run_with(), "unknown", "went well: its loss went from 1 to 0.0105", "not known", "^$", "Add GFSCallback"),
        (
            run_with(stability_ratio=0.1),
            "far",
            "went well",
            "far below .* 0.10 .* never past 1 in 100",
            "^$",
            "gfs pilot",
        ),
        (
            run_with(stability_ratio=0.5, alarm=0),
            "near",
            "went well",
            "below the edge",
            "stayed quiet",
            "Nothing has to be done",
        ),
        (
            run_with(stability_ratio=lambda s: 0.5 if s < 50 else 1.0, marks=ALARM, alarm=0),
            "edge",
            "went well: .* came back from its early warnings",
            r"at the edge .* between 0\.50 and 1\.00, past 1 in 50% of 100",
            "an alarm at step 40: the loss is 9",
            "came back from its alarms by itself",
        ),
        (
            run_with(running_stability_ratio=2.0, learning_rate=0.1),
            "past",
            "but its steps are past the edge",
            "its running stability ratio was 2.00",
            "^$",
            r"Lower the learning rate, to about 0\.025 \(0\.025 to 0\.025, by 50 measurements of the .* their edge",
        ),
        (
            run_with(stability_ratio=0.5, mean_square_stability_ratio=2.0, lr_effective=0.1),
            "near",
            "went well",
            r"below .*in the mean square\) it was 2\.00, by 50 measurements; .* no verdict rests on it",
            "^$",
            "Nothing has to be done",
        ),
        (
            run_with(stability_ratio=0.5, alarm=2, marks=ALARM),
            "near",
            "early warning is still on",
            "below",
            "alarm at step 40",
            "the alarm is still on",
        ),
        (
            run_with(loss=lambda s: 1.0 if s < 60 else np.nan, stability_ratio=0.9, marks=ALARM),
            "edge",
            "destroyed: from step 60 on its loss was not finite",
            "at the edge",
            "raised an alarm at step 40",
            "Start again with a lower learning rate",
        ),
        (
            run_with(loss=lambda s: 1 / (1 + s) if s < 60 else np.nan, stability_ratio=0.9, marks=ALARM),
            "edge",
            "destroyed: from step 60 on its loss was not finite",
            "at the edge",
            "raised an alarm at step 40",
            "from a checkpoint before step 40",
        ),
        (
            run_with(loss=lambda s: 1.0 + s, stability_ratio=0.9),
            "edge",
            r"destroyed: its loss ended at 95\.5, far above its start: it began at 1\.",
            "at the edge",
            "^$",
            "Start again with a lower learning rate",
        ),
        (
            run_with(loss=lambda s: 1 / (1 + s) if s < 60 else 0.9, stability_ratio=0.1),
            "far",
            r"destroyed: its loss ended at 0\.9, after a best of .* at step 59; since about step 60 it has lost 9\d%",
            "far below",
            "^$",
            r"from a checkpoint before step 60 .* Only where the data or the loss were made harder",
        ),
        (
            run_with(stability_ratio=0.5, lr_scale=0.25, gfs_sharpness_full=lambda s: 30 - s / 10),
            "near",
            "went well",
            "below",
            r"down to 0\.25 of what .* full GFS sharpness went from 30 to 20\.1",
            "Nothing has to be done",
        ),
    ],
)
def test_the_verdict(run: Run, standing: str, summary: str, where: str, what: str, do: str) -> None:
    verdict = judge(run)
    assert verdict.standing == standing
    for pattern, sentence in zip(
        (summary, where, what, do), (verdict.summary, verdict.where, verdict.what, verdict.do), strict=True
    ):
        assert re.search(pattern, sentence, re.IGNORECASE), sentence
        assert sentence.endswith(".") or not sentence
    assert verdict.sentences[0] == verdict.summary
    assert all(verdict.sentences)


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    values[[31_234, 77_777]] = [50.0, -50.0]
    thin = thinned(Curve(np.arange(100_000), values), most=500)
    assert len(thin.steps) <= 1002
    assert {31_234, 77_777, 0, 99_999} <= set(thin.steps.tolist())
    assert (np.diff(thin.steps) > 0).all()
    assert np.array_equal(thin.values, values[thin.steps])


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "<b>run" / "history.jsonl"
    first = gfs.Measurement.of(0, HOSTILE, sharpness=1.0, stability_ratio=0.5, reasons=(HOSTILE,), loss_probe=2.0)
    second = gfs.Measurement.of(1, HOSTILE, stability_ratio=0.7, alarm=2, reasons=(f"alarm {HOSTILE}",), loss_probe=1.0)
    return written(path, first, second, evil=HOSTILE)


def invoke(*given: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, given)])


def test_a_page_is_one_file_that_escapes_what_it_shows(hostile: Path, tmp_path: Path) -> None:
    done = invoke(hostile, "-o", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "never past 1 in 2 measurements" in done.output
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", page)
    assert not re.findall(r"@import|url\(\s*['\"]?http", page)
    assert 'id="alarm-0"' in page
    assert list(tmp_path.iterdir()) == [tmp_path / "<b>run", tmp_path / "page.html"]


def test_text_numbers_and_pictures(hostile: Path, tmp_path: Path) -> None:
    for ending in ("md", "json", "svg", "png"):
        assert invoke(hostile, "-o", tmp_path / f"r.{ending}").exit_code == 0
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["verdict"]["standing"] == "near"
    assert held["values"]["stability_ratio"]["last"] == 0.7
    assert held["values"]["stability_ratio"]["points"] == 2
    assert held["alarms"] == [{"step": 1, "state": 2, "reason": f"alarm {HOSTILE}"}]
    text = (tmp_path / "r.md").read_text()
    assert "&lt;script>" in text
    assert "<script" not in text
    assert "| 0 | 2 | 0.5 | 1 |" in text
    drawing = ET.parse(tmp_path / "r.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert not drawing.findall(".//{http://www.w3.org/2000/svg}script")
    assert imread(tmp_path / "r.png").shape[1] == 1200


def test_a_report_stands_keys_of_a_later_version_and_layers(tmp_path: Path) -> None:
    path = written(tmp_path / "run" / "history.jsonl", gfs.Measurement.of(0, "SGD", stability_ratio=0.5, residual=1e-3))
    with path.open("a") as file:
        for step in (1, 2):
            line = {"step": step, "optimizer_name": "SGD", "stability_ratio": 0.6, "of_a_later_version": step}
            file.write(json.dumps(line | {"layers": {"sharpness": {"net.0": 1.0}, "new": {"net.0": 2.0}}}) + "\n")
    for ending in ("html", "md", "json", "svg"):
        done = invoke(path, "-o", tmp_path / f"r.{ending}")
        assert done.exit_code == 0, done.output
    held = json.loads((tmp_path / "r.json").read_text())["values"]
    assert set(held) == {"stability_ratio", "residual", "of_a_later_version"}
    assert held["of_a_later_version"]["last"] == 2.0
    assert held["of_a_later_version"]["meaning"] == "of_a_later_version"
    assert held["residual"]["meaning"].startswith("bound on the distance of the sharpness")


def test_a_format_beats_the_ending_and_an_unknown_ending_is_told(hostile: Path, tmp_path: Path) -> None:
    assert invoke(hostile, "-o", tmp_path / "r.txt", "--format", "md").exit_code == 0
    assert (tmp_path / "r.txt").read_text().startswith("# Stability of")
    done = invoke(hostile, "-o", tmp_path / "r.doc")
    assert done.exit_code == 2
    assert "ends in no known format; let it end in .html, .png, .svg, .md, .json" in done.output
    done = invoke(hostile, "-o", tmp_path / "page.html" / "x" / "y.html", "--loss", "nope")
    assert done.exit_code == 2
    assert "holds no `nope`" in done.output


def test_a_place_that_cannot_be_written_is_said(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke(hostile, "-o", tmp_path / "file" / "r.html")
    assert done.exit_code == 2
    assert "choose another file with --out" in done.output


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    rng = np.random.default_rng(0)
    keys = ("loss_probe", "sharpness", "threshold", "stability_ratio", "running_stability_ratio", "gfs_sharpness",
            "overhead", "hvps", "grad_evals", "learning_rate")  # fmt: skip
    with path.open("w") as file:
        for step, row in enumerate(rng.uniform(0.5, 1.5, (100_000, len(keys)))):
            file.write(json.dumps({"step": step, **dict(zip(keys, row, strict=True))}) + "\n")
    assert invoke(path, "-o", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size < 5_000_000


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_watching_follows_a_run_that_begins_later(tmp_path: Path, ending: signal.Signals) -> None:
    path, page = tmp_path / "run" / "history.jsonl", tmp_path / "page.html"
    command = [sys.executable, "-m", "gfs_report", "report", str(path), "-o", str(page), "--watch", "--every", "1"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        assert "follows" in job.stdout.readline()
        written(path, gfs.Measurement.of(3, "SGD", stability_ratio=0.5))
        assert job.stdout.readline().startswith("step 3: The run ended below the edge")
        assert '<meta http-equiv="refresh" content="1">' in page.read_text()
        history.append(path, gfs.Measurement.of(8, "SGD", stability_ratio=2.0))
        assert job.stdout.readline().startswith("step 8: The run ended past the edge")
        time.sleep(0.2)
        job.send_signal(ending)
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert "http-equiv" not in page.read_text()


def test_a_rate_that_a_control_held_down_is_shown_beside_the_asked_one() -> None:
    run = run_with(lr_effective=0.05, lr_scale=0.5, learning_rate=0.05)
    rate = next(p for p in make_report(run).pictures if p.heading == "Learning rate")
    assert [(line.name, line.curve.last) for line in rate.lines] == [("asked for", 0.1), ("used", 0.05)]


def test_a_part_of_a_history_is_named_in_every_format(tmp_path: Path) -> None:
    path = tmp_path / "run" / "history.jsonl"
    for name, ratio in (("a", 0.2), ("b", 0.9)):
        history.begin(path, {}, run=name)
        for step in (0, 10):
            history.append(path, gfs.Measurement.of(step, "SGD", stability_ratio=ratio), run=name)
    latest = invoke(path, "-o", tmp_path / "latest.json")
    assert "This is part 2 of 2 in its history; --part N shows another one." in latest.output
    first = invoke(path, "-o", tmp_path / "first.json", "--part", "1")
    assert "far below" in first.output
    held = json.loads((tmp_path / "first.json").read_text())
    assert (held["part"], held["parts"], held["title"]) == (1, 2, "Stability of run, SGD, part 1 of 2")
    assert held["values"]["stability_ratio"]["last"] == 0.2
    assert invoke(path, "-o", tmp_path / "first.html", "--part", "1").exit_code == 0
    assert "SGD, part 1 of 2" in (tmp_path / "first.html").read_text()
    missing = invoke(path, "--part", "5", "-o", tmp_path / "x.html")
    assert missing.exit_code == 2
    assert "there is no part 5; it holds 2" in missing.output


@pytest.mark.parametrize("second", [False, True])
def test_a_second_data_set_says_nothing_about_the_run(second: bool) -> None:
    """Past the edge, with a loss that rises: of the data that is not trained on, that is no fault of the run."""
    run = run_with(stability_ratio=3.0, loss_probe=lambda s: 1 + s)
    run.settings = {"probe": "loader" if second else "batch"}
    verdict = judge(run)
    assert verdict.failed is not second
    assert verdict.standing == ("unknown" if second else "past")
    if second:
        assert verdict.summary.startswith("This run went well")
        assert "that of a second data set" in verdict.where
        assert "measure the data that it trains on" in verdict.do
    run.logged = {}
    assert (run.loss() is None) is second


LAYERS = [f"h{i}" for i in range(12)]  # more than the table holds


def trained(path: Path, steps: int, **options: Any) -> list[gfs.Measurement]:
    """What was measured in a training of twelve layers on the digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, name in enumerate(LAYERS):
        model.add_module(name, nn.Linear(8 if i else 64, 10 if name == LAYERS[-1] else 8))
        model.add_module(f"act{i}", nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = gfs.GFSConfig(max_overhead=None, history=str(path), **options)
    monitor = gfs.StabilityMonitor(model, optimizer, config)

    def loss_of(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    told = []
    for step in range(steps):
        rows = torch.randint(1797, (64,))
        optimizer.zero_grad()
        loss_of(rows).backward()
        told.append(monitor.step(loss_of, rows, step))
        optimizer.step()
    return [m for m in told if m is not None]


@pytest.mark.parametrize(
    ("options", "steps", "key"),
    [
        ({"tier": "sharpness", "every": 20, "running_every": 3}, 61, "curvature_share"),
        ({"tier": "sharpness", "every": 20, "running_every": 3}, 25, "running_curvature_share"),
        ({"tier": "running", "every": 3}, 22, "running_curvature_share"),
    ],
    ids=["both at last", "solved for before", "never solved for"],
)
def test_where_the_curvature_sits_is_what_was_logged_last(
    tmp_path: Path, options: dict[str, Any], steps: int, key: str
) -> None:
    path = tmp_path / "history.jsonl"
    told = trained(path, steps, **options)
    last = next(m for m in reversed(told) if m.layers("curvature_share") or m.layers("running_curvature_share"))
    shares = last.layers(key)
    assert last.step == steps - 1
    assert set(shares) == set(LAYERS)
    assert sum(shares.values()) == pytest.approx(1)
    assert key == "curvature_share" or not last.layers("curvature_share")
    before = next(m for m in told if m.layers(key)).layers(key)
    assert before is shares or before != shares  # an earlier measurement has others

    largest = sorted(shares, key=lambda layer: -shares[layer])[:10]
    rows = [[layer, f"{shares[layer]:.1%}"] for layer in largest]
    [table] = [s for s in make_report(read_run(path)).sections() if s.heading == "Where the curvature sits"]
    assert isinstance(table, Table)
    assert table.rows == rows
    for ending in ("html", "md", "json"):
        assert invoke(path, "-o", tmp_path / f"r.{ending}").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["curvature_shares"] == shares
    markdown, page = ((tmp_path / f"r.{ending}").read_text() for ending in ("md", "html"))
    shown = markdown.split("Where the curvature sits")[1].split("\n#")[0]
    assert re.findall(r"^\| (h\d+) \| (\S+%) \|$", shown, re.MULTILINE) == [tuple(row) for row in rows]
    shown = page.split("Where the curvature sits</")[1].split("</table>")[0]
    assert re.findall(r"<td>(h\d+)</td>\s*<td>(\S+%)</td>", shown) == [tuple(row) for row in rows]


def test_loggers_get_the_three_largest_shares_of_a_run(tmp_path: Path) -> None:
    told = trained(tmp_path / "history.jsonl", 13, tier="sharpness", every=20, running_every=3)
    for key in ("curvature_share", "running_curvature_share"):
        first = next(m for m in told if m.layers(key))
        largest = sorted(first.layers(key).items(), key=lambda item: -item[1])[:3]
        logged = {name: value for name, value in first.as_log_dict().items() if name.startswith(f"gfs/{key}/")}
        assert logged == {f"gfs/{key}/{layer}": share for layer, share in largest}
