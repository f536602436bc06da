"""The pictures as one still image, for papers and slides."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gfs_report.plots import RED, Picture

_WIDE = 90  # characters of a line of the title


def write_still(path: Path, title: str, pictures: Sequence[Picture]) -> None:
    """Write the pictures below each other; PNG or SVG, as the file's ending says.

    Raises:
        OSError: ``path`` cannot be written.
    """
    drawn = [(p, lines) for p in pictures if (lines := p.shown())]
    sheet = Figure(figsize=(8, 2.6 * max(1, len(drawn)) + 0.5), layout="constrained")
    lines_of_title = [part for line in title.splitlines() for part in textwrap.wrap(line, _WIDE)]
    sheet.suptitle(_literal("\n".join(lines_of_title)))
    axes = sheet.subplots(max(1, len(drawn)), sharex=True, squeeze=False)[:, 0]
    for axis, (picture, lines) in zip(axes, drawn, strict=False):
        for line in lines:
            style = {"line": "-", "dashed": "--", "points": ":"}[line.form]
            marker = "o" if line.form == "points" else ""
            label = _literal(line.name)
            axis.plot(*line.curve, style, marker=marker, color=line.colour, alpha=line.alpha, lw=1.2, label=label)
        if picture.edge is not None:
            axis.axhline(picture.edge, color=RED, ls="--", lw=1)
        for mark in picture.marks:
            axis.axvline(mark.step, color=RED, alpha=0.25 * mark.state, lw=1)
        axis.set_yscale("log" if picture.log else "linear")
        axis.set_ylabel(picture.unit)
        axis.set_title(picture.heading, loc="left", fontsize="medium")
        axis.legend(fontsize="small", ncols=3)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer step")
    sheet.savefig(path, dpi=150)


def _literal(text: str) -> str:
    """Text without mathematical markup."""
    return text.replace("$", r"\$")
