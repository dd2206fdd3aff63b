"""DARTS: architecture weights by gradient, first order and through one step of the network's own training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.core.errors import SettingError
from netwright.search._relaxed_loop import Loss, Stepper, descend, move, steady
from netwright.search._relaxed_search import GradientSearch
from netwright.search.relaxed import alphas, weights

__all__ = ["DARTS", "first_order", "hessian_product", "mixed_product", "second_order"]

_RADIUS = 0.01  # length by which a finite difference shifts the weights


def first_order(val_loss: Loss, alphas: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    r"""The gradient :math:`\nabla_\alpha L_v(w, \alpha)` at the weights as they are.

    Args:
        val_loss: :math:`L_v`, computed from the parameters' values at each call.
        alphas: of any shapes.

    Returns:
        One gradient of the same shape for each; zeros where the loss does not depend on it.
    """
    return torch.autograd.grad(val_loss(), alphas, materialize_grads=True)


def second_order(
    train_loss: Loss,
    val_loss: Loss,
    weights: Sequence[nn.Parameter],
    alphas: Sequence[nn.Parameter],
    rate: float,
    *,
    exact: bool = False,
) -> tuple[Tensor, ...]:
    r"""The gradient of the validation loss after one step of training.

    With :math:`w' = w - \xi \nabla_w L_t(w, \alpha)`,

    .. math:: \nabla_\alpha L_v(w', \alpha)
        - \xi\, \nabla^2_{\alpha, w} L_t(w, \alpha)\, \nabla_{w'} L_v(w', \alpha).

    Args:
        train_loss: :math:`L_t`.
        val_loss: :math:`L_v`.
        weights: :math:`w`; shifted meanwhile, and put back to the last bit.
        alphas: :math:`\alpha`.
        rate: :math:`\xi`; with 0 it is :func:`first_order`.
        exact: differentiate twice, rather than by finite differences.

    Example:
        >>> w, a = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (3.0, 1.0))
        >>> slope = second_order(lambda: ((w - a) ** 2).sum() / 2, lambda: (w**2).sum() / 2, [w], [a], 0.5)
        >>> round(float(slope[0]), 6)  # w' = w - (w - a) / 2 = 2, so d(w'^2 / 2)/da = w' / 2
        1.0
    """
    slope = torch.autograd.grad(train_loss(), weights, materialize_grads=True)
    with _shifted(weights, slope, -rate):
        after = torch.autograd.grad(val_loss(), [*alphas, *weights], materialize_grads=True)
    direct, vector = after[: len(alphas)], after[len(alphas) :]
    indirect = mixed_product(train_loss, weights, alphas, vector, exact=exact)
    return tuple(first - rate * second for first, second in zip(direct, indirect, strict=True))


def mixed_product(
    train_loss: Loss,
    weights: Sequence[nn.Parameter],
    alphas: Sequence[nn.Parameter],
    vector: Sequence[Tensor],
    *,
    exact: bool = False,
) -> tuple[Tensor, ...]:
    r""":math:`\nabla^2_{\alpha, w} L_t\, v`, shaped like the alphas.

    By a second derivative, or by :math:`[\nabla_\alpha L_t(w + \epsilon v) - \nabla_\alpha L_t(w - \epsilon v)] /
    2 \epsilon` with :math:`\epsilon = 0.01 / \lVert v \rVert`, whose error is of order :math:`\epsilon^2`.
    """
    return _product(train_loss, weights, alphas, vector, exact)


def hessian_product(
    train_loss: Loss, weights: Sequence[nn.Parameter], vector: Sequence[Tensor], *, exact: bool = False
) -> tuple[Tensor, ...]:
    r""":math:`\nabla^2_{w, w} L_t\, v`, shaped like the weights; see :func:`mixed_product`."""
    return _product(train_loss, weights, weights, vector, exact)


def _product(
    loss: Loss,
    weights: Sequence[nn.Parameter],
    variables: Sequence[nn.Parameter],
    vector: Sequence[Tensor],
    exact: bool,
) -> tuple[Tensor, ...]:
    """Derivative by ``variables`` of the slope of ``loss`` along ``vector``."""
    if exact:
        slope = torch.autograd.grad(loss(), weights, create_graph=True, materialize_grads=True)
        along = torch.stack([(a * b).sum() for a, b in zip(slope, vector, strict=True)]).sum()
        if not along.requires_grad:  # linear in all of them
            return tuple(map(torch.zeros_like, variables))
        return torch.autograd.grad(along, variables, materialize_grads=True)
    length = float(torch.stack([part.square().sum() for part in vector]).sum().sqrt())
    if length == 0:
        return tuple(map(torch.zeros_like, variables))
    ends = []
    for shift in (_RADIUS / length, -_RADIUS / length):
        with _shifted(weights, vector, shift):
            ends.append(torch.autograd.grad(loss(), variables, materialize_grads=True))
    return tuple((ahead - back) * (length / (2 * _RADIUS)) for ahead, back in zip(*ends, strict=True))


@contextmanager
def _shifted(weights: Sequence[nn.Parameter], vector: Sequence[Tensor], length: float) -> Iterator[None]:
    """Inside, the weights are moved by ``length`` times ``vector``."""
    before = [part.detach().clone() for part in weights]
    try:
        with torch.no_grad():
            for part, step in zip(weights, vector, strict=True):
                part.add_(step, alpha=length)
        yield
    finally:
        with torch.no_grad():
            for part, value in zip(weights, before, strict=True):
                part.copy_(value)


@dataclass(frozen=True, kw_only=True)
class DARTS(GradientSearch):
    r"""Architecture weights and network weights in turn, each by the gradient of a loss on its half of the data.

    The plain differentiable search, and the baseline of its relatives: cheap, and known to collapse to identities when
    it runs long (:class:`~netwright.search.amended_darts.AmendedDARTS` holds out longer). Each iteration

    1. moves :math:`\alpha` by Adam along :func:`first_order` or :func:`second_order`, :math:`L_v` the loss on a batch
       of the second half of the training data and :math:`\xi` the current learning rate;
    2. moves :math:`w` by SGD with momentum down :math:`\nabla_w L_t`, the loss on a batch of the first half; its
       learning rate falls to 0 by a half cosine.

    Args:
        order: 1 takes the weights as constants, 2 looks one step of training ahead.
        exact: with order 2, differentiate twice rather than by finite differences.
        epochs: passes over the halves.
        batch_size: of both batches.
        lr: of the weights at the start.
        momentum: of the weights.
        weight_decay: of the weights.
        clip_norm: largest norm of the weights' gradient; None for no bound.
        alpha_lr: of the alphas.
        alpha_decay: weight decay of the alphas.

    Raises:
        SettingError: a setting out of its range.

    Example:
        >>> from netwright.core.task import load_task
        >>> from netwright.search.relaxed import Mixed
        >>> task = load_task("breast-cancer")
        >>> edge = Mixed({"skip": nn.Identity(), "linear": nn.Sequential(nn.Linear(30, 30), nn.ReLU())})
        >>> result = DARTS(epochs=2).search(nn.Sequential(edge, nn.Linear(30, 2)), task)
        >>> sorted(result.choices), tuple(result.alphas["0"].shape)
        (['0'], (3, 2))

    Source: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv 1806.09055.

    Differs: the step that order 2 looks ahead is the plain gradient step of the equation, without momentum and decay.
        Running statistics are those of the weights' steps alone. "none" can be chosen. Alphas start at 0.

    Cost: order 1 takes two forward and backward passes an iteration, order 2 five; memory is that of all operations
        together, with ``exact`` about twice as much.
    """

    order: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise SettingError(f"DARTS: order must be 1 or 2, got {self.order!r}.")

    def _stepper(self, network: nn.Module, seed: int) -> Stepper:
        return Alternating(self, network, self._gradient)

    def _gradient(
        self, train: Loss, held: Loss, weights: list[nn.Parameter], alphas: list[nn.Parameter], rate: float
    ) -> tuple[Tensor, ...]:
        if self.order == 1:
            return first_order(held, alphas)
        return second_order(train, held, weights, alphas, rate, exact=self.exact)


Gradient = Callable[[Loss, Loss, list[nn.Parameter], list[nn.Parameter], float], tuple[Tensor, ...]]


class Alternating(Stepper):
    """A step of the alphas along a gradient that is given, then one of the weights."""

    def __init__(self, settings: GradientSearch, network: nn.Module, gradient: Gradient) -> None:
        self._gradient, self._clip = gradient, settings.clip_norm
        self._alphas, self._weights = list(alphas(network).values()), weights(network)
        self.networks = (network,)
        self.movers = (settings._mover(network),)
        self.others = (settings._alpha_mover(network),)

    def step(self, train: Callable[[nn.Module], Loss], held: Callable[[nn.Module], Loss], epoch: int) -> float:
        """One iteration."""
        network, rate = self.networks[0], float(self.movers[0].param_groups[0]["lr"])
        with steady(network):
            slope = self._gradient(train(network), held(network), self._weights, self._alphas, rate)
        move(self._alphas, slope, self.others[0])
        return descend(train(network), self._weights, self.movers[0], self._clip)
