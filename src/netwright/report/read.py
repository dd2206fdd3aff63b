"""Reads a run directory into a :class:`~netwright.report.run.Run`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from netwright.core.errors import CorruptRunError
from netwright.report.fields import Fields, load_object
from netwright.report.run import (
    Epoch,
    Evaluation,
    Latency,
    LatencyRatio,
    Layer,
    Point,
    Result,
    Run,
    Score,
    ScoreDrop,
    Settings,
    Step,
)

__all__ = ["parse_result", "read_run"]

Part = TypeVar("Part")

_RESUME = "Run the same command with --resume to have it written again, or start anew in an empty folder."
_PAGES = {"search": "report.html", "comparison": "comparison.html", "training": "report.html"}
_NOT_A_RUN = "Give the folder that was passed as --out to 'netwright optimize'."


def read_run(path: Path | str) -> Run:
    """Everything that a run directory says, whether the run has finished or not.

    Reach for it when figures of a run are wanted in Python; ``netwright report`` is built on it.
    ``run.json`` must be there; without ``result.json`` the run counts as unfinished; whatever else is
    absent or damaged is left out, with a sentence in ``remarks``. Time and memory grow linearly with
    the number of evaluated candidates (about 1 KB each).

    Args:
        path: the run directory.

    Returns:
        The run.

    Raises:
        CorruptRunError: no such folder, no ``run.json``, a folder of another command, or a ``run.json`` or
            ``result.json`` that cannot be read; the message names the file and the remedy.

    Example:
        >>> read_run("no/such/folder")
        Traceback (most recent call last):
        ...
        netwright.core.errors.CorruptRunError: no/such/folder is not a run directory: there is no run.json in it. \
Give the folder that was passed as --out to 'netwright optimize'.
    """
    path = Path(path)
    try:
        stored = load_object(path / "run.json", _RESUME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptRunError(f"{path} is not a run directory: there is no run.json in it. {_NOT_A_RUN}") from error
    kind = "replay" if stored.has("replay_of") else stored.text("kind", default="optimization")
    if kind != "optimization":
        page = f"{_PAGES[kind]} is written there when the {kind} ends. " if kind in _PAGES else ""
        raise CorruptRunError(f"{path} holds a {kind}, not an optimization. {page}{_NOT_A_RUN}")
    settings = _settings(stored)
    remarks: list[str] = []
    result = _read_result(path / "result.json", remarks)
    evaluations = _read_evaluations(path / "evaluations.jsonl", remarks)
    history = _optional(path / "history.json", _history, "The training curves are", remarks)
    layers = _optional(path / "layers.json", _layers, "The table of layers is", remarks)
    return Run(path, settings, result, evaluations, history or {}, layers or (), tuple(remarks))


def parse_result(fields: Fields) -> Result:
    """A ``result.json`` that has been loaded.

    Args:
        fields: the object with its file name and remedy.

    Raises:
        CorruptRunError: a field that is missing or of the wrong kind.
    """
    status = fields.text("status")
    if status not in ("met", "not_met", "interrupted"):
        raise fields.wrong("status", "'met', 'not_met' or 'interrupted'")
    ratios = fields.inner("ratios") if fields.has("ratios") else None
    return Result(
        task=fields.text("task"),
        seed=fields.integer("seed"),
        status="met" if status == "met" else "not_met" if status == "not_met" else "interrupted",
        explanation=fields.text("explanation"),
        target=_texts(fields, "target"),
        keep=_texts(fields, "keep"),
        machine=fields.plain("machine"),
        baseline=_point(fields.inner("baseline")),
        chosen=_point(fields.inner("chosen")) if fields.has("chosen") else None,
        ratios={} if ratios is None else {key: ratios.number(key) for key in ratios.content if ratios.has(key)},
        latency_ratio=_latency_ratio(fields.inner("latency_ratio")) if fields.has("latency_ratio") else None,
        score_drop=_score_drop(fields.inner("score_drop")) if fields.has("score_drop") else None,
        front=tuple(_point(entry) for entry in fields.inners("front")),
        hypervolume=fields.maybe_number("hypervolume"),
        evaluations=fields.integer("evaluations"),
        failed=fields.integer("failed"),
        wall_s=fields.number("wall_s"),
        raw=fields.content,
    )


def _read_result(path: Path, remarks: list[str]) -> Result | None:
    try:
        fields = load_object(path, _RESUME)
        if fields.has("baseline") or fields.text("status") != "interrupted":
            return parse_result(fields)
        remarks.append("The run was stopped before its baseline was measured.")
        return None
    except FileNotFoundError:
        remarks.append("There is no result.json: the run is still going, or was killed. What follows is what is known.")
        return None


def _read_evaluations(path: Path, remarks: list[str]) -> tuple[Evaluation, ...]:
    """One entry per whole line. A torn last line is what a killed run leaves behind; it is not an error."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        remarks.append("There is no evaluations.jsonl, so the evaluated candidates are not shown.")
        return ()
    kept: list[Evaluation] = []
    bad: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            kept.append(_evaluation(f"{path}: line {number}", line))
        except (CorruptRunError, ValueError, RecursionError):
            bad.append(number)
    if bad and bad[-1] == len(lines) and not lines[-1].endswith(b"\n"):
        remarks.append(f"The last line of {path.name} (line {bad.pop()}) was torn off, so it is not counted.")
    if bad:
        listed = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        remarks.append(f"{len(bad)} damaged lines of {path.name} are not counted (lines {listed}).")
    return tuple(kept)


