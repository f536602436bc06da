"""The pages in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gfs_core as gfs
from gfs_core.run import history
from gfs_report.report import make_report, write_report
from gfs_report.runs import read_run
from tests.report.browser import look_at, needs_chromium, opened
from tests.report.test_report import HOSTILE


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a run with everything in it, and with markup in its words."""
    needs_chromium()
    folder = tmp_path_factory.mktemp("run")
    path = folder / "history.jsonl"
    history.begin(path, {"every": 5, "note": HOSTILE})
    for step in range(0, 400, 5):
        ratio = min(1.0, step / 200) + 0.1 * float(np.sin(step))
        history.append(
            path,
            gfs.Measurement.of(
                step, HOSTILE, sharpness=10 * ratio, threshold=10.0, stability_ratio=ratio, gfs_sharpness=9.5 * ratio,
                running_stability_ratio=0.9 * ratio, mean_square_stability_ratio=1.1 * ratio, loss_probe=1 / (1 + step),
                gfs_stability_ratio=0.95 * ratio, gfs_sharpness_full=30 - step / 50 if step % 100 == 0 else None,
                learning_rate=0.2, lr_effective=0.1 if step > 200 else 0.2, lr_scale=0.5 if step > 200 else 1.0,
                critical_lr=0.3, overhead=0.05, hvps=4, grad_evals=20, alarm=2 if step in (200, 205) else 0,
                reasons=(f"the loss is {HOSTILE}",) if step == 200 else ("no flow",) if step == 50 else (),
            ),
        )  # fmt: skip
    write_report(make_report(read_run(path)), folder / "page.html", "html")
    return folder / "page.html"


def test_it_opens_without_an_error_or_a_request_and_everyone_can_read_it(page_of_a_run: Path) -> None:
    assert look_at(page_of_a_run, "report") == 6


def test_the_ink_follows_the_colour_scheme(page_of_a_run: Path) -> None:
    ink = """() => [...Bokeh.documents[0]._all_models.values()]
        .filter(m => m.type == "LinearAxis").map(m => String(m.major_label_text_color))"""
    with opened(page_of_a_run, scheme="light") as page:
        assert set(page.evaluate(ink)) == {"#1c1c1c"}
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(300)
        assert set(page.evaluate(ink)) == {"#ececec"}


def centre_of(page: Any, figure: int) -> tuple[float, float]:
    box = page.locator(".bk-Figure").nth(figure).locator(".bk-events").first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_picture_says_its_values_under_the_pointer(page_of_a_run: Path) -> None:
    with opened(page_of_a_run) as page:
        figure = page.locator(".bk-Figure").nth(1)
        figure.scroll_into_view_if_needed()
        page.mouse.move(*centre_of(page, 1))
        rows = page.locator(".bk-tooltip-row-label")
        rows.first.wait_for(timeout=5000)
        said = dict(zip(rows.all_inner_texts(), page.locator(".bk-tooltip-row-value").all_inner_texts(), strict=True))
        held = read_run(page_of_a_run.parent / "history.jsonl").gfs["stability_ratio"]
        step = int(said["step:"])
        assert float(said["stability ratio:"]) == pytest.approx(held.values[held.steps.tolist().index(step)], rel=1e-3)
        assert set(said) == {"step:", "stability ratio:", "running:", "mean square:", "GFS_k:"}


def test_zooming_one_picture_zooms_all(page_of_a_run: Path) -> None:
    ranges = """() => Bokeh.documents[0].roots().map(r => [r.x_range.start, r.x_range.end])"""
    with opened(page_of_a_run) as page:
        before = page.evaluate(ranges)
        page.locator(".bk-Figure").nth(1).scroll_into_view_if_needed()
        x, y = centre_of(page, 1)
        page.mouse.move(x - 60, y - 40)
        page.mouse.down()
        page.mouse.move(x + 60, y + 40, steps=5)
        page.mouse.up()
        page.wait_for_timeout(300)
        after = page.evaluate(ranges)
        assert after[1][1] - after[1][0] < 0.5 * (before[1][1] - before[1][0])
        assert all(r == after[1] for r in after)


def test_a_click_on_a_warning_leads_to_its_reason(page_of_a_run: Path) -> None:
    with opened(page_of_a_run) as page:
        figure = page.locator(".bk-Figure").first
        figure.scroll_into_view_if_needed()
        at = page.evaluate(
            """() => { const [v] = Bokeh.index.roots.map ? Bokeh.index.roots : [...Object.values(Bokeh.index)];
            const r = v.model.renderers.find(r => r.glyph.type == "Scatter" && r.data_source.data.anchor);
            const s = r.data_source.data, f = v.frame;
            return [f.x_scale.compute(s.step[0]), f.y_scale.compute(s.value[0])]; }"""
        )
        box = figure.bounding_box()
        page.mouse.click(box["x"] + at[0], box["y"] + at[1])
        page.wait_for_function("location.hash == '#alarm-0'", timeout=5000)
        assert "alarm: the loss is </script>" in page.locator("#alarm-0").inner_text()
