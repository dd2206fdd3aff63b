"""Geometric parameterization: the weights of a neuron as a radius and hyperspherical angles."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.core.errors import SettingError
from netwright.param._layers import check_number, find_layers, free_weight, from_rows, row_groups, to_rows

__all__ = ["GeometricParameterization", "InputMeanNorm", "geometric_parameterization"]

_OWNER = "geometric_parameterization"


def _direction(angles: Tensor) -> Tensor:
    """Unit rows ``(m, n)`` at hyperspherical ``angles`` ``(m, n - 1)``.

    Entry ``i`` is ``cos(angle_i)`` times the sines of all angles before it, the last entry the product of all sines.
    """
    if angles.shape[1] == 0:
        return angles.new_ones(len(angles), 1)
    cosines = angles.cos()
    sines = angles.sin().cumprod(1)
    return torch.cat([cosines[:, :1], sines[:, :-1] * cosines[:, 1:], sines[:, -1:]], 1)


def _coordinates(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Radius ``(m,)`` and angles ``(m, n - 1)`` of ``rows`` ``(m, n)``: all angles in [0, pi], the last in [-pi, pi].

    Each angle is an arc tangent of an entry and the length of all after it, exact also where one of them vanishes.
    Lengths are summed in double precision from the last entry on, relative to the largest of the row.
    """
    if rows.shape[1] == 1:
        return rows[:, 0].clone(), rows[:, :0].clone()
    largest = rows.double().abs().amax(1, keepdim=True)
    scaled = rows.double() / torch.where(largest > 0, largest, 1.0)
    tails = scaled.square().flip(1).cumsum(1).flip(1).sqrt()
    angles = torch.cat([torch.atan2(tails[:, 1:-1], scaled[:, :-2]), torch.atan2(scaled[:, -1:], scaled[:, -2:-1])], 1)
    return (largest * tails[:, :1])[:, 0].to(rows.dtype), angles.to(rows.dtype)


class GeometricParameterization(nn.Module):
    r"""The parametrization ``weight = radius * direction(angles)``, for ``register_parametrization``.

    ``original0`` is the radius ``(outputs,)``, ``original1`` the angles ``(outputs, inputs * kernel - 1)``. See
    :func:`geometric_parameterization`, which converts whole models and biases too.

    Args:
        shape: of the weight.
        groups: of a transposed convolution, whose weight counts inputs first; 0 for all other layers.

    Example:
        >>> part = GeometricParameterization((1, 3))
        >>> radius, angles = part.right_inverse(torch.tensor([[0.0, 0.0, 2.0]]))
        >>> radius, angles
        (tensor([2.]), tensor([[1.5708, 1.5708]]))
    """

    def __init__(self, shape: Sequence[int], groups: int = 0) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.groups = groups

    def forward(self, radius: Tensor, angles: Tensor) -> Tensor:
        """The weight."""
        return from_rows(radius[:, None] * _direction(angles), self.shape, self.groups)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Radius and angles of a weight."""
        return _coordinates(to_rows(weight, self.groups))


class _Offset(nn.Module):
    """A bias as radius times offset; the radius stays with the layer's weight."""

    def __init__(self, weight: nn.Module) -> None:
        super().__init__()
        self.weight = (weight,)  # a tuple: held, but not registered a second time

    def _radius(self) -> Tensor:
        radius = self.weight[0].original0
        assert isinstance(radius, Tensor)
        return radius

    def forward(self, offset: Tensor) -> Tensor:
        return self._radius() * offset

    def right_inverse(self, bias: Tensor) -> Tensor:
        return _offsets(self._radius(), bias)


def _offsets(radius: Tensor, bias: Tensor) -> Tensor:
    """``bias / radius``, zero where both are.

    Raises:
        SettingError: a bias that no multiple of the radius reaches.
    """
    offset = torch.where(bias == 0, 0.0, bias / torch.where(bias == 0, 1.0, radius))
    lost = ((radius * offset - bias).abs() > 1e-3 * bias.abs()) | ~offset.isfinite()
    if bool(lost.any()):
        rows = ", ".join(map(str, lost.nonzero()[:5, 0].tolist()))
        raise SettingError(
            f"{_OWNER}: the weights of units {rows} are zero while their biases are not, so their boundaries lie at "
            "infinity. Pass scale_bias=False, or leave the layer out with exclude."
        )
    return offset


