"""Whether a run may go on: it is an optimization, and the one that is asked for."""

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from netwright.core.errors import CorruptRunError, RunDirectoryError
from netwright.core.rundir import MARK, RunDirectory
from netwright.workshop.finish import RESULT
from netwright.workshop.job import Job, Sampler

__all__ = ["KIND", "asked", "check_same", "is_finished", "measured", "settings_of"]

KIND = "optimization"
"""What the settings of a run of this command say that it is."""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "task": lambda value: isinstance(value, str),
    "seed": lambda value: isinstance(value, int),
    "target": _is_texts,
    "keep": _is_texts,
    "budget_s": _is_time,
    "engine": lambda value: value in ("local", "ray"),
    "workers": _is_count,
    "evaluations": lambda value: value is None or _is_count(value),
    "sampler": lambda value: value in get_args(Sampler),
    "batch": _is_count,
    "threads": _is_count,
}
"""What each setting may be, where the file has it."""


def settings_of(run: RunDirectory) -> dict[str, Any]:
    """The settings of the optimization that lies in ``run``; nothing is written.

    Raises:
        RunDirectoryError: no run lies there, or one of another command.
        RunLockedError: a live process writes there.
        CorruptRunError: the settings are damaged, or lack what an optimization has.
    """
    run.check_old()
    stored = run.settings
    kind = "replay" if "replay_of" in stored else stored.get("kind", KIND)  # older versions wrote no kind
    if kind != KIND:
        raise RunDirectoryError(
            f"{run.path} holds a {kind}, not an {KIND}. Give the folder of an {KIND} with --out, or a new one "
            "without --resume."
        )
    found: dict[str, Any] = run.read(MARK, "task", "seed", "target", "keep")
    wrong = [name for name, fits in _FITS.items() if name in found and not fits(found[name])]
    if wrong:
        raise CorruptRunError(
            f"{run.path / MARK} is damaged: {wrong[0]} cannot be {found[wrong[0]]!r}. Restore it, or start again in "
            "another folder."
        )
    return found


def check_same(run: RunDirectory, job: Job) -> None:
    """See that a run goes on as it was begun, and one that is finished answers what it was asked; nothing is written.

    Raises:
        RunDirectoryError: what lies in ``run`` is no optimization, or another one than ``job``.
    """
    old = settings_of(run)
    task = old["task"] if _is_task(job, old) else job.name
    for what, now in (("task", task), ("seed", job.seed), *measured(job).items()):
        if what in old and old[what] != now:
            raise RunDirectoryError(
                f"The run in {job.out} has {what} {old[what]!r}, not {now!r}. Resume it with the same, or start "
                "another one."
            )
    new = asked(job)
    changed = [what for what in ("target", "keep") if what in old and old[what] != new[what]]
    if is_finished(run) and changed:
        raise RunDirectoryError(
            f"The run in {job.out} is finished, and {' and '.join(changed)} cannot be given anew. Start another run "
            "with another --out."
        )


def _is_task(job: Job, old: Mapping[str, Any]) -> bool:
    """Whether the run's task is the job's: the same name, or one of the same thing in the same file."""
    inner = str(old["task"]).rpartition(":")[2]
    in_file = job.file is not None and old.get("task_file") == job.file and inner == job.name.rpartition(":")[2]
    return bool(old["task"] == job.name or in_file)


def is_finished(run: RunDirectory) -> bool:
    """Whether the run has come to its end."""
    return run.has(RESULT) and bool(run.read(RESULT, "status")["status"] != "interrupted")


def measured(job: Job) -> dict[str, int]:
    """What a resumed run measures by as before."""
    return {"batch": job.measuring.batch, "threads": job.measuring.threads}


def asked(job: Job) -> dict[str, Any]:
    """What a resumed run may be asked anew."""
    return {
        "target": {limit.metric: limit.text for limit in job.limits},
        "keep": {"score": job.keep.text},
        "budget_s": job.budget,
        "engine": job.engine,
        "workers": job.workers or 0,
        "evaluations": job.evaluations,
        "sampler": job.sampler,
    }
