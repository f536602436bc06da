"""Hooks of the site: pages that lie outside of docs/, links that are made for the repository, and tables from the code.

Links are written for whoever reads the files in the repository. Here those to a page become links within the site;
those to code, which the site does not hold, become the path in words.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import gfs_core
from gfs_core import GFSConfig, log_keys
from gfs_core.config import TIERS
from gfs_core.signals.catalog import Signals

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    *sorted(f"benchmarks/{p.name}" for s in ("md", "svg") for p in ROOT.glob(f"benchmarks/*.{s}")),
)
_CODE = re.compile(r"(^ *```.*?^ *```)", re.M | re.S)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ROLE = re.compile(r":(?:class|meth|func|mod|attr):<code>(~?)([\w.]+)</code>")


class Examples(griffe.Extension):
    """Docstrings say "Example:"; a section of code is known to griffe as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what lies outside of docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's, and fill in tables that are made from the code."""
    here = page.file.src_uri
    for name, table in (("options", _options), ("log keys", _keys), ("signals", _signals)):
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", table())

    def moved(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        target = site_link(here, target)
        if target:
            return f"{image}[{text}]({target})"
        path = _in_repository(here, found[3])
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    pieces = _CODE.split(markdown)
    return "".join(piece if i % 2 else _LINK.sub(moved, piece) for i, piece in enumerate(pieces))


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Make links of the Sphinx roles in docstrings."""

    def linked(found: re.Match[str]) -> str:
        name = found[2].removeprefix("gfs_core.")
        last = found[2].rpartition(".")[2]
        public = f"gfs_core.{last}" if last in gfs_core.__all__ else found[2]
        return f'<autoref identifier="{public}" optional><code>{last if found[1] else name}</code></autoref>'

    return _ROLE.sub(linked, html).replace("::</p>", ":</p>")


def site_link(page: str, target: str) -> str | None:
    """The link of a page to ``target`` within the site; ``None`` where the site does not hold it.

    Args:
        page: path of the page within the site, the same as within docs/ or, for those from outside, the repository.
        target: as written for the repository.
    """
    if re.match(r"[a-z]+:|#", target):
        return target
    path, mark, anchor = _in_repository(page, target).partition("#")
    if path == "README.md":
        path = "docs/index.md"
    if path.endswith(".py") or (not path.startswith("docs/") and path not in OUTSIDE):
        return None
    return os.path.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".") + mark + anchor


def _in_repository(page: str, target: str) -> str:
    folder = posixpath.dirname(page if page in OUTSIDE else f"docs/{page}")
    return posixpath.normpath(posixpath.join(folder, target))


def _options() -> str:
    told = GFSConfig.help()
    rows = [f"| `{f.name}` | `{f.default!r}` | {told[f.name]} |" for f in fields(GFSConfig)]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def _keys() -> str:
    return "\n".join(["| key | meaning |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in log_keys().items())])


def _signals() -> str:
    head = "| signal | keys | cost | needs | copies of the weights, without and with a preconditioner |"
    rows = [
        f"| `{s.name}` | {_names(k.name for k in s.keys)} | {s.cost.name.lower()} | {_names(s.needs)} "
        f"| {s.copies[0]}, {s.copies[1]} |"
        for s in sorted(Signals().all, key=lambda s: TIERS.index(s.name))
    ]
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
