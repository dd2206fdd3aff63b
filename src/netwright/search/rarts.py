"""RARTS: two copies of the weights, one for each half of the data, that share an architecture."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright.search._relaxed_loop import Loss, Stepper, move, steady
from netwright.search._relaxed_search import GradientSearch
from netwright.search.relaxed import alphas, weights

__all__ = ["RARTS", "alpha_gradient", "weight_gradient"]


def weight_gradient(
    value: Tensor, own: Sequence[nn.Parameter], other: Sequence[nn.Parameter], scale: float, beta: float
) -> tuple[Tensor, ...]:
    r""":math:`s\, \nabla_u L(u, \alpha) + \beta (u - u')` for a copy :math:`u` of the weights and the other.

    Args:
        value: :math:`L`, the loss with its graph.
        own: :math:`u`.
        other: :math:`u'`, of the same shapes.
        scale: :math:`s`, 1 for :math:`y` and :math:`\lambda` for :math:`w`.
        beta: :math:`\beta`.
    """
    slope = torch.autograd.grad(value, own, materialize_grads=True)
    return tuple(scale * part + beta * (a.detach() - b.detach()) for part, a, b in zip(slope, own, other, strict=True))


def alpha_gradient(val_loss: Loss, train_loss: Loss, alphas: Sequence[nn.Parameter], lam: float) -> tuple[Tensor, ...]:
    r""":math:`\nabla_\alpha L_v(y, \alpha) + \lambda \nabla_\alpha L_t(w, \alpha)`.

    Args:
        val_loss: :math:`L_v` with the weights :math:`y`.
        train_loss: :math:`L_t` with the weights :math:`w`.
        alphas: :math:`\alpha`, of both.
        lam: :math:`\lambda`.
    """
    ahead = torch.autograd.grad(val_loss(), alphas, materialize_grads=True)
    behind = torch.autograd.grad(train_loss(), alphas, materialize_grads=True)
    return tuple(first + lam * second for first, second in zip(ahead, behind, strict=True))


@dataclass(frozen=True, kw_only=True)
class RARTS(GradientSearch):
    r"""A single-level search on all of the data, without second derivatives.

    Reach for it where first-order DARTS is too crude and second-order too slow. Two copies of the network, with weights
    :math:`y` and :math:`w` and one set of architecture weights :math:`\alpha`, minimize

    .. math:: L_v(y, \alpha) + \lambda L_t(w, \alpha) + \tfrac{\beta}{2} \lVert y - w \rVert^2,

    :math:`L_v` and :math:`L_t` the losses on batches of the second and the first half of the training data. Each
    iteration moves one block after the other, each along the gradient at what the others have just become:

    .. math::
        y &\leftarrow y - \gamma\, [\nabla_y L_v(y, \alpha) + \beta (y - w)], \\
        w &\leftarrow w - \gamma\, [\lambda \nabla_w L_t(w, \alpha) + \beta (w - y)], \\
        \alpha &\leftarrow \alpha - \gamma_\alpha\, [\nabla_\alpha L_v(y, \alpha)
        + \lambda \nabla_\alpha L_t(w, \alpha)].

    Steps of weights are SGD's with momentum, whose rate :math:`\gamma` falls to 0 by a half cosine; those of alphas are
    Adam's. :math:`w` is scored and derived.

    Args:
        lam: :math:`\lambda`, weight of the loss on the first half.
        beta: :math:`\beta`, how hard the copies pull at each other.
        epochs: passes over the halves.
        batch_size: of both batches.
        lr: of the weights at the start.
        momentum: of the weights.
        weight_decay: of the weights.
        clip_norm: largest norm of the gradient of either copy; None for no bound.
        alpha_lr: of the alphas.
        alpha_decay: weight decay of the alphas.

    Raises:
        SettingError: a setting out of its range.

    Example:
        >>> from netwright.core.task import load_task
        >>> from netwright.search.relaxed import Mixed
        >>> edge = Mixed({"skip": nn.Identity(), "linear": nn.Sequential(nn.Linear(30, 30), nn.ReLU())})
        >>> result = RARTS(epochs=2).search(nn.Sequential(edge, nn.Linear(30, 2)), load_task("breast-cancer"))
        >>> len(result.scores)
        2

    Source: paper 203: Xue, Qi and Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", 2020,
        arXiv 2008.03901.

    Differs: both copies start from the same weights. Steps are those of SGD with momentum and of Adam, where the
        convergence theorem is about plain ones; with ``momentum=0`` those of the weights are plain.

    Cost: four forward and backward passes an iteration (two of them for alphas alone), twice first-order DARTS and less
        than the five of second order; the weights and their momentum are held twice.
    """

    lam: float = 1.0
    beta: float = 0.1

    def _stepper(self, network: nn.Module, seed: int) -> Stepper:
        return _Splitting(self, network)


class _Splitting(Stepper):
    """The three moves of an iteration."""

    def __init__(self, settings: RARTS, network: nn.Module) -> None:
        self._settings = settings
        self._alphas = list(alphas(network).values())
        twin = copy.deepcopy(network, {id(alpha): alpha for alpha in self._alphas})  # alphas are shared
        self._w, self._y = weights(network), weights(twin)
        self.networks = (network, twin)
        self.movers = (settings._mover(network), settings._mover(twin))
        self.others = (settings._alpha_mover(network),)

    def step(self, train: Callable[[nn.Module], Loss], held: Callable[[nn.Module], Loss], epoch: int) -> float:
        """One iteration of Gauss and Seidel: y, w, alpha."""
        network, twin = self.networks
        lam = self._settings.lam
        self._pull(held(twin)(), self._y, self._w, 1.0, self.movers[1])
        value = train(network)()
        self._pull(value, self._w, self._y, lam, self.movers[0])
        with ExitStack() as stack:
            for part in self.networks:
                stack.enter_context(steady(part))
            slope = alpha_gradient(held(twin), train(network), self._alphas, lam)
        move(self._alphas, slope, self.others[0])
        return float(value.detach())

    def _pull(
        self, value: Tensor, own: list[nn.Parameter], other: list[nn.Parameter], scale: float, mover: Optimizer
    ) -> None:
        move(own, weight_gradient(value, own, other, scale, self._settings.beta), mover, self._settings.clip_norm)
