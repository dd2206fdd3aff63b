"""SWAP against CHITA where noise is added to the gradients; and without noise, for comparison."""

from claims._compress import small_mlp, task_of, trained
from netwright.compress.chita import CHITA
from netwright.compress.swap import SWAP
from netwright.core.evaluate import evaluate
from netwright.core.transform import Transform

PAPER = 80
CLAIM = (
    "At 90% sparsity of an MLP 784-40-20-10 on Fashion-MNIST, with normal noise of three times their root mean square "
    "added to the gradients, SWAP keeps more test accuracy than CHITA, each with the better of three settings on val."
)
BETTER = "higher"
NOISE = 3.0
EPS = (0.003, 0.03, 0.1)
RIDGES = (0.1, 1.0, 10.0)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(small_mlp, smoke=smoke)
    model = trained(task, seed)
    count = 16 if smoke else 128
    found: dict[str, float] = {}
    for suffix, noise in (("", NOISE), ("_without_noise", 0.0)):
        methods: dict[str, list[Transform]] = {
            "method": [SWAP(0.9, 4, count, noise=noise, eps=eps) for eps in EPS],
            "baseline": [CHITA(0.9, 4, count, noise=noise, ridge=ridge) for ridge in RIDGES],
        }
        for name, settings in methods.items():
            tried = [setting(model, task, seed=seed) for setting in settings]
            best = max(tried, key=lambda cut: evaluate(cut, task, "val"))
            found[name + suffix] = evaluate(best, task, "test")
    return found
