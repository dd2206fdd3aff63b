"""Training of a graph hypernetwork by the losses of networks that run with predicted weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netwright.core.batch_statistics import reestimate
from netwright.core.data import Batch, Inputs, batches
from netwright.core.errors import NonFiniteLossError
from netwright.core.graph.export import arguments
from netwright.core.losses import task_loss
from netwright.core.randomness import isolated
from netwright.core.task import Task
from netwright.search._ghn_graph import NetworkGraph

__all__ = ["network_loss", "settle_norms", "train"]


def network_loss(task: Task, model: nn.Module, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
    """The task's loss of ``model`` run in training mode with ``parameters``; the model is left as it is."""
    shaped = {name: parameters[name].view(value.shape) for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    args, kwargs = arguments(batch[0])
    output: Any = functional_call(model, shaped | buffers, args, kwargs)
    return task_loss(task, task.read(output), batch[1])


def settle_norms(model: nn.Module, inputs: Sequence[Inputs] | None) -> None:
    """Give the batch norms of a model in eval mode the statistics of ``inputs``; see ``GraphHyperNetwork.predict``."""
    if inputs is None:
        for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        return
    reestimate(model, inputs)


def train(
    network: nn.Module,
    task: Task,
    architectures: Sequence[nn.Module],
    graphs: Sequence[NetworkGraph],
    steps: int,
    meta_batch: int,
    batch_size: int,
    lr: float,
    clip_norm: float,
    seed: int,
    report: Callable[[float, str], None],
) -> list[float]:
    """See :meth:`netwright.search.GraphHyperNetwork.fit`."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    modes = [(part, part.training) for model in architectures for part in model.modules()]
    stream = _endless(task, batch_size, generator, device)
    losses = []
    with isolated(seed, device):
        try:
            for model in architectures:
                model.train()
            for step in range(steps):
                drawn = torch.randperm(len(architectures), generator=generator)[:meta_batch].tolist()
                batch = next(stream)
                predicted = network([graphs[index] for index in drawn])
                parts = [
                    network_loss(task, architectures[index], parameters, batch)
                    for index, parameters in zip(drawn, predicted, strict=True)
                ]
                loss = torch.stack(parts).mean()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteLossError(f"The mean loss is {value} at step {step}. Lower lr or clip_norm.")
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
                optimizer.step()
                schedule.step()
                losses.append(value)
                report((step + 1) / steps, f"loss {value:.4f}")
        finally:
            for part, training in modes:
                part.training = training
    return losses


def _endless(task: Task, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
    while True:
        yield from batches(task.data.train, size, generator=generator, drop_last=True, device=device)
