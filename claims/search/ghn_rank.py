"""Whether accuracy with predicted weights ranks networks as accuracy after training does.

The rank correlation of the number of parameters is recorded beside it: on this task it is the better guide.
"""

from scipy.stats import kendalltau
from torch.utils.data import TensorDataset

from claims._training import clone
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import load_task
from netwright.search._ghn_networks import random_networks
from netwright.search.graph_hypernetwork import GraphHyperNetwork

PAPER = 293
CLAIM = (
    "On digits, Kendall's tau between validation accuracy with weights that a graph hypernetwork predicts and test "
    "accuracy after five epochs of training, over 64 convolutional networks that it has not seen, is above 0.4."
)
BETTER = "higher"
SEEDS = 8
LEAST = 0.4


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = load_task("digits")
    assert isinstance(task.data.train, TensorDataset)
    inputs = task.data.train.tensors[0]
    ghn = GraphHyperNetwork(10, largest=(32, 64, 3, 3), seed=seed)
    known = random_networks(10 if smoke else 1000, seed)
    ghn.fit(task, known, steps=3 if smoke else 2000, meta_batch=4, lr=2e-3, seed=seed)
    recipe = Recipe(
        epochs=0.2 if smoke else 5, optimizer_settings={"lr": 2e-3}, schedule_settings={"max_lr": 2e-3}, batch_size=64
    )
    predicted, trained, sizes = [], [], []
    for network in random_networks(4 if smoke else 64, seed + 1_000_000):
        predicted.append(evaluate(ghn.predict(network, inputs), task, "val"))
        model = fit(clone(network), task, recipe, seed=seed, device="cpu", validate=False).model
        trained.append(evaluate(model, task, "test"))
        sizes.append(sum(value.numel() for value in network.parameters()))
    return {
        "method": tau(predicted, trained),
        "baseline": LEAST,
        "tau_of_parameters": tau(sizes, trained),
        "predicted": sum(predicted) / len(predicted),
        "trained": sum(trained) / len(trained),
    }


def tau(one: list[float] | list[int], two: list[float]) -> float:
    """Kendall's rank correlation, ties counted (tau-b); 0 where one side is constant."""
    found = float(kendalltau(one, two).statistic)
    return found if found == found else 0.0
