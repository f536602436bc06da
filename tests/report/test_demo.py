from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gfs_core as gfs
from gfs_report.cli import app


def test_quick_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    assert "2/η" in done.output
    history = gfs.read_history(tmp_path / "demo" / "history.jsonl")
    assert [m.step for m in history] == [0, 10, 20, 30, 40, 50]
    assert history[0].threshold == pytest.approx(10)
    assert history[0].gfs_sharpness_full > 2 * history[0].sharpness
    assert list((tmp_path / "demo" / "tensorboard").glob("events*"))
    page = (tmp_path / "demo" / "index.html").read_text()
    for heading in ("Sharpness and the threshold", "Stability ratio", "Loss", "Work of a measurement", "Settings"):
        assert f"<h2>{heading}</h2>" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", page)
    assert len(page) < 5_000_000


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path / "file" / "demo")])
    assert done.exit_code == 2
    assert "choose another folder with --out" in done.output
