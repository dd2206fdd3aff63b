"""Tasks around the models of the zoo, on which methods must run."""

import torch
from torch import nn

from netwright.core.data import Data
from netwright.core.outputs import take_items
from netwright.core.task import Task
from tests.graph.zoo import build


def zoo_task(name: str) -> tuple[nn.Module, Task]:
    """A model and eight items for it, whose loss is the mean square of the outputs."""
    model, inputs = build(name)
    items = [(take_items(inputs, torch.tensor(index % 2)), 0) for index in range(8)]
    data = Data(list(items), list(items), list(items))
    return model, Task(name, lambda: model, data, lambda output, _: output.square().mean(), lambda output, _: 0.0)
