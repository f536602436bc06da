"""A real browser that looks at pages: Chromium, headless, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--no-first-run", "--disable-quic")  # fmt: skip


def needs_chromium() -> None:
    """Skip where there is no browser; in CI that is a failure."""
    if CHROMIUM is None and os.environ.get("CI"):
        pytest.fail("no Chromium: install the Debian package `chromium`")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the Debian package `chromium`")


@contextmanager
def opened(path: Path, width: int = 1000, scheme: Any = "light") -> Iterator[Page]:
    """The page at ``path``, drawn; at the end: no error was said and nothing but the file was asked for."""
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request", lambda r: wrong.append(f"request: {r.url}") if not r.url.startswith(("file:", "data:")) else None
        )
        page.goto(path.resolve().as_uri())
        page.wait_for_function("!window.Bokeh || (Bokeh.documents.length > 0 && Bokeh.documents.every(d => d.is_idle))")
        yield page
        browser.close()
    assert not wrong, wrong


def look_at(path: Path, name: str) -> int:
    """A page wide and light, narrow and dark: readable for everyone, nothing beside the screen. How many pictures."""
    pictures = 0
    for width, scheme in ((1000, "light"), (360, "dark")):
        with opened(path, width, scheme) as page:
            screenshot(page, f"{name}-{scheme}-{width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            assert not found, [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
            pictures = page.locator(".bk-Figure").count()
    return pictures


def screenshot(page: Page, name: str) -> None:
    """Keep a picture of the whole page among the tests' output."""
    folder = Path(os.environ.get("GFS_SCREENSHOTS", "test-output/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
