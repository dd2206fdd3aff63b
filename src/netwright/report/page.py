"""From a run to one HTML page."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from bokeh.embed import json_item
from bokeh.plotting import figure
from markupsafe import Markup

from netwright.report.compare import compare
from netwright.report.curves import curve_plot, progress_plot, volume_plot
from netwright.report.format import (
    COST_NAMES,
    ScoreStyle,
    compact,
    duration,
    moment,
    plain_steps,
    pretty_limit,
    quantity,
)
from netwright.report.frame import embedded, environment, library
from netwright.report.front_plot import axes, default_axis, front_plot
from netwright.report.layers import layer_rows
from netwright.report.limits import main_cost, target_limit
from netwright.report.progress import follow
from netwright.report.run import COSTS, Epoch, Point, Run
from netwright.report.tiles import tiles
from netwright.report.words import GLOSSARY, STATUS_WORDS, headline, subline

__all__ = ["render"]

_PLACES = ("front", "loss", "score", "progress", "volume")

_MACHINE: Mapping[str, str] = {
    "cpu": "Processor",
    "os": "System",
    "python": "Python",
    "isa": "Instruction sets",
    "memory_bytes": "Memory",
    "cores": "Cores",
    "threads": "Threads used",
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
}


def render(run: Run) -> str:
    """The whole report as one HTML text: styles, scripts and data inline, nothing fetched.

    About 1.3 MB of it is the plotting library; each evaluated candidate adds about 0.6 KB. Takes well under
    a second for hundreds of candidates.

    Args:
        run: what was read from the run directory.
    """
    style = ScoreStyle.of(run.settings.score, run.baseline)
    plots = _plots(run, style)
    menu = axes(run, style)
    result = run.result
    return str(
        environment()
        .get_template("template.html")
        .render(
            run=run,
            result=result,
            status=result.status if result else "unfinished",
            status_words=STATUS_WORDS[result.status if result else "unfinished"],
            headline=headline(run),
            subline=subline(run),
            tiles=tiles(run, style),
            rows=compare(result, style) if result else (),
            front=_front_rows(run, style),
            costs=[COST_NAMES[cost] for cost in COSTS],
            layers=layer_rows(run.layers),
            chosen_steps=plain_steps(result.chosen.steps) if result and result.chosen else "",
            all_settings=json.dumps([asdict(step) for step in result.chosen.steps], indent=2, ensure_ascii=False)
            if result and result.chosen
            else "",
            created=moment(run.settings.created),
            failures=_failures(run),
            facts=_facts(run),
            glossary=GLOSSARY,
            score_title=style.title,
            across=default_axis(run, menu),
            axes=menu,
            plots={name: name in plots for name in _PLACES},
            drawn=[network for network, entries in run.history.items() if any(map(_is_drawn, entries))],
            bokeh=library() if plots else Markup(""),
            data=embedded({"plots": plots, "axes": menu}),
        )
    )


def _plots(run: Run, style: ScoreStyle) -> dict[str, object]:
    """Figures by the id of their place in the page, as JSON that the plotting library understands."""
    figures: dict[str, figure | None] = {}
    if run.points or run.result is not None:
        figures["front"] = front_plot(run, style)
    label = f"{style.title}, validation{' (%)' if style.percent else ''}"
    figures["loss"] = curve_plot(run.history, "train_loss", "Training loss", name="loss")
    figures["score"] = curve_plot(run.history, "val_score", label, style.worth, name="score")
    progress = follow(run)
    if progress is not None and run.baseline is not None:
        wanted = run.settings.target.get(progress.cost)
        limit = target_limit(progress.cost, wanted, run.baseline) if wanted else None
        base = run.baseline.cost(progress.cost)
        figures["progress"] = progress_plot(progress, None if limit is None else limit / base)
        figures["volume"] = volume_plot(progress)
    return {name: json_item(plot) for name, plot in figures.items() if plot is not None}


def _is_drawn(entry: Epoch) -> bool:
    return entry.train_loss is not None or entry.val_score is not None


def _front_rows(run: Run, style: ScoreStyle) -> list[dict[str, object]]:
    """The front as a table, fastest first: the plot for those who cannot see or hover it."""
    points = run.result.front if run.result else ()
    cost = main_cost(run.settings.target)
    return [_front_row(point, style) for point in sorted(points, key=lambda point: point.cost(cost))]


def _front_row(point: Point, style: ScoreStyle) -> dict[str, object]:
    return {
        "steps": plain_steps(point.steps, 8) if point.steps else "baseline",
        "score": style.value(point.score.val),
        "costs": [quantity(cost, point.cost(cost)) for cost in COSTS],
    }


def _failures(run: Run) -> list[tuple[str, str]]:
    """Causes with the trials that failed from them, the most frequent first."""
    trials: dict[str, list[int]] = {}
    for entry in run.failures:
        trials.setdefault(entry.error or "no cause was recorded", []).append(entry.trial)
    ordered = sorted(trials.items(), key=lambda pair: -len(pair[1]))
    return [(cause, ", ".join(map(str, numbers))) for cause, numbers in ordered]


def _facts(run: Run) -> dict[str, Mapping[str, str]]:
    """Machine and settings as label and value."""
    settings, result = run.settings, run.result
    found = result.machine if result else {}
    machine = {_MACHINE.get(key, key): _shown(key, value) for key, value in found.items()}
    chosen = {
        "Task": settings.task,
        "Target": _limits(settings.target) or "none",
        "Keep": _limits(settings.keep) or "anything",
        "Budget": "none" if settings.budget_s is None else duration(settings.budget_s),
        "Seed": str(settings.seed),
        "Engine": f"{settings.engine}, {_workers(settings.workers)}",
        "Netwright": settings.netwright,
        "Begun": moment(settings.created),
    }
    if result:
        chosen["Took"] = duration(result.wall_s)
        if result.hypervolume is not None:
            chosen["Hypervolume"] = compact(result.hypervolume)
    return {"Machine": machine, "Settings": {key: value for key, value in chosen.items() if value}}


def _shown(key: str, value: object) -> str:
    """A fact about the machine; bytes get a unit, lists commas."""
    if key.endswith("_bytes") and isinstance(value, int):
        return quantity("memory", value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _workers(count: int) -> str:
    """How many evaluations side by side; 0 stands for one on each core."""
    return "one worker on each core" if count == 0 else f"{count} worker{'' if count == 1 else 's'}"


def _limits(limits: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {pretty_limit(limit)}" for name, limit in limits.items())