def geometric_parameterization(
    module: nn.Module,
    *,
    scale_bias: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    r"""Rewrite the weights of a layer, or of all linear and convolution layers of a model, in spherical coordinates.

    Reach for it where ReLU networks without batch normalization train unsteadily, or to use larger learning rates: a
    step of the optimizer can turn a unit's boundary only as far as its angles move, however short its weight vector is.

    A unit with weights :math:`w \in \mathbb R^n` and bias :math:`b` is written with radius :math:`r`, angles
    :math:`\theta_1, \dots, \theta_{n-1}` and offset :math:`\lambda` as

    .. math:: w = r\, u(\theta), \quad b = r \lambda, \qquad
              u_i = \cos\theta_i \prod_{j < i} \sin\theta_j \ (i < n), \quad u_n = \prod_{j < n} \sin\theta_j.

    It switches on across the hyperplane :math:`u(\theta)^\top x + \lambda = 0`, whose place :math:`-\lambda u` does
    not depend on the radius. For every change :math:`\varepsilon` of the angles

    .. math:: \arccos \langle u(\theta), u(\theta + \varepsilon) \rangle \le \lVert \varepsilon \rVert_2,

    while the same change of :math:`w`, or of the vector that weight normalization normalizes, can turn a short vector
    by any angle. The model computes the same function after the change, up to rounding.

    Trained are ``parametrizations.weight.original0`` (radii), ``original1`` (angles) and
    ``parametrizations.bias.original`` (offsets): make the optimizer afterwards, and keep angles and offsets out of
    weight decay. ``torch.nn.utils.parametrize.remove_parametrizations`` folds them back. Cost: one parameter for each
    weight plus none; a sine, a cosine and a cumulative product of each weight in every forward pass, and about five
    times the weights' memory while the graph lives; nothing per item of the batch.

    Args:
        module: a layer, or a model whose linear and convolution layers are all converted. Changed in place.
        scale_bias: also write biases as :math:`r \lambda`; otherwise they stay as they are.
        include: for a model, patterns of layer names to which it is confined.
        exclude: for a model, patterns of layer names to leave out. The paper leaves out the output layer.

    Returns:
        The module.

    Raises:
        SettingError: no layer, a pattern that matches none, a lazy layer, a weight that modules share or that is
            parametrized already, one without values, in half precision or complex, or a bias at a unit without weights.
            Nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(5, 4)
        >>> before = model(x)
        >>> _ = geometric_parameterization(model, exclude=["2"])
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
        >>> [tuple(value.shape) for value in model[0].parameters()]
        [(8,), (8, 3), (8,)]

    Source: paper 196, W. Chen, H. Ge, "ReLU Characteristic Activation Analysis" (also "Neural Characteristic Activation
    Analysis and Geometric Parameterization for ReLU Networks"), 2024, arXiv 2305.15912.

    Differs: the radius multiplies before the ReLU, so that a converted layer is an ordinary one; the paper has it
    after. While the radius is positive that is the same; where it changes its sign, the boundary stays in both, and
    here the active side changes, there the sign of the output. With one input the radius carries the sign, where the
    paper keeps a fixed sign beside it. The paper subtracts the batch mean from what enters every layer but the first:
    place :class:`InputMeanNorm` there yourself, since it changes the function. Initialization is that of the layers.
    """
    layers = find_layers(_OWNER, module, include, exclude)
    for where, layer in layers.items():
        weight = free_weight(_OWNER, module, layer, where, "weight")
        label = f"{where}.weight" if where else "weight"
        if weight.dtype not in (torch.float32, torch.float64):
            raise SettingError(
                f"{_OWNER}: {label} is of {weight.dtype}, and angles need float32. Convert the model, and train in "
                "lower precision by autocast."
            )
        if weight.is_meta:
            raise SettingError(f"{_OWNER}: {label} is on the meta device and has no values. Load them first.")
        bias = layer._parameters.get("bias")
        if scale_bias and bias is not None:
            _offsets(_coordinates(to_rows(weight.detach(), row_groups(layer)))[0], bias.detach())
        elif scale_bias and layer.bias is not None:
            raise SettingError(
                f"{_OWNER}: the bias of layer {where!r} is no plain parameter. Undo what computes it, or pass "
                "scale_bias=False."
            )
    for layer in layers.values():
        assert isinstance(layer.weight, Tensor)
        part = GeometricParameterization(layer.weight.shape, row_groups(layer))
        parametrize.register_parametrization(layer, "weight", part)
        if scale_bias and layer.bias is not None:
            held = layer.parametrizations
            assert isinstance(held, nn.ModuleDict)
            parametrize.register_parametrization(layer, "bias", _Offset(held["weight"]))
    return module


class InputMeanNorm(nn.Module):
    r"""Subtracts from each channel its mean: that of the batch in training, a running average in evaluation.

    Goes before a geometrically parameterized layer whose inputs are rectified, so that its boundaries pass through
    the data. Input and output ``(batch, channels, ...)``. No trainable parameters, one running mean per channel.

    Args:
        channels: number of channels.
        momentum: share of the newest batch in the running mean, in (0, 1].

    Raises:
        SettingError: a setting outside its range.

    Example:
        >>> norm = InputMeanNorm(2)
        >>> norm(torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
        tensor([[-1., -1.],
                [ 1.,  1.]])

    Source: paper 196, see :func:`geometric_parameterization`.
    """

    running_mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.01) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise SettingError(f"InputMeanNorm: channels must be a positive integer, got {channels!r}.")
        self.momentum = check_number("InputMeanNorm", "momentum", momentum, above=True)
        if self.momentum > 1:
            raise SettingError(f"InputMeanNorm: momentum must be at most 1, got {momentum!r}.")
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` without its mean."""
        mean = self.running_mean
        if self.training:
            mean = x.mean([axis for axis in range(x.dim()) if axis != 1])
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        return x - mean.view(-1, *[1] * (x.dim() - 2))
