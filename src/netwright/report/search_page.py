"""A search over sub-networks as one HTML page: the front, how it grew, how good the predictors were, what matters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure

from netwright.core.files import atomic_write
from netwright.core.machine import machine
from netwright.report.canvas import add_hover, new_figure, small_tip
from netwright.report.format import compact
from netwright.report.frame import embedded, environment, library
from netwright.search import PredictorQuality, SearchResult, SearchSpace, importance, predictor_quality
from netwright.version import __version__

__all__ = ["render_search", "write_search_report"]

_MOST_ROWS, _MOST_DECISIONS = 50, 12
_COLOURS = 8
_MARGIN = 0.05  # of the range beyond the worst candidate, where the hypervolume ends


def write_search_report(
    result: SearchResult,
    space: SearchSpace,
    out: Path | str,
    *,
    task: str,
    files: Mapping[int, Path] | None = None,
    command: str = "",
) -> Path:
    """Write one self-contained ``report.html`` about a search into a folder.

    Args:
        result: of :func:`netwright.search.run`.
        space: that was searched.
        out: the folder.
        task: how the task is called.
        files: the ONNX file of each candidate on the front, by number.
        command: that repeats the search.

    Returns:
        The path of the report.

    Cost: some fits of the predictors, a second or so for a hundred candidates.
    """
    page = render_search(result, space, task=task, files=files or {}, command=command)
    path = Path(out) / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def render_search(
    result: SearchResult, space: SearchSpace, *, task: str, files: Mapping[int, Path], command: str
) -> str:
    """The whole page as one HTML text, nothing fetched; arguments as in :func:`write_search_report`."""
    quality = predictor_quality(result, space)
    worth = importance(result, space)
    figures = {
        "search-front": _front(result),
        "growth": _growth(result),
        "quality": _quality(quality, list(result.objectives)),
        **{f"importance-{place}": _importance(name, parts) for place, (name, parts) in enumerate(worth.items())},
    }
    plots = {name: json_item(plot) for name, plot in figures.items() if plot is not None}
    found = list(result.front)
    return str(
        environment()
        .get_template("search.html")
        .render(
            headline=f"{task}: {len(found)} sub-networks on the front of {' and '.join(result.objectives)}",
            lead=_lead(result),
            objectives=list(result.objectives),
            rows=[_row(entry.number, entry.params, entry.metrics or {}, files) for entry in found[:_MOST_ROWS]],
            hidden=max(0, len(found) - _MOST_ROWS),
            metrics=sorted({name for entry in found for name in entry.metrics or {}}),
            failures=[(entry.number, entry.error) for entry in result.failed],
            importances=list(worth),
            facts={key: str(value) for key, value in machine().items() if isinstance(value, str | int)},
            command=command,
            netwright=__version__,
            plots=plots,
            bokeh=library(),
            data=embedded({"plots": plots, "axes": {}}),
        )
    )


def _lead(result: SearchResult) -> str:
    share = 100 * result.proposing_s / result.seconds if result.seconds else 0.0
    ended = " Every candidate of the space was measured." if result.exhausted else ""
    return (
        f"{len(result.evaluations)} candidates were evaluated in {result.seconds:.0f} s, {len(result.failed)} of them "
        f"failed; choosing them took {share:.0f}% of the time. What is on the front was measured.{ended}"
    )


def _row(number: int, params: Mapping[str, object], metrics: Mapping[str, float], files: Mapping[int, Path]) -> object:
    return {
        "number": number,
        "metrics": {name: compact(value) for name, value in metrics.items()},
        "params": ", ".join(f"{name} {value}" for name, value in params.items()),
        "file": f"front/{files[number].name}" if number in files else "",
    }


def _front(result: SearchResult) -> figure | None:
    """The first two objectives of everything that was measured."""
    if len(result.objectives) < 2 or not any(entry.feasible for entry in result.evaluations):
        return None
    up, across = list(result.objectives)[:2]
    plot = new_figure(across, up, height=380)
    plot.name = "search-front"
    on_front = {entry.number for entry in result.front}
    renderers: list[DataRenderer] = []
    for kind, tag, size in (("Evaluated", "--evaluated", 6), ("On the front", "--front", 9)):
        chosen = [
            entry
            for entry in result.evaluations
            if entry.metrics is not None and (entry.number in on_front) == (kind == "On the front")
        ]
        points = [entry.metrics or {} for entry in chosen]
        source = ColumnDataSource(
            {
                "x": [point[across] for point in points],
                "y": [point[up] for point in points],
                "kind": [f"{kind}, number {entry.number}" for entry in chosen],
                "shown": [compact(point[up]) for point in points],
                "where": [f"{across} {compact(point[across])}" for point in points],
            }
        )
        drawn = plot.scatter(x="x", y="y", source=source, size=size)
        drawn.tags = [tag]
        renderers.append(drawn)
    add_hover(plot, renderers, small_tip("@where", up))
    return plot


def _growth(result: SearchResult) -> figure | None:
    """Hypervolume of the front after every evaluation, as a share of the last one's."""
    values = result.values()
    if not len(values):
        return None
    reach = values.max(0) + _MARGIN * np.maximum(np.ptp(values, axis=0), 1e-12)
    volumes = result.hypervolumes(reach)
    last = volumes[-1] or 1.0
    plot = new_figure("Evaluations", "Hypervolume, share of the last", height=300)
    plot.name = "growth"
    source = ColumnDataSource(
        {
            "x": list(range(1, len(volumes) + 1)),
            "y": [volume / last for volume in volumes],
            "kind": ["Front"] * len(volumes),
            "shown": [f"{volume / last:.3f}" for volume in volumes],
        }
    )
    plot.step(x="x", y="y", source=source, line_width=2.5, mode="after").tags = ["--front"]
    dots = plot.scatter(x="x", y="y", source=source, size=4)
    dots.tags = ["--front"]
    add_hover(plot, [dots], small_tip("after @x evaluations", "hypervolume"))
    return plot


