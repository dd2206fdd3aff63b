"""HESSO against magnitude pruning and as much training, at 80% of the units."""

from claims._compress import small_cnn, task_of, trained
from netwright.compress.hesso import HESSO
from netwright.compress.prune import Prune
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.graph import trace

PAPER = 149
CLAIM = (
    "Removing 80% of the units of every layer of a small convolutional network trained on 6,000 Fashion-MNIST images, "
    "HESSO removes exactly as many as asked for within 8 epochs and ends at a higher test accuracy than the better of "
    "global and layerwise magnitude pruning followed by 8 epochs of training."
)
BETTER = "higher"
SEEDS = 30  # a difference of half a point, where seeds differ by a point


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(small_cnn, items=6000, epochs=4, smoke=smoke)
    model = trained(task, seed)
    units = sum(group.size for group in trace(model, task.example()).groups)
    assert task.recipe is not None
    recipe = task.recipe.replace(epochs=0.5 if smoke else 8.0)
    ours = HESSO(0.8, scope="layer")(model, task, budget=recipe.epochs, seed=seed)
    cycles = HESSO(0.8, scope="layer", corrective=True)(model, task, budget=recipe.epochs, seed=seed)
    tried = []
    for scope in ("global", "layer"):
        small = Prune(0.8, scope=scope)(model, task)
        raw = evaluate(small, task, "test")
        fit(small, task, recipe, seed=seed, validate=False)
        tried.append((evaluate(small, task, "val"), evaluate(small, task, "test"), raw))
    best = max(tried, key=lambda entry: entry[0])
    left = sum(value.shape[0] for value in ours.parameters() if value.ndim > 1) - 10
    return {
        "method": evaluate(ours, task, "test"),
        "baseline": best[1],
        "baseline_without_training": best[2],
        "with_corrective_cycles": evaluate(cycles, task, "test"),
        "removed": 1 - left / units,
        "whole": evaluate(model, task, "test"),
    }
