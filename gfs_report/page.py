"""One self-contained HTML page: no file beside it, no request to the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bokeh.embed import components
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from gfs_report.plots import Picture, draw

_TEMPLATES = Environment(loader=PackageLoader("gfs_report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


class Table(NamedTuple):
    """Rows of text under a head; the first column names the row."""

    heading: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Notes(NamedTuple):
    """A list of sentences; ``anchors`` names each for links, where given."""

    heading: str
    items: Sequence[str]
    anchors: Sequence[str] = ()


Section = Picture | Table | Notes


class Found(Protocol):
    """What was found of a job."""

    @property
    def lead(self) -> list[str]:
        """What matters, in a few sentences."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for programs."""


def write_found(out: Path, name: str, found: Found, *, title: str, sections: Sequence[Section]) -> Path:
    """Write the page of what was found of a job, ``index.html``, and ``NAME.json`` beside it; the path of the page.

    Raises:
        OSError: ``out`` cannot be written.
    """
    page = out / "index.html"
    write_page(page, title=title, lead=found.lead, sections=sections)
    text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return page


def of_job(facts: Mapping[str, Any]) -> Table:
    """What is known of model, data and optimizer of a job."""
    rows = [
        (name.replace("_", " "), str(value))
        for name, value in facts.items()
        if not isinstance(value, dict) and value not in (None, "") and name != "free_bytes"
    ]
    return Table("The job", "As it was found.", ("fact", "value"), rows)


def write_page(
    path: Path, *, title: str, lead: Sequence[str], sections: Sequence[Section], refresh: int | None = None
) -> None:
    """Write the page: what matters in words first, then the sections in their order.

    Args:
        path: the file, whose folder is made where it is not there.
        title: heading of the page.
        lead: its first sentences, a paragraph each.
        sections: pictures, tables and notes. A picture without a point to show is left out.
        refresh: seconds after which the page loads itself again; ``None``: never.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figures: list[figure | None] = []
    steps = None  # the range of steps that all pictures share
    for section in sections:
        drawn = None
        if isinstance(section, Picture):
            drawn = draw(section, steps if section.linked else None)
            if drawn is not None and section.linked:
                steps = drawn.x_range
        figures.append(drawn)
    script, divs = components([f for f in figures if f is not None]) if any(figures) else ("", ())
    embedded = iter(divs)
    parts = [
        {"kind": type(s).__name__.lower(), "of": s, "div": Markup(next(embedded)) if f is not None else ""}
        for s, f in zip(sections, figures, strict=True)
        if f is not None or not isinstance(s, Picture)
    ]
    page = _TEMPLATES.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        parts=parts,
        refresh=refresh,
        bokeh=Markup(Resources(mode="inline", components=["bokeh"]).render_js()) if divs else "",
        script=Markup(script),  # the library's own code and markup; everything else is escaped
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # a browser that loads it again meanwhile sees the old one whole
    part.write_text(page, encoding="utf-8")
    part.replace(path)
