"""How much each unit of a group matters."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from netwright.compress._weights import differentiable
from netwright.core.data import batches
from netwright.core.errors import TransformError
from netwright.core.graph.groups import Group
from netwright.core.losses import task_loss
from netwright.core.randomness import isolated
from netwright.core.task import Task

__all__ = ["saliency_magnitude", "saliency_taylor", "unit_sums"]


def saliency_magnitude(model: nn.Module, group: Group) -> Tensor:
    r"""The length of everything that belongs to a unit.

    .. math:: s_u = \sqrt{\sum_{p} \lVert W_{p,u} \rVert^2}

    over the places :math:`p` of the group in parameters (buffers do not count), :math:`W_{p,u}` being the slice of
    unit :math:`u`.

    Args:
        model: the traced model.
        group: one of its groups.

    Returns:
        ``(size,)`` in float64.

    Example:
        >>> from netwright.core.graph import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> model[0].weight.data, model[2].weight.data = torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0, 2.0]])
        >>> saliency_magnitude(model, trace(model, torch.zeros(2, 1)).groups[0])
        tensor([5., 2.], dtype=torch.float64)

    Cost: one pass over the group's parameters.
    """
    squares = {name: value.detach().double() ** 2 for name, value in _parameters(model, [group]).items()}
    return unit_sums(group, squares).sqrt()


def saliency_taylor(
    model: nn.Module,
    groups: Sequence[Group],
    task: Task,
    *,
    count: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    told: Callable[[float], object] | None = None,
) -> dict[str, Tensor]:
    r"""First-order estimate of how the loss changes when a unit fades.

    .. math:: s_u = \frac1B \sum_{b=1}^B \Big| \sum_{p} \sum_{w \in W_{p,u}} w \,\frac{\partial L_b}{\partial w} \Big|

    over batches :math:`b` of the training split: the slope of the loss as all of the unit's parameters are scaled
    towards zero together. The model is in eval mode.

    Args:
        model: the traced model; untouched.
        groups: the groups to score.
        task: its loss and its training split.
        count: number of batches :math:`B`, fewer where the split is smaller.
        batch_size: items in a batch.
        seed: draws the batches.
        told: called with the finished fraction.

    Returns:
        For each group's name, ``(size,)`` in float64.

    Raises:
        TransformError: a task without a loss, or a loss or gradient that is not finite.

    Example:
        >>> from netwright.core.graph import trace
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> model = nn.Sequential(nn.Linear(30, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> model[2].weight.data[:, 1] = 0.0  # nobody reads unit 1
        >>> [found] = saliency_taylor(model, trace(model, task.example()).groups, task).values()
        >>> int(found.argmin()), float(found[1])
        (1, 0.0)

    Cost: ``count`` forward and backward passes, memory for one copy of the model and its gradients.
    """
    if task.loss is None:
        raise TransformError(
            f"Taylor saliency needs the gradients of a loss, but task {task.name!r} trains by its own fit=. Give it a "
            "loss= too, or use saliency='magnitude'."
        )
    model = deepcopy(model).eval()
    parameters = _parameters(model, groups)
    for value in parameters.values():
        value.requires_grad_(True)
    total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    device = next((value.device for value in parameters.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    done = 0
    with isolated(seed), differentiable(model):
        for inputs, targets in batches(task.data.train, batch_size, generator=generator, drop_last=True, device=device):
            with torch.enable_grad():
                loss = task_loss(task, task.outputs(model, inputs), targets)
            for name, score in _slopes(loss, parameters, groups, task).items():
                total[name] += score.cpu()
            done += 1
            if told is not None:
                told(done / count)
            if done == count:
                break
    return {name: score / done for name, score in total.items()}


def _slopes(loss: Tensor, parameters: Mapping[str, Tensor], groups: Sequence[Group], task: Task) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    products = {
        name: torch.zeros_like(value, dtype=torch.float64)
        if gradient is None
        else value.detach().double() * gradient.double()
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }
    slopes = {group.name: unit_sums(group, products).abs() for group in groups}
    if not all(bool(slope.isfinite().all()) for slope in slopes.values()):
        raise TransformError(
            f"Taylor saliency: the gradients of task {task.name!r} are not finite on a batch of its training data "
            f"(loss {loss.item():.4g}). Train the model to a finite loss first, or use saliency='magnitude'."
        )
    return slopes


def unit_sums(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """For each unit of ``group`` the sum of ``values`` over its places; places not in ``values`` are left out.

    Returns:
        ``(size,)``.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for place in group.places:
        if place.parameter in values:
            value = values[place.parameter]
            entries = value.sum([dim for dim in range(value.ndim) if dim != place.dim]) if value.ndim > 1 else value
            total = total.to(entries.device) + entries[torch.as_tensor(place.index, device=entries.device)].sum(1)
    return total


def _parameters(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    wanted = {place.parameter for group in groups for place in group.places}
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if name in wanted}
