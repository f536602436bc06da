"""Pictures as Bokeh figures: lines over optimizer steps, however long the run was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    FixedTicker,
    HoverTool,
    Span,
    TapTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from gfs_report.runs import Curve, Mark

# Okabe and Ito's palette: told apart with every kind of colour vision, on light and on dark.
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
_MOST = 1500  # pairs of points of a line: more than a screen has pixels; of each bundle of steps the least and largest


class Line(NamedTuple):
    """One curve of a picture, in the colour and form that it has everywhere."""

    name: str
    curve: Curve
    colour: str
    form: Literal["line", "dashed", "points"] = "line"
    alpha: float = 1.0


@dataclass
class Picture:
    """What a figure shows; drawn by :func:`draw` with Bokeh, by :mod:`gfs_report.still` as a still image.

    Attributes:
        heading: what it is.
        caption: how to read it, in a sentence or two.
        unit: name of the vertical axis.
        lines: the curves; one without points is left out.
        log: a logarithmic vertical axis; values that are not positive are left out.
        edge: a value marked by a dashed line over the whole width, as the edge of stability.
        step: a step marked by a vertical line.
        marks: early warnings, shown as points on the first line with a link to ``#alarm-N``.
        linked: whether its steps pan and zoom with those of the other pictures of a page.
        rates: whether the curves are over learning rates, on a logarithmic axis, and not over steps; not linked then.
    """

    heading: str
    caption: str
    unit: str
    lines: list[Line]
    log: bool = False
    edge: float | None = None
    step: int | None = None
    marks: Sequence[Mark] = ()
    linked: bool = True
    rates: bool = False

    def shown(self) -> list[Line]:
        """The lines with what can be shown of them, thinned to a few thousand points each."""
        out = []
        for line in self.lines:
            keep = np.isfinite(line.curve.values)
            if self.log:
                keep &= line.curve.values > 0
            if keep.any():
                out.append(line._replace(curve=thinned(Curve(line.curve.steps[keep], line.curve.values[keep]))))
        return out


def thinned(curve: Curve, most: int = _MOST) -> Curve:
    """The least and the largest value of each of ``most`` equal spans of steps: no spike is lost."""
    if len(curve.steps) <= 2 * most:
        return curve
    first, last = curve.steps[0], curve.steps[-1]
    bundle = np.minimum((curve.steps - first) * most // max(1, last - first), most - 1)
    starts = np.flatnonzero(np.diff(bundle, prepend=-1))
    ends = np.append(starts[1:], len(bundle))
    kept: list[int] = []
    for a, b in zip(starts, ends, strict=True):
        part = curve.values[a:b]
        kept += sorted({int(a + part.argmin()), int(a + part.argmax())})
    keep = np.unique(np.array([0, *kept, len(bundle) - 1]))
    return Curve(curve.steps[keep], curve.values[keep])


def draw(picture: Picture, x_range: Any = None) -> figure | None:
    """The picture as a Bokeh figure; ``None`` where there is nothing to show.

    Args:
        picture: what to show.
        x_range: the horizontal range of another figure, to pan and zoom along with it.
    """
    lines = picture.shown()
    if not lines:
        return None
    plot = figure(
        height=320,
        sizing_mode="stretch_width",
        x_axis_label="learning rate" if picture.rates else "optimizer step",
        x_axis_type="log" if picture.rates else "linear",
        y_axis_label=picture.unit,
        y_axis_type="log" if picture.log else "linear",
        tools="pan,box_zoom,reset,save",
        active_drag="box_zoom",
        output_backend="canvas",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0.2,
        min_border_right=12,
        **({} if x_range is None else {"x_range": x_range}),
    )
    plot.toolbar.logo = None
    plot.add_tools(WheelZoomTool(dimensions="width"), CrosshairTool(dimensions="height", line_alpha=0.3))
    plot.x_range.range_padding = 0.02
    for line in lines:
        _add_line(plot, line)
    _add_hover(plot, lines, ("rate", "@step{%.3g}") if picture.rates else ("step", "@step{0}"))
    if picture.edge is not None:
        at = {"location": picture.edge, "dimension": "width"}
        plot.add_layout(Span(**at, line_color=RED, line_dash="dashed", line_width=1.5))
    if picture.step is not None:
        plot.add_layout(Span(location=picture.step, dimension="height", line_color=RED, line_width=1.5))
    if picture.marks:
        _add_marks(plot, picture.marks, lines[0].curve)
    if picture.log:
        values = np.concatenate([line.curve.values for line in lines])
        plot.yaxis.ticker = _log_ticks(float(values.min()), float(values.max()))
    plot.legend.click_policy = "hide"
    plot.legend.ncols = 2  # four names in one row are cut off on a phone
    plot.legend.background_fill_alpha = 0
    plot.legend.border_line_alpha = 0
    plot.legend.label_text_font_size = "12px"
    plot.add_layout(plot.legend[0], "above")
    return plot


def _add_line(plot: figure, line: Line) -> None:
    source = ColumnDataSource({"step": line.curve.steps.astype(np.float64), "value": line.curve.values})
    look = {"source": source, "color": line.colour, "alpha": line.alpha, "legend_label": line.name}
    if line.form == "points":
        plot.line("step", "value", source=source, color=line.colour, line_width=1, line_dash="dotted")
        plot.scatter("step", "value", size=8, **look)
    else:
        plot.line("step", "value", line_width=1.5, line_dash="dashed" if line.form == "dashed" else "solid", **look)


def _add_hover(plot: figure, lines: Sequence[Line], head: tuple[str, str]) -> None:
    """One box with the place of the pointer and the latest value of each curve; several would hide each other."""
    longest = max(lines, key=lambda line: len(line.curve.steps)).curve
    columns = {"step": longest.steps.astype(np.float64), "value": longest.values}
    for i, line in enumerate(lines):
        latest = np.searchsorted(line.curve.steps, longest.steps, side="right") - 1
        columns[f"of{i}"] = np.where(latest >= 0, line.curve.values[latest], np.nan)
    unseen = plot.line("step", "value", source=ColumnDataSource(columns), alpha=0)
    said = [head, *((line.name, f"@of{i}{{%.4g}}") for i, line in enumerate(lines))]
    formats = {f"@of{i}": "printf" for i in range(len(lines))} | ({"@step": "printf"} if "%" in head[1] else {})
    plot.add_tools(HoverTool(renderers=[unseen], tooltips=said, formatters=formats, mode="vline"))


def _add_marks(plot: figure, marks: Sequence[Mark], curve: Curve) -> None:
    """Triangles at the early warnings; a click goes to the reason."""
    at = np.interp([m.step for m in marks], curve.steps, curve.values)
    source = ColumnDataSource(
        {
            "step": [m.step for m in marks],
            "value": at,
            "state": [m.word for m in marks],
            "reason": [m.reason for m in marks],
            "colour": [ORANGE if m.state < 2 else RED for m in marks],
            "anchor": [f"alarm-{i}" for i in range(len(marks))],
        }
    )
    glyph = plot.scatter(
        "step", "value", marker="triangle", size=12, color="colour", source=source, legend_label="early warning"
    )
    plot.add_tools(HoverTool(renderers=[glyph], tooltips=[("step", "@step{0}"), ("@state", "@reason")]))
    go = CustomJS(
        args={"source": source},
        code="const i = source.selected.indices[0]; if (i !== undefined) location.hash = source.data.anchor[i];",
    )
    plot.add_tools(TapTool(renderers=[glyph], callback=go))


def _log_ticks(low: float, high: float) -> FixedTicker:
    """1, 2, 5 over a few decades, powers of ten over many: Bokeh's own ticker prints its labels over each other."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    mantissas = (1, 2, 5) if last - first <= 4 else (1,)
    stride = max(1, (last - first) // 8)
    return FixedTicker(ticks=[m * 10.0**e for e in range(first, last + 1, stride) for m in mantissas])
