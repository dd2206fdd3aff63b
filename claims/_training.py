"""What claims about training share: data in memory, a small network, a plain loop, and a fair grid."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import ResNet
from netwright.core.task import load_task

Setting = TypeVar("Setting")
Loss = Callable[[Tensor, Tensor], Tensor]


class Arrays(NamedTuple):
    """Three splits in memory: training, for choices, and for the reported number."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def arrays(name: str, *, seed: int = 0, train: int | None = None, held_out: int | None = None) -> Arrays:
    """The data of a built-in task; ``train`` and ``held_out`` draw that many items of each split by ``seed``."""
    data = load_task(name).data
    generator = torch.Generator().manual_seed(seed)

    def part(dataset: object, count: int | None) -> tuple[Tensor, Tensor]:
        assert isinstance(dataset, TensorDataset)
        inputs, targets = dataset.tensors
        if count is None:
            return inputs, targets
        index = torch.randperm(len(targets), generator=generator)[:count]
        return inputs[index], targets[index]

    return Arrays(part(data.train, train), part(data.val, held_out), part(data.test, held_out))


def diabetes(seed: int) -> Arrays:
    """scikit-learn's diabetes regression, standardized, split 60/20/20 by ``seed``; targets ``(n, 1)``."""
    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    cut = len(order) * 6 // 10, len(order) * 8 // 10
    parts = order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]
    shift, scale = inputs[parts[0]].mean(0), inputs[parts[0]].std(0)
    inputs = (inputs - shift) / scale
    targets = ((targets - targets[parts[0]].mean()) / targets[parts[0]].std())[:, None]
    return Arrays(*((inputs[part], targets[part]) for part in parts))


def resnet(seed: int, width: int = 16) -> ResNet:
    """A residual network for one-channel images in ten classes; 78k parameters at width 16."""
    torch.manual_seed(seed)
    return ResNet(1, width, 10)


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """The indices of ``steps`` batches: shuffled epochs without their last, smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < steps:
        order = torch.randperm(count, generator=generator)
        found += [part for part in torch.split(order, min(size, count)) if len(part) == min(size, count)]
    return found[:steps]


def descend(
    model: nn.Module,
    optimizer: Optimizer,
    data: tuple[Tensor, Tensor],
    loss: Loss,
    *,
    steps: int,
    batch: int,
    seed: int,
    schedule: LRScheduler | None = None,
    before_step: Callable[[], object] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> list[float]:
    """Plain training in place; the loss of each step's batch."""
    inputs, targets = data
    model.train()
    seen = []
    for step, index in enumerate(batches(len(targets), batch, steps, seed)):
        optimizer.zero_grad()
        value = loss(model(inputs[index]), targets[index])
        torch.autograd.backward(value)
        if before_step is not None:
            before_step()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if after_step is not None:
            after_step(step)
        seen.append(float(value.detach()))
    return seen


@torch.no_grad()
def full_loss(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> float:
    """The loss over all of ``data`` in eval mode; a large number where it is not finite."""
    was = model.training
    model.eval()
    value = loss(model(data[0]), data[1])
    model.train(was)
    return float(value) if bool(value.isfinite()) else 1e6


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of ``data`` that is classified rightly, in eval mode."""
    was = model.training
    model.eval()
    share = (model(data[0]).argmax(1) == data[1]).float().mean()
    model.train(was)
    return float(share)


def steps_to(losses: Sequence[float], target: float, window: int = 10) -> int:
    """The first step at which the mean of the last ``window`` losses is at most ``target``; the end where none is."""
    for end in range(window, len(losses) + 1):
        if sum(losses[end - window : end]) / window <= target:
            return end
    return len(losses)


def best(settings: Iterable[Setting], value: Callable[[Setting], float], *, higher: bool = False) -> Setting:
    """The setting with the lowest ``value`` (or the highest)."""
    found = [(value(entry), entry) for entry in settings]
    return (max if higher else min)(found, key=lambda pair: pair[0])[1]


def clone(model: nn.Module) -> nn.Module:
    """An independent copy: methods that are compared start from the same weights."""
    return copy.deepcopy(model)
