"""Figures over time: the training curves and the progress of the search."""

from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, Range1d
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure

from netwright.report.canvas import KINDS, MARKS, add_hover, new_figure, small_tip
from netwright.report.format import COST_NAMES, compact
from netwright.report.progress import Progress
from netwright.report.run import Epoch

__all__ = ["curve_plot", "progress_plot", "volume_plot"]


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
    plot = new_figure("Epoch", label, height=280)
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
        dots = plot.scatter(x="x", y="y", source=source, marker=MARKS[network][0], size=6)
        dots.tags = [f"--{network}"]
        renderers.append(dots)
    if not renderers:
        return None
    add_hover(plot, renderers, small_tip("epoch @x", label))
    return plot


def progress_plot(progress: Progress, limit: float | None) -> figure:
    """Cost of each candidate over the baseline's against time, with the best so far as a line.

    Args:
        progress: the followed search.
        limit: the target as a ratio, drawn as a line; None for none.
    """
    name = COST_NAMES[progress.cost]
    plot = new_figure("Seconds since the start", f"{name}, share of the baseline", height=280)
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
    add_hover(plot, renderers, small_tip("after @x{0.0} s", f"{name}, share of the baseline"))
    return plot


def volume_plot(progress: Progress) -> figure:
    """How much of the box below the baseline the front covered after each candidate."""
    plot = new_figure("Seconds since the start", "Hypervolume of the front", height=280)
    plot.name = "volume"
    plot.y_range = Range1d(start=0, end=1)
    source = ColumnDataSource({"x": [0.0, *progress.seconds], "y": [progress.start, *progress.volume]})
    plot.varea_step(x="x", y1=0, y2="y", source=source, step_mode="after", fill_alpha=0.18).tags = ["--front"]
    plot.step(x="x", y="y", source=source, mode="after", line_width=2.5).tags = ["--front"]
    return plot