def _optional(path: Path, parse: Callable[[bytes], Part], what: str, remarks: list[str]) -> Part | None:
    try:
        return parse(path.read_bytes())
    except OSError:
        remarks.append(f"{what} left out: there is no {path.name}.")
    except (CorruptRunError, ValueError, RecursionError) as error:
        remarks.append(f"{what} left out: {path.name} is damaged ({error}).")
    return None


def _settings(fields: Fields) -> Settings:
    return Settings(
        netwright=fields.text("netwright", default="unknown"),
        task=fields.text("task"),
        description=fields.text("description", default=""),
        score=fields.text("score", default="score"),
        target=_texts(fields, "target"),
        keep=_texts(fields, "keep"),
        budget_s=fields.maybe_number("budget_s"),
        seed=fields.integer("seed"),
        engine=fields.text("engine", default="local"),
        workers=fields.integer("workers") if fields.has("workers") else 1,
        command=fields.text("command", default=""),
        created=fields.text("created", default=""),
    )


def _texts(fields: Fields, key: str) -> dict[str, str]:
    inner = fields.inner(key) if fields.has(key) else None
    return {} if inner is None else {name: inner.text(name) for name in inner.content}


def _point(fields: Fields) -> Point:
    score, latency = fields.inner("score"), fields.inner("latency_ms")
    return Point(
        steps=tuple(Step(step.text("method"), step.plain("settings")) for step in fields.inners("steps")),
        score=Score(score.number("val"), score.maybe_number("test"), score.interval("test_ci95")),
        latency_ms=Latency(
            median=latency.positive("median"),
            p10=latency.positive("p10"),
            p90=latency.positive("p90"),
            batch=latency.integer("batch"),
            threads=latency.integer("threads"),
            runtime=latency.text("runtime"),
        ),
        memory_bytes=fields.integer("memory_bytes"),
        size_bytes=fields.integer("size_bytes"),
        macs=fields.integer("macs"),
        parameters=fields.integer("parameters"),
        latency_ratio=_latency_ratio(fields.inner("latency_ratio")) if fields.has("latency_ratio") else None,
    )


def _latency_ratio(fields: Fields) -> LatencyRatio:
    return LatencyRatio(fields.number("median"), fields.number("low"), fields.number("high"), fields.flag("noisy"))


def _score_drop(fields: Fields) -> ScoreDrop | None:
    return ScoreDrop(fields.number("test"), fields.interval("ci95")) if fields.has("test") else None


def _evaluation(where: str, line: bytes) -> Evaluation:
    fields = _object(where, json.loads(line))
    state = fields.text("state")
    if state not in ("ok", "failed"):
        raise fields.wrong("state", "'ok' or 'failed'")
    return Evaluation(
        trial=fields.integer("trial"),
        state="ok" if state == "ok" else "failed",
        point=_point(fields.inner("point")) if fields.has("point") else None,
        error=fields.text("error", default="") or None,
        seconds=fields.number("seconds"),
        finished_s=fields.number("finished_s"),
    )


def _history(content: bytes) -> dict[str, tuple[Epoch, ...]]:
    fields = _object("history.json", json.loads(content))
    return {name: tuple(_epoch(entry) for entry in fields.inners(name)) for name in ("baseline", "chosen")}


def _epoch(fields: Fields) -> Epoch:
    step = fields.integer("step") if fields.has("step") else 0
    epoch = fields.maybe_number("epoch")
    optional = {key: fields.maybe_number(key) for key in ("train_loss", "val_score", "lr", "seconds")}
    return Epoch(step, float(step) if epoch is None else epoch, **optional)


def _layers(content: bytes) -> tuple[Layer, ...]:
    entries = Fields("layers.json", {"layers": json.loads(content)}, _RESUME).inners("layers")
    return tuple(
        Layer(
            layer=entry.text("layer"),
            kind=entry.text("kind"),
            baseline_shape=entry.sizes("baseline_shape") or (),
            chosen_shape=entry.sizes("chosen_shape"),
            baseline_macs=entry.integer("baseline_macs"),
            chosen_macs=entry.integer("chosen_macs"),
            baseline_parameters=entry.integer("baseline_parameters"),
            chosen_parameters=entry.integer("chosen_parameters"),
            precision=entry.text("precision", default="float32"),
        )
        for entry in entries
    )


def _object(where: str, content: object) -> Fields:
    if not isinstance(content, dict):
        raise CorruptRunError(f"{where} should hold an object. {_RESUME}")
    return Fields(where, content, _RESUME)
