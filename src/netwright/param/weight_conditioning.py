"""Weight conditioning: layers compute with weights whose rows have one length."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.core.errors import SettingError
from netwright.param._layers import check_number, find_layers, free_weight, from_rows, row_groups, to_rows

__all__ = ["WeightConditioning", "weight_conditioning"]

_OWNER = "weight_conditioning"


def _equilibrate(rows: Tensor, scale: float) -> Tensor:
    """``scale * rows_i / ||rows_i||``; a row of zeros (or one too small to divide by) stays as it is."""
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    usable = length > torch.finfo(length.dtype).tiny
    return (wide * torch.where(usable, scale / torch.where(usable, length, 1.0), 1.0)).to(rows.dtype)


class WeightConditioning(nn.Module):
    """The parametrization behind :func:`weight_conditioning`, for ``register_parametrization``.

    Args:
        scale: length of the rows.
        groups: of a transposed convolution, whose weight counts inputs first; 0 for all other layers.
    """

    def __init__(self, scale: float = 1.0, groups: int = 0) -> None:
        super().__init__()
        self.scale = check_number("WeightConditioning", "scale", scale, above=True)
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        """The conditioned weight, of the same shape."""
        return from_rows(_equilibrate(to_rows(weight, self.groups), self.scale), weight.shape, self.groups)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``weight`` itself: what is assigned is kept, and conditioned when it is read."""
        return weight


def weight_conditioning(
    module: nn.Module,
    name: str = "weight",
    *,
    scale: float = 1.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    r"""Make a layer, or all linear and convolution layers of a model, compute with row-equilibrated weights.

    Reach for it where plain or weight-normalized networks train slowly because their layers are badly conditioned:
    networks without normalization layers, coordinate networks, transformers. Before a normalization layer it changes
    only the speed of learning, since the scale of a row is divided out there anyway.

    Each weight is unfolded to a matrix :math:`W` with one row :math:`W_i` for each output unit (a convolution's to
    ``(outputs, inputs * kernel)``), and the layer uses

    .. math:: \hat W = s P W, \qquad P = \operatorname{diag}\big(1 / \lVert W_1 \rVert_2, \dots,
              1 / \lVert W_m \rVert_2\big),

    with :math:`s` the ``scale``. Among diagonal :math:`P`, equal rows bring the condition number
    :math:`\sigma_{\max} / \sigma_{\min}` within a factor :math:`\sqrt m` of its least value. Gradients flow through
    :math:`P`: that of :math:`W_i` is orthogonal to :math:`W_i`. A row of zeros stays zero and gets the plain gradient.

    The trained parameter is :math:`W`, under ``module.parametrizations.weight.original``; reading ``module.weight``
    gives :math:`\hat W`. The function that the model computes changes when a layer is conditioned, so do it before
    training. ``torch.nn.utils.parametrize.remove_parametrizations(module, "weight")`` folds :math:`\hat W` back into
    an ordinary parameter. Cost: one pass over the weights per forward and two per backward, and a copy of them;
    nothing per item of the batch.

    Args:
        module: a layer, or a model whose linear and convolution layers are all conditioned. Changed in place.
        name: the parameter, of two or more dimensions.
        scale: length of each row. One by default; :math:`\sqrt 2` keeps the size of activations before a ReLU that
            no normalization precedes.
        include: for a model, patterns of layer names to which it is confined.
        exclude: for a model, patterns of layer names to leave out, such as ``("head",)``.

    Returns:
        The module. Parameters stay the same objects: an optimizer that has them goes on.

    Raises:
        SettingError: no layer, a pattern that matches none, a lazy layer, a weight that modules share, one with fewer
            than two dimensions, or one that is conditioned already. Nothing is changed then.

    Example:
        >>> layer = weight_conditioning(nn.Linear(3, 2))
        >>> layer.weight.norm(dim=1).allclose(torch.ones(2))
        True
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = weight_conditioning(model, exclude=["2"])
        >>> parametrize.is_parametrized(model[0]), parametrize.is_parametrized(model[2])
        (True, False)

    Source: paper 78, H. Saratchandran, T. X. Wang, S. Lucey, "Weight Conditioning for Smooth Optimization of Neural
    Networks", 2024, arXiv 2409.03424.

    Differs: only the abstract could be read. The Euclidean norm of rows is the classical row equilibration; that
    gradients flow through the norms, that all layers take part, and ``scale`` are our choices.
    """
    check_number(_OWNER, "scale", scale, above=True)
    if isinstance(module, nn.Module) and _owns(module, name):
        layers = {"": module}
    else:
        layers = find_layers(_OWNER, module, include, exclude)
    for where, layer in layers.items():
        if not parametrize.is_parametrized(layer, name):
            free_weight(_OWNER, module, layer, where, name)
        elif any(isinstance(part, WeightConditioning) for part in _chain(layer, name)):
            label = f"{where}.{name}" if where else name
            raise SettingError(f"{_OWNER}: {label} is conditioned already. Leave the layer out with exclude.")
    for layer in layers.values():
        parametrize.register_parametrization(layer, name, WeightConditioning(scale, row_groups(layer)))
    return module


def _owns(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is a tensor of the module itself, and of nothing below it."""
    below = (part for part in module.modules() if part is not module)
    return isinstance(getattr(module, name, None), Tensor) and not any(hasattr(part, name) for part in below)


def _chain(layer: nn.Module, name: str) -> list[nn.Module]:
    held = layer.parametrizations
    assert isinstance(held, nn.ModuleDict)
    chain = held[name]
    assert isinstance(chain, nn.ModuleList)
    return list(chain)
