"""A run of ``netwright train`` as one HTML page: curves and a table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure
from markupsafe import Markup

from netwright.report.canvas import add_hover, new_figure, small_tip
from netwright.report.format import compact, duration, moment, quantity
from netwright.report.frame import embedded, environment, library
from netwright.report.training_run import CurvePoint, Training, TrainingRun

__all__ = ["render_training"]

_COLOURS = 8
_LOG_ABOVE = 20.0  # largest over smallest loss from which the axis is logarithmic
_DASHES: tuple[str | list[int], ...] = ("solid", [7, 3], [2, 3])


@dataclass(frozen=True, eq=False)
class _Line:
    """How one training is drawn."""

    training: Training
    colour: str
    dash: str | list[int]

    @property
    def pattern(self) -> str:
        return "" if isinstance(self.dash, str) else " ".join(map(str, self.dash))


def render_training(run: TrainingRun) -> str:
    """The whole page as one HTML text, nothing fetched.

    The curves are those of the best setting of each name; while the run goes on, those of all that have ended.

    Args:
        run: what was read from the run directory.
    """
    shown = [entry for entry in run.trainings if entry.leader and entry.curve] or [
        entry for entry in run.trainings if entry.curve
    ]
    lines = [
        _Line(entry, f"--series-{place % _COLOURS}", _DASHES[place // _COLOURS % len(_DASHES)])
        for place, entry in enumerate(shown)
    ]
    figures = {
        "loss": _curves(lines, lambda point: point.train_loss, "Training loss", "loss"),
        "score": _curves(lines, lambda point: point.val_score, "Score, validation", "score"),
    }
    plots = {name: json_item(plot) for name, plot in figures.items() if plot is not None}
    return str(
        environment()
        .get_template("training.html")
        .render(
            run=run,
            headline=_headline(run),
            lines=lines,
            rows=[_row(entry, run) for entry in run.trainings],
            facts=_facts(run),
            failures=[(_label(entry), entry.error) for entry in run.trainings if entry.error],
            recipe=_recipe(run),
            plots=plots,
            bokeh=library() if plots else Markup(""),
            data=embedded({"plots": plots, "axes": {}}),
        )
    )


def _headline(run: TrainingRun) -> str:
    if run.best is None:
        return f"{run.task}: {len(run.trainings)} of {run.planned} trainings have ended"
    best = next(entry for entry in run.trainings if entry.entry == run.best)
    if run.planned == 1:
        return f"{run.task}, trained by {best.name}: {_number(best.test)} on the test set"
    return f"{run.task}: {best.name} did best on the validation set, {_number(best.test)} on the test set"


def _curves(lines: list[_Line], value: Callable[[CurvePoint], float | None], label: str, name: str) -> figure | None:
    found = {line: _points(line.training, value) for line in lines}
    heights = [y for pairs in found.values() for _, y in pairs]
    log = name == "loss" and bool(heights) and min(heights) > 0 and max(heights) > _LOG_ABOVE * min(heights)
    plot = new_figure("Epoch", label, height=340, log=log)
    plot.name = name
    renderers: list[DataRenderer] = []
    for line, pairs in found.items():
        if not pairs:
            continue
        source = ColumnDataSource(
            {
                "x": [x for x, _ in pairs],
                "y": [y for _, y in pairs],
                "kind": [_label(line.training)] * len(pairs),
                "shown": [compact(y) for _, y in pairs],
            }
        )
        drawn = plot.line(x="x", y="y", source=source, line_width=2.5, line_dash=line.dash)
        drawn.tags = [line.colour]
        dots = plot.scatter(x="x", y="y", source=source, size=5)
        dots.tags = [line.colour]
        renderers.append(dots)
    if not renderers:
        return None
    add_hover(plot, renderers, small_tip("epoch @x", label))
    return plot


def _points(training: Training, value: Callable[[CurvePoint], float | None]) -> list[tuple[float, float]]:
    return [(point.epoch, found) for point in training.curve if (found := value(point)) is not None]


def _row(entry: Training, run: TrainingRun) -> Mapping[str, object]:
    last = next((point.train_loss for point in reversed(entry.curve) if point.train_loss is not None), None)
    return {
        "name": entry.name,
        "best": entry.entry == run.best,
        "lr": "" if entry.lr is None else f"{entry.lr:.3g}",
        "loss": "diverged" if entry.error else _number(last),
        "val": _number(entry.val),
        "test": _number(entry.test),
        "interval": "" if entry.test_interval is None else " to ".join(map(_number, entry.test_interval)),
        "seconds": "" if entry.seconds is None else duration(entry.seconds),
        "state": quantity("memory", entry.optimizer_bytes) if entry.optimizer_bytes is not None and entry.steps else "",
    }


def _facts(run: TrainingRun) -> Mapping[str, Mapping[str, str]]:
    settings = {
        "Task": run.task,
        "Seed": str(run.seed),
        "Trainings": str(run.planned),
        "Begun": moment(run.created),
        "Netwright": run.netwright,
    }
    machine = {key: str(value) for key, value in run.machine.items() if isinstance(value, str | int)}
    return {"Settings": {key: value for key, value in settings.items() if value}, "Machine": machine}


def _recipe(run: TrainingRun) -> str:
    found = [entry.recipe for entry in run.trainings if entry.entry == run.best]
    return json.dumps(found[0], indent=2, ensure_ascii=False) if found else ""


def _label(entry: Training) -> str:
    return entry.name if entry.lr is None else f"{entry.name}, lr {entry.lr:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
