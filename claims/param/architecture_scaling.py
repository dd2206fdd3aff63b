"""A learning rate carried over from one small network to eight random topologies."""

import math
import random
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from claims._training import arrays, best, descend
from netwright.param.architecture_scaling import ArchitectureScaling, architecture_scaling

PAPER = 194
CLAIM = (
    "The SGD learning rate that architecture_scaling predicts for eight random topologies of ReLU networks on digits, "
    "from the best rate of one base network, lies within a factor of 2 of the best rate of a grid: the median distance "
    "is below one octave, and below that of the base network's own rate."
)
BETTER = "lower"
SEEDS = 5
_WIDTH = 48
Edges: TypeAlias = tuple[tuple[int, ...], ...]


class Wired(nn.Module):
    """A ReLU network on a graph, as in the paper: the stem feeds vertex 0, the last vertex feeds the readout.

    ``edges[j][i]`` says how vertex ``i`` enters vertex ``j + 1``: 0 not at all, 1 as it is, 2 by a layer.
    """

    def __init__(self, edges: Edges) -> None:
        super().__init__()
        self.edges = edges
        self.stem, self.readout = nn.Linear(64, _WIDTH), nn.Linear(_WIDTH, 10)
        self.layers = nn.ModuleDict(
            {f"{i}_{j}": nn.Linear(_WIDTH, _WIDTH) for j, row in enumerate(edges) for i, e in enumerate(row) if e == 2}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        vertices = [functional.relu(self.stem(x.flatten(1)))]
        for j, row in enumerate(self.edges):
            terms = [
                vertices[i] if edge == 1 else functional.relu(self.layers[f"{i}_{j}"](vertices[i]))
                for i, edge in enumerate(row)
                if edge
            ]
            vertices.append(sum(terms[1:], terms[0]))
        out: Tensor = self.readout(vertices[-1])
        return out


def topology(draw: random.Random) -> Edges:
    """A random graph of three to seven vertices, each of which lies on a path from the stem to the readout."""
    vertices = draw.randint(3, 7)
    while True:
        rows = tuple(tuple(draw.choice((0, 1, 2)) for _ in range(j + 1)) for j in range(vertices - 1))
        read = {i for row in rows for i, edge in enumerate(row) if edge}
        if all(any(row) for row in rows) and read == set(range(vertices - 1)):
            return rows


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    inputs, targets = arrays("digits", seed=seed).train
    data = ((inputs - inputs.mean()) / inputs.std(), targets)
    steps = 5 if smoke else 100

    def study(edges: Edges, repeats: int = 1) -> tuple[ArchitectureScaling, float]:
        """The scaling of a topology, and the rate of a grid of half octaves with the least training loss at the end."""
        model = Wired(edges)
        scaling = architecture_scaling(model, data[0][:2])

        def final(lr: float) -> float:
            total = 0.0
            for repeat in range(repeats):
                scaling.initialize(model, seed + 1000 * repeat)
                optimizer = torch.optim.SGD(model.parameters(), lr)
                seen = descend(model, optimizer, data, functional.cross_entropy, steps=steps, batch=128, seed=seed)
                total += sum(seen[-10:])
            return total if math.isfinite(total) else math.inf

        octave = best(range(-5, 0, 2) if smoke else range(-7, 2), lambda half: final(2.0**half))
        return scaling, best((2.0**octave, 2.0 ** (octave - 0.5), 2.0 ** (octave + 0.5)), final)

    base, base_lr = study(((2,),), repeats=1 if smoke else 3)
    draw = random.Random(seed)
    scaled, unscaled = [], []
    for _ in range(1 if smoke else 8):
        scaling, found = study(topology(draw))
        scaled.append(abs(math.log2(scaling.lr_for(base, base_lr) / found)))
        unscaled.append(abs(math.log2(base_lr / found)))
    return {
        "method": median(scaled),
        "baseline": min(1.0, median(unscaled)),
        "unscaled": median(unscaled),
        "within_2x": sum(distance <= 1 for distance in scaled) / len(scaled),
        "unscaled_within_2x": sum(distance <= 1 for distance in unscaled) / len(unscaled),
    }
