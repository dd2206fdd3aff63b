"""The plan of a run in words, before anything is done."""

from netwright.core.graph import branch_names
from netwright.core.graph.macs import count_parameters, total_macs
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.workshop.job import Job
from netwright.workshop.pace import check_pace
from netwright.workshop.plan import default_workers, prunable, space_of
from netwright.workshop.resuming import check_same
from netwright.workshop.run import prepare
from netwright.workshop.space import STEPS, Droppable, weight_bits

__all__ = ["dry_run"]


def dry_run(job: Job, *, resume: bool = False) -> list[str]:
    """What a run would do, line by line; the task is loaded, checked and traced, nothing is trained or written.

    Args:
        job: what is asked for.
        resume: whether the run would go on with the one in ``job.out``.

    Raises:
        NetwrightError: as the run itself would.
    """
    run = RunDirectory(job.out)
    check_same(run, job) if resume else run.check_new()
    task, graph = prepare(job)
    groups = prunable(graph)
    steps = job.steps or STEPS
    branches = branch_names(task.build(job.seed), task.example()) if "branches" in steps else []
    sized = any(limit.metric == "size" for limit in job.limits)
    bits = weight_bits(steps, sized)
    space = space_of(
        graph,
        steps,
        int8={} if bits else None,
        branches=tuple(map(Droppable, branches)),
        codebooks="codebooks" in steps and sized,
        widths=bits,
        gradients=task.loss is not None,
    )
    recipe = task.recipe or Recipe()
    heads = sum(group.kind == "heads" for group in graph.groups)
    seconds = None if resume else check_pace(task, job.budget, job.seed)
    training = "comes trained" if task.trained else f"is trained for {recipe.epochs:g} epochs"
    training += "" if seconds is None else f", about {seconds:.0f} s"
    return [
        f"Task {job.name}: {len(task.data.train)} training, {len(task.data.val)} validation, "
        f"{len(task.data.test)} test items.",
        f"The baseline {training}; {count_parameters(graph.program):,} parameters, "
        f"{total_macs(graph.program) / 1e6:.3g} M MACs an item.",
        f"Prunable: {len(groups)} groups, {sum(size for _, size in groups)} units ({heads} groups of attention heads).",
        *(
            f"  {group.name}: {group.size} {group.kind}{'' if group.exact else ' (changes statistics)'}"
            for group in graph.groups
        ),
        *(f"  left alone: {entry.name}, stopped by {entry.operation}: {entry.reason}" for entry in graph.blocked),
        f"Residual branches that may go: {', '.join(branches) or 'none'}.",
        f"Space: {', '.join(space.offered()) or 'nothing'}; about 10^{space.size():.0f} proposals.",
        "Target: " + ", ".join(f"{limit.metric}{limit.text}" for limit in job.limits) + f"; keep score{job.keep.text}.",
        f"Time: at most about {job.budget:.0f} s, on {job.workers or default_workers()} workers ({job.engine}).",
        f"Run directory: {job.out}. Nothing was written.",
    ]
