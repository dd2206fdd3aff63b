"""All weights that single-weight pruning may set to zero, as one vector."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from netwright.core.data import Batch, batches
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.losses import task_loss
from netwright.core.randomness import isolated
from netwright.core.task import Task

__all__ = ["FlatWeights", "differentiable", "loss_gradients", "training_batches"]

Told: TypeAlias = Callable[[float], object]
_TOGETHER = 16  # gradients that are written into the columns of the matrix at a time
_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class FlatWeights:
    """The matrices and kernels of a model as one vector of ``size`` entries.

    Every floating-point parameter with more than one entry along at least two dimensions belongs to it, and the weights
    of linear, recurrent and attention layers and of convolutions whatever their shape. Tables of embeddings (each row
    of which few items read), normalizations, biases, and the scales of layers and single tokens do not, however many
    dimensions they have. Shared parameters belong to it once.

    Args:
        model: whose parameters they are, read and written in place.
        exclude: names of parameters, or of modules whose parameters, stay out.

    Raises:
        NothingToPruneError: a model without any.
        TransformError: a name in ``exclude`` that the model does not have.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str] = ()) -> None:
        layers = {id(value) for name, value in _own(model, _LAYERS) if "weight" in name}
        others = {id(value) for _, value in _own(model, (nn.Embedding, nn.LayerNorm, nn.RMSNorm))}
        known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        for name in exclude:
            if name not in known:
                raise TransformError(f"exclude names {name!r}, which {type(model).__name__} does not have.")
        found = {
            name: value
            for name, value in model.named_parameters()
            if value.is_floating_point() and value.numel() and id(value) not in others
            if id(value) in layers or sum(size > 1 for size in value.shape) > 1
        }
        self.parameters = {
            name: value
            for name, value in found.items()
            if not any(name == stays or name.startswith(f"{stays}.") for stays in exclude)
        }
        if not self.parameters:
            reason = f"exclude={list(exclude)!r} leaves none of its {len(found)}" if found else "it has none"
            raise NothingToPruneError(f"{type(model).__name__} has no weight matrix or kernel to prune: {reason}.")
        self.size = sum(value.numel() for value in self.parameters.values())

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Name, place in the vector, and the parameter itself."""
        start = 0
        for name, value in self.parameters.items():
            yield name, slice(start, start + value.numel()), value
            start += value.numel()

    def read(self) -> Tensor:
        """A copy of the weights, ``(size,)``."""
        return torch.cat([value.detach().flatten() for value in self.parameters.values()])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Put ``(size,)`` numbers into the model."""
        for _, place, value in self:
            value.copy_(vector[place].view_as(value))

    def gather(self, values: Sequence[Tensor | None]) -> Tensor:
        """Tensors shaped like the parameters, in their order (None for zeros), as one vector."""
        pairs = zip(self.parameters.values(), values, strict=True)
        return torch.cat([torch.zeros_like(param).flatten() if v is None else v.flatten() for param, v in pairs])

    def require_left(self, owner: object, ratio: float, *, each: bool = False) -> None:
        """Check that something stays when ``ratio`` of the weights go.

        Args:
            owner: the transform, for messages.
            ratio: share of the weights to remove.
            each: of every parameter, not only of all together.

        Raises:
            TransformError: a ratio that would leave none.
        """
        sizes = {f" of {name}": value.numel() for name, value in self.parameters.items()} if each else {"": self.size}
        where, size = min(sizes.items(), key=lambda entry: entry[1])
        if round((1.0 - ratio) * size) < 1:
            raise TransformError(
                f"{type(owner).__name__}.ratio={ratio!r} would leave none of {size} weights{where}. The highest ratio "
                f"that leaves one is {1 - 1 / size:.{max(6, len(str(size)) + 1)}g}."
            )

    def dense(self, density: float) -> int:
        """How many weights ``density`` of all are, at least one."""
        return max(1, round(density * self.size))


def _own(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that modules of some kinds hold themselves, by their names there."""
    for module in model.modules():
        if isinstance(module, kinds):
            yield from module.named_parameters(recurse=False)


def differentiable(model: nn.Module) -> AbstractContextManager[object]:
    """Inside, gradients flow through recurrent layers in eval mode too, which cuDNN refuses them."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


def training_batches(task: Task, size: int, count: int, seed: int, device: torch.device) -> list[Batch]:
    """At most ``count`` whole batches of the training split, drawn without replacement.

    Raises:
        TransformError: fewer training items than one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    with isolated(seed):
        for batch in batches(task.data.train, size, generator=generator, drop_last=True, device=device):
            found.append(batch)
            if len(found) == count:
                break
    if not found:
        raise TransformError(
            f"Task {task.name!r} has {len(task.data.train)} training items, fewer than one batch of {size}. Lower the "
            "batch size."
        )
    return found


def loss_gradients(
    model: nn.Module, weights: FlatWeights, task: Task, parts: Sequence[Batch], told: Told | None = None
) -> Tensor:
    """The gradient of the mean loss of each batch with respect to ``weights``, ``(len(parts), weights.size)``.

    With batches of one item these are per-item gradients. The model's mode is left as it is; nothing accumulates in
    ``grad``. What belongs to one weight lies together in memory, so that the matrix is cheap to take columns from.

    Args:
        model: the model that ``weights`` belongs to.
        weights: with respect to what.
        task: whose loss.
        parts: the batches.
        told: called with the finished fraction.

    Raises:
        TransformError: a loss or gradient that is not finite.

    Cost: a forward and a backward pass for each batch, the matrix that is returned and sixteen rows of it.
    """
    start = weights.read()
    rows = start.new_empty(weights.size, len(parts)).mT
    some = start.new_empty(min(_TOGETHER, len(parts)), weights.size)
    variables = list(weights.parameters.values())
    frozen = [value for value in variables if not value.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    try:
        for position, (inputs, targets) in enumerate(parts):
            with torch.enable_grad(), differentiable(model):
                loss = task_loss(task, task.outputs(model, inputs), targets)
                gradients = torch.autograd.grad(loss, variables, allow_unused=True)
            place = position % len(some)
            some[place] = weights.gather(gradients)
            if place == len(some) - 1 or position == len(parts) - 1:
                rows[position - place : position + 1] = some[: place + 1]
            if not bool(loss.isfinite() & some[place].abs().amax().isfinite()):
                raise TransformError(
                    f"Task {task.name!r}: loss or gradients are not finite on a batch of its training data (loss "
                    f"{loss.item():.4g}). Train the model to a finite loss first."
                )
            if told is not None:
                told((position + 1) / len(parts))
    finally:
        for value in frozen:
            value.requires_grad_(False)
    return rows
