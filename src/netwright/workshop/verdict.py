"""How a run ended, in a sentence."""

from netwright.workshop.choice import excess, shortfall
from netwright.workshop.job import Job
from netwright.workshop.point import Point, ratios
from netwright.workshop.study import Study

__all__ = ["asked_for", "nothing_better", "verdict"]


def asked_for(job: Job) -> str:
    """The targets as the user wrote them."""
    return ", ".join(f"{limit.metric}{limit.text}" for limit in job.limits)


def nothing_better(study: Study, stopped: str | None) -> str:
    """Why the baseline is handed back.

    Args:
        study: every evaluation.
        stopped: why every full recovery failed, None where one did not.
    """
    if study.entries and study.failed == len(study.entries):
        found = f"All {study.failed} candidates failed, so the baseline is handed back."
        return f"{found} The commonest cause: {study.cause()}"
    if stopped is not None:
        return f"The full recoveries failed, so the baseline is handed back. The first cause: {stopped}"
    return "No candidate cost less than the baseline as the target asks, so the baseline is handed back."


def verdict(job: Job, baseline: Point, point: Point, change: float) -> tuple[bool, str]:
    """Whether the target was met, and what was reached.

    Args:
        job: what was asked for.
        baseline: the reference of every ratio.
        point: the model handed back, tested.
        change: of the test score.
    """
    shares = ratios(point, baseline)
    reached = ", ".join(f"{limit.metric} {shares[limit.metric]:.3g}x" for limit in job.limits)
    scored = f"test score {point.test:.4g} ({change:+.4g} against the baseline)"
    asked = asked_for(job)
    if excess(point, baseline, job.limits) > 1:
        return False, f"The target {asked} was not reached within the budget: the best found has {reached} at {scored}."
    if shortfall(point, baseline, job.keep) > 0:
        return False, f"{asked} was reached, but not with score{job.keep.text} on validation: {reached} at {scored}."
    if change < job.keep.change - 1e-9:
        return False, (
            f"{asked} was reached with the score kept on validation, but the test split, read once at the end, lost "
            f"more than score{job.keep.text} allows: {reached} at {scored}."
        )
    return True, f"The target was met: {reached} at {scored}."
