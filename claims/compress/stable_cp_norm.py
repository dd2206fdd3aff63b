"""Component norms of corrected decompositions against those of plain least squares, before any fine-tuning."""

from claims._compress import task_of, trained
from claims.compress.stable_cp import component_norm, decomposed, wide_cnn
from netwright.core.evaluate import evaluate

PAPER = 128
CLAIM = (
    "At a tenth of the operations of the last three 3 x 3 convolutions of a network trained on Fashion-MNIST, and at "
    "errors at most 1% larger, corrected components have a smaller norm relative to the kernel that they sum to "
    "(geometric mean of the layers) than those of plain CP-ALS at the same rank."
)
BETTER = "lower"
SEEDS = 5


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(wide_cnn, items=4000, epochs=4.0, smoke=smoke)
    model = trained(task, seed)
    stable = decomposed(model, task, "stable", seed, smoke=smoke)
    plain = decomposed(model, task, "als", seed, smoke=smoke)
    return {
        "method": component_norm(stable),
        "baseline": component_norm(plain),
        "method_accuracy": evaluate(stable, task, "test"),
        "baseline_accuracy": evaluate(plain, task, "test"),
    }
