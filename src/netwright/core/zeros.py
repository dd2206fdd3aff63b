"""Zeros that stay zero while a network is trained."""

import torch
from torch import Tensor, nn

from netwright.core.errors import TransformError

__all__ = ["Zeros", "is_sparse"]

_SHARE = 0.3  # of zeros from which a matrix counts as sparse; weights that were never pruned have none


class Zeros:
    """The zeros that the weights of a model have now, and the way back to them.

    Reach for it in a training loop of your own after a transform that sets single weights to zero:
    :meth:`restore` after every step of the optimizer. :func:`netwright.core.fit.fit` does so with
    ``Recipe(keep_zeros=True)``. Whole tensors of zeros (a layer initialized so) and one-dimensional parameters are not
    held.

    Args:
        model: whose parameters are looked at.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.eye(2))
        >>> zeros = Zeros(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> zeros.restore()
        >>> layer.weight.data
        tensor([[2., 0.],
                [0., 2.]])

    Cost: a byte for each weight held, and one pass over these for each restoration.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        for name, value in model.named_parameters():
            if value.ndim > 1 and value.is_floating_point():
                gone = value.detach() == 0
                if bool(gone.any()) and not bool(gone.all()):
                    self._held[name] = value, gone

    @torch.no_grad()
    def restore(self) -> None:
        """Set the held entries to zero again, in place."""
        for value, gone in self._held.values():
            value.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Set the same entries of another model to zero, in place.

        Args:
            model: with parameters of the same names and shapes.

        Raises:
            TransformError: a parameter with zeros that it does not have, or has in another shape.
        """
        parameters = dict(model.named_parameters())
        for name, (value, gone) in self._held.items():
            found = parameters.get(name)
            if found is None or found.shape != value.shape:
                what = "is not there" if found is None else f"has shape {tuple(found.shape)}"
                raise TransformError(
                    f"The zeros of {name} {tuple(value.shape)} cannot be kept: in the trained {type(model).__name__} "
                    f"it {what}. Let fit= train the network that it is given."
                )
            found.masked_fill_(gone.to(found.device), 0.0)


def is_sparse(model: nn.Module) -> bool:
    """Whether some matrix of the model has so many zeros that they were put there.

    Example:
        >>> is_sparse(nn.Linear(4, 4))
        False
    """
    return any(
        _SHARE <= float((value.detach() == 0).double().mean()) < 1
        for value in model.parameters()
        if value.ndim > 1 and value.is_floating_point() and value.numel() > 0
    )
