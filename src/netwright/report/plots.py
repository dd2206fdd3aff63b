"""The report's figures, as Bokeh models: the front, the training curves, the progress of the search.

Colours are not set here: each renderer carries the name of a CSS variable of the page as its tag, and the
page paints it, so that one figure serves a light and a dark screen and paper.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.models.annotations import Label, Span
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure

from netwright.report.format import COST_NAMES, ScoreStyle, compact, plain_steps, pretty_limit, quantity, unit_for
from netwright.report.limits import main_cost, score_floor, target_limit
from netwright.report.progress import Progress
from netwright.report.run import COSTS, Epoch, Point, Run

__all__ = ["KINDS", "Axis", "axes", "curve_plot", "front_plot", "progress_plot"]

Axis = dict[str, Any]
"""One entry of the axis menus, as the page's script reads it: label, direction, limit."""

KINDS: Mapping[str, str] = {
    "evaluated": "Evaluated candidate",
    "front": "On the front",
    "baseline": "Baseline",
    "chosen": "Chosen",
}
"""Kinds of points, in drawing order."""

_MARKS: Mapping[str, tuple[str, int]] = {
    "evaluated": ("circle", 7),
    "front": ("circle", 10),
    "baseline": ("square", 14),
    "chosen": ("star", 24),
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_TIP = """<div class="nw-tip" style="margin:-5px;padding:10px 12px;max-width:340px;border-radius:3px;
background:var(--panel);color:var(--ink);font:13px/1.45 var(--sans)"><div style="font-weight:650">@kind</div>
<div style="margin:2px 0 6px;overflow-wrap:anywhere;color:var(--soft)">@steps</div>
<div style="display:grid;grid-template-columns:auto auto;gap:0 14px;font-variant-numeric:tabular-nums">
{rows}</div></div>"""


def axes(run: Run, style: ScoreStyle) -> dict[str, Axis]:
    """What can stand on an axis of the front: every cost and the score, with units, targets and the floor.

    Args:
        run: the run.
        style: how scores are written.
    """
    menu: dict[str, Axis] = {}
    baseline = run.baseline
    largest = _largest(run)
    for cost in COSTS:
        unit = unit_for(cost, largest.cost(cost)) if largest else unit_for(cost, 1.0)
        wanted = run.settings.target.get(cost)
        limit = target_limit(cost, wanted, baseline) if wanted else None
        menu[cost] = {
            "name": COST_NAMES[cost],
            "label": f"{COST_NAMES[cost]} ({unit.name})" if unit.name else COST_NAMES[cost],
            "worth": unit.worth,
            "up": False,
            "limit": None if limit is None else limit / unit.worth,
            "limit_label": f"target {pretty_limit(wanted or '')}",
        }
    floor = score_floor(run.settings.keep, baseline)
    menu["score"] = {
        "name": f"{style.title}, validation",
        "label": f"{style.title}, validation{' (%)' if style.percent else ''}",
        "worth": 1 / style.worth,
        "up": True,
        "limit": None if floor is None else floor * style.worth,
        "limit_label": f"floor {pretty_limit(run.settings.keep.get('score', ''))}",
    }
    return menu


def front_plot(run: Run, style: ScoreStyle) -> figure:
    """Every measured network as a point; the page's script moves the points when other axes are chosen.

    Args:
        run: the run; it must have at least one measured point.
        style: how scores are written.
    """
    menu = axes(run, style)
    across = main_cost(run.settings.target)
    tools = "pan,wheel_zoom,box_zoom,reset,save"
    plot = _figure(menu[across]["label"], menu["score"]["label"], height=460, tools=tools)
    plot.name = "front"
    plot.x_range, plot.y_range = Range1d(start=0, end=1), Range1d(start=0, end=1)
    edge = plot.step(x="x", y="y", source=ColumnDataSource({"x": [], "y": []}), mode="after", line_width=2)
    edge.name, edge.tags = "edge", ["--front"]
    points = _columns(run, menu, style)
    source = ColumnDataSource({**points, "x": points[across], "y": points["score"]})
    marks = plot.scatter(
        x="x",
        y="y",
        source=source,
        marker={"field": "marker"},
        size="marker_size",
        fill_color={"field": "fill"},
        fill_alpha="alpha",
        line_color={"field": "edge"},
        line_width=1.5,
    )
    marks.name = "points"
    for side in ("x", "y"):
        plot.add_layout(_limit_line(side))
        plot.add_layout(_limit_label(side))
    _hover(plot, [marks], _TIP.replace("{rows}", "".join(_tip_row(key, axis["name"]) for key, axis in menu.items())))
    return plot


def curve_plot(
    history: Mapping[str, Sequence[Epoch]], what: str, label: str, worth: float = 1.0, *, name: str
) -> figure | None:
    """A training curve of the baseline and of the chosen network; None where nothing was recorded.

    Args:
        history: entries by network.
        what: "train_loss" or "val_score".
        label: the vertical axis.
        worth: shown number over stored number.
        name: the figure's name in the page.
    """
    plot = _figure("Epoch", label, height=280, tools="pan,box_zoom,reset")
    plot.name = name
    renderers: list[DataRenderer] = []
    for network, entries in history.items():
        pairs = [(e.epoch, value * worth) for e in entries if (value := getattr(e, what)) is not None]
        if not pairs:
            continue
        source = ColumnDataSource(
            {
                "x": [x for x, _ in pairs],
                "y": [y for _, y in pairs],
                "kind": [KINDS[network]] * len(pairs),
                "shown": [compact(y) for _, y in pairs],
            }
        )
        dash = "solid" if network == "chosen" else [6, 3]
        line = plot.line(x="x", y="y", source=source, line_width=2.5, line_dash=dash)
        line.tags = [f"--{network}"]
        dots = plot.scatter(x="x", y="y", source=source, marker=_MARKS[network][0], size=6)
        dots.tags = [f"--{network}"]
        renderers.append(dots)
    if not renderers:
        return None
    _hover(plot, renderers, _small_tip("epoch @x", label))
    return plot


def progress_plot(progress: Progress, limit: float | None) -> figure:
    """Cost of each candidate over the baseline's against time, with the best so far as a line.

    Args:
        progress: the followed search.
        limit: the target as a ratio, drawn as a line; None for none.
    """
    name = COST_NAMES[progress.cost]
    plot = _figure("Seconds since the start", f"{name}, share of the baseline", height=280, tools="pan,box_zoom,reset")
    plot.name = "progress"
    columns: dict[str, list[Any]] = {
        "x": list(progress.seconds),
        "y": list(progress.ratios),
        "kind": ["kept the score" if kept else "lost too much score" for kept in progress.kept],
        "shown": [compact(ratio) for ratio in progress.ratios],
        "kept": list(progress.kept),
    }
    renderers: list[DataRenderer] = []
    for kept, marker, tag in ((False, "x", "--evaluated"), (True, "circle", "--front")):
        rows = [i for i, value in enumerate(progress.kept) if value is kept]
        source = ColumnDataSource({key: [values[i] for i in rows] for key, values in columns.items()})
        dots = plot.scatter(x="x", y="y", source=source, marker=marker, size=7, line_width=1.5)
        dots.tags = [tag]
        renderers.append(dots)
    best = ColumnDataSource({"x": [0.0, *progress.seconds], "y": [1.0, *progress.best]})
    plot.step(x="x", y="y", source=best, mode="after", line_width=2.5).tags = ["--chosen"]
    if limit is not None:
        ends = ColumnDataSource({"x": [0.0, max(progress.seconds)], "y": [limit, limit]})
        plot.line(x="x", y="y", source=ends, line_width=1.5, line_dash=[4, 4]).tags = ["--soft"]
    _hover(plot, renderers, _small_tip("after @x{0.0} s", f"{name}, share of the baseline"))
    return plot


def area_plot(progress: Progress) -> figure:
    """How much of the final front's area was covered after each candidate."""
    plot = _figure("Seconds since the start", "Area covered by the front (%)", height=280, tools="pan,box_zoom,reset")
    plot.name = "area"
    covered = [0.0, *(100 * share for share in progress.area)]
    source = ColumnDataSource({"x": [0.0, *progress.seconds], "y": covered, "shown": [compact(y) for y in covered]})
    plot.varea_step(x="x", y1=0, y2="y", source=source, step_mode="after", fill_alpha=0.18).tags = ["--front"]
    plot.step(x="x", y="y", source=source, mode="after", line_width=2.5).tags = ["--front"]
    return plot


def _figure(across: str, up: str, *, height: int, tools: str) -> figure:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools=tools,
        toolbar_location="above",
        x_axis_label=across,
        y_axis_label=up,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=16,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "13px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.axis_line_color = None
    return plot


def _hover(plot: figure, renderers: list[DataRenderer], tip: str) -> None:
    plot.add_tools(HoverTool(renderers=renderers, tooltips=tip, point_policy="snap_to_data", show_arrow=False))


def _small_tip(where: str, label: str) -> str:
    return (
        '<div class="nw-tip" style="margin:-5px;padding:8px 10px;border-radius:3px;background:var(--panel);'
        f'color:var(--ink);font:13px/1.4 var(--sans)"><b>@kind</b>, {where}<br>{_literal(label)}: @shown</div>'
    )


def _tip_row(key: str, name: str) -> str:
    return f'<span style="color:var(--soft)">{_literal(name)}</span><span>@shown_{key}</span>'


def _literal(text: str) -> str:
    """Text as it stands inside a tooltip's template, where @ and $ begin a column's name."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;").replace("$", "&#36;")


def _limit_line(side: str) -> Span:
    """The line of a target or floor; the page's script places it."""
    return Span(
        name=f"limit-{side}",
        dimension="height" if side == "x" else "width",
        location=0,
        visible=False,
        line_dash=[4, 4],
        line_width=1.5,
        tags=["--soft"],
    )


def _limit_label(side: str) -> Label:
    """The words on a target's line, at the edge of the plot where the line ends."""
    across = side == "x"
    return Label(
        name=f"label-{side}",
        x=0 if across else 6,
        y=6 if across else 0,
        x_units="data" if across else "screen",
        y_units="screen" if across else "data",
        x_offset=5 if across else 0,
        y_offset=0 if across else 4,
        text="",
        text_font=_FONT,
        text_font_size="12px",
        visible=False,
        tags=["--soft"],
    )


def _groups(run: Run) -> dict[str, list[Point]]:
    """Points by kind; a candidate that is on the front, chosen or the baseline is not drawn twice."""
    result = run.result
    groups: dict[str, list[Point]] = {
        "front": list(result.front) if result else [],
        "baseline": [run.baseline] if run.baseline else [],
        "chosen": [result.chosen] if result and result.chosen and result.chosen.steps else [],
    }
    known = {_key(point) for points in groups.values() for point in points}
    return {"evaluated": [point for point in run.points if _key(point) not in known], **groups}


def _key(point: Point) -> tuple[str, float, float]:
    return plain_steps(point.steps, None), point.latency_ms.median, point.score.val


def _largest(run: Run) -> Point | None:
    points = [point for group in _groups(run).values() for point in group]
    return run.baseline or max(points, key=lambda point: point.size_bytes, default=None)


def _columns(run: Run, menu: Mapping[str, Axis], style: ScoreStyle) -> dict[str, Sequence[Any]]:
    """One row per point, in drawing order: its place on every axis, its looks, and the words of its tooltip."""
    rows = [(kind, point) for kind, points in _groups(run).items() for point in points]
    points = [point for _, point in rows]
    columns: dict[str, Sequence[Any]] = {
        "group": [kind for kind, _ in rows],
        "kind": [KINDS[kind] for kind, _ in rows],
        "marker": [_MARKS[kind][0] for kind, _ in rows],
        "marker_size": [_MARKS[kind][1] for kind, _ in rows],
        "alpha": [0.3 if kind == "evaluated" else 1.0 for kind, _ in rows],
        "fill": ["#808080"] * len(rows),
        "edge": ["#808080"] * len(rows),
        "steps": [plain_steps(point.steps) if point.steps else "as the task defines it" for point in points],
        "score": [point.score.val * style.worth for point in points],
        "shown_score": [style.value(point.score.val) for point in points],
    }
    for cost in COSTS:
        columns[cost] = [point.cost(cost) / menu[cost]["worth"] for point in points]
        columns[f"shown_{cost}"] = [quantity(cost, point.cost(cost)) for point in points]
    return columns
