"""The figure and the page of a comparison; apart from its rows, since Bokeh takes half a second to import."""

import html
import math
from collections.abc import Sequence
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

_PAGE = """
{% block postamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  main { font: 15px/1.5 sans-serif; color: #222222; max-width: 1200px; margin: 0 auto; padding: 1em; }
  .figures { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28em), 1fr)); }
  .table { overflow-x: auto; font: 13px/1.5 monospace; }
</style>
{% endblock %}
{% block contents %}
<main>
<h1>{{ head }}</h1>
<p>{{ about }}</p>
<div class="figures">{{ super() }}</div>
<pre class="table">{{ table }}</pre>
</main>
{% endblock %}
"""
_WIDTH, _HEIGHT = 400, 300  # of the least that a panel shows, in pixels
_LETTER, _LINE, _GAP = 6.5, 13, 7  # of labels
_INK, _ACCENT, _SOFT = "#222222", "#0b6e99", "#8a8a8a"


def drawn(found: "Comparison") -> LayoutDOM:
    """Validation score against measured latency, and against the size of the file."""
    return row(_panel(found, "latency"), _panel(found, "size"), sizing_mode="stretch_width")


def page(found: "Comparison") -> str:
    """HTML with the figure and the table, which needs no network."""
    panels = [_panel(found, "latency"), _panel(found, "size")]
    title = f"Compression of {found.task}"
    shown = {"head": title, "about": _about(found), "table": found.table()}
    values = {name: html.escape(text, quote=False) for name, text in shown.items()}
    whole: str = file_html(panels, INLINE, title, template=_PAGE, template_variables=values)
    return whole


def _about(found: "Comparison") -> str:
    """What the numbers hold for, in a line."""
    parts = [] if found.seed is None else [f"seed {found.seed}"]
    if found.baseline.cost is not None:
        latency = found.baseline.cost.latency
        threads = f"{latency.threads} thread{'' if latency.threads == 1 else 's'}"
        parts.append(f"the baseline takes {latency.median_ms:.3g} ms at batch size {latency.batch} on {threads}")
    if found.machine is not None:
        parts.append(found.machine)
    line = ", ".join(parts)
    return line[:1].upper() + line[1:]


def _panel(found: "Comparison", axis: str) -> figure:
    entries = [entry for entry in (found.baseline, *found.rows) if entry.cost is not None and entry.val is not None]
    reference = found.baseline.cost
    assert reference is not None
    shares = []
    for entry in entries:
        assert entry.cost is not None
        size = entry.cost.size_bytes / reference.size_bytes
        shares.append(size if axis == "size" else 1.0 if entry.ratio is None else entry.ratio.median)
    names = [entry.name for entry in entries]
    scores = [entry.val for entry in entries if entry.val is not None]
    margin = 0.08 * (max(scores) - min(scores)) or 0.01
    left, right = 0.8 * min(shares), 1.7 * max(shares)
    low, high = min(scores) - margin, max(scores) + 1.5 * margin
    points = [
        (_WIDTH * math.log(share / left) / math.log(right / left), _HEIGHT * (score - low) / (high - low))
        for share, score in zip(shares, scores, strict=True)
    ]
    moves = _placed(points, [_LETTER * len(name) for name in names])
    source = ColumnDataSource(
        {
            "share": shares,
            "val": [entry.val for entry in entries],
            "name": names,
            "x_offset": [across for across, _ in moves],
            "y_offset": [up for _, up in moves],
            "align": ["right" if across < 0 else "left" for across, _ in moves],
            "color": [_SOFT if entry is found.baseline else _ACCENT for entry in entries],
        }
    )
    panel = figure(
        height=380,
        x_axis_type="log",
        x_range=Range1d(start=left, end=right),
        x_axis_label=f"{'Latency' if axis == 'latency' else 'Size on disk'} (share of the baseline's)",
        y_range=Range1d(start=low, end=high),
        y_axis_label="Score on validation",
        sizing_mode="stretch_width",
        toolbar_location="above",
    )
    dots = panel.scatter("share", "val", color="color", size=10, source=source)
    panel.add_tools(
        HoverTool(renderers=[dots], tooltips=[("", "@name"), (axis, "@share{0.000}x"), ("score", "@val{0.0000}")])
    )
    labels = LabelSet(
        x="share", y="val", text="name", x_offset="x_offset", y_offset="y_offset", text_align="align", source=source
    )
    labels.text_color = _INK
    labels.text_font_size = "11px"
    panel.add_layout(labels)
    return panel


def _placed(points: Sequence[tuple[float, float]], widths: Sequence[float]) -> list[tuple[float, float]]:
    """How far from its point each label begins, to the right and up (to the left, where it ends), in pixels.

    One after the other they take the first place beside their point that is free of labels and within the panel.
    """
    taken: list[tuple[float, float, float]] = []  # left, right, and foot
    moves: list[tuple[float, float]] = []
    for (x, y), width in zip(points, widths, strict=True):
        choices = [
            (across, up + 5.0)
            for up in (0, -_LINE - 8, _LINE, -2 * _LINE - 8, 2 * _LINE, -3 * _LINE - 8, 3 * _LINE)
            for across in (_GAP, -_GAP)
        ]
        spans = [(x + across if across > 0 else x + across - width, y + up) for across, up in choices]
        free = [
            number
            for number, (start, foot) in enumerate(spans)
            if 0 <= foot <= _HEIGHT - _LINE
            and 0 <= start <= _WIDTH - width
            and all(start + width < a or start > b or abs(foot - other) >= _LINE for a, b, other in taken)
        ]
        chosen = free[0] if free else 0
        taken.append((spans[chosen][0], spans[chosen][0] + width, spans[chosen][1]))
        moves.append(choices[chosen])
    return moves
