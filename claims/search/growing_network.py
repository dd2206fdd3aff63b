"""Accuracy of a network that grew while it trained, against the full-size one, for the operations of both trainings."""

from torch import nn

from claims._compress import task_of
from netwright.core.builtin.networks import BasicBlock
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.search.growing_network import GrowingNetwork

PAPER = 18
CLAIM = (
    "On 2,500 images of Fashion-MNIST, a residual network that grows while it trains comes within one point of the "
    "full-size network's test accuracy, with at most 60% of its training operations in as many steps."
)
BETTER = "higher"
SEEDS = 8
PARITY = 0.01
MOST = 0.6  # a larger share of the training operations counts as an accuracy of 0


def residual() -> nn.Module:
    """Five blocks of 16 and 32 channels on 14 x 14 pixels; 60k parameters, 4.3M multiply-accumulates."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16),
        BasicBlock(16, 16),
        BasicBlock(16, 32, 2),
        BasicBlock(32, 32),
        BasicBlock(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(residual, items=2500, epochs=20, smoke=smoke)
    grown = GrowingNetwork(0.75, seed_share=0.5, rounds=6, settle=0.5)(task.build(seed), task, seed=seed)
    full = fit(task.build(seed), task, seed=seed, device="cpu", validate=False).model
    accuracy = evaluate(grown.model, task, "test")
    return {
        "method": accuracy if grown.training_share <= MOST else 0.0,
        "baseline": evaluate(full, task, "test"),
        "accuracy": accuracy,
        "training_share": grown.training_share,
        "final_share": grown.macs / grown.full_macs,
        "layers": float(len(grown.history[-1].layers)),
    }
