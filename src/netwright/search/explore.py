"""Search the sub-networks of a task's network: train a super-network, measure candidates, keep the front."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from optuna.samplers import BaseSampler

from netwright.core.artifact import load_weights, save_weights
from netwright.core.check import check_task
from netwright.core.console import ConsoleProgress
from netwright.core.errors import NetwrightError, RunDirectoryError, SettingError
from netwright.core.files import atomic_write, remedy
from netwright.core.onnx_export import export_onnx
from netwright.core.recipe import Recipe
from netwright.core.rundir import MARK, RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.search.measured import Measured
from netwright.search.result import Direction, SearchResult
from netwright.search.run import Engine, checked, run
from netwright.search.space import SearchSpace
from netwright.search.super_net import Elastic, SuperNet

__all__ = ["METRICS", "Explored", "explore"]

METRICS: Mapping[str, Direction] = {
    "score": "maximize",
    "latency_ms": "minimize",
    "memory_bytes": "minimize",
    "size_bytes": "minimize",
    "macs": "minimize",
    "parameters": "minimize",
}
"""What is measured of a candidate, and what is wanted of it."""
_WEIGHTS = "supernet.safetensors"
_TRAINING = 0.3  # of the progress is training where a super-network is trained


@dataclass(frozen=True)
class Explored:
    """What :func:`explore` found.

    Attributes:
        net: the super-network.
        space: its candidates.
        result: everything that was measured.
        front: for the candidates on the front, by number, the ONNX file; none without a folder.
    """

    net: Elastic
    space: SearchSpace
    result: SearchResult
    front: Mapping[int, Path]


def explore(
    task: Task,
    net: Elastic | None = None,
    *,
    objectives: Sequence[str] = ("score", "latency_ms"),
    constraints: Sequence[str] = (),
    evaluations: int = 100,
    budget_s: float | None = None,
    sampler: BaseSampler | None = None,
    epochs: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    engine: Engine = "local",
    batch: int = 1,
    threads: int = 1,
    progress: Progress | None = None,
) -> Explored:
    """Search sub-networks for the front of score against what they cost on this machine.

    Reach for it to choose the size of a network before it is compressed: one training serves all sizes. With a
    super-network of one's own nothing is trained; without one the task's network is made elastic
    (:class:`~netwright.search.super_net.SuperNet`) and trained.

    Args:
        task: data, loss and score; its network is the largest one where ``net`` is None.
        net: a super-network of any class, see :class:`~netwright.search.super_net.Elastic`.
        objectives: of :data:`METRICS`.
        constraints: hard constraints on them, such as ``"latency_ms<=0.2"``.
        evaluations: how many candidates are measured in all.
        budget_s: seconds of searching, training aside, after which no further candidate is begun.
        sampler: any Optuna sampler; None for LINAS.
        epochs: of training the super-network; None is the recipe's.
        out: folder for the super-network, the log, and the ONNX files of the front.
        resume: go on with what lies there.
        seed: source of all randomness; a super-network that was trained in ``out`` needs the same again.
        workers: evaluations at a time; latency is then measured beside others.
        engine: "local" for this machine, "ray" for a Ray cluster (an extra).
        batch: items in a measured call.
        threads: threads of a measured call.
        progress: told the finished fraction and what is going on; None shows a bar with the time left.

    Raises:
        DataError, TaskError: a task that cannot be worked on, see :func:`netwright.core.check.check_task`.
        SettingError: an unknown objective, a setting out of its range, or nothing to resume.
        RunDirectoryError: a folder that cannot be used, or holds a search of another task, with a super-network from
            another seed, or whose candidates were measured otherwise: in other batches, by other threads, on another
            engine, or alone where they would now be measured beside others, or the other way round.
        RunLockedError: another process is searching in the folder.

    Cost: the training, then for each candidate what :class:`~netwright.search.measured.Measured` says.
    """
    unknown = [name for name in objectives if name not in METRICS]
    if unknown or not objectives:
        raise SettingError(
            f"{f'{unknown[0]!r} is not measured' if unknown else 'No objective is named'}. "
            f"Known are {', '.join(METRICS)}."
        )
    goals = {name: METRICS[name] for name in objectives}
    for limit in checked(goals, constraints, evaluations, workers, budget_s, engine):
        if limit.metric not in METRICS:
            raise SettingError(f"Constraint {limit} speaks of {limit.metric!r}. Measured are {', '.join(METRICS)}.")
    if resume and out is None:
        raise SettingError("resume needs a search to go on with. Give its folder as out.")
    place = None if out is None else Path(out).absolute()  # the task may change the working directory
    check_task(task)
    with ExitStack() as stack:
        if place is not None:
            settings: dict[str, object] = {"kind": "search", "task": task.name, "trained_here": net is None}
            settings |= {"batch": batch, "threads": threads, "engine": engine, "measured_alone": workers == 1}
            if net is None:
                settings["seed"] = seed  # it says which units of the untrained network are the longest
            stack.enter_context(_folder(place, resume, settings))
        report = progress or stack.enter_context(ConsoleProgress(f"search {task.name}")).update
        begun = _TRAINING if net is None else 0.0
        chosen = _super_net(task, place, epochs, seed, report) if net is None else net
        log = None if place is None else place / "search"
        result = run(
            chosen.space,
            Measured(chosen, task, batch=batch, threads=threads),
            goals,
            sampler=sampler,
            evaluations=evaluations,
            budget_s=budget_s,
            out=log,
            resume=resume and log is not None and (log / MARK).exists(),
            constraints=constraints,
            seed=seed,
            workers=workers,
            engine=engine,
            progress=lambda fraction, what: report(begun + (0.98 - begun) * fraction, what),
        )
        files = {} if place is None else _front_files(chosen, task, result, place / "front")
        report(1.0, f"{len(result.front)} on the front")
    return Explored(chosen, chosen.space, result, files)


def _folder(place: Path, resume: bool, settings: Mapping[str, object]) -> RunDirectory:
    """The folder, owned by this process: a new one, or one with a search of the same kind."""
    folder = RunDirectory(place)
    if not resume:
        return folder.create(settings)
    folder.check_old()
    kind = folder.read(MARK, "task").get("kind", "optimization")  # which older versions of that command did not write
    if kind != settings["kind"]:
        raise RunDirectoryError(f"{place} holds another run ({kind}), not a search. Give the folder of a search.")
    folder.open()
    try:
        stored = folder.read(MARK, "kind", "task", "trained_here")  # older versions had no more
        for name, value in settings.items():
            if stored.get(name, value) != value:
                raise RunDirectoryError(
                    f"{place} holds a search with {name}={stored[name]!r}, not {value!r}. Resume with the same, or "
                    "give another folder."
                )
    except NetwrightError:
        folder.close()
        raise
    return folder


def _super_net(task: Task, place: Path | None, epochs: float | None, seed: int, report: Progress) -> SuperNet:
    """The task's network, elastic and trained; taken from the folder where it lies there."""
    report(0.0, "tracing")
    net = SuperNet(task.build(seed), task)
    stored = None if place is None else place / _WEIGHTS
    if stored is not None and stored.exists():
        load_weights(net.model, stored)
        return net
    recipe = task.recipe or Recipe()
    net.fit(
        recipe if epochs is None else recipe.lasting(epochs),
        seed=seed,
        progress=lambda fraction, what: report(_TRAINING * fraction, f"super-network: {what}"),
    )
    if stored is not None:
        with atomic_write(stored) as temporary:
            save_weights(net.model, temporary)
    return net


def _front_files(net: Elastic, task: Task, result: SearchResult, folder: Path) -> dict[int, Path]:
    """Every candidate of the front as an ONNX file."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot make {folder}: {error.strerror or error}. {remedy(error)}, then go on with --resume."
        ) from error
    files = {}
    for entry in result.front:
        path = folder / f"{entry.number:05d}.onnx"
        files[entry.number] = path
        if not path.exists():
            with atomic_write(path) as temporary:
                export_onnx(net.extract(entry.params), task.example(2), temporary)
    for stale in folder.glob("*.onnx"):
        if stale not in files.values():
            stale.unlink()
    return files
