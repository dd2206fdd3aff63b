"""What layers read and give on calibration data: patches that weights meet, first and second moments."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.core.data import Dataset, Inputs, batches, call, to_device
from netwright.core.errors import TransformError
from netwright.core.graph.inference import inference
from netwright.core.outputs import take_items

__all__ = ["Moments", "calibration", "check_finite", "output_moments", "patches"]

_BATCH = 32
_CHUNK = 1 << 22  # elements of patches at a time


class Moments:
    """Sums over rows of the rows themselves and of their outer products, in float64.

    Args:
        width: length of a row.
        device: where the sums are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take ``(n, width)`` rows in."""
        size = max(1, _CHUNK // max(rows.shape[1], 1))
        for start in range(0, len(rows), size):
            exact = rows[start : start + size].double()
            self.count += len(exact)
            self.first += exact.sum(0)
            self.second += exact.t() @ exact

    @property
    def mean(self) -> Tensor:
        """``(width,)``."""
        return self.first / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """``(width, width)``."""
        mean = self.mean
        return self.second / max(self.count, 1) - torch.outer(mean, mean)


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    mode: str = "constant",
) -> Tensor:
    """What each output position of a convolution reads: ``(positions, channels * kernel)``, ordered as weights are.

    Args:
        x: ``(b, c, ...)`` with one or two spatial dimensions.
        kernel: extents of the kernel.
        stride: distance between positions.
        padding: on both sides of each dimension, "same" or "valid".
        dilation: distance between entries of the kernel.
        mode: what is padded, as ``functional.pad`` takes it.
    """
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    if padding == "valid":
        padding = (0, 0)
    sides = []
    for position in (1, 0):
        if isinstance(padding, str):
            total = dilation[position] * (kernel[position] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [padding[position]] * 2
    if any(sides):
        x = functional.pad(x, sides, mode=mode)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1)


def calibration(data: Dataset, items: int, seed: int, device: torch.device) -> Iterator[Inputs]:
    """``items`` inputs of ``data``, or all of fewer, drawn without replacement, in batches."""
    left = items
    for inputs, targets in batches(data, min(_BATCH, items), generator=torch.Generator().manual_seed(seed)):
        yield to_device(inputs if left >= len(targets) else take_items(inputs, torch.arange(left)), device)
        left -= len(targets)
        if left <= 0:
            return


def output_moments(
    owner: object, model: nn.Module, layers: Mapping[str, nn.Module], data: Dataset, items: int, seed: int
) -> dict[str, Moments]:
    """The moments of what each layer gives on calibration data, the model in eval mode.

    Args:
        owner: the transform, for messages.
        model: holds the layers.
        layers: linear layers and convolutions, by name.
        data: where the inputs are drawn from.
        items: how many.
        seed: which.

    Raises:
        TransformError: activations that are not finite.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    found: dict[str, Moments] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            channel = -1 if isinstance(module, nn.Linear) else 1 - module.get_parameter("weight").ndim
            rows = output.movedim(channel, -1).flatten(0, -2)
            found.setdefault(name, Moments(rows.shape[1], rows.device)).add(rows)

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in layers.items()]
    try:
        with inference(model):
            for inputs in calibration(data, items, seed, device):
                call(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    for name, sums in found.items():
        check_finite(owner, name, sums)
    return found


def check_finite(owner: object, name: str, sums: Moments) -> None:
    """Refuse activations that are not finite.

    Raises:
        TransformError: moments that are not finite.
    """
    if not bool(sums.second.isfinite().all()):
        raise TransformError(
            f"{type(owner).__name__}: activations at {name or 'the model'} are not finite on training data. Check the "
            "data, or train the model again."
        )
