"""``search.run``: any space, any evaluation, several objectives, hard constraints; resumable, and nothing twice."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.samplers import BaseSampler

from netwright.core.console import ConsoleProgress
from netwright.core.errors import RunDirectoryError, SettingError
from netwright.core.rundir import MARK, RunDirectory
from netwright.search._log import line_of
from netwright.search._ray_workers import RayWorkers
from netwright.search._study import Search
from netwright.search._workers import Pool, Workers
from netwright.search.linas import LINASSampler
from netwright.search.result import Direction, Limit, SearchResult
from netwright.search.space import Params, SearchSpace, SpaceError

__all__ = ["Engine", "checked", "run"]

Progress: TypeAlias = Callable[[float, str], None]
Engine: TypeAlias = Literal["local", "ray"]
"""Where candidates are evaluated."""
Job: TypeAlias = tuple[optuna.Trial, dict[str, Any]]


def run(
    space: SearchSpace,
    evaluate: Callable[[Params], Mapping[str, float]],
    objectives: Mapping[str, Direction],
    *,
    sampler: BaseSampler | None = None,
    evaluations: int = 100,
    budget_s: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    constraints: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress | None = None,
) -> SearchResult:
    """Search a space for the front of measured candidates.

    Reach for it to optimize anything that can be evaluated: sub-networks of a supernet, compression policies, settings.
    A candidate is evaluated once; what a sampler proposes again is answered from memory and costs no evaluation. An
    invalid candidate is never evaluated. An evaluation that raises, exits, or returns NaN, is recorded as failed with
    the reason, and the search goes on. A sampler that asks to stop ends it: ``GridSampler`` does so after the last
    candidate of its grid, ``BruteForceSampler`` after the last of the space.

    With ``out`` every finished evaluation is on disk before the next begins; after a crash, or to spend more
    evaluations, call again with ``resume=True``. A candidate in whose evaluation the process died twice (killed from
    outside or from within) is then recorded as failed, and the search goes past it.

    Args:
        space: what a candidate is.
        evaluate: called with a candidate's decisions (those that count); returns metrics by name.
        objectives: "maximize" or "minimize" for each metric that is an objective.
        sampler: any Optuna sampler; None for :class:`~netwright.search.linas.LINASSampler`.
        evaluations: how many candidates are evaluated in all, failed ones and those before a resumption included.
        budget_s: seconds after which no further candidate is begun, this call's alone; None for as long as it takes.
        out: folder for the log, the study and the result; None keeps nothing.
        resume: go on with the run in ``out``.
        constraints: hard constraints on metrics, ``"latency_ms<=5"``; the metric need not be an objective.
        seed: source of randomness of the default sampler and of random candidates.
        workers: evaluations at a time; more than one run in processes of their own, and ``evaluate`` is sent there by
            cloudpickle. They do not run the main script, which needs no guard.
        engine: "local" for this machine, "ray" for a Ray cluster (an extra).
        progress: called with the finished share and a word; None shows a bar with the time left.

    Returns:
        What was measured; its ``front`` holds measured, feasible candidates only.

    Raises:
        SettingError: no objective, an unknown direction, constraints that contradict each other, or no evaluations.
        SpaceError: a space without a valid candidate, a choice without a hash, such as a list, or, with ``out``, one
            that JSON cannot hold.
        RunDirectoryError: a folder that cannot be used, or a run of another space or other objectives.

    Example:
        >>> from optuna.distributions import IntDistribution
        >>> space = SearchSpace({"width": IntDistribution(1, 64), "depth": IntDistribution(1, 8)})
        >>> def evaluate(params):
        ...     cost = params["width"] * params["depth"]
        ...     return {"error": 1 / params["width"] + 1 / params["depth"], "cost": cost}
        >>> goals = {"error": "minimize", "cost": "minimize"}
        >>> found = run(space, evaluate, goals, evaluations=30, constraints=["cost<=128"])
        >>> all(entry.metrics["cost"] <= 128 for entry in found.front)
        True

    Cost: beside the evaluations what the sampler takes, and one flushed line each, with one worker two.
    """
    place = None if out is None else Path(out).absolute()  # what is called below may change the working directory
    limits = checked(objectives, constraints, evaluations, workers, budget_s, engine)
    end = math.inf if budget_s is None else time.monotonic() + budget_s

    def pool() -> Pool[Job]:
        return RayWorkers(evaluate, workers) if engine == "ray" else Workers(evaluate, workers)

    _check_choices(space)
    space.sample(np.random.default_rng(seed))  # raises where no candidate is valid, before anything is written
    if place is None:
        if resume:
            raise SettingError("resume needs a run to go on with. Give its folder as out.")
        return _search(None, space, evaluate, objectives, limits, sampler, evaluations, end, seed, pool, progress)
    settings, folder = _settings(space, objectives, limits, seed), RunDirectory(place)
    with folder.open() if resume else folder.create(settings) as opened:
        _same(opened, settings, limits)
        return _search(opened, space, evaluate, objectives, limits, sampler, evaluations, end, seed, pool, progress)


def _search(
    folder: RunDirectory | None,
    space: SearchSpace,
    evaluate: Callable[[Params], Mapping[str, float]],
    objectives: Mapping[str, Direction],
    limits: Sequence[Limit],
    sampler: BaseSampler | None,
    evaluations: int,
    end: float,
    seed: int,
    pool: Callable[[], Pool[Job]],
    progress: Progress | None,
) -> SearchResult:
    search = Search(folder, space, objectives, limits, sampler or LINASSampler(space, seed=seed), seed)
    workers, begun = pool(), time.monotonic()
    with ConsoleProgress("search") as bar:
        tell = bar.update if progress is None else progress
        try:
            while True:
                while workers.free and search.started < evaluations and time.monotonic() < end:
                    job = search.ask()
                    if job is None:
                        break
                    if workers.inside:
                        search.begin(job[1])
                    workers.submit(job, job[1])
                if not workers.busy:
                    break
                for (trial, params), answer in workers.next():
                    search.tell(trial, params, answer)
                    spent = 0.0 if end == math.inf else (time.monotonic() - begun) / (end - begun)
                    share = max(len(search.entries) / min(evaluations, space.size), spent)
                    tell(min(1.0, share), search.words())
        finally:
            workers.close()
            search.end()
            result = search.result()
            if folder is not None:
                folder.write("result.json", _summary(result))
    return result


def checked(
    objectives: Mapping[str, Direction],
    constraints: Sequence[str],
    evaluations: int,
    workers: int,
    budget_s: float | None,
    engine: str,
) -> list[Limit]:
    """The constraints, read; settings as :func:`run` has them.

    Raises:
        SettingError: a setting that is impossible.
    """
    if engine not in get_args(Engine):
        raise SettingError(f"engine must be 'local' or 'ray', got {engine!r}.")
    if budget_s is not None and not budget_s > 0:
        raise SettingError(f"budget_s must be positive, got {budget_s!r}. It counts seconds.")
    if not objectives:
        raise SettingError("A search needs at least one objective, such as {'accuracy': 'maximize'}.")
    for name, way in objectives.items():
        if way not in ("maximize", "minimize"):
            raise SettingError(f"Objective {name!r} must be 'maximize' or 'minimize', got {way!r}.")
    for label, value in (("evaluations", evaluations), ("workers", workers)):
        if value < 1:
            raise SettingError(f"{label} must be at least 1, got {value}.")
    limits = [Limit.parse(text) for text in ([constraints] if isinstance(constraints, str) else constraints)]
    for above in (limit for limit in limits if limit.upper):
        for below in (limit for limit in limits if not limit.upper and limit.metric == above.metric):
            if below.bound > above.bound:
                raise SettingError(
                    f"Constraints {above} and {below} contradict each other: nothing can meet both. Drop one."
                )
    return limits


def _check_choices(space: SearchSpace) -> None:
    """Assure that known candidates can be looked up.

    Raises:
        SpaceError: a choice without a hash.
    """
    for name, distribution in space.decisions.items():
        for choice in distribution.choices if isinstance(distribution, CategoricalDistribution) else ():
            try:
                hash(choice)
            except TypeError:
                raise SpaceError(
                    f"Decision {name!r} has the choice {choice!r}, which has no hash. Give a tuple or a name for it."
                ) from None


def _settings(
    space: SearchSpace, objectives: Mapping[str, Direction], limits: Sequence[Limit], seed: int
) -> dict[str, Any]:
    """What the folder says about the search.

    Raises:
        SpaceError: a choice that JSON cannot hold.
    """
    for name, distribution in space.decisions.items():
        for choice in distribution.choices if isinstance(distribution, CategoricalDistribution) else ():
            try:
                json.dumps(choice, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise SpaceError(
                    f"Decision {name!r} has the choice {choice!r}, which cannot be written into a folder ({error}). "
                    "Choose by a name for it, or search without out."
                ) from error
    return {
        "kind": "search",
        "decisions": {name: distribution_to_json(distribution) for name, distribution in space.decisions.items()},
        "objectives": dict(objectives),
        "constraints": [limit.exact for limit in limits],
        "seed": seed,
    }


def _same(folder: RunDirectory, settings: Mapping[str, Any], limits: Sequence[Limit]) -> None:
    compared = ("decisions", "objectives", "constraints")
    stored = folder.read(MARK, *compared)
    rounded = {"constraints": [str(limit) for limit in limits]}  # as older versions wrote them
    for name in compared:
        if stored[name] not in (settings[name], rounded.get(name, settings[name])):
            raise RunDirectoryError(
                f"{folder.path} holds a search with other {name}: {stored[name]}, not {settings[name]}. "
                "Resume with the same, or give another folder."
            )


def _summary(result: SearchResult) -> dict[str, Any]:
    return {
        "schema": 1,
        "objectives": dict(result.objectives),
        "front": [line_of(entry) for entry in result.front],
        "evaluations": len(result.evaluations),
        "failed": len(result.failed),
        "exhausted": result.exhausted,
        "wall_s": result.seconds,
        "proposing_s": result.proposing_s,
    }
