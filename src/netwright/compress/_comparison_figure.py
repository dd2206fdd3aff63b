"""The figure and the page of a comparison; apart from its rows, since Bokeh takes half a second to import."""

import html
from typing import TYPE_CHECKING

from bokeh.embed import file_html
from bokeh.layouts import row
from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.models.annotations import LabelSet
from bokeh.models.layouts import LayoutDOM
from bokeh.plotting import figure
from bokeh.resources import INLINE

if TYPE_CHECKING:
    from netwright.compress._comparison import Comparison

__all__ = ["drawn", "page"]

_INK, _ACCENT, _SOFT = "#222222", "#0b6e99", "#8a8a8a"


def drawn(found: "Comparison") -> LayoutDOM:
    """Validation score against measured latency, and against the size of the file."""
    return row(_panel(found, "latency"), _panel(found, "size"), sizing_mode="stretch_width")


def page(found: "Comparison") -> str:
    """HTML with the figure and the table, which needs no network."""
    whole: str = file_html(drawn(found), INLINE, f"Compression of {found.task}")
    text = html.escape(found.table(), quote=False)
    return whole.replace("</body>", f"<pre style='font:13px/1.5 monospace;margin:2em'>{text}</pre></body>")


def _panel(found: "Comparison", axis: str) -> figure:
    entries = [entry for entry in (found.baseline, *found.rows) if entry.cost is not None]
    reference = found.baseline.cost
    assert reference is not None
    shares = []
    for entry in entries:
        assert entry.cost is not None
        size = entry.cost.size_bytes / reference.size_bytes
        shares.append(size if axis == "size" else 1.0 if entry.ratio is None else entry.ratio.median)
    source = ColumnDataSource(
        {
            "share": shares,
            "val": [entry.val for entry in entries],
            "name": [entry.name for entry in entries],
            "color": [_SOFT if entry is found.baseline else _ACCENT for entry in entries],
        }
    )
    scores = [entry.val for entry in entries if entry.val is not None]
    margin = 0.08 * (max(scores) - min(scores)) or 0.01
    panel = figure(
        height=380,
        x_axis_type="log",
        x_range=Range1d(start=0.8 * min(shares), end=1.7 * max(shares)),
        x_axis_label=f"{'Latency' if axis == 'latency' else 'Size on disk'} (share of the baseline's)",
        y_range=Range1d(start=min(scores) - margin, end=max(scores) + 1.5 * margin),
        y_axis_label="Score on validation",
        sizing_mode="stretch_width",
        toolbar_location="above",
    )
    dots = panel.scatter("share", "val", color="color", size=10, source=source)
    panel.add_tools(
        HoverTool(renderers=[dots], tooltips=[("", "@name"), (axis, "@share{0.000}x"), ("score", "@val{0.0000}")])
    )
    labels = LabelSet(x="share", y="val", text="name", x_offset=7, y_offset=5, source=source, text_color=_INK)
    labels.text_font_size = "11px"
    panel.add_layout(labels)
    return panel
