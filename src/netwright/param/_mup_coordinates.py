"""The coordinate check: how the size of features changes with width while a network trains."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from netwright.core.errors import SettingError

__all__ = ["CoordinateCheck", "coordinate_check"]


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of features over width.

    Args:
        widths: the widths, ``(w,)``.
        names: the modules whose outputs were looked at, ``m`` of them.
        sizes: root mean square of each output before step ``t``, mean over seeds, ``(t + 1, w, m)``.
        changes: root mean square of its change since the start, ``(t + 1, w, m)``; zero at first.
    """

    widths: NDArray[np.float64]
    names: tuple[str, ...]
    sizes: NDArray[np.float64]
    changes: NDArray[np.float64]

    @property
    def slopes(self) -> NDArray[np.float64]:
        """Exponent of the changes in the width after each step, ``(t, m)``: near 0 where features learn alike."""
        return _exponents(self.widths, self.changes[1:])

    @property
    def size_slopes(self) -> NDArray[np.float64]:
        """Exponent of the sizes in the width, ``(t + 1, m)``; -1/2 is right for the outputs before the first step."""
        return _exponents(self.widths, self.sizes)


def coordinate_check(
    build: Callable[[int], tuple[nn.Module, Optimizer]],
    widths: Sequence[int],
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
    *,
    steps: int = 3,
    seeds: int = 3,
) -> CoordinateCheck:
    """Train networks of several widths for a few steps on one batch, and see how much their features move.

    Reach for it before trusting settings across widths: in the maximal update parameterization all ``slopes`` are near
    0; a positive one is a layer that blows up with width, a negative one a layer that stops to learn.

    Args:
        build: ``build(width)`` makes a model and its optimizer; called with the random state of each seed.
        widths: at least two.
        inputs: one batch.
        targets: its targets.
        loss: ``loss(outputs, targets)``.
        steps: optimizer steps.
        seeds: networks per width whose sizes are averaged.

    Returns:
        Sizes and changes of the output of every module without children that gives a floating-point tensor.

    Raises:
        SettingError: fewer than two widths, or no steps or seeds.

    Example:
        >>> from netwright.param.mup import mup
        >>> def network(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 2))
        >>> def build(width):
        ...     model = network(width)
        ...     return model, torch.optim.SGD(mup(model, network(32), optimizer="sgd", lr=0.1))
        >>> data = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
        >>> found = coordinate_check(build, [32, 128, 512], *data)
        >>> bool(abs(found.slopes).max() < 0.3)
        True

    Cost: ``len(widths) * seeds * (steps + 1)`` forward passes and as many steps less one.
    """
    if len(set(widths)) < 2 or steps < 1 or seeds < 1:
        raise SettingError(
            f"coordinate_check needs two widths or more, a step and a seed, got widths={list(widths)}, steps={steps}, "
            f"seeds={seeds}."
        )
    names: tuple[str, ...] = ()
    sizes, changes = [], []
    for width in widths:
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                model, optimizer = build(width)
                names, outputs = _outputs(model, optimizer, inputs, targets, loss, steps)
            sizes.append([[_size(entry) for entry in step] for step in outputs])
            changes.append([[_size(b - a) for a, b in zip(outputs[0], step, strict=True)] for step in outputs])
    shape = len(widths), seeds, steps + 1, len(names)
    means = [np.asarray(entry, dtype=np.float64).reshape(shape).mean(1).swapaxes(0, 1) for entry in (sizes, changes)]
    return CoordinateCheck(np.asarray(widths, dtype=np.float64), names, means[0], means[1])


def _outputs(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    steps: int,
) -> tuple[tuple[str, ...], list[list[Tensor]]]:
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                heard[name] = output.detach().double().clone()

        return hook

    handles: list[RemovableHandle] = [
        module.register_forward_hook(listen(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    found = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        found.append(list(heard.values()))
        if step < steps:
            torch.autograd.backward(value)
            optimizer.step()
    for handle in handles:
        handle.remove()
    return tuple(heard), found


def _size(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.square().mean()))


def _exponents(widths: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes of straight lines through ``log(sizes)`` over ``log(widths)``, along the middle dimension."""
    x = np.log(widths)
    y = np.log(np.maximum(sizes, np.finfo(np.float64).tiny))
    centred = x - x.mean()
    return np.asarray(np.einsum("w,twm->tm", centred, y) / (centred**2).sum())
