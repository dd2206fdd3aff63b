"""A sixtieth of the weights of LeNet-300-100, without retraining after the cut, against the dense network."""

from claims._compress import lenet_300_100, task_of, trained
from netwright.compress.global_sparse_momentum import GlobalSparseMomentum
from netwright.core.evaluate import evaluate

PAPER = 164
CLAIM = (
    "LeNet-300-100 on 10,000 Fashion-MNIST images, trained on by global sparse momentum, keeps a sixtieth of its "
    "weights at a drop of test accuracy under one point, with no training after the weights are cut."
)
BETTER = "higher"
PARITY = 0.01
SEEDS = 5
RATIO = 1 - 1 / 60
LEFTOVER = 1e-6  # the longer the training, the sooner weights that are never chosen may go


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(lenet_300_100, epochs=8, smoke=smoke)
    dense = trained(task, seed)
    method = GlobalSparseMomentum(RATIO, leftover=LEFTOVER)
    sparse = method(dense, task, budget=1 if smoke else 96, seed=seed)
    weights = [value for value in sparse.parameters() if value.ndim > 1]
    left = sum(int((value != 0).sum()) for value in weights)
    return {
        "method": evaluate(sparse, task, "test"),
        "baseline": evaluate(dense, task, "test"),
        "times fewer": sum(value.numel() for value in weights) / left,
    }