def _quality(found: Sequence[PredictorQuality], objectives: Sequence[str]) -> figure | None:
    """Rank correlation on candidates not seen, against how many were."""
    if not found:
        return None
    plot = new_figure("Candidates learned from", "Kendall tau on later candidates", height=300)
    plot.name = "quality"
    renderers: list[DataRenderer] = []
    for place, name in enumerate(objectives):
        entries = [entry for entry in found if entry.objective == name]
        source = ColumnDataSource(
            {
                "x": [entry.seen for entry in entries],
                "y": [entry.kendall_tau for entry in entries],
                "kind": [f"{name}, {entry.predictor}" for entry in entries],
                "shown": [f"{entry.kendall_tau:.2f}" for entry in entries],
            }
        )
        plot.line(x="x", y="y", source=source, line_width=2.5).tags = [f"--series-{place % _COLOURS}"]
        dots = plot.scatter(x="x", y="y", source=source, size=6)
        dots.tags = [f"--series-{place % _COLOURS}"]
        renderers.append(dots)
    add_hover(plot, renderers, small_tip("learned from @x", "Kendall tau"))
    return plot


def _importance(objective: str, worth: Mapping[str, float]) -> figure:
    """The decisions that matter most to an objective."""
    names = list(worth)[:_MOST_DECISIONS][::-1]
    plot = new_figure("Importance", "", height=60 + 26 * len(names))
    plot.name = f"importance-{objective}"
    source = ColumnDataSource(
        {
            "x": [max(worth[name], 0.0) for name in names],
            "y": list(range(len(names))),
            "kind": names,
            "shown": [f"{worth[name]:.3f}" for name in names],
        }
    )
    bars = plot.hbar(y="y", right="x", height=0.7, source=source)
    bars.tags = ["--front"]
    plot.yaxis.ticker = list(range(len(names)))
    plot.yaxis.major_label_overrides = dict(enumerate(names))
    add_hover(plot, [bars], small_tip(objective, "importance"))
    return plot
