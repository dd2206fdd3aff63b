"""Longer training with gradual or alternating masks against the length of the dense recipe, at 95% and 98% zeros."""

from claims._compress import small_mlp, task_of, trained
from netwright.compress.sparse_recipe import SparseRecipe
from netwright.core.evaluate import evaluate

PAPER = 37
CLAIM = (
    "784-40-20-10 on 10,000 Fashion-MNIST images, trained sparse for four times the dense recipe's length with gradual "
    "or alternating masks, has a higher test accuracy, on average over 95% and 98% zeros, than the same network "
    "pruned at once or gradually within the dense recipe's length (two settings each, chosen on val)."
)
BETTER = "higher"
SEEDS = 3
RATIOS = (0.95, 0.98)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(small_mlp, epochs=4, smoke=smoke)
    dense = trained(task, seed)
    found = {"dense": evaluate(dense, task, "test")}
    for ratio in RATIOS:
        short = [
            SparseRecipe(ratio, extension=1, stop=1e-9, updates=1),  # at once, then fine-tuning
            SparseRecipe(ratio, extension=1),
        ]
        long = [SparseRecipe(ratio, schedule, extension=4, updates=10) for schedule in ("gradual", "alternating")]
        for name, methods in (("baseline", short), ("method", long)):
            models = [method(dense, task, seed=seed) for method in methods]
            scores = [evaluate(model, task, "val") for model in models]
            best = scores.index(max(scores))
            found[f"{name} {ratio:g}"] = evaluate(models[best], task, "test")
            found[f"{name} {ratio:g} setting"] = best
    for name in ("method", "baseline"):
        found[name] = sum(found[f"{name} {ratio:g}"] for ratio in RATIOS) / len(RATIOS)
    return found
