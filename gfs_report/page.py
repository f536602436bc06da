"""One self-contained HTML page from a history: no file beside it, no request to the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from gfs_core import Measurement
from gfs_report.plots import pictures

_TEMPLATES = Environment(loader=PackageLoader("gfs_report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_page(path: Path, history: Sequence[Measurement], *, title: str, story: Sequence[str]) -> None:
    """Write the page: the story in words first, then the pictures, then the numbers.

    Raises:
        OSError: ``path`` cannot be written.
    """
    drawn = pictures(history)
    script, divs = components([figure for _, _, figure in drawn])
    page = _TEMPLATES.get_template("page.html.j2").render(
        title=title,
        story=story,
        bokeh=Markup(
            Resources(mode="inline", components=["bokeh"]).render_js()
        ),  # the library's own code and markup; everything else is escaped
        script=Markup(script),
        pictures=[(head, text, Markup(div)) for (head, text, _), div in zip(drawn, divs, strict=True)],
        rows=_rows(history),
        reasons=sorted({reason for m in history for reason in m.reasons}),
    )
    path.write_text(page, encoding="utf-8")


def _rows(history: Sequence[Measurement], most: int = 60) -> list[list[str]]:
    stride = max(1, -(-len(history) // most))
    shown = [m for i, m in enumerate(history) if i % stride == 0 or m.gfs_sharpness_full is not None]
    columns = (
        "loss_probe",
        "sharpness",
        "threshold",
        "stability_ratio",
        "gfs_sharpness",
        "gfs_sharpness_full",
        "seconds",
    )
    return [[str(m.step), *(_number(getattr(m, c)) for c in columns)] for m in shown]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
