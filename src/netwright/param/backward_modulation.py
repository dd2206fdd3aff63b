"""Backward error modulation: errors keep their size on the way back through a deep plain network."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.core.errors import SettingError
from netwright.param._layers import check_number, find_layers

__all__ = ["BackwardModulation"]


def _size(error: Tensor) -> Tensor:
    """The root mean square of ``error``, a scalar; in double precision, so that small errors do not vanish."""
    error = torch.view_as_real(error) if error.is_complex() else error
    wide = torch.float32 if error.device.type == "mps" else torch.float64
    length: Tensor = torch.linalg.vector_norm(error, dtype=wide)
    return length / math.sqrt(error.numel())


def _factor(size: Tensor, above: Tensor, tolerance: float) -> Tensor:
    """What brings ``size`` to ``above``; 1 where their ratio is within ``tolerance``, or one is zero or not finite."""
    ratio = above / size
    sound = ratio.isfinite() & (ratio > 0)
    return torch.where(sound & ((ratio > tolerance) | (ratio * tolerance < 1)), ratio, 1.0)


class _Pass:
    """The errors of one forward pass: the size of each layer's once it is known, and the factor it was given."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sizes: list[Tensor | None] = []
        self.factors: dict[str, Tensor] = {}

    def modulate(self, index: int, tolerance: float, error: Tensor) -> Tensor | None:
        """The error at the output of the layer called as ``index``-th, scaled to that of the next one."""
        with torch.no_grad():
            size = _size(error)
            above = next((entry for entry in self.sizes[index + 1 :] if entry is not None), None)
            if above is None:
                self.sizes[index] = size
                return None
            factor = _factor(size, above.to(size.device), tolerance)
            self.sizes[index] = size * factor
            self.factors[self.names[index]] = factor
        return error * factor


class BackwardModulation:
    r"""Rescales errors on their way back, layer by layer, so that deep plain networks can learn.

    Reach for it when a network without shortcuts is so deep that errors grow or vanish on the way back (behind batch
    normalization and ReLU they grow by about a fifth per layer), together with
    :func:`~netwright.param.orthonormal.orthonormal`. It acts on SGD; optimizers that normalize each gradient, as Adam
    does, undo it.

    With :math:`\delta_l` the derivative of the loss with respect to the output of layer :math:`l`, as it arrives, and
    :math:`\sigma(\cdot)` the root mean square of all entries, each consecutive pair of layers is held to a
    quasi-isometry:

    .. math:: \hat\delta_l = \rho_l\, \delta_l, \qquad \rho_l = \begin{cases}
              \sigma(\hat\delta_{l+1}) / \sigma(\delta_l) & \text{where that lies outside } [1/\tau, \tau] \\
              1 & \text{otherwise,} \end{cases}

    starting from the last layer, which stays as it is. Gradients of the layer's weights and all errors below come from
    :math:`\hat\delta_l`: directions stay, and each layer has a learning rate of its own. Layers are taken in the order
    of their calls; in a network that branches, errors that meet again have been scaled differently. The forward pass
    does not change, neither does evaluation mode; outputs of exported programs carry nothing. Cost: one read and one
    write of each layer's error, one scalar for each layer.

    The object is attached on construction. ``remove()``, or leaving a ``with`` block, detaches it; ``enabled`` switches
    it off for a while. A copy of the model carries a copy of it.

    Args:
        model: whose calls are watched. A layer called outside of the model's own call is not modulated.
        tolerance: :math:`\tau \ge 1`. With 1 all errors are brought to the size of the last layer's.
        steps: modulate only that many forward passes in training mode, the first; None for all. How many there were is
            kept by ``state_dict``, and by the checkpoints of ``netwright.fit``.
        include: patterns of names of linear and convolution layers to which it is confined.
        exclude: patterns of layer names to leave out.

    Raises:
        SettingError: a tolerance below 1, steps that are no positive integer, no layer, a pattern that matches none,
            or a lazy layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with BackwardModulation(model) as modulation:
        ...     model(torch.randn(8, 4)).sum().backward()
        ...     sorted(modulation.factors)
        ['0', '2']

    Source: paper 212, D. Xie, J. Xiong, S. Pu, "All You Need is Beyond a Good Init: Exploring Better Solution for
    Training Extremely Deep Convolutional Neural Networks with Orthonormality and Modulation", 2017, arXiv 1703.01827.

    Differs: only the abstract could be read (a backward error modulation based on the quasi-isometry of consecutive
    parametric layers). The formula, the band ``tolerance`` and ``steps`` are derived from that. Under batch
    normalization the root mean square is the standard deviation, since the errors that leave it have mean zero.
    """

    enabled: bool

    def __init__(
        self,
        model: nn.Module,
        *,
        tolerance: float = 1.0,
        steps: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self.tolerance = check_number("BackwardModulation", "tolerance", tolerance, low=1.0)
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise SettingError(f"BackwardModulation: steps must be a positive integer or None, got {steps!r}.")
        self.enabled = True
        self.steps = steps
        self.seen = 0
        self._pass: _Pass | None = None
        self._last: _Pass | None = None
        layers = find_layers("BackwardModulation", model, include, exclude)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, prepend=True),
            *(layer.register_forward_hook(partial(self._watch, name)) for name, layer in layers.items()),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def factors(self) -> dict[str, float]:
        """The factor of each layer in the last backward pass; of its first call where it was called twice."""
        return {} if self._last is None else {name: float(value) for name, value in self._last.factors.items()}

    def remove(self) -> None:
        """Detach from the model. Backward passes of graphs that exist already are still modulated."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, int]:
        """The forward passes that were modulated, so that a resumed training ends modulation where it would have."""
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.seen = int(state_dict["seen"])

    def __enter__(self) -> "BackwardModulation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _begin(self, model: nn.Module, args: Any) -> None:
        wanted = self.enabled and model.training and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if wanted and (self.steps is None or self.seen < self.steps):
            self._pass = self._last = _Pass()
            self.seen += 1

    def _watch(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        now = self._pass
        if now is not None and isinstance(output, Tensor) and output.requires_grad:
            now.names.append(name)
            now.sizes.append(None)
            watched: Any = output
            watched.register_hook(partial(now.modulate, len(now.sizes) - 1, self.tolerance))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._pass = None
