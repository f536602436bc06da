"""The pictures of a history, as Bokeh figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Span
from bokeh.plotting import figure

from gfs_core import Measurement

# Okabe and Ito's palette: told apart with every kind of colour vision, on light and on dark.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#888888"

Series = tuple[str, Callable[[Measurement], float | None], str, str]


def pictures(history: Sequence[Measurement]) -> list[tuple[str, str, figure]]:
    """Heading, caption and figure of each picture; a picture without values is left out."""
    raw: Callable[[Measurement], float | None] = lambda m: (  # noqa: E731
        m.sharpness if m.preconditioned_sharpness is None else m.preconditioned_sharpness
    )
    plans: list[tuple[str, str, list[Series], dict[str, object]]] = [
        (
            "Sharpness and the stability threshold",
            "Raw sharpness (thin), after a short stretch of gradient flow (GFS_k), at the end of the full "
            "gradient flow (points), and the optimizer's threshold (dashed).",
            [
                ("raw sharpness", raw, BLUE, "line"),
                ("GFS_k (short horizon)", lambda m: m.gfs_sharpness, ORANGE, "line"),
                ("full GFS", lambda m: m.gfs_sharpness_full, GREEN, "points"),
                ("threshold", lambda m: m.threshold, RED, "dashed"),
            ],
            {},
        ),
        (
            "Stability ratio",
            "Sharpness over threshold. 1 is the edge of stability; above it the oscillation grows.",
            [
                ("stability ratio", lambda m: m.stability_ratio, BLUE, "line"),
                ("GFS_k stability ratio", lambda m: m.gfs_stability_ratio, ORANGE, "line"),
            ],
            {"edge": 1.0},
        ),
        ("Loss", "On the probe, logarithmic.", [("loss", lambda m: m.loss_probe, BLUE, "line")], {"log": True}),
        (
            "What measuring cost",
            "Gradients and Hessian-vector products of each measurement, logarithmic; a product costs about two "
            "gradients.",
            [
                ("gradients", lambda m: m.grad_evals, BLUE, "line"),
                ("Hessian-vector products", lambda m: m.hvps, ORANGE, "line"),
            ],
            {"log": True},
        ),
    ]
    out = []
    for heading, caption, series, options in plans:
        picture = _figure(history, heading, series, **options)
        if picture is not None:
            out.append((heading, caption, picture))
    return out


def _figure(
    history: Sequence[Measurement], label: str, series: list[Series], log: object = False, edge: object = None
) -> figure | None:
    plot = figure(
        height=300,
        sizing_mode="stretch_width",
        x_axis_label="optimizer step",
        y_axis_label=label.lower(),
        y_axis_type="log" if log else "linear",
        tools="pan,wheel_zoom,box_zoom,reset,save",
        active_drag="box_zoom",
        output_backend="canvas",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0.2,
    )
    plot.toolbar.logo = None
    seen: list[float] = []
    for name, value, colour, kind in series:
        points = [(m.step, v) for m in history if (v := value(m)) is not None and (v > 0 or not log)]
        if not points:
            continue
        seen += [p[1] for p in points]
        source = ColumnDataSource({"step": [p[0] for p in points], "value": [p[1] for p in points]})
        if kind == "points":
            plot.line("step", "value", source=source, color=colour, line_width=1, line_dash="dotted")
            glyph = plot.scatter("step", "value", source=source, color=colour, size=9, legend_label=name)
        else:
            dash = "dashed" if kind == "dashed" else "solid"
            glyph = plot.line(
                "step", "value", source=source, color=colour, line_width=1.5, line_dash=dash, legend_label=name
            )
        plot.add_tools(HoverTool(renderers=[glyph], tooltips=[("step", "@step"), (name, "@value{0.0000}")]))
    if not seen:
        return None
    if log:
        plot.yaxis.ticker = _log_ticks(min(seen), max(seen))
    if isinstance(edge, float):
        plot.add_layout(Span(location=edge, dimension="width", line_color=RED, line_dash="dashed", line_width=1.5))
    plot.legend.location = "top_left"
    plot.legend.click_policy = "hide"
    plot.legend.ncols = 2  # four names in one row are cut off on a phone
    plot.legend.background_fill_alpha = 0
    plot.legend.border_line_alpha = 0
    plot.add_layout(plot.legend[0], "above")
    return plot


def _log_ticks(low: float, high: float) -> FixedTicker:
    """1, 2, 5 over a few decades, powers of ten over many: Bokeh's own ticker prints its labels over each other."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    mantissas = (1, 2, 5) if last - first <= 4 else (1,)
    return FixedTicker(ticks=[m * 10.0**e for e in range(first, last + 1) for m in mantissas])
