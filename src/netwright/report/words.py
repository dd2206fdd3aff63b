"""The report's sentences: the headline, the line below it, and the glossary."""

from dataclasses import replace

from netwright.report.compare import cost_change
from netwright.report.format import ScoreStyle, duration, pretty_limit
from netwright.report.limits import main_cost, score_floor
from netwright.report.run import COSTS, Cost, Point, Result, Run

__all__ = ["GLOSSARY", "STATUS_WORDS", "best_so_far", "headline", "subline", "wanted"]

STATUS_WORDS = {
    "met": "Target met",
    "not_met": "Target not met",
    "interrupted": "Not finished",
    "unfinished": "Not finished",
}
"""The four ways in which a run can stand."""


def headline(run: Run) -> str:
    """What came out, in words and numbers, without flattery.

    ``digits: 8.1× faster and 52× smaller at 0.3 points less accuracy`` where the target was met; where it
    was not, the sentence begins with that; a network that is no better than the baseline is never called
    an improvement.
    """
    task, result = run.settings.task, run.result
    if result is None:
        count = len(run.evaluations)
        return f"{task}: not finished, {count} candidate{'' if count == 1 else 's'} evaluated so far"
    opening = {"met": "", "not_met": "target not met; ", "interrupted": "not finished; "}[result.status]
    if result.status == "interrupted" and result.chosen is None:
        result = replace(result, chosen=best_so_far(run), ratios={}, latency_ratio=None, score_drop=None)
    gains = _gains(result)
    if result.chosen is None or not result.chosen.steps or not gains:
        return f"{task}: {opening}nothing better than the baseline was found"
    best = {"met": "", "not_met": "the best found is ", "interrupted": "the best so far is "}[result.status]
    changes = [cost_change(result, cost) for cost in ("latency", "size")]
    losses = [change.words for change in changes if change and change.verdict == "worse"]
    but = f", but {' and '.join(losses)}," if losses else ""
    style = ScoreStyle.of(run.settings.score, result.baseline)
    return f"{task}: {opening}{best}{' and '.join(gains)}{but} {_score_words(result, style)}"


def best_so_far(run: Run) -> Point | None:
    """The measured candidate with the smallest targeted cost among those that keep the score; None without one.

    What a run that has not finished can say for itself: nothing was chosen yet, and the test set not read.
    """
    baseline = run.baseline
    if baseline is None:
        return None
    floor = score_floor(run.settings.keep, baseline)
    kept = [point for point in run.points if floor is None or point.score.val >= floor]
    cost = main_cost(run.settings.target)
    return min(kept, key=lambda point: point.share(cost, baseline), default=None)


def subline(run: Run) -> str:
    """One line on what was asked for and what it took."""
    asked = wanted(run)
    if run.result is None:
        return f"Asked for {asked}." if asked else ""
    count = run.result.evaluations
    tried = f"{count} candidate{'' if count == 1 else 's'} evaluated in {duration(run.result.wall_s)}"
    failed = f", {run.result.failed} of them failed" if run.result.failed else ""
    return f"Asked for {asked}; {tried}{failed}." if asked else f"{tried}{failed}."


def wanted(run: Run) -> str:
    """Target and floor as they were asked for, with the name of the score."""
    limits = [*run.settings.target.items(), *run.settings.keep.items()]
    return " and ".join(f"{name} {pretty_limit(limit)}" for name, limit in limits)


def _gains(result: Result) -> list[str]:
    """The improvements that lead the headline: latency and size, else whatever else was aimed at or got better."""
    leading: tuple[Cost, ...] = ("latency", "size")
    aim = main_cost(result.target)
    order = leading if aim in leading else (aim, *leading)
    found = [change.words for cost in order if (change := cost_change(result, cost)) and change.verdict == "better"]
    if found:
        return found[:2]
    rest = [cost for cost in COSTS if cost not in order]
    return [change.words for cost in rest if (change := cost_change(result, cost)) and change.verdict == "better"][:1]


def _score_words(result: Result, style: ScoreStyle) -> str:
    chosen = result.chosen
    if chosen is None:
        return ""
    split = ""
    if result.score_drop is not None:
        difference = result.score_drop.test
    elif chosen.score.test is not None and result.baseline.score.test is not None:
        difference = chosen.score.test - result.baseline.score.test
    else:
        difference, split = chosen.score.val - result.baseline.score.val, "validation "
    amount, name = style.amount(difference), style.name.replace("_", " ")
    if float(amount) == 0:
        return f"at the same {split}{name}"
    direction = "more" if difference > 0 else "less"
    if style.percent:
        return f"at {amount} point{'' if amount == '1.0' else 's'} {direction} {split}{name}"
    return f"at {amount} {'higher' if difference > 0 else 'lower'} {split}{name}"


GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Baseline",
        "The network that everything is compared with: the task's own model, trained by the task's recipe or "
        "handed over already trained, and exported in the same way as every candidate.",
    ),
    (
        "Candidate",
        "The baseline after a list of steps (for example: remove some channels, then store weights in 8 bits) and a "
        "short recovery training in which the baseline acts as the teacher.",
    ),
    (
        "Pareto front",
        "The candidates that no other candidate beats in everything at once. Moving along the front, one quantity "
        "only improves while another gets worse, so the choice among them is a matter of taste, or of the target.",
    ),
    (
        "Latency",
        "The time of one call after warm-up, on the machine, runtime, batch and threads named in this report. The "
        "median is shown with the 10th and 90th percentile. The ratio of two networks comes from alternating "
        "measurements in one process, so that a slow moment of the machine hits both alike.",
    ),
    ("Size on disk", "Bytes of the exported ONNX file, weights included. 1 KB is 1000 bytes."),
    (
        "Peak memory",
        "Bytes that one call needs: the weights as stored, and the activations that are alive at the worst moment. It "
        "is computed from the exported file; what the runtime itself needs comes on top.",
    ),
    (
        "MACs",
        "Multiply-accumulate operations of one forward pass at batch one, counted from the traced graph. They say how "
        "much arithmetic there is, not how fast it runs: that is what latency is measured for.",
    ),
    ("Parameters", "Numbers that training sets. Their count is the same whether each takes 4 bytes or 1."),
    (
        "Validation and test",
        "The search, the training and the choice see only training and validation data. The test set is read once, at "
        "the end, for the figures of the baseline and of the chosen network.",
    ),
    (
        "95% interval",
        "If the whole were repeated with fresh test data, 95 in 100 such intervals would contain the true value. "
        "Where the interval of a change includes no change, the data cannot tell the two networks apart.",
    ),
    (
        "Pruning",
        "Removing whole channels, heads or hidden units, so that every layer becomes a smaller ordinary layer. "
        "Channels that are added to each other must go together; they form a group.",
    ),
    (
        "int8",
        "Weights and activations held as 8-bit whole numbers with a scale, instead of 32-bit floating point numbers: a "
        "quarter of the size, and faster where the processor has instructions for it. With 4-bit weights, an eighth of "
        "the size; they are computed with as 8 bits, as fast.",
    ),
    (
        "Hypervolume",
        "The volume of the region that the front dominates, up to a fixed worst corner. It grows whenever a search "
        "finds something that was not yet dominated, and so measures progress in one number.",
    ),
)
"""Terms of the report, one paragraph each."""
