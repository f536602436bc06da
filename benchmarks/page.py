"""How long the report of a long run takes to write and to open. Writes page.md. Run: python -m benchmarks.page."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from playwright.sync_api import sync_playwright

from benchmarks.lib.store import FOLDER
from benchmarks.lib.tables import row, table
from gfs_report.report import make_report, write_report
from gfs_report.runs import read_run
from tests.report.browser import CHROMIUM, FLAGS

KEYS = ("loss_probe", "sharpness", "threshold", "stability_ratio", "running_stability_ratio", "gfs_sharpness",
        "mean_square_stability_ratio", "overhead", "hvps", "grad_evals", "learning_rate")  # fmt: skip
HEAD = """# The report of a long run

    python -m benchmarks.page

A history of {keys} values at each measurement. *Open*: from the request to all pictures drawn, in headless Chromium
without a GPU, median of five; the page beside it has one measurement.
"""


def history(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step, values in enumerate(rng.uniform(0.5, 1.5, (count, len(KEYS)))):
            file.write(
                json.dumps({"step": step, "alarm": int(step % 1000 == 999), **dict(zip(KEYS, values, strict=True))})
                + "\n"
            )


def seconds_to_open(page: Path) -> float:
    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        for _ in range(5):
            tab = browser.new_page()
            began = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_function("window.Bokeh && Bokeh.documents.length > 0 && Bokeh.documents.every(d => d.is_idle)")
            taken.append(time.perf_counter() - began)
            tab.close()
        browser.close()
    return median(taken)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 1_000, 100_000):
            path, page = Path(folder, f"{count}.jsonl"), Path(folder, f"{count}.html")
            history(path, count)
            began = time.perf_counter()
            run = read_run(path)
            read = time.perf_counter()
            write_report(make_report(run), page, "html")
            written = time.perf_counter()
            size = page.stat().st_size / 1e6
            seconds = (read - began, written - read, seconds_to_open(page))
            rows.append([count, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{size:.2f}", f"{seconds[2]:.2f}"])
            print(row(rows[-1]), flush=True)
    head = ["measurements", "read, s", "write, s", "page, MB", "open, s"]
    (FOLDER / "page.md").write_text("\n".join([HEAD.format(keys=len(KEYS)), *table(head, rows)]) + "\n")


if __name__ == "__main__":
    main()
