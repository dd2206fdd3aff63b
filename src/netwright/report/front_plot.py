"""The figure of all networks, with axes to choose."""

from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, Range1d
from bokeh.models.annotations import Label, Span
from bokeh.plotting import figure

from netwright.report.canvas import FONT, KINDS, MARKS, add_hover, literal, new_figure
from netwright.report.format import (
    COST_NAMES,
    TIMES,
    ScoreStyle,
    compact,
    plain_steps,
    pretty_limit,
    quantity,
    unit_for,
)
from netwright.report.limits import main_cost, score_floor, target_limit
from netwright.report.run import COSTS, Point, Run

__all__ = ["Axis", "axes", "default_axis", "front_plot"]

Axis = dict[str, Any]
"""One entry of the axis menus, as the page's script reads it: label, direction, limit."""

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
    if baseline is not None and any(point.latency_ratio for point in _every(run)):
        wanted = run.settings.target.get("latency")
        limit = target_limit("latency", wanted, baseline) if wanted else None
        menu["ratio"] = {
            "name": f"Latency, {TIMES} baseline",
            "label": f"Latency ({TIMES} the baseline's, measured in turns)",
            "worth": 1.0,
            "up": False,
            "limit": None if limit is None else limit / baseline.cost("latency"),
            "limit_label": f"target {pretty_limit(wanted or '')}",
        }
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


def default_axis(run: Run, menu: Mapping[str, Axis]) -> str:
    """The horizontal axis to begin with: the targeted cost, latency as a ratio where it was measured as one."""
    cost = main_cost(run.settings.target)
    return "ratio" if cost == "latency" and "ratio" in menu else cost


def front_plot(run: Run, style: ScoreStyle) -> figure:
    """Every measured network as a point; the page's script moves the points when other axes are chosen.

    Args:
        run: the run; it must have at least one measured point.
        style: how scores are written.
    """
    menu = axes(run, style)
    across = default_axis(run, menu)
    tools = "pan,wheel_zoom,box_zoom,reset,save"
    plot = new_figure(menu[across]["label"], menu["score"]["label"], height=460, tools=tools)
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
    add_hover(plot, [marks], _TIP.replace("{rows}", "".join(_tip_row(key, axis["name"]) for key, axis in menu.items())))
    return plot


def _tip_row(key: str, name: str) -> str:
    return f'<span style="color:var(--soft)">{literal(name)}</span><span>@shown_{key}</span>'


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
        text_font=FONT,
        text_font_size="12px",
        visible=False,
        tags=["--soft"],
    )


def _groups(run: Run) -> dict[str, list[Point]]:
    """Points by kind, each point once: as chosen or baseline before as one of the front before as evaluated."""
    result = run.result
    known: set[tuple[str, float, float]] = set()
    groups: dict[str, list[Point]] = {}
    for kind, points in (
        ("chosen", [result.chosen] if result and result.chosen and result.chosen.steps else []),
        ("baseline", [run.baseline] if run.baseline else []),
        ("front", result.front if result else ()),
        ("evaluated", run.points),
    ):
        groups[kind] = [point for point in points if _key(point) not in known]
        known |= {_key(point) for point in points}
    return {kind: groups[kind] for kind in KINDS}


def _key(point: Point) -> tuple[str, float, float]:
    return plain_steps(point.steps, None), point.latency_ms.median, point.score.val


def _every(run: Run) -> list[Point]:
    return [point for group in _groups(run).values() for point in group]


def _largest(run: Run) -> Point | None:
    points = _every(run)
    return run.baseline or max(points, key=lambda point: point.size_bytes, default=None)


def _columns(run: Run, menu: Mapping[str, Axis], style: ScoreStyle) -> dict[str, Sequence[Any]]:
    """One row per point, in drawing order: its place on every axis, its looks, and the words of its tooltip."""
    rows = [(kind, point) for kind, points in _groups(run).items() for point in points]
    points = [point for _, point in rows]
    standing = {_key(point) for point in (run.result.front if run.result else ())}
    columns: dict[str, Sequence[Any]] = {
        "group": [kind for kind, _ in rows],
        "kind": [KINDS[kind] for kind, _ in rows],
        "marker": [MARKS[kind][0] for kind, _ in rows],
        "marker_size": [MARKS[kind][1] for kind, _ in rows],
        "alpha": [0.3 if kind == "evaluated" else 1.0 for kind, _ in rows],
        "fill": ["#808080"] * len(rows),
        "edge": ["#808080"] * len(rows),
        "stands": [_key(point) in standing for point in points],
        "steps": [plain_steps(point.steps) if point.steps else "as the task defines it" for point in points],
        "score": [point.score.val * style.worth for point in points],
        "shown_score": [style.value(point.score.val) for point in points],
    }
    baseline = run.baseline
    if "ratio" in menu and baseline is not None:
        columns["ratio"] = [point.share("latency", baseline) for point in points]
        columns["shown_ratio"] = [f"{compact(point.share('latency', baseline))}{TIMES}" for point in points]
    for cost in COSTS:
        columns[cost] = [point.cost(cost) / menu[cost]["worth"] for point in points]
        columns[f"shown_{cost}"] = [quantity(cost, point.cost(cost)) for point in points]
    return columns
