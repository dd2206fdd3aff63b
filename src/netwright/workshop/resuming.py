"""Whether a run may go on: it is an optimization, and the one that is asked for."""

from typing import Any

from netwright.core.errors import RunDirectoryError
from netwright.core.rundir import MARK, RunDirectory
from netwright.workshop.finish import RESULT
from netwright.workshop.job import Job

__all__ = ["KIND", "asked", "check_same", "is_finished", "measured", "settings_of"]

KIND = "optimization"
"""What the settings of a run of this command say that it is."""


def settings_of(run: RunDirectory) -> dict[str, Any]:
    """The settings of the optimization that lies in ``run``; nothing is written.

    Raises:
        RunDirectoryError: no run lies there, or one of another command.
        RunLockedError: a live process writes there.
        CorruptRunError: the settings are damaged, or lack what an optimization has.
    """
    run.check_old()
    stored: Any = run.settings
    if isinstance(stored, dict):
        kind = "replay" if "replay_of" in stored else stored.get("kind", KIND)  # older versions wrote no kind
        if kind != KIND:
            raise RunDirectoryError(
                f"{run.path} holds a {kind}, not an {KIND}. Give the folder of an {KIND} with --out, or a new one "
                "without --resume."
            )
    found: dict[str, Any] = run.read(MARK, "task", "seed", "target", "keep")
    return found


def check_same(run: RunDirectory, job: Job) -> None:
    """See that a run goes on as it was begun, and one that is finished answers what it was asked; nothing is written.

    Raises:
        RunDirectoryError: what lies in ``run`` is no optimization, or another one than ``job``.
    """
    old = settings_of(run)
    for what, now in (("task", job.name), ("seed", job.seed), *measured(job).items()):
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
