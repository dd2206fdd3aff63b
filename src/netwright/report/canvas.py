"""What the report's figures have in common: a bare canvas, tooltips, the marks of each kind of point.

Colours are not set here: each renderer carries the name of a CSS variable of the page as its tag, and the
page paints it, so that one figure serves a light and a dark screen and paper.
"""

from collections.abc import Mapping

from bokeh.models import HoverTool
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure

__all__ = ["FONT", "KINDS", "MARKS", "add_hover", "literal", "new_figure", "small_tip"]

KINDS: Mapping[str, str] = {
    "evaluated": "Evaluated candidate",
    "front": "On the front",
    "baseline": "Baseline",
    "chosen": "Chosen",
}
"""Kinds of points, in drawing order."""

MARKS: Mapping[str, tuple[str, int]] = {
    "evaluated": ("circle", 7),
    "front": ("circle", 10),
    "baseline": ("square", 14),
    "chosen": ("star", 24),
}
"""Marker and size in pixels of each kind."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
"""The font of everything that is drawn on a canvas."""


def new_figure(across: str, up: str, *, height: int, tools: str = "", log: bool = False) -> figure:
    """An empty figure as wide as its place, without a logo, drawn on whatever lies behind it.

    Args:
        across: label of the horizontal axis.
        up: label of the vertical axis.
        height: in pixels.
        tools: names of tools; without any there is no toolbar, and the figure is there to look at and hover.
        log: whether the vertical axis is logarithmic.
    """
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools=tools,
        toolbar_location="above" if tools else None,
        x_axis_label=across,
        y_axis_label=up,
        y_axis_type="log" if log else "linear",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=16,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "13px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.axis_line_color = None
    return plot


def add_hover(plot: figure, renderers: list[DataRenderer], tip: str) -> None:
    """Show ``tip``, an HTML template in which ``@name`` stands for a column, over the points of ``renderers``."""
    plot.add_tools(HoverTool(renderers=renderers, tooltips=tip, point_policy="snap_to_data", show_arrow=False, limit=2))


def small_tip(where: str, label: str) -> str:
    """A tooltip of two lines: which network and where, and the value."""
    return (
        '<div class="nw-tip" style="margin:-5px;padding:8px 10px;border-radius:3px;background:var(--panel);'
        f'color:var(--ink);font:13px/1.4 var(--sans)"><b>@kind</b>, {where}<br>{literal(label)}: @shown</div>'
    )


def literal(text: str) -> str:
    """Text as it stands inside a tooltip's template, where @ and $ begin a column's name."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;").replace("$", "&#36;")
