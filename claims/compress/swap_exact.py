"""SWAP against CHITA at the same ridges where gradients are exact."""

from claims._compress import small_mlp, task_of, trained
from claims.compress.swap import compared

PAPER = 80
CLAIM = (
    "At 90% sparsity of an MLP 784-40-20-10 on Fashion-MNIST, with gradients as they are, SWAP keeps as much test "
    "accuracy as CHITA to within one point, each with the best of three ridges on val."
)
BETTER = "higher"
PARITY = 0.01
SEEDS = 8


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(small_mlp, smoke=smoke)
    return compared(trained(task, seed), task, 0.9, 0.0, seed, smoke=smoke)
